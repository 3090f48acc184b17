# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What ``torchgeo fit --data`` can name."""

from .image_masks import ImageMaskFolderDataModule
from .scenes import WorldCoverScenesDataModule
from .ssl4eo_s12_ml import SSL4EOS12MLDataModule
from .synthetic import SyntheticScenesDataModule

__all__ = (
    'ImageMaskFolderDataModule',
    'SSL4EOS12MLDataModule',
    'SyntheticScenesDataModule',
    'WorldCoverScenesDataModule',
)
