# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Building blocks of the tasks."""

from .ema import copy_buffers, make_teacher, update_ema
from .heads import DINOHead, mlp_head
from .masking import SiameseMasking, encode_visible, mask_pixels, random_visible
from .packing import can_pack, encode_crops

__all__ = (
    'DINOHead',
    'SiameseMasking',
    'can_pack',
    'copy_buffers',
    'encode_crops',
    'encode_visible',
    'make_teacher',
    'mask_pixels',
    'mlp_head',
    'random_visible',
    'update_ema',
)
