# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What ``torchgeo fit --data`` can name."""

from .image_masks import ImageMaskFolderDataModule
from .scenes import WorldCoverScenesDataModule
from .synthetic import SyntheticScenesDataModule

__all__ = (
    'ImageMaskFolderDataModule',
    'SyntheticScenesDataModule',
    'WorldCoverScenesDataModule',
)
