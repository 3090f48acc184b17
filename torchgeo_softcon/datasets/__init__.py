# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datasets of images with ESA WorldCover."""

from torchgeo_softcon.datasets.image_masks import ImageMaskFolder
from torchgeo_softcon.datasets.scenes import WorldCoverScenes
from torchgeo_softcon.datasets.synthetic import SyntheticScenes
from torchgeo_softcon.datasets.worldcover import ESAWorldCover

__all__ = ('ESAWorldCover', 'ImageMaskFolder', 'SyntheticScenes', 'WorldCoverScenes')
