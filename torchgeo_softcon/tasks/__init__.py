# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretraining tasks, and the linear evaluation of what they train."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .base import PretrainingTask as PretrainingTask
    from .dino_mc import DINOMCTask as DINOMCTask
    from .linear_probe import LinearProbeTask as LinearProbeTask
    from .softcon import SoftConTask as SoftConTask

__getattr__, __dir__, __all__ = lazy_names(globals())
