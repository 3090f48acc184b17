# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Made-up archives in the layout of SSL4EO-S12."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.transform import from_origin

from torchgeo_softcon.ssl4eo.tiffs import BANDS

#: Sides of the published patches in pixels.
SIDES = {10: 264, 20: 132, 60: 44}

_RESOLUTION = {
    **dict.fromkeys(('VV', 'VH', 'B2', 'B3', 'B4', 'B8'), 10),
    **dict.fromkeys(('B5', 'B6', 'B7', 'B8A', 'B11', 'B12'), 20),
    **dict.fromkeys(('B1', 'B9', 'B10'), 60),
}


def side(band: str) -> int:
    return SIDES[_RESOLUTION[band]]


def season(split: str, day: str, tile: str = 'T32TQM') -> str:
    """Name of an image of a day such as 20200604."""
    if split == 's1':
        return f'S1A_IW_GRDH_1SDV_{day}T010800_{day}T010825_032906_03CFB6_0E5A'
    return f'{day}T054639_{day}T054831_{tile}'


def write_image(folder: Path, split: str, rng: np.random.Generator) -> None:
    """Write the bands of an image, with the grids of the published files."""
    folder.mkdir(parents=True)
    left, top = rng.uniform(-170, 170), rng.uniform(-70, 70)
    for band in BANDS[split]:
        size, pixel = side(band), _RESOLUTION[band] * 9e-6
        values: npt.NDArray[Any]
        if split == 's1':
            values = rng.normal(-15, 4, (size, size)).astype(np.float32)
        else:
            values = rng.integers(0, 12000, (size, size), dtype=np.uint16)
        with rasterio.open(
            folder / f'{band}.tif',
            'w',
            driver='GTiff',
            height=size,
            width=size,
            count=1,
            dtype=values.dtype.name,
            crs='EPSG:4326',
            # Bands of another resolution start half a pixel of theirs earlier
            transform=from_origin(left - pixel / 2, top + pixel / 2, pixel, pixel),
        ) as file:
            file.write(values, 1)


def write_archive(
    root: Path, images: Mapping[str, Mapping[str, Sequence[str]]], seed: int = 0
) -> Path:
    """Write an archive.

    Args:
        root: Its folder.
        images: Days of the images of each location of each split.
        seed: Seed of the pixels.

    Returns:
        The folder.
    """
    rng = np.random.default_rng(seed)
    for split, locations in images.items():
        for location, days in locations.items():
            for day in days:
                write_image(root / split / location / season(split, day), split, rng)
    return root
