# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Transforms for batches on their device."""

from .colours import jitter
from .crops import MultiCropView
from .sampling import random_crop_grid
from .unit_range import ToUnitRange
from .views import RandomView
from .worldcover import WORLDCOVER_CODES, WorldCoverMultiLabel, class_fractions

__all__ = (
    'WORLDCOVER_CODES',
    'MultiCropView',
    'RandomView',
    'ToUnitRange',
    'WorldCoverMultiLabel',
    'class_fractions',
    'jitter',
    'random_crop_grid',
)
