# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders and pretrained weights.

Loaded on first use: the weights are registered whenever TorchGeo's models are imported,
which must not pull in what the encoders need.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .encoders import read_weights
    from .loading import (
        create_encoder,
        feature_size,
        is_vit,
        load_encoder,
        read_pretrained,
    )
    from .weights import (
        ResNet50_Weights,
        Swin_T_Weights,
        ViTBase14_DINOv2_Weights,
        ViTBase16_Weights,
        ViTSmall8_Weights,
        ViTSmall14_DINOv2_Weights,
        ViTSmall16_Weights,
        WideResNet50_2_Weights,
    )

__all__ = (
    'ResNet50_Weights',
    'Swin_T_Weights',
    'ViTBase14_DINOv2_Weights',
    'ViTBase16_Weights',
    'ViTSmall8_Weights',
    'ViTSmall14_DINOv2_Weights',
    'ViTSmall16_Weights',
    'WideResNet50_2_Weights',
    'create_encoder',
    'feature_size',
    'is_vit',
    'load_encoder',
    'read_pretrained',
    'read_weights',
)


_MODULES = {'read_weights': 'encoders'}
_MODULES |= {
    name: 'weights' if name.endswith('_Weights') else 'loading'
    for name in __all__
    if name not in _MODULES
}

__getattr__, __dir__ = lazy_names(globals(), _MODULES)
