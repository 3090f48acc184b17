# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Changes of colour, of images with any number of bands and of RGB images."""

import math

import torch
from kornia.color import rgb_to_grayscale, rgb_to_hsv
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
)
from torch import Tensor


def colour_map(
    means: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor
) -> tuple[Tensor, Tensor]:
    """Write brightness, then contrast, then saturation as one linear map of the bands.

    Brightness multiplies the image, contrast stretches every band about its own mean,
    as in the SSL4EO-S12 recipe. (kornia's operations of these names add and multiply.)
    Saturation stretches every pixel about the mean of its bands. Nothing is clipped.
    https://github.com/zhu-xlab/SSL4EO-S12/blob/1dc0c83/src/benchmark/pretrain_ssl/models/rs_transforms_float32.py

    Takes the means of the bands (B, C), and factors of shape (B,), 1 for no change, of
    brightness also (B, C). Returns matrices (B, C, C) and offsets (B, C, 1): each pixel
    becomes ``matrix @ pixel + offset``. Such a map commutes with resampling and blurring,
    so it is applied where there are the fewest pixels.
    """
    brightness, contrast = brightness.to(means), contrast.to(means).view(-1, 1, 1)
    gain = brightness.view(len(means), -1).expand_as(means)
    grey = gain[:, None] / means.shape[1]
    matrix = grey.lerp(gain.diag_embed(), saturation.to(means).view(-1, 1, 1))
    return contrast * matrix, (1 - contrast) * (matrix @ means[..., None])


def jitter_rgb(
    image: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    hue: Tensor,
    grey: Tensor,
) -> Tensor:
    """Change brightness, contrast, saturation and hue in random order, then to grey.

    The operations of torchvision's ``ColorJitter`` for RGB images (B, 3, H, W) in [0, 1],
    with factors and shifts of the hue (shares of the colour circle) per image, and whether
    it becomes its luma (bool), all of shape (B,).
    """
    image = image.clamp(0, 1)  # bicubic crops overshoot
    operations = (
        lambda x: adjust_brightness_accumulative(x, brightness),
        lambda x: adjust_contrast_with_mean_subtraction(x, contrast),
        lambda x: adjust_saturation_with_gray_subtraction(x, saturation),
        lambda x: shift_hue(x, hue),
    )
    for i in torch.randperm(4).tolist():  # on the CPU: nothing waits for a device
        image = operations[i](image)
    return torch.where(grey.view(-1, 1, 1, 1), rgb_to_grayscale(image), image)


def shift_hue(image: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images (B, 3, H, W) in [0, 1] by shares (B,) of the circle.

    The same values as torchvision's ``adjust_hue``, in half the time by one formula for
    all sectors: https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    hue, saturation, value = rgb_to_hsv(image).split(1, 1)
    sector = hue * (3 / math.pi) + 6 * shift.view(-1, 1, 1, 1)
    offset = torch.arange(5, 0, -2, device=image.device).view(3, 1, 1)
    sector = (sector + offset) % 6
    missing = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    return value - value * saturation * missing
