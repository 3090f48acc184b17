# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.transform import from_origin

#: Next to the repository, where they exist.
DATA = Path(__file__).parents[2].parent / 'shared' / 'data'

#: South-west of the two images of `two_zones`, in longitude and latitude.
PLACES = {'EPSG:32633': (14.999, 50.0), 'EPSG:32718': (-76.0, -12.001)}


def write_raster(
    path: Path,
    values: Any,
    crs: str | None = 'EPSG:32633',
    origin: tuple[float, float] = (500000, 5540000),
    resolution: float | tuple[float, float] = 10,
    descriptions: Sequence[str] | None = None,
    **kwargs: Any,
) -> Path:
    """Write bands (C, H, W) as a GeoTIFF, *origin* is the upper left corner."""
    values = np.asarray(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    xres, yres = np.broadcast_to(resolution, 2)
    profile = {
        'driver': 'GTiff',
        'count': values.shape[0],
        'height': values.shape[1],
        'width': values.shape[2],
        'dtype': values.dtype,
        'crs': crs,
        'transform': from_origin(*origin, xres, yres),
    }
    with rasterio.open(path, 'w', **(profile | kwargs)) as target:
        target.write(values)
        if descriptions:
            target.descriptions = tuple(descriptions)
    return path


def write_worldcover(path: Path, west: float, north: float, size: int = 600) -> Path:
    """Write a map of cropland that is built-up in the north-east and the south-west."""
    values = np.full((1, size, size), 40, np.uint8)
    values[:, : size // 2, size // 2 :] = 50
    values[:, size // 2 :, : size // 2] = 50
    return write_raster(path, values, 'EPSG:4326', (west, north), 1 / 12000, nodata=0)


def two_zones(root: Path, size: int = 96, bands: int = 2, dates: int = 1) -> None:
    """Write images in two UTM zones, bright where the map says built-up."""
    for crs, (west, south) in PLACES.items():
        write_worldcover(root / 'worldcover' / f'{crs[5:]}.tif', west, south + 0.05)
        to_metres = Transformer.from_crs('EPSG:4326', crs, always_xy=True)
        x, y = to_metres.transform(west + 0.025, south + 0.025)
        left, top = round(x) - 5 * size, round(y) + 5 * size
        columns, rows = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
        lon, lat = to_metres.transform(
            left + 10 * columns, top - 10 * rows, direction='INVERSE'
        )
        built = (lon > west + 0.025) == (lat > south + 0.025)
        image = np.where(built, 200, 100).astype(np.uint8)
        for date in range(dates):
            write_raster(
                root / 'images' / crs[5:] / f'{date}.tif',
                np.stack([image + date] * bands),
                crs,
                (left, top),
            )


def make_two_zones(factory: pytest.TempPathFactory) -> Path:
    """The folder of :func:`two_zones` with images of two dates."""
    root = factory.mktemp('two_zones')
    two_zones(root, dates=2)
    return root
