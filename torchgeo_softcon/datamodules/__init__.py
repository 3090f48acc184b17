# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What ``torchgeo fit --data`` can name."""

from torchgeo_softcon.datamodules.image_masks import ImageMaskFolderDataModule
from torchgeo_softcon.datamodules.scenes import WorldCoverScenesDataModule
from torchgeo_softcon.datamodules.synthetic import SyntheticScenesDataModule

__all__ = (
    'ImageMaskFolderDataModule',
    'SyntheticScenesDataModule',
    'WorldCoverScenesDataModule',
)
