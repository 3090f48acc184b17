# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datasets of images with ESA WorldCover."""

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
