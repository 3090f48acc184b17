# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Transforms for batches on their device."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .crops import MultiCropView as MultiCropView
    from .unit_range import ToUnitRange as ToUnitRange
    from .views import RandomView as RandomView
    from .worldcover import WORLDCOVER_CODES as WORLDCOVER_CODES
    from .worldcover import WorldCoverMultiLabel as WorldCoverMultiLabel
    from .worldcover import class_fractions as class_fractions

__getattr__, __dir__, __all__ = lazy_names(globals())
