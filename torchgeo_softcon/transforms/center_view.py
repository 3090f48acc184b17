# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The view of an image that encoders get in evaluations."""

import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode


def center_view(image: Tensor, size: int) -> Tensor:
    """Resize images and cut out their centre, as all evaluations of DINO do.

    The shorter side becomes 8 / 7 of *size* (256 for 224), by bicubic interpolation. It
    may go beyond the range of values by a little.
    https://github.com/facebookresearch/dino/blob/main/eval_linear.py

    Args:
        image: Images of shape (..., C, H, W).
        size: Side of the result in pixels.

    Returns:
        Images of shape (..., C, size, size).
    """
    larger = F.resize(image, [round(size * 8 / 7)], InterpolationMode.BICUBIC)
    return F.center_crop(larger, [size, size])
