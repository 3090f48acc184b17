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


def jitter(
    image: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor | None = None,
) -> Tensor:
    """Change brightness, then contrast, then saturation, without clipping.

    Brightness multiplies the image, contrast stretches every band about its own mean,
    as in the SSL4EO-S12 recipe. (kornia's operations of these names add and multiply.)
    Saturation stretches every pixel about the mean of its bands.
    https://github.com/zhu-xlab/SSL4EO-S12/blob/1dc0c83/src/benchmark/pretrain_ssl/models/rs_transforms_float32.py

    Args:
        image: Images of shape (B, C, H, W). Brightness is meant for values that are 0
            where it is dark, such as reflectance, and less for dB or z-scores.
        brightness: Factors of shape (B,), or of shape (B, C) for each band its own.
            1 changes nothing.
        contrast: Factors of shape (B,). 1 changes nothing.
        saturation: Factors of shape (B,). 1 changes nothing, 0 gives grey.

    Returns:
        The changed images, shape (B, C, H, W).
    """
    with torch.autocast(image.device.type, enabled=False):
        means = image.mean((-2, -1))
        if saturation is None:
            # Band by band: a band that is not finite does not spoil the others
            gain = brightness.to(means).view(len(means), -1, 1, 1)
            mean = gain * means[..., None, None]
            return mean.lerp(image * gain, contrast.to(means).view(-1, 1, 1, 1))
        matrix, offset = colour_map(means, brightness, contrast, saturation)
        return torch.baddbmm(offset, matrix, image.flatten(2)).view_as(image)


def colour_map(
    means: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the changes of :func:`jitter` as one linear map of the bands.

    Each pixel becomes ``matrix @ pixel + offset``. Such a map commutes with resampling
    and blurring, so it is applied where there are the fewest pixels.

    Args:
        means: Means of the bands of the images that :func:`jitter` is given, shape
            (B, C).
        brightness: Factors of shape (B,) or (B, C).
        contrast: Factors of shape (B,).
        saturation: Factors of shape (B,).

    Returns:
        Matrices of shape (B, C, C) and offsets of shape (B, C, 1).
    """
    brightness, contrast = brightness.to(means), contrast.to(means).view(-1, 1, 1)
    gain = brightness.view(len(means), -1).expand_as(means)
    matrix = gain.diag_embed()
    if saturation is not None:
        grey = gain[:, None] / means.shape[1]
        matrix = grey.lerp(matrix, saturation.to(means).view(-1, 1, 1))
    return contrast * matrix, (1 - contrast) * (matrix @ means[..., None])


def jitter_rgb(
    image: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    hue: Tensor,
    grey: Tensor | None = None,
) -> Tensor:
    """Change brightness, contrast, saturation and hue in random order, then to grey.

    The operations of torchvision's ``ColorJitter``, with factors per image.

    Args:
        image: RGB images of shape (B, 3, H, W) in [0, 1].
        brightness: Factors of shape (B,). 1 changes nothing.
        contrast: Factors of shape (B,). 1 changes nothing.
        saturation: Factors of shape (B,). 1 changes nothing.
        hue: Shifts as a share of the colour circle, shape (B,). 0 changes nothing.
        grey: Images that become grey, their luma, shape (B,), bool. Defaults to none.

    Returns:
        The changed images, shape (B, 3, H, W), in [0, 1].
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
    if grey is not None:
        image = torch.where(grey.view(-1, 1, 1, 1), rgb_to_grayscale(image), image)
    return image


def shift_hue(image: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images (B, 3, H, W) in [0, 1] by shares (B,) of the circle.

    The same values as torchvision's ``adjust_hue``. From hue, saturation and value back
    to RGB is one formula for all sectors of the circle, which takes half the time:
    https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    hue, saturation, value = rgb_to_hsv(image).split(1, 1)
    sector = hue * (3 / math.pi) + 6 * shift.view(-1, 1, 1, 1)
    offset = torch.arange(5, 0, -2, device=image.device).view(3, 1, 1)
    sector = (sector + offset) % 6
    missing = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    return value - value * saturation * missing
