# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Random resized crops with antialiasing, for a whole batch on its device."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation: TypeAlias = Literal['bilinear', 'bicubic']


def random_boxes(
    image: Tensor, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """Draw the box of a random resized crop for each image of a batch.

    The same distribution as torchvision's ``RandomResizedCrop``: area uniform in
    *scale*, aspect ratio log-uniform in *ratio*, the first of ten draws that fits, and
    a large central box if none does.

    Args:
        image: Images of shape (B, C, H, W).
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height.

    Returns:
        Left, top, right and bottom in pixels, the last two excluded, shape (B, 4),
        int64.
    """
    draws, device = (len(image), 10), image.device
    height, width = image.shape[-2:]
    area = torch.empty(draws, device=device).uniform_(*scale) * (height * width)
    log_ratio = torch.empty(draws, device=device).uniform_(*map(math.log, ratio))
    aspect = log_ratio.exp()
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()]).round_()

    fits = (size[0] >= 1) & (size[0] <= width) & (size[1] >= 1) & (size[1] <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    width_, height_ = (s.gather(1, first)[:, 0] for s in size)
    left, top = torch.rand(2, len(image), device=device)

    # No draw fits: the largest central box of an allowed ratio
    found = fits.any(1)
    central = min(width, height * max(ratio)), min(height, width / min(ratio))
    width_ = torch.where(found, width_, round(central[0]))
    height_ = torch.where(found, height_, round(central[1]))
    left = torch.where(found, left, 0.5)
    top = torch.where(found, top, 0.5)

    # Whole pixels, all of them equally likely; at the centre rounded down
    x = (left * (width - width_ + found)).floor_()
    y = (top * (height - height_ + found)).floor_()
    return torch.stack([x, y, x + width_, y + height_], 1).long()


def resample(
    image: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    flips: Tensor | None = None,
    interpolation: Interpolation = 'bilinear',
) -> Tensor:
    """Resize a box of each image to one size, antialiased.

    Equal to torchvision's ``resized_crop(..., antialias=True)`` for each image, then
    flips.

    Args:
        image: Images of shape (B, C, H, W), float32.
        boxes: Boxes in pixels as of :func:`random_boxes`, shape (B, 4).
        size: Height and width of the crops in pixels.
        flips: Whether to mirror left and right, and top and bottom, shape (2, B), bool.
        interpolation: Kernel of the interpolation.

    Returns:
        Crops of shape (B, C, h, w).
    """
    if flips is None:
        flips = torch.zeros(2, len(image), dtype=torch.bool, device=image.device)
    if image.device.type != 'cpu':
        # Two products with a matrix per sample: nothing waits for the boxes
        x = weights(boxes[:, ::2], image.shape[-1], size[1], flips[0], interpolation)
        y = weights(boxes[:, 1::2], image.shape[-2], size[0], flips[1], interpolation)
        return y[:, None] @ (image @ x.mT[:, None])

    crops = image.new_empty(*image.shape[:2], *size)
    parameters = zip(boxes.tolist(), flips.T.tolist(), strict=True)
    for i, ((left, top, right, bottom), mirrored) in enumerate(parameters):
        box = image[i : i + 1, :, top:bottom, left:right]
        # Antialiasing changes nothing where bilinear resampling magnifies, but is slower
        shrinks = bottom - top > size[0] or right - left > size[1]
        antialias = shrinks or interpolation != 'bilinear'
        crop = F.interpolate(box, size, mode=interpolation, antialias=antialias)
        dims = [dim for dim, mirror in zip((-1, -2), mirrored, strict=True) if mirror]
        crops[i] = crop[0].flip(dims) if dims else crop[0]
    return crops


def weights(
    spans: Tensor, pixels: int, size: int, flip: Tensor, interpolation: Interpolation
) -> Tensor:
    """Weights of antialiased resizing along one axis, as in PyTorch and Pillow.

    Args:
        spans: First pixel, and the one after the last, of each sample, shape (B, 2).
        pixels: Number of pixels N of the image.
        size: Number of pixels n of the crop.
        flip: Whether to mirror the crop, shape (B,), bool.
        interpolation: Kernel of the interpolation.

    Returns:
        Matrices of shape (B, n, N), float32. Rows sum to 1.
    """
    start, stop = (s.view(-1, 1, 1) for s in spans.unbind(1))
    source = torch.arange(pixels, device=spans.device)
    target = torch.arange(size, device=spans.device)[:, None]
    target = torch.where(flip.view(-1, 1, 1), size - 1 - target, target)

    step = (stop - start) / size
    centre = start + (target + 0.5) * step
    # Wider than one pixel of the crop only where it has fewer pixels than its box
    distance = ((source + 0.5 - centre) / step.clamp(min=1)).abs()
    if interpolation == 'bilinear':
        weight = (1 - distance).clamp(min=0)
    else:
        # Keys' cubic with a = -0.5
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weight = weight * ((source >= start) & (source < stop))
    return weight / weight.sum(-1, keepdim=True)
