# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datamodule for georeferenced images and WorldCover tiles."""

import os
import warnings
from typing import Any

from .._checks import check_counts, check_types
from ..datasets.packed_scenes import PackedCover, is_packed
from ..datasets.scenes import Paths, WorldCoverScenes
from ..geo.grid import overlapping
from ..landcover import LandCoverProduct
from .base import DrawDataModule, Target, target_transform


class WorldCoverScenesDataModule(DrawDataModule):
    """Random windows of Sentinel-2-like rasters, labelled by ESA WorldCover.

    For pretraining, and for fine-tuning the host's tasks on the same ground:
    ``MultiLabelClassificationTask`` (``Classification`` with ``task: multilabel``) with
    *target* ``label`` and 11 classes, ``SemanticSegmentationTask`` with *target*
    ``mask``, 12 classes and ``ignore_index: 0``.

    Without *val_fraction*, validation and test windows are drawn from the same ground
    as those for training, so their scores say little about other places.
    """

    def __init__(
        self,
        images: Paths | None = None,
        worldcover: Paths | None = None,
        batch_size: int = 64,
        length: int | None = None,
        num_workers: int | None = None,
        target: Target = 'label',
        min_fraction: float = 0.05,
        fractions: bool = False,
        val_fraction: float = 0.0,
        seed: int = 0,
        product: str | LandCoverProduct = 'worldcover',
        root: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Initialize a new WorldCoverScenesDataModule instance.

        Args:
            images: Folders, searched recursively for .tif, .tiff and .jp2, or files.
            worldcover: Folders or files of WorldCover tiles, or of rasters of *product*.
                None for what is packed, or for no labels at all, together with
                *allow_unlabelled*.
            batch_size: Number of samples in a batch on one device.
            length: Number of samples per epoch. By default as many as cover the area
                of all images once, and at least one batch.
            num_workers: Number of processes that read, see :class:`.DrawDataModule` for
                the default.
            target: ``'label'`` for a multi-hot label (11 classes), ``'mask'`` for a
                mask with the classes 1 to 11 in the order of their codes, 0 is no data.
            min_fraction: Smallest share of a window that a class in its label covers.
            fractions: Give the share of every class instead of 0 and 1.
            val_fraction: Part of each raster, at its lower end, whose windows are for
                testing only, and as much above it for validation only. With 0, all are
                drawn from everywhere. Rasters of different places that overlap, as tiles
                of Sentinel-2 do by 10 km, still share ground, and there is a warning.
            seed: Seed of the windows, from 0 to 2**32 - 1.
            product: Another land-cover product, its name, or its YAML file, see
                :func:`torchgeo_softcon.landcover.find_product`. What is packed counts
                before it.
            root: Instead of *images*, a folder of ``torchgeo-softcon pack``.
            **kwargs: Other options of :class:`.WorldCoverScenes`.

        Raises:
            TypeError: If the dataset has no such option.
            ValueError: If an argument is out of range.
        """
        check_types(WorldCoverScenesDataModule.__init__, locals())
        check_counts(length=length)
        self._options = kwargs
        super().__init__(
            WorldCoverScenes, batch_size, num_workers, val_fraction, seed, self._options
        )
        self.length = length
        if (images is None) == (root is None):
            raise ValueError(
                f'one of images and root must be given, got {images!r} and {root!r}'
            )
        folder: Any = images if root is None else root
        self._images = folder
        if root is not None and not is_packed(root):
            raise FileNotFoundError(
                f'root must be a folder of `torchgeo-softcon pack`, got {root}: pack '
                'the scenes, or give images and worldcover'
            )
        if is_packed(folder) and worldcover is None:
            cover = None if kwargs.get('allow_unlabelled') else PackedCover(folder)
            product = cover.product if cover else product
        self._worldcover, self._product = worldcover, product
        self._target = target_transform(target, min_fraction, fractions, product)

    @property
    def shares_ground(self) -> bool:
        """Whether the windows of all splits are drawn from the same ground."""
        return self.val_fraction == 0

    def open_dataset(self) -> WorldCoverScenes:
        """Open the rasters.

        Warns:
            UserWarning: If *val_fraction* does not keep the splits apart.
        """
        scenes = WorldCoverScenes(
            images=self._images,
            worldcover=self._worldcover,
            rows=(0.0, 1.0),
            transforms=self._target,
            seed=self.seed,
            product=self._product,
            **self._options,
        )
        grids = [place.grid for place in scenes.places]
        pairs = overlapping(grids) if self.val_fraction > 0 else []
        if pairs:
            names = ' and '.join(scenes.places[number].name for number in pairs[0])
            warnings.warn(
                f'val_fraction={self.val_fraction} divides every raster on its own, '
                f'but {len(pairs)} pairs of places overlap, such as {names}: ground '
                'of the training may also be in validation and testing',
                UserWarning,
                stacklevel=4,
            )
        return scenes

    def setup(self, stage: str) -> None:
        """Open the rasters and choose the windows."""
        super().setup(stage)
        if stage == 'fit':
            dataset: Any = self.train_dataset
            world_size = self.trainer.world_size if self.trainer else 1
            whole = max(len(dataset), self.batch_size * world_size)
            dataset.length = self.length or whole
