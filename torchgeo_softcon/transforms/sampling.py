# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Random parameters of views, drawn per sample on the device of the batch."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .interpolation import Crop, blur_matrices, gaussian_kernels


def uniform(like: Tensor, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw uniform numbers on a device, in float32 whatever PyTorch's default is.

    In bfloat16, the positions of 224 pixels are no longer all different.
    """
    numbers = torch.empty(shape, dtype=torch.float32, device=like.device)
    return numbers.uniform_(low, high)


def choose(image: Tensor, probability: float) -> Tensor:
    """Choose samples of images (B, ...): True with a probability, shape (B,)."""
    return uniform(image, len(image)) < probability


# A first call may come from prediction, others from training
@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Put numbers on a device in float32, once, as they come from the host."""
    return torch.tensor(values, dtype=torch.float32).to(device)


def _random_sides(
    image: Tensor, shape: Sequence[int], scale: Sequence[float], ratio: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Draw widths and heights of crops in pixels, area and log of the ratio uniform."""
    pixels = image.shape[-2] * image.shape[-1]
    area = uniform(image, *shape, low=scale[0], high=scale[1]) * pixels
    low, high = map(math.log, ratio)
    aspect = uniform(image, *shape, low=low, high=high).exp()
    return (area * aspect).sqrt(), (area / aspect).sqrt()


def random_crop_axes(
    image: Tensor,
    size: tuple[int, int],
    scale: Sequence[float],
    ratio: Sequence[float],
    horizontal_flip: float = 0.0,
    vertical_flip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw a random resized crop with flips per sample, as positions in the image.

    The area is uniform in *scale*, the aspect ratio log-uniform in *ratio*, as in
    torchvision's ``RandomResizedCrop``. A side longer than the image is cut to it,
    where torchvision would draw again. *size* is (h, w), flips are probabilities.

    Returns rows (B, h) and columns (B, w) in the coordinates of
    ``grid_sample(..., align_corners=False)``, float32.
    """
    batch = len(image)
    # Extent and centre in grid_sample's coordinates, where the image is [-1, 1]
    sides = _random_sides(image, (batch,), scale, ratio)
    centre = uniform(image, 2, batch) * 2 - 1
    sign = uniform(image, 2, batch)
    axes = []
    for i, flip in enumerate((horizontal_flip, vertical_flip)):
        extent = (sides[i] / image.shape[-1 - i]).clamp(max=1)
        number = torch.arange(size[1 - i], dtype=torch.float32, device=image.device)
        base = (number * 2 + 1) / size[1 - i] - 1
        signed = extent * torch.where(sign[i] < flip, -1, 1)
        shift = centre[i] * (1 - extent)
        axes.append(signed[:, None] * base + shift[:, None])
    return axes[1], axes[0]


def random_boxes(
    image: Tensor, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """Draw the box of a random resized crop for each image of a batch.

    The same distribution as torchvision's ``RandomResizedCrop``: the first of ten draws
    that fits, and a large central box if none does. Returns left, top, right and bottom
    in pixels, the last two excluded, shape (B, 4), int64.
    """
    height, width = image.shape[-2:]
    sides = _random_sides(image, (len(image), 10), scale, ratio)
    size = torch.stack(sides).round_()

    fits = (size[0] >= 1) & (size[0] <= width) & (size[1] >= 1) & (size[1] <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    width_, height_ = (s.gather(1, first)[:, 0] for s in size)
    left, top = uniform(image, 2, len(image))

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


def random_blurs(
    crops: Sequence[Crop], probabilities: Sequence[float], sigma: tuple[float, float]
) -> list[Crop]:
    """Draw a Gaussian blur of some samples of V views, and put it into their matrices.

    Takes, for each view, the probability that a sample of it is blurred, and the range of
    standard deviations in pixels.
    """
    if not any(probabilities):
        return list(crops)
    like = crops[0][0]
    shape = len(crops), len(like)
    share: float | Tensor = probabilities[0]
    if any(p != share for p in probabilities):
        share = constant(tuple(probabilities), like.device)[:, None]
    chosen = uniform(like, *shape) < share
    sigmas = uniform(like, *shape, low=sigma[0], high=sigma[1])
    # Three standard deviations, at most what reflection can pad
    sides = [min(rows.shape[1], columns.shape[1]) for rows, columns in crops]
    radii = [min(math.ceil(3 * sigma[1]), side - 1) for side in sides]
    kernels = {
        radius: gaussian_kernels(sigmas.flatten(), chosen.flatten(), radius)
        for radius in dict.fromkeys(radii)
    }
    blurred = list(crops)
    for i, (rows, columns) in enumerate(crops):
        if probabilities[i]:
            own = kernels[radii[i]].unflatten(0, shape)[i]
            blurred[i] = blur_matrices(rows, own), blur_matrices(columns, own)
    return blurred
