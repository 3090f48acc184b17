# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A page of pictures of a run: ``torchgeo-softcon report``."""

from .page import write_page

__all__ = ('write_page',)
