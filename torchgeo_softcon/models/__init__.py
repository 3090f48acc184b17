# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders and pretrained weights.

Loaded on first use: the weights are registered whenever TorchGeo's models are imported,
which must not pull in what the encoders need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import (
        create_encoder,
        feature_size,
        is_vit,
        load_encoder,
        read_pretrained,
        read_weights,
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


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = 'weights' if name.endswith('_Weights') else 'loading'
    value = getattr(import_module(f'.{module}', __name__), name)
    globals()[name] = value
    return value
