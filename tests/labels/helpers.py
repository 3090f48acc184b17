# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import rasterio
from affine import Affine
from pyproj import CRS, Transformer

from torchgeo_softcon.geo.footprints import make_footprints
from torchgeo_softcon.geo.mosaic import Tile, open_tile
from torchgeo_softcon.landcover.products import WORLDCOVER_CODES

WGS84 = CRS.from_epsg(4326)
CODES = np.array(WORLDCOVER_CODES, np.uint8)

#: Pixels of 3 degrees in the tiles of the tests, and of their blocks.
SIZE, BLOCK = 1500, 128

Codes = npt.NDArray[np.uint8]


def codes_at(lon: Any, lat: Any) -> Codes:
    """Codes of a made-up world: a hash of the pixel of the map that a place is in."""
    col = np.floor(np.asarray(lon) * (SIZE // 3) + 1e-6).astype(np.int64)
    row = np.floor(-np.asarray(lat) * (SIZE // 3) + 1e-6).astype(np.int64)
    around = col % (360 * (SIZE // 3))
    return CODES[((around * 7919 ^ row * 104729) >> 3) % len(CODES)]


def write_tile(
    folder: Path, west: int, south: int, year: int = 2021, **profile: Any
) -> Path:
    """Write the made-up world of 3 x 3 degrees with an official name."""
    version = {2020: 'v100', 2021: 'v200'}[year]
    name = f'{"NS"[south < 0]}{abs(south):02}{"EW"[west < 0]}{abs(west):03}'
    path = folder / f'ESA_WorldCover_10m_{year}_{version}_{name}_Map.tif'
    centres = (np.arange(SIZE) + 0.5) * 3 / SIZE
    codes = codes_at(west + centres[None], (south + 3 - centres)[:, None])
    if year == 2020:
        codes = CODES[(np.searchsorted(CODES, codes) + 1) % len(CODES)]
    return write_codes(
        path, codes, Affine(3 / SIZE, 0, west, 0, -3 / SIZE, south + 3), **profile
    )


def write_codes(
    path: Path,
    codes: npt.NDArray[Any],
    transform: Affine,
    crs: str = 'EPSG:4326',
    **profile: Any,
) -> Path:
    """Write a raster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    default = {
        'tiled': True,
        'blockxsize': BLOCK,
        'blockysize': BLOCK,
        'compress': 'deflate',
    }
    shape = {'count': 1, 'height': codes.shape[0], 'width': codes.shape[1]}
    with rasterio.open(
        path,
        'w',
        'GTiff',
        dtype=codes.dtype.name,
        crs=crs,
        transform=transform,
        **{**default, **shape, **profile},
    ) as dst:
        dst.write(codes, 1)
    return path


def open_tiles(folder: Path) -> list[Tile]:
    return [open_tile(str(path)) for path in sorted(folder.glob('*.tif'))]


def grid(
    crs: str, lon: float, lat: float, res: float = 10, rotation: float = 0
) -> Affine:
    """Georeference of a grid that begins at a place."""
    to_crs = Transformer.from_crs(WGS84, CRS.from_user_input(crs), always_xy=True)
    x, y = to_crs.transform(lon, lat)
    return (
        Affine.translation(x, y) @ Affine.rotation(rotation) @ Affine.scale(res, -res)
    )


def table_of(crs: str, transform: Affine, height: int, width: int) -> pa.Table:
    return make_footprints(['a'], [crs], [transform[:6]], [(height, width)])


def centres(
    crs: str, transform: Affine, height: int, width: int
) -> tuple[npt.NDArray[np.float64], ...]:
    """Longitude and latitude of every pixel centre, projected one by one."""
    col, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    a, b, c, d, e, f = transform[:6]
    to_degrees = Transformer.from_crs(CRS.from_user_input(crs), WGS84, always_xy=True)
    lon, lat = to_degrees.transform(a * col + b * row + c, d * col + e * row + f)
    return np.asarray(lon), np.asarray(lat)


def histogram(
    codes: npt.NDArray[Any], among: Sequence[int] = WORLDCOVER_CODES
) -> list[int]:
    return [int((codes == code).sum()) for code in among]


def write_image(path: Path, crs: str | None, transform: Affine, size: int = 32) -> Path:
    """Write an image with nothing on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        'w',
        'GTiff',
        count=2,
        height=size,
        width=size,
        dtype='uint16',
        crs=crs,
        transform=transform,
    ) as dst:
        dst.write(np.ones((2, size, size), np.uint16))
    return path
