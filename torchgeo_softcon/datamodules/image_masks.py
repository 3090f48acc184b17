# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datamodule for image patches with masks."""

import functools
import os
from typing import Any

from .._checks import check_types
from ..datasets.image_masks import ImageMaskFolder
from .base import DrawDataModule, Target, target_transform


class ImageMaskFolderDataModule(DrawDataModule):
    """Image patches and masks of ESA WorldCover codes, without georeference.

    See :class:`.ImageMaskFolder` for the layout of the folders, and
    :class:`.WorldCoverScenesDataModule` for fine-tuning with the host's tasks.

    Images of one place (see *places*) are never in two splits, unless *val_fraction* is 0.
    Predictions are of single images, of their middle if they are cropped to *size*.
    """

    shuffle = True

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        target: Target = 'label',
        min_fraction: float = 0.05,
        fractions: bool = False,
        val_fraction: float = 0.0,
        seed: int = 0,
        val_root: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new ImageMaskFolderDataModule instance.

        Args:
            root: Folder with the folders ``images`` and ``masks``.
            batch_size: Number of samples in a batch on one device.
            num_workers: Number of processes that read, see :class:`.DrawDataModule` for
                the default.
            target: ``'label'`` for a multi-hot label (11 classes), ``'mask'`` for a
                mask with the classes 1 to 11 in the order of their codes, 0 is no data.
            min_fraction: Smallest share of an image that a class in its label covers.
            fractions: Give the share of every class instead of 0 and 1.
            val_fraction: Part of the places for validation only, and as much for
                testing only. With 0, all are for all three.
            seed: Seed of the order, the dates, the crops and the division.
            val_root: Folder with other images, of other places, for validation and
                testing, instead of *val_fraction*.
            **kwargs: Other options of :class:`.ImageMaskFolder`.

        Raises:
            TypeError: If the dataset has no such option.
            ValueError: If an argument is out of range.
        """
        check_types(ImageMaskFolderDataModule.__init__, locals())
        self._options = kwargs
        if val_root is not None and val_fraction:
            raise ValueError(
                f'val_fraction must be left out with val_root = {val_root}, got '
                f'{val_fraction}'
            )
        super().__init__(
            ImageMaskFolder, batch_size, num_workers, val_fraction, seed, self._options
        )
        self._root, self._val_root = root, val_root
        self._target = target_transform(target, min_fraction, fractions)

    def open_dataset(self) -> ImageMaskFolder:
        """Find the images."""
        return self._open(self._root, **self._options)

    def _open(
        self, root: str | os.PathLike[str] | None, **options: Any
    ) -> ImageMaskFolder:
        """Find the images in a folder."""
        return ImageMaskFolder(
            root=root, transforms=self._target, seed=self.seed, **options
        )

    @functools.cached_property
    def _others(self) -> ImageMaskFolder:
        """Images for validation and testing, scaled and read as those of the training."""
        others = {**self._options, 'images': None, 'masks': None}
        others['value_range'] = self.source.value_range
        return self._open(self._val_root, **others)

    def setup(self, stage: str) -> None:
        """Open the data and divide them."""
        super().setup(stage)
        if self._val_root is not None and stage != 'predict':
            self.val_dataset = self.test_dataset = self._others
