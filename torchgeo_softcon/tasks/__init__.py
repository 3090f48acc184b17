# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretraining tasks, and the linear evaluation of what they train."""

from .base import PretrainingTask
from .dino_mc import DINOMCTask
from .linear_probe import LinearProbeTask
from .softcon import SoftConTask

__all__ = ('DINOMCTask', 'LinearProbeTask', 'PretrainingTask', 'SoftConTask')
