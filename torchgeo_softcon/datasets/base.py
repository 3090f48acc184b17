# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datasets whose samples are draws: images of random dates or windows."""

from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor, nn

from .._compat import NonGeoDataset, Sample
from ..bands import shown_channels
from ..geo.rasters import DamagedFileError
from .damage import Damage

#: Samples to try in place of one that is damaged. If so many are, it is not the files.
_MAX_TRIES = 10

Read = TypeVar('Read')


class DrawnImages(NonGeoDataset):  # type: ignore[misc]
    """A dataset whose random choices are a pure function of *seed* and the index.

    Attributes:
        bands: Names of the bands, None if they are unknown.
        seasons: Number of different dates per sample.
        seed: Seed of the choices.
        damage: Damaged files that are left out, None where they are an error.
    """

    bands: tuple[str, ...] | None
    seasons: int
    seed: int
    damage: Damage | None = None

    #: Name of the places that the images can be divided by, for messages.
    _places: str

    def __iter__(self) -> Iterator[Sample]:
        """Iterate over the samples of the first epoch."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        """Return a sample."""
        return self._read_intact(self._draw_sample, index)

    def _draw_sample(self, index: int) -> Sample:
        """Read a sample, an error if a file is damaged."""
        raise NotImplementedError

    def _read_intact(self, read: Callable[[int], Read], index: int) -> Read:
        """Read a sample, or if it is damaged and that is no error, always the same other."""
        drawn = index
        for number in range(1, _MAX_TRIES):
            try:
                return read(drawn)
            except DamagedFileError as error:
                if self.damage is None:
                    raise
                self.damage.note(error.path)
            drawn = int(self._generator(index, number).integers(2**32))
        return read(drawn)

    def _generator(self, index: int, *stream: int) -> np.random.Generator:
        """Return the random numbers of a draw."""
        if index < 0:
            raise IndexError(f'index must be at least 0, got {index}')
        # Counter based: no state that order, workers or ranks could change
        return np.random.Generator(np.random.Philox([self.seed, index, *stream]))

    def _keys(self) -> npt.ArrayLike:
        """Return the name or number of the place of each sample."""
        raise NotImplementedError

    def _only(self, numbers: npt.NDArray[np.int64]) -> Self:
        """Return some of the samples."""
        raise NotImplementedError

    def divide(self, fraction: float) -> tuple[Self, Self, Self]:
        """Divide by place, at random, always the same for a seed.

        Args:
            fraction: Part of the places in the second and in the third dataset. With 0,
                all are in all three.

        Returns:
            Datasets for training, validation and testing.

        Raises:
            ValueError: If one of them would be empty.
        """
        if fraction == 0:
            return self, self, self
        keys = np.asarray(self._keys())
        names = np.unique(keys)
        count = round(fraction * len(names))
        if not 0 < count < len(names) / 2:
            raise ValueError(
                f'{len(names)} {self._places} cannot be divided into parts of {fraction}'
            )
        order = np.random.default_rng(self.seed).permutation(len(names))
        cuts = np.split(names[order], [len(names) - 2 * count, len(names) - count])
        parts = (np.flatnonzero(np.isin(keys, cut)) for cut in cuts)
        first, second, third = map(self._only, parts)
        return first, second, third

    def plot(self, sample: Sample, suptitle: str | None = None) -> Figure:
        """Plot the image of each season, and the mask if there is one.

        Without the names of red, green and blue bands, the first three bands are shown,
        or the first alone if there are fewer.

        Args:
            sample: *image* in [0, 1] of shape (C, H, W) or (T, C, H, W), and possibly a
                *mask* of shape (H, W).
            suptitle: Title of the figure.
        """
        image: Tensor = sample['image']
        seasons = image[None] if image.ndim == 3 else image
        channels = shown_channels(self.bands, seasons.shape[1])
        columns = len(seasons) + ('mask' in sample)
        figure, axes = plt.subplots(1, columns, figsize=(4 * columns, 4), squeeze=False)
        for axis, season in zip(axes[0], seasons, strict=False):
            picture = season[channels].permute(1, 2, 0).numpy()
            axis.imshow(picture, vmin=0, vmax=1, cmap='gray')
        if 'mask' in sample:
            axes[0, -1].imshow(sample['mask'].numpy(), interpolation='none')
        for axis in axes[0]:
            axis.axis('off')
        if suptitle is not None:
            figure.suptitle(suptitle)
        return figure


def is_batched(transform: Any) -> bool:
    """Tell whether a transform gives for a batch what it gives for its samples."""
    if isinstance(transform, nn.Sequential):
        return all(is_batched(part) for part in transform)
    return bool(getattr(transform, 'batched', False))


def check_seed(seed: int) -> None:
    """Check that a seed is one word of entropy: more would run into the index behind it."""
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed must be from 0 to 2**32 - 1, got {seed}')
