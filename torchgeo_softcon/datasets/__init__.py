# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datasets of images with ESA WorldCover.

The names are loaded at their first use: what reads land cover only, without TorchGeo and
torch, such as the workers of :mod:`torchgeo_softcon.labels`, stays small.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(globals(), _MODULES)
