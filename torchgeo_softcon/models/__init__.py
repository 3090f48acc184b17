# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders and pretrained weights.

Loaded on first use: the weights are registered whenever TorchGeo's models are imported,
which must not pull in what the encoders need.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .encoders import read_weights as read_weights
    from .loading import create_encoder as create_encoder
    from .loading import feature_size as feature_size
    from .loading import is_vit as is_vit
    from .loading import load_encoder as load_encoder
    from .weights import ResNet50_Weights as ResNet50_Weights
    from .weights import Swin_T_Weights as Swin_T_Weights
    from .weights import ViTBase14_DINOv2_Weights as ViTBase14_DINOv2_Weights
    from .weights import ViTBase16_Weights as ViTBase16_Weights
    from .weights import ViTSmall8_Weights as ViTSmall8_Weights
    from .weights import ViTSmall14_DINOv2_Weights as ViTSmall14_DINOv2_Weights
    from .weights import ViTSmall16_Weights as ViTSmall16_Weights
    from .weights import WideResNet50_2_Weights as WideResNet50_2_Weights

__getattr__, __dir__, __all__ = lazy_names(globals())
