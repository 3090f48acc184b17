# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from typing import Any

import torch
from torch import Tensor

from torchgeo_softcon.transforms.sampling import random_crop_axes


def random_crop_grid(image: Tensor, size: tuple[int, int], *options: Any) -> Tensor:
    """The crops of RandomView as a grid of shape (B, h, w, 2) for grid_sample."""
    y, x = random_crop_axes(image, size, *options)
    shape = len(image), *size
    return torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], -1)
