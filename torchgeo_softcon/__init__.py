# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SoftCon and DINO-MC pretraining for TorchGeo.

Importing this package is cheap: the names below are loaded at their first use. It also
activates the plugin, see :mod:`torchgeo_softcon.plugin`.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_names
from .plugin import install_unless_silenced as _install

if TYPE_CHECKING:
    from ._version import __version__ as __version__
    from .callbacks import CollapseMonitor, EmbeddingWriter, KNNProbe
    from .datamodules import (
        ImageMaskFolderDataModule,
        SSL4EOS12MLDataModule,
        SyntheticScenesDataModule,
        WorldCoverScenesDataModule,
    )
    from .datasets import (
        SSL4EOS12ML,
        ESAWorldCover,
        ImageMaskFolder,
        SyntheticScenes,
        WorldCoverScenes,
    )
    from .labels import label_archive
    from .losses import DINOLoss, SoftContrastiveLoss, soft_contrastive_loss
    from .models import (
        ResNet50_Weights,
        Swin_T_Weights,
        ViTBase14_DINOv2_Weights,
        ViTBase16_Weights,
        ViTSmall8_Weights,
        ViTSmall14_DINOv2_Weights,
        ViTSmall16_Weights,
        WideResNet50_2_Weights,
    )
    from .tasks import DINOMCTask, LinearProbeTask, SoftConTask
    from .transforms import MultiCropView, RandomView, ToUnitRange, WorldCoverMultiLabel

__all__ = (
    'SSL4EOS12ML',
    'CollapseMonitor',
    'DINOLoss',
    'DINOMCTask',
    'ESAWorldCover',
    'EmbeddingWriter',
    'ImageMaskFolder',
    'ImageMaskFolderDataModule',
    'KNNProbe',
    'LinearProbeTask',
    'MultiCropView',
    'RandomView',
    'ResNet50_Weights',
    'SSL4EOS12MLDataModule',
    'SoftConTask',
    'SoftContrastiveLoss',
    'Swin_T_Weights',
    'SyntheticScenes',
    'SyntheticScenesDataModule',
    'ToUnitRange',
    'ViTBase14_DINOv2_Weights',
    'ViTBase16_Weights',
    'ViTSmall8_Weights',
    'ViTSmall14_DINOv2_Weights',
    'ViTSmall16_Weights',
    'WideResNet50_2_Weights',
    'WorldCoverMultiLabel',
    'WorldCoverScenes',
    'WorldCoverScenesDataModule',
    'label_archive',
    'soft_contrastive_loss',
)

#: Public names, and the module that has them.
_MODULES = {
    '__version__': '_version',
    'CollapseMonitor': 'callbacks',
    'DINOLoss': 'losses',
    'DINOMCTask': 'tasks',
    'ESAWorldCover': 'datasets',
    'EmbeddingWriter': 'callbacks',
    'ImageMaskFolder': 'datasets',
    'ImageMaskFolderDataModule': 'datamodules',
    'KNNProbe': 'callbacks',
    'LinearProbeTask': 'tasks',
    'MultiCropView': 'transforms',
    'RandomView': 'transforms',
    'ResNet50_Weights': 'models',
    'SSL4EOS12ML': 'datasets',
    'SSL4EOS12MLDataModule': 'datamodules',
    'SoftConTask': 'tasks',
    'SoftContrastiveLoss': 'losses',
    'Swin_T_Weights': 'models',
    'SyntheticScenes': 'datasets',
    'SyntheticScenesDataModule': 'datamodules',
    'ToUnitRange': 'transforms',
    'ViTBase14_DINOv2_Weights': 'models',
    'ViTBase16_Weights': 'models',
    'ViTSmall14_DINOv2_Weights': 'models',
    'ViTSmall16_Weights': 'models',
    'ViTSmall8_Weights': 'models',
    'WideResNet50_2_Weights': 'models',
    'WorldCoverMultiLabel': 'transforms',
    'WorldCoverScenes': 'datasets',
    'WorldCoverScenesDataModule': 'datamodules',
    'label_archive': 'labels',
    'soft_contrastive_loss': 'losses',
}

__getattr__, __dir__ = lazy_names(globals(), _MODULES)

# Last, as it may import the modules above
_install()
