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
    from .callbacks import CollapseMonitor as CollapseMonitor
    from .callbacks import EmbeddingWriter as EmbeddingWriter
    from .callbacks import KNNProbe as KNNProbe
    from .datamodules import BigEarthNetV2DataModule as BigEarthNetV2DataModule
    from .datamodules import ImageMaskFolderDataModule as ImageMaskFolderDataModule
    from .datamodules import SSL4EOS12MLDataModule as SSL4EOS12MLDataModule
    from .datamodules import SyntheticScenesDataModule as SyntheticScenesDataModule
    from .datamodules import WorldCoverScenesDataModule as WorldCoverScenesDataModule
    from .datasets import SSL4EOS12ML as SSL4EOS12ML
    from .datasets import ESAWorldCover as ESAWorldCover
    from .datasets import ImageMaskFolder as ImageMaskFolder
    from .datasets import SyntheticScenes as SyntheticScenes
    from .datasets import WorldCoverScenes as WorldCoverScenes
    from .labels import label_archive as label_archive
    from .losses import DINOLoss as DINOLoss
    from .losses import SoftContrastiveLoss as SoftContrastiveLoss
    from .losses import soft_contrastive_loss as soft_contrastive_loss
    from .models import ResNet50_Weights as ResNet50_Weights
    from .models import Swin_T_Weights as Swin_T_Weights
    from .models import ViTBase14_DINOv2_Weights as ViTBase14_DINOv2_Weights
    from .models import ViTBase16_Weights as ViTBase16_Weights
    from .models import ViTSmall8_Weights as ViTSmall8_Weights
    from .models import ViTSmall14_DINOv2_Weights as ViTSmall14_DINOv2_Weights
    from .models import ViTSmall16_Weights as ViTSmall16_Weights
    from .models import WideResNet50_2_Weights as WideResNet50_2_Weights
    from .tasks import DINOMCTask as DINOMCTask
    from .tasks import LinearProbeTask as LinearProbeTask
    from .tasks import SoftConTask as SoftConTask
    from .transforms import MultiCropView as MultiCropView
    from .transforms import RandomView as RandomView
    from .transforms import ToUnitRange as ToUnitRange
    from .transforms import WorldCoverMultiLabel as WorldCoverMultiLabel

__getattr__, __dir__, __all__ = lazy_names(globals())

# Last, as it may import the modules above
_install()
