# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datasets whose samples are draws: images of random dates or windows."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from .._compat import NonGeoDataset, Sample
from .plotting import plot_sample

#: What a dataset does with each sample.
Transform = Callable[[Sample], Sample]


class DrawnImages(NonGeoDataset):  # type: ignore[misc]
    """A dataset whose random choices are a pure function of *seed* and the index.

    Attributes:
        bands: Names of the bands, None if they are unknown.
        seasons: Number of different dates per sample.
        seed: Seed of the choices.
    """

    bands: tuple[str, ...] | None
    seasons: int
    seed: int

    def __len__(self) -> int:
        """Return the number of samples per epoch."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Read a sample.

        Args:
            index: Number of the draw, from 0 on and without an upper end.

        Returns:
            A sample.

        Raises:
            IndexError: If *index* is negative.
            OSError: If a file cannot be read. The message names it.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[Sample]:
        """Iterate over the samples of the first epoch."""
        return (self[index] for index in range(len(self)))

    def _generator(self, index: int, *stream: int) -> np.random.Generator:
        """Return the random numbers of a draw.

        Raises:
            IndexError: If *index* is negative. There is no upper end.
        """
        if index < 0:
            raise IndexError(f'index must be at least 0, got {index}')
        # Counter based: no state that order, workers or ranks could change
        return np.random.Generator(np.random.Philox([self.seed, index, *stream]))

    def plot(self, sample: Sample, suptitle: str | None = None) -> Figure:
        """Plot a sample.

        Args:
            sample: A sample of this dataset.
            suptitle: Title of the figure.

        Returns:
            A figure with a row of one image per season, and the mask if there is one.
        """
        return plot_sample(sample, self.bands, suptitle)


def divide_at_random(
    names: npt.ArrayLike, fraction: float, seed: int, what: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Divide names at random, always the same for a seed.

    Args:
        names: Names or numbers, shape (N,).
        fraction: Part of them in the second and in the third group.
        seed: Seed of the division.
        what: What they are of, for messages.

    Returns:
        Three groups, none of them empty.

    Raises:
        ValueError: If one would be empty.
    """
    names = np.asarray(names)
    count = round(fraction * len(names))
    if not 0 < count < len(names) / 2:
        raise ValueError(
            f'{len(names)} {what} cannot be divided into parts of {fraction}'
        )
    order = np.random.default_rng(seed).permutation(len(names))
    first, second, third = np.split(
        names[order], [len(names) - 2 * count, len(names) - count]
    )
    return first, second, third


def check_draws(seed: int, **counts: int | None) -> None:
    """Check the options of draws.

    Args:
        seed: Seed of the choices.
        **counts: Values by the name of the option, None where there is none.

    Raises:
        ValueError: If a count is not at least 1, or the seed does not fit into 32 bits.
    """
    if any(count is not None and count < 1 for count in counts.values()):
        raise ValueError(
            f'{" and ".join(counts)} must be at least 1, got '
            f'{" and ".join(map(str, counts.values()))}'
        )
    # One word of entropy. A larger one would take the place of the index behind it.
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed must be from 0 to 2**32 - 1, got {seed}')
