# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datamodules, which ``torchgeo fit --data`` can name."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .bigearthnet_v2 import BigEarthNetV2DataModule as BigEarthNetV2DataModule
    from .image_masks import ImageMaskFolderDataModule as ImageMaskFolderDataModule
    from .scenes import WorldCoverScenesDataModule as WorldCoverScenesDataModule
    from .ssl4eo_s12_ml import SSL4EOS12MLDataModule as SSL4EOS12MLDataModule
    from .synthetic import SyntheticScenesDataModule as SyntheticScenesDataModule

__getattr__, __dir__, __all__ = lazy_names(globals())
