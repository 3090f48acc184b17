# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The offset of Sentinel-2's digital numbers, found in the data."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from .._checks import require
from ..bands import Level, band_statistics

#: What ESA adds since processing baseline 04.00, and the authors of SSL4EO-S12 v1.1 to
#: the Zarr chunk files, but not to the shards.
#: https://sentiwiki.copernicus.eu/web/s2-processing
OFFSET = 1000

#: When that baseline began, in ns since 1970.
_BASELINE_0400 = int(np.datetime64('2022-01-25', 'ns').astype(np.int64))

#: Images that are looked at, and which of their pixels count as dark, in percent.
_TRIED, _DARK = 12, 2


def find_offsets(archive: Any, given: int | None) -> npt.NDArray[np.int64]:
    """Find what is added to the numbers of each image of an archive, and say so.

    Attributes of the arrays tell it (*add_offset*). Without them, the darkest pixels do:
    B10 of Level-1C shows next to nothing but air, and somewhere on Earth some band is
    dark. Where no image has a pixel below half of the offset, the mean of all bands
    decides, which is nearer to that of SSL4EO-S12 with or without the offset. This is
    done apart for images of the two times of processing, and for files of other names.

    Args:
        archive: Images of Level-1C or Level-2A, a :class:`.ShardArchive`.
        given: What the user says, None to find out.

    Returns:
        Offset of each image, shape (N,).

    Raises:
        ValueError: If images disagree that should not.
    """
    if given is not None:
        require(given >= 0, f'offset must be at least 0, got {given}')
        return np.full(len(archive), given)
    offsets = np.zeros(len(archive), np.int64)
    kinds = [os.path.basename(path).partition('_')[0] for path in archive.files]
    late = archive.time >= _BASELINE_0400
    groups = np.array(kinds)[archive.file] + np.where(late, ' since 2022-01-25', '')
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        told = np.unique(archive.told[rows])
        if np.isfinite(told).any():
            require(len(told) == 1, _disagreement(archive, group, told))
            offset, reason = int(told[0]), 'as their attributes say'
        else:
            offset, reason = _look(archive, rows, group)
        offsets[rows] = offset
        found = f'{offset} added to their numbers, which is taken off' if offset else ''
        rank_zero_info(
            f'Images of {archive.root} ({group}) have {found or "no offset"}, {reason}. If '
            'that is not so, give offset'
        )
    return offsets


def _look(archive: Any, rows: npt.NDArray[np.int64], group: str) -> tuple[int, str]:
    """Look at some of the images, and return the offset with the reason."""
    # From all over the files
    rows = rows[np.argsort(archive.order[rows])]
    tried = rows[np.unique(np.linspace(0, len(rows) - 1, _TRIED).astype(int))]
    level: Level = 'L2A' if archive.split == 's2a' else 'L1C'
    bands = archive.stored_bands
    expected = np.mean([mean for mean, _ in band_statistics(bands, level)])
    dark, means = [], []
    for row in tried:
        pixels = archive.pixels(int(row)).reshape(len(bands), -1)
        filled = [band[band > 0] for band in pixels]  # 0 is no data
        if any(not len(band) for band in filled):
            continue
        lowest = [np.percentile(band, _DARK) for band in filled]
        # The cirrus band tells it of every image alone
        chosen = bands.index('B10') if 'B10' in bands else None
        dark.append(min(lowest) if chosen is None else lowest[chosen])
        means.append(np.mean([band.mean() for band in filled]))
    if not dark:
        return 0, 'as those looked at are empty'
    low, mean = float(np.min(dark)), float(np.mean(means))
    if 'B10' in bands:
        bright = np.array(dark) >= OFFSET / 2
        require(
            bright.all() or not bright.any(),
            _disagreement(archive, group, np.round(dark)),
        )
        return OFFSET * int(bright.all()), f'as B10 begins at {low:.0f}'
    if low < OFFSET / 2:
        return 0, f'as dark pixels are at {low:.0f}'
    added = mean > expected + OFFSET / 2
    return OFFSET * int(added), (
        f'as dark pixels are at {low:.0f} and the mean is {mean:.0f}, where {expected:.0f} '
        'is that of SSL4EO-S12 without'
    )


def _disagreement(archive: Any, group: str, values: npt.NDArray[Any]) -> str:
    """Say that images have different offsets."""
    return (
        f'images of {archive.root} ({group}) must have one offset, but their darkest '
        f'numbers or attributes are {", ".join(f"{v:g}" for v in values[:5])}: keep files '
        'of one kind there, or give offset'
    )
