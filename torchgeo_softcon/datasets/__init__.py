# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datasets of images with ESA WorldCover."""

from .image_masks import ImageMaskFolder
from .scenes import WorldCoverScenes
from .synthetic import SyntheticScenes
from .worldcover import ESAWorldCover

__all__ = ('ESAWorldCover', 'ImageMaskFolder', 'SyntheticScenes', 'WorldCoverScenes')
