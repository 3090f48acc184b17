# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datamodule for image patches with masks."""

from collections.abc import Sequence

from ..datasets.image_masks import ImageMaskFolder
from ..datasets.scaling import ValueRange
from .base import DrawDataModule, Target, target_transform


class ImageMaskFolderDataModule(DrawDataModule):
    """Image patches and masks of ESA WorldCover codes, without georeference.

    See :class:`.ImageMaskFolder` for the layout of the folders, and
    :class:`.WorldCoverScenesDataModule` for fine-tuning with the host's tasks.

    Without *val_fraction*, all images are used for training, validation and testing
    alike. With it, images of one place (see *places*) are never in two of them.
    Predictions are of single images, of their middle if they are cropped to *size*.

    .. versionadded:: 0.1
    """

    shuffle = True

    def __init__(
        self,
        root: str | None = None,
        images: str | None = None,
        masks: str | None = None,
        image_bands: Sequence[int] | None = None,
        mask_band: int | None = None,
        bands: Sequence[str] | None = None,
        value_range: ValueRange = None,
        nodata: float | None = None,
        batch_size: int = 64,
        seasons: int = 1,
        places: str | None = None,
        size: int | None = None,
        num_workers: int | None = None,
        target: Target = 'label',
        min_fraction: float = 0.05,
        fractions: bool = False,
        val_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Initialize a new ImageMaskFolderDataModule instance.

        Args:
            root: Folder with the folders ``images`` and ``masks``.
            images: Folder of images, instead of the one in *root*.
            masks: Folder of masks, instead of the one in *root*.
            image_bands: Positions of the bands to use, from 1. All by default.
            mask_band: Position of the mask in the image file, from 1, if it is there.
            bands: Names of the bands in *image_bands*.
            value_range: What becomes 0 and 1: ``softcon``, a pair ``[low, high]``, or
                one pair per band. By default 0 and 255 for uint8, and the mean of
                SSL4EO-S12 -2 and +2 standard deviations for known *bands* in digital
                numbers or dB.
            nodata: Value of pixels without data, None for what each file says.
            batch_size: Number of samples in a batch on one device.
            seasons: Number of different dates per sample.
            places: Regular expression that finds the place in the path of an image. By
                default, images in one folder are one place for more than one of
                *seasons*, and every image is a place for one.
            size: Height and width of a random crop, None for whole images.
            num_workers: Number of processes that read, per device. By default the cores
                there are for each CUDA device, from 1 to 8, and 0 without CUDA.
            target: ``'label'`` for a multi-hot label (11 classes), ``'mask'`` for a
                mask with the classes 1 to 11 in the order of their codes, 0 is no data.
            min_fraction: Smallest share of an image that a class must cover to be in
                its label.
            fractions: Give the share of every class instead of 0 and 1.
            val_fraction: Part of the places for validation only, and as much for
                testing only. With 0, all are for all three.
            seed: Seed of the order, the dates, the crops and the parts.

        Raises:
            ValueError: If an argument is out of range.
        """
        super().__init__(
            ImageMaskFolder,
            batch_size,
            num_workers,
            val_fraction,
            seed,
            transforms=target_transform(target, min_fraction, fractions),
            root=root,
            images=images,
            masks=masks,
            image_bands=image_bands,
            mask_band=mask_band,
            bands=bands,
            value_range=value_range,
            nodata=nodata,
            seasons=seasons,
            places=places,
            size=size,
        )
        self._folder: ImageMaskFolder | None = None

    def setup(self, stage: str) -> None:
        """Find the images and divide them.

        Args:
            stage: Either 'fit', 'validate', 'test', or 'predict'.

        Raises:
            ValueError: If there are too few places to divide.
        """
        if self._folder is None:
            self._folder = ImageMaskFolder(**self.kwargs)
        self._divide(stage, self._folder)
        if stage == 'predict':
            self.predict_dataset = self._folder.images()
