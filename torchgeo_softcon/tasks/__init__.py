# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretraining tasks."""

from .dino_mc import DINOMCTask
from .softcon import SoftConTask

__all__ = ('DINOMCTask', 'SoftConTask')
