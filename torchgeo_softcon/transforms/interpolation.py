# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Resizing, mirroring and blurring along one axis, as matrices.

A crop with flips and a Gaussian blur are linear, and separate for rows and columns: the
view of a band is ``rows @ band @ columns.T``. None of these functions waits for a device.
"""

import math
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation: TypeAlias = Literal['bilinear', 'bicubic']
#: Matrices of the rows (B, h, H) and of the columns (B, w, W) of a view.
Crop: TypeAlias = tuple[Tensor, Tensor]


def resize_matrices(
    spans: Tensor, pixels: int, size: int, flip: Tensor, interpolation: Interpolation
) -> Tensor:
    """Resize along one axis, antialiased as in PyTorch, torchvision and Pillow.

    Takes the first pixel, and the one after the last, of each sample (B, 2), int64, the
    numbers of pixels N of the image and n of the crop, and whether to mirror each crop
    (B,). Returns matrices (B, n, N), float32, whose rows sum to 1.
    """
    start, stop = spans[:, :1], spans[:, 1:]
    target = torch.arange(size, device=spans.device)
    target = torch.where(flip[:, None], size - 1 - target, target)

    # Centres within the box, in whole pixels and the rest: in float32, the sum would be
    # off by 1e-5 pixels
    centre = (2 * target + 1) * (stop - start)
    whole = centre.div(2 * size, rounding_mode='floor')
    rest = (centre - whole * 2 * size).float() / (2 * size)

    support = 1 if interpolation == 'bilinear' else 2
    reach = math.ceil(support * max(1, pixels / size))
    tap = torch.arange(-reach, reach + 1, device=spans.device)
    # Wider than one pixel of the crop only where it has fewer pixels than its box
    width = ((stop - start).float() / size).clamp(min=1)[..., None]
    distance = ((tap.float() + 0.5 - rest[..., None]) / width).abs()
    if interpolation == 'bilinear':
        weight = (1 - distance).clamp(min=0)
    else:
        # Keys' cubic with a = -0.5
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    index = (start + whole)[..., None] + tap
    weight = weight * ((index >= start[..., None]) & (index < stop[..., None]))
    return _dense(index, weight / weight.sum(-1, keepdim=True), pixels)


def crop_matrices(
    image: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    flips: Tensor,
    interpolation: Interpolation = 'bilinear',
) -> Crop:
    """Resize a box of each image, antialiased, and then mirror it.

    Equal to torchvision's ``resized_crop(..., antialias=True)`` for each image, then
    flips. Takes images (B, C, H, W), boxes as of :func:`.random_boxes`, the size (h, w) of
    crops, and whether to mirror left and right, and top and bottom, shape (2, B), bool.
    """
    height, width = image.shape[-2:]
    if height == width and size[0] == size[1]:
        # Both axes at once: half the operations
        spans = torch.cat([boxes[:, 1::2], boxes[:, ::2]])
        flip = flips.flip(0).flatten()
        both = resize_matrices(spans, width, size[1], flip, interpolation)
        rows, columns = both.unflatten(0, (2, -1)).unbind()
        return rows, columns
    columns = resize_matrices(boxes[:, ::2], width, size[1], flips[0], interpolation)
    rows = resize_matrices(boxes[:, 1::2], height, size[0], flips[1], interpolation)
    return rows, columns


def bilinear_matrices(position: Tensor, pixels: int) -> Tensor:
    """Interpolate linearly between the two nearest of N pixels, at positions (B, n).

    The same as ``grid_sample(..., padding_mode='border', align_corners=False)``, in whose
    coordinates the positions are. Returns matrices (B, n, N), float32.
    """
    position = (((position + 1) * pixels - 1) / 2).clamp(0, pixels - 1)
    low = position.floor()
    share = position - low
    index = low.long()[..., None] + torch.arange(2, device=position.device)
    return _dense(index, torch.stack([1 - share, share], -1), pixels)


def _dense(index: Tensor, weight: Tensor, pixels: int) -> Tensor:
    """Make matrices (B, n, N) of taps (B, n, K) at different columns (B, n, K)."""
    # Taps beside the image have no weight, and go to a column that is left out
    index, weight = torch.where(weight == 0, pixels, index), weight.float()
    matrix = weight.new_zeros(*weight.shape[:2], pixels + 1)
    return matrix.scatter_(2, index, weight)[..., :pixels]


def identity(image: Tensor) -> Crop:
    """Make matrices that leave images (B, C, H, W) as they are."""
    height, width = (
        torch.eye(side, dtype=torch.float32, device=image.device)
        for side in image.shape[-2:]
    )
    return height.expand(len(image), -1, -1), width.expand(len(image), -1, -1)


def gaussian_kernels(sigma: Tensor, chosen: Tensor, radius: int) -> Tensor:
    """Make Gaussian kernels within three standard deviations (B,), in pixels.

    Samples that are not chosen (B,) get a unit impulse. Returns kernels of
    shape (B, 2 * radius + 1), float32, that sum to 1.
    """
    sigma = sigma[:, None]
    offset = torch.arange(-radius, radius + 1, device=sigma.device)
    # Taps beyond weigh less than 0.3 %
    inside = offset.abs() <= (3 * sigma).ceil()
    kernel = (-0.5 * (offset / sigma) ** 2).exp() * inside
    kernel = torch.where(chosen[:, None], kernel, (offset == 0).to(kernel))
    return (kernel / kernel.sum(1, keepdim=True)).float()


def blur_matrices(matrices: Tensor, kernels: Tensor) -> Tensor:
    """Blur the results of matrices (B, n, N) by kernels (B, 2 r + 1), r < n, reflecting."""
    form = _blur_each if matrices.device.type == 'cpu' else _blur_all
    return form(matrices, kernels)


def _blur_all(matrices: Tensor, kernels: Tensor) -> Tensor:
    """Blur the whole batch at once: nothing waits for the kernels."""
    radius = kernels.shape[1] // 2
    padded = F.pad(matrices, (0, 0, radius, radius), mode='reflect')
    blurred = F.conv2d(padded[None], kernels[:, None, :, None], groups=len(kernels))
    return blurred[0]


def _blur_each(matrices: Tensor, kernels: Tensor) -> Tensor:
    """Blur only the chosen samples, with as many taps as they need: for a CPU."""
    blurred = matrices.clone(memory_format=torch.contiguous_format)
    size, middle = matrices.shape[1], kernels.shape[1] // 2
    for i, kernel in enumerate(kernels.tolist()):
        radius = sum(tap > 0 for tap in kernel) // 2
        if radius:
            taps = kernel[middle - radius : middle + radius + 1]
            pad = (0, 0, radius, radius)
            padded = F.pad(matrices[i : i + 1], pad, mode='reflect')[0]
            torch.mul(padded[:size], taps[0], out=blurred[i])
            for start, tap in enumerate(taps[1:], 1):
                blurred[i].add_(padded[start : start + size], alpha=tap)
    return blurred
