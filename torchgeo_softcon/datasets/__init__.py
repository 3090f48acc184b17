# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datasets of images with ESA WorldCover.

The names are loaded at their first use: what reads land cover only, without TorchGeo and
torch, such as the workers of :mod:`torchgeo_softcon.labels`, stays small.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .image_masks import ImageMaskFolder
    from .scenes import WorldCoverScenes
    from .ssl4eo_s12_ml import SSL4EOS12ML
    from .synthetic import SyntheticScenes
    from .worldcover import ESAWorldCover

__all__ = (
    'SSL4EOS12ML',
    'ESAWorldCover',
    'ImageMaskFolder',
    'SyntheticScenes',
    'WorldCoverScenes',
)

_MODULES = {
    'ESAWorldCover': 'worldcover',
    'ImageMaskFolder': 'image_masks',
    'SSL4EOS12ML': 'ssl4eo_s12_ml',
    'SyntheticScenes': 'synthetic',
    'WorldCoverScenes': 'scenes',
}


def __getattr__(name: str) -> Any:
    """Load a dataset at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    from importlib import import_module

    value = getattr(import_module(f'.{_MODULES[name]}', __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names of the module, those that are not loaded yet included."""
    return sorted({*globals(), *_MODULES})
