# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretraining tasks."""

from .softcon import SoftConTask

__all__ = ('SoftConTask',)
