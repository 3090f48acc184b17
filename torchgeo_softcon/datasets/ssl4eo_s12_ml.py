# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SSL4EO-S12 with land-cover labels."""

import copy
import datetime
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .._checks import check_counts, check_fractions, check_types
from .._compat import Sample
from ..geo.rasters import DamagedFileError
from ..ssl4eo.image_records import decode
from ..ssl4eo.labels import match_labels, read_labels
from ..ssl4eo.lulc import LULC, lulc_labels
from ..ssl4eo.record_archive import RecordArchive
from ..ssl4eo.shards import check_aligned, open_archive
from ..ssl4eo.tiffs import BANDS, RADAR, Archive, Split, days, pair, split_names
from ..transforms.unit_range import ToUnitRange
from .base import DrawnImages, check_seed
from .damage import Damage, OnError
from .scaling import softcon_range

#: Locations that a message names.
_NAMED = 3

#: Multi-hot, or shares of the classes.
_Label = npt.NDArray[np.float32] | npt.NDArray[np.int64]


class SSL4EOS12ML(DrawnImages):
    """SSL4EO-S12-ML: patches of Sentinel-1 and Sentinel-2 in four seasons, with labels.

    The images are those of TorchGeo's ``SSL4EOS12``, in the same folders and with the same
    values, as many as are on disk, with the multi-labels of SoftCon, or those of
    ``torchgeo-softcon labels``. A folder that ``torchgeo-softcon pack`` wrote is read in
    the same way, a hundred times faster. So are SSL4EO-S12 v1.1 and TerraMesh, whose bands
    are all at 10 m, in shards or in Zarr chunk files, see :class:`.ShardArchive`.

    A sample is a location, and *seasons* of its images in random order, a pure function of
    *seed* and the index. Indices beyond the length start again with the first location and
    make new choices.

    Dataset features:

    * *image*: float32 of shape (T, C, 264, 264), digital numbers (Sentinel-2; S2RGB: 0
      to 255) and dB (Sentinel-1). Bands of 20 and 60 m have their pixels repeated, as by
      TorchGeo
    * *label*: of shape (T, K), multi-hot (int64) or shares of the classes (float32). All
      zeros is unknown. Only with *labels*

    If you use this dataset in your research, please cite the following papers:

    * https://arxiv.org/abs/2211.07044
    * https://arxiv.org/abs/2405.20462
    """

    _places = 'locations'

    def __init__(
        self,
        root: str | os.PathLike[str] = 'data',
        split: Split | Sequence[Split] = 's2c',
        labels: str | os.PathLike[str] | None = None,
        seasons: int = 1,
        require_labels: bool = False,
        min_fraction: float = 0.05,
        fractions: bool = False,
        transforms: Callable[[Sample], Sample] | None = None,
        seed: int = 0,
        max_cloud: float | None = None,
        offset: int | None = None,
        on_error: OnError = 'raise',
    ) -> None:
        """Initialize a new SSL4EOS12ML instance.

        Args:
            root: Folder with the folders ``s1``, ``s2c`` or ``s2a``, as they are published
                or packed, or ``S1GRD``, ``S2L1C``, ... of v1.1, or with ``train`` and
                ``val``, of which ``train`` counts.
            split: One of them, or several to stack the bands of images of one season:
                those of the same name (``s2c`` and ``s2a``) or nearest in time (``s1``).
                In v1.1, ``s2c`` is S2L1C, ``s2a`` S2L2A and ``s1`` S1GRD.
            labels: The JSON file of SSL4EO-S12-ML, or a Parquet file of
                ``torchgeo-softcon labels``. ``lulc`` for the land-cover layer of v1.1, in
                Esri's classes. None for the labels that are packed, if any.
            seasons: Number of images per sample.
            require_labels: Leave out images whose label is unknown.
            min_fraction: Smallest share of an image that a class must cover to be in its
                label, where shares are known.
            fractions: Give the share of every class instead of 0 and 1.
            transforms: Function of a sample.
            seed: Seed of the choice of seasons.
            max_cloud: Largest share of thin and thick clouds in an image. Others are left
                out. Needs the cloud masks of v1.1.
            offset: What is added to Sentinel-2 in files of v1.1, which is taken off. By
                default it is found, see :func:`.find_offsets`.
            on_error: ``'skip'`` takes another sample for one whose files are damaged, see
                :class:`.ImageMaskFolder`. By default, and for packed files, which are
                checked when they are opened, a damaged file is an error.

        Raises:
            FileNotFoundError: If there are no images, or no file of labels.
            OSError: If a file cannot be opened, or later, if it cannot be read.
            ValueError: If an argument is out of range, if labels do not belong to the
                images, or if no location has enough images.

        Warns:
            UserWarning: If images are not in the labels, or locations are left out.
        """
        check_types(SSL4EOS12ML.__init__, locals())
        splits = split_names(split)
        check_counts(seasons=seasons)
        check_seed(seed)
        check_fractions(max_cloud=max_cloud)
        if not 0 < min_fraction <= 1:
            raise ValueError(f'min_fraction must be in (0, 1], got {min_fraction}')

        self.root = Path(root)
        self.splits = splits
        self.seasons = seasons
        self.transforms = transforms
        self.seed = seed
        self.damage = Damage() if on_error == 'skip' else None
        self.archives = [open_archive(self.root, name, offset) for name in splits]
        check_aligned(self.archives)
        self.bands = tuple(band for name in splits for band in BANDS[name])
        self.softcon_range = split_range(splits)
        # The split that images are named by: Sentinel-2 where there is a choice
        self._column = int(splits[0] in RADAR and len(splits) > 1)
        self._main = self.archives[self._column]

        rows = self._align()
        if max_cloud is not None:
            rows = self._without_clouds(rows, max_cloud)
        label = self._label(rows, labels, min_fraction, fractions, require_labels)
        if label is not None and require_labels:
            rows, label = rows[label.any(1)], label[label.any(1)]
        self._group(rows, label)

    def _align(self) -> npt.NDArray[np.int64]:
        """Return the numbers of images that every split has, shape (M, S)."""
        main = self._main
        rows = np.stack([self._partners(other) for other in self.archives], 1)
        alone = (rows < 0).any(1)
        if alone.all():
            raise ValueError(
                f'split={self.splits} needs images of the same locations and dates, found '
                f'none in {self.root}'
            )
        if alone.any():
            some = np.flatnonzero(alone)[:_NAMED]
            first = ', '.join('/'.join(main.name(row)) for row in some)
            warnings.warn(
                f'{alone.sum()} of {len(rows)} images of {main.split} are left out, as '
                f'other splits have none of their date: {first}',
                UserWarning,
                stacklevel=3,
            )
        return rows[~alone]

    def _partners(self, other: Archive) -> npt.NDArray[np.int64]:
        """Return the number of the image of another split for each image, -1 for none."""
        main = self._main
        if other is main:
            return np.arange(len(main))
        if not {main.split, other.split} & {*RADAR}:
            names, index = (
                pd.MultiIndex.from_arrays([a.location, a.season]) for a in (main, other)
            )
            found: npt.NDArray[np.int64] = index.get_indexer(names)
            if (found >= 0).any():
                return found  # else v1.1, where one of them has times alone
        ours, theirs = (days(a.split, a.season) for a in (main, other))
        return pair(main.location, ours, other.location, theirs)

    def _without_clouds(
        self, rows: npt.NDArray[np.int64], max_cloud: float
    ) -> npt.NDArray[np.int64]:
        """Leave out the images that have more clouds."""
        for column, archive in enumerate(self.archives):
            clouds = archive.clouds()
            if clouds is None:
                continue
            shares = clouds[rows[:, column]]
            if not (shares <= max_cloud).any():
                raise ValueError(
                    f'max_cloud={max_cloud} leaves no image of {archive.root}, the '
                    f'clearest has {shares.min():.3g}'
                )
            return rows[shares <= max_cloud]
        raise ValueError(
            f'max_cloud needs cloud masks, which {", ".join(self.splits)} of {self.root} '
            'have not: add a split that has them, such as S2L2A of v1.1, or leave it out'
        )

    def _label(
        self,
        rows: npt.NDArray[np.int64],
        path: str | os.PathLike[str] | None,
        min_fraction: float,
        fractions: bool,
        required: bool,
    ) -> _Label | None:
        """Return the label of each image, shape (M, K)."""
        main = self._main
        packed = main.labels if isinstance(main, RecordArchive) else None
        if path == LULC:
            packed = lulc_labels(self.root, main)
        labels = packed if path in (None, LULC) else read_labels(str(path))
        self.codes = None if labels is None else tuple(labels.codes)
        if labels is None:
            if required or fractions:
                raise ValueError(
                    'labels must be given for require_labels and fractions: the JSON file '
                    'of SSL4EO-S12-ML, or a Parquet file of `torchgeo-softcon labels`'
                )
            return None
        if fractions and not labels.shares:
            raise ValueError(
                f'fractions needs labels with shares of the classes, {labels.source} tells '
                'which classes there are only'
            )
        images = rows[:, self._column]
        values = match_labels(
            labels, main.split, main.location[images], main.season[images]
        )
        return values if fractions else (values >= min_fraction).astype(np.int64)

    def _group(self, rows: npt.NDArray[np.int64], label: _Label | None) -> None:
        """Put the images of each location together."""
        location = self._main.location[rows[:, self._column]]
        # Sorted, as archives are
        names, start, count = np.unique(location, return_index=True, return_counts=True)
        enough = count >= self.seasons
        if not enough.any():
            raise ValueError(
                f'seasons={self.seasons} needs a location with as many images'
                f'{" that are labelled" if label is not None else ""}, the most there are '
                f'is {count.max(initial=0)}'
            )
        if not enough.all():
            few = b', '.join(names[~enough][:_NAMED]).decode()
            warnings.warn(
                f'{(~enough).sum()} of {len(names)} locations have fewer than '
                f'{self.seasons} images and are left out: {few}',
                UserWarning,
                stacklevel=3,
            )
        self._rows, self._labels = rows, label
        self._start, self._count = start[enough], count[enough]

    def __len__(self) -> int:
        """Return the number of locations."""
        return len(self._start)

    def __getitem__(self, index: int) -> Sample:
        """Read a sample."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> 'RecordBatch':
        """Read a batch of samples at once.

        Raises:
            IndexError: If an index is negative.
            OSError: If a file cannot be read, it is named.
        """
        images = np.concatenate([self._draw(index) for index in indices])
        try:
            read = self._read(images)
        except DamagedFileError:
            if self.damage is None:
                raise
            intact = [self._read_intact(self._draw_readable, i) for i in indices]
            images = np.concatenate(intact)
            read = self._read(images)
        shape = len(indices), self.seasons
        records = {
            name: torch.from_numpy(r).view(*shape, -1) for name, r in read.items()
        }
        label = None
        if self._labels is not None:
            label = torch.from_numpy(self._labels[images]).view(*shape, -1)
        return RecordBatch(self, records, label)

    def _read(self, images: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.uint8]]:
        """Read the records of N images, of each split."""
        return {
            archive.split: archive.read(self._rows[images, column])
            for column, archive in enumerate(self.archives)
        }

    def _draw_readable(self, index: int) -> npt.NDArray[np.int64]:
        """Draw the images of a sample, an error if they cannot be read."""
        images = self._draw(index)
        self._read(images)
        return images

    def _draw(self, index: int) -> npt.NDArray[np.int64]:
        """Draw the numbers of the images of a sample, shape (T,)."""
        location = index % len(self)
        count = self._count[location]
        if count == 1 and index >= 0:
            return self._start[location : location + 1]
        rng = self._generator(index)
        return self._start[location] + rng.permutation(count)[: self.seasons]

    def names(self, index: int) -> list[str]:
        """Return the T names ``location/image`` of a sample, those of Sentinel-2 if any."""
        rows = self._rows[self._draw(index), self._column]
        return ['/'.join(self._main.name(row)) for row in rows]

    def place(self, index: int) -> str:
        """Return the location of a sample."""
        return self.names(index)[0].partition('/')[0]

    def footprint(
        self, index: int
    ) -> tuple[shapely.Polygon, str | None, datetime.date | None]:
        """Return outline, CRS and day of the first image, no day if there are more."""
        main = self._main
        row = self._rows[self._draw(index)[0], self._column]
        grids = main.georeference(int(row))
        (day,) = days(main.split, main.season[row : row + 1]).tolist()
        return shapely.box(*grids.bounds), grids.crs, day if self.seasons == 1 else None

    def cloud_masks(self, index: int) -> npt.NDArray[np.uint8]:
        """Return the :meth:`.Archive.cloud_mask` of each image of a sample, (T, H, W)."""
        rows = self._rows[self._draw(index), self._column]
        return np.stack([self._main.cloud_mask(row) for row in rows])

    def decode(self, records: Mapping[str, Tensor]) -> Tensor:
        """Make images of records, on whatever device they are.

        Args:
            records: Bytes of each split, shape (..., R).

        Returns:
            Images of shape (..., C, 264, 264), the size of the finest band.
        """
        size = max(a.dtype[b].shape[0] for a in self.archives for b in a.bands)
        images = (
            decode(records[a.split], a.dtype, a.bands, size) for a in self.archives
        )
        return torch.cat([*images], -3)

    def images(self) -> Self:
        """Return every image as a sample of its own, in order."""
        other = copy.copy(self)
        locations = zip(self._start, self._count, strict=True)
        other._start = np.concatenate([np.arange(s, s + n) for s, n in locations])
        other._count = np.ones_like(other._start)
        other.seasons, other.damage = 1, None
        return other

    def _keys(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self))

    def _only(self, numbers: npt.NDArray[np.int64]) -> Self:
        other = copy.copy(self)
        other._start, other._count = self._start[numbers], self._count[numbers]
        return other

    def plot(self, sample: Sample, suptitle: str | None = None) -> Figure:
        """Plot a sample, see :meth:`.DrawnImages.plot`, from -2 to +2 deviations."""
        return super().plot(ToUnitRange.between(self.softcon_range)(sample), suptitle)


def split_range(splits: Sequence[str]) -> tuple[tuple[float, float], ...]:
    """Return the range ``'softcon'`` of each band, of Level-2A for the split ``s2a``.

    Colours of 8 bits are from 0 to 255.
    """
    ranges = (
        softcon_range(BANDS[name], 'L2A' if name == 's2a' else 'L1C')
        or ((0.0, 255.0),) * len(BANDS[name])
        for name in splits
    )
    return tuple(pair for pairs in ranges for pair in pairs)


@dataclass(eq=False)
class RecordBatch(Sequence[Sample]):
    """A batch of samples whose bands still have their own resolutions.

    Any function that collates samples finds finished ones in it, :meth:`collate` leaves
    the work to the device.

    Attributes:
        dataset: The dataset that it is from.
        records: Bytes of each split, shape (B, T, R).
        label: Labels of shape (B, T, K), if there are any.
    """

    dataset: SSL4EOS12ML
    records: dict[str, Tensor]
    label: Tensor | None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(next(iter(self.records.values())))

    def __getitem__(self, index: Any) -> Any:
        """Make the sample of a number in the batch."""
        sample: Sample = {
            'image': self.dataset.decode({k: v[index] for k, v in self.records.items()})
        }
        if self.label is not None:
            sample['label'] = self.label[index]
        transforms = self.dataset.transforms
        return sample if transforms is None else transforms(sample)

    def collate(self) -> Sample:
        """Return *records* and *label*, for :meth:`.SSL4EOS12ML.decode` on a device."""
        label = {} if self.label is None else {'label': self.label}
        return {'records': self.records, **label}
