# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The grid of official ESA WorldCover tiles: their names, places and files."""

import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
import rasterio
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader

#: Left, bottom, right and top.
Bounds = tuple[float, float, float, float]

#: The public bucket, which needs no account.
BUCKET = 'https://esa-worldcover.s3.eu-central-1.amazonaws.com'

#: Algorithm version of each year.
VERSIONS = {2020: 'v100', 2021: 'v200'}

#: Width and height of an official tile, in pixels and in degrees.
TILE_SIZE, TILE_DEGREES = 36000, 3

#: Official names, with whatever somebody added to them.
OFFICIAL = re.compile(
    r'ESA_WorldCover_10m_(?P<year>\d{4})_v\d{3}_(?P<tile>[NS]\d{2}[EW]\d{3})'
    r'_(?P<layer>[A-Za-z0-9]+)'
)

#: First and last row of tiles, and all columns, in tiles from 0° E, 0° N: the product
#: reaches from 60° S to 84° N.
_SOUTH, _NORTH, _AROUND = -20, 28, 120

#: A box that reaches less far than this into a tile, in tiles, only touches it: rounding
#: of projected coordinates is far below (0.3 mm on the ground).
_TOUCH = 1e-9


def check_year(year: int) -> None:
    """Raise a ValueError if there is no map of a year."""
    if year not in VERSIONS:
        raise ValueError(f'year must be 2020 or 2021, got {year!r}')


def tile_file(tile: str, year: int) -> str:
    """Name of the file of an official tile, without a folder."""
    return f'ESA_WorldCover_10m_{year}_{VERSIONS[year]}_{tile}_Map.tif'


def tile_path(tile: str, year: int) -> str:
    """Path of an official tile below the address of the public bucket."""
    return f'{VERSIONS[year]}/{year}/map/{tile_file(tile, year)}'


def tile_corner(tile: str) -> tuple[int, int]:
    """Longitude and latitude of the south-west corner of a tile, in degrees.

    Args:
        tile: Name of the tile, like N51E003.

    Returns:
        The corner.

    Raises:
        ValueError: If there is no such tile.
    """
    match = re.fullmatch(r'([NS])(\d{2})([EW])(\d{3})', tile)
    if match is not None:
        lat = int(match[2]) * (1 if match[1] == 'N' else -1)
        lon = int(match[4]) * (1 if match[3] == 'E' else -1)
        row, col = lat // TILE_DEGREES, lon // TILE_DEGREES
        if _name(row, col) == tile and _SOUTH <= row < _NORTH:
            return lon, lat
    raise ValueError(
        f'names must be those of official tiles, every 3 degrees from S60W180 to N81E177, '
        f'got {tile!r}'
    )


def _name(row: int, col: int) -> str:
    """Name of a tile by its place in the grid."""
    lat = row * TILE_DEGREES
    lon = (col * TILE_DEGREES + 180) % 360 - 180
    return f'{"N" if lat >= 0 else "S"}{abs(lat):02}{"E" if lon >= 0 else "W"}{abs(lon):03}'


def tiles_of(bounds: Bounds | Iterable[Sequence[float]]) -> list[str]:
    """Names of the official tiles under boxes, like N51E003 for its south-west corner.

    Args:
        bounds: Left, bottom, right and top in degrees of longitude and latitude, one box
            or many, of shape (N, 4). A box across the antimeridian has its left edge east
            of its right edge, or one edge outside of [-180, 180]. Tiles that a box only
            touches with its edge are not under it.

    Returns:
        Sorted names without duplicates. Tiles of open sea are named, too, but do not
        exist. Ground north of 84° N and south of 60° S, where no tile is, has no names.

    Raises:
        ValueError: If *bounds* are no boxes.
    """
    if not hasattr(bounds, '__len__'):
        bounds = list(bounds)
    boxes = np.asarray(bounds, np.float64)
    if not boxes.size:
        return []
    boxes = np.atleast_2d(boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f'bounds must be of shape (N, 4), got {boxes.shape}')
    left, bottom, right, top = boxes.T
    bad = ~((bottom >= -90) & (bottom <= top) & (top <= 90))
    bad |= ~(np.maximum(abs(left), abs(right)) <= 540)
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(
            'bounds must be (left, bottom, right, top) in degrees of longitude and '
            f'latitude, got {tuple(boxes[index].tolist())} at {index}'
        )

    # A point or a line is under the tile to the north-east of it
    right = np.where(right < left, right + 360, right)
    west, south = (np.floor(low / TILE_DEGREES + _TOUCH) for low in (left, bottom))
    east, north = (np.ceil(high / TILE_DEGREES - _TOUCH) for high in (right, top))
    cols = np.clip(east - west, 1, _AROUND).astype(int)
    col = west.astype(int) % _AROUND
    row = np.clip(south.astype(int), _SOUTH, _NORTH) - _SOUTH
    stop = np.clip(np.maximum(north, south + 1).astype(int), _SOUTH, _NORTH) - _SOUTH

    # Every box adds 1 from its first to its last tile: marks at its four corners, summed
    marks = np.zeros((_NORTH - _SOUTH + 1, 2 * _AROUND + 1), int)
    for rows, columns, mark in (
        (row, col, 1),
        (row, col + cols, -1),
        (stop, col, -1),
        (stop, col + cols, 1),
    ):
        np.add.at(marks, (rows, columns), mark)
    counts = marks.cumsum(0).cumsum(1)[:-1, :-1]
    covered = (counts[:, :_AROUND] + counts[:, _AROUND:]) > 0  # twice around the Earth
    return sorted(_name(r + _SOUTH, c) for r, c in np.argwhere(covered).tolist())


def is_readable(path: str | os.PathLike[str]) -> bool:
    """Whether a file is there and a raster that is not truncated."""
    try:
        with rasterio.open(path) as src:
            _check_blocks(src)
    except (RasterioError, ValueError):
        return False
    return True


def _check_blocks(src: DatasetReader) -> list[tuple[int, int]]:
    """Row and column of the blocks that a file stores, all of which must be in it."""
    size = os.path.getsize(src.name)
    stored = []
    for (row, col), _ in src.block_windows(1):
        offset, length = (
            src.get_tag_item(f'BLOCK_{item}_{col}_{row}', 'TIFF', bidx=1)
            for item in ('OFFSET', 'SIZE')
        )
        if offset is not None:  # else all pixels are 0, or it is no TIFF
            if int(offset) + int(length) > size:
                raise ValueError(f'truncated after {size} bytes')
            stored.append((row, col))
    return stored


def check_official(path: str, tile: str) -> None:
    """Raise a ValueError or RasterioError if a file is not that of a tile."""
    left, bottom = tile_corner(tile)
    with rasterio.open(path, driver='GTiff') as src:
        grid = (src.width, src.height, src.count, src.dtypes[0])
        if grid != (TILE_SIZE, TILE_SIZE, 1, 'uint8'):
            raise ValueError(
                f'{TILE_SIZE} x {TILE_SIZE} pixels, 1 band of uint8 expected, got '
                f'{grid[0]} x {grid[1]}, {grid[2]} of {grid[3]}'
            )
        bounds = (left, bottom, left + TILE_DEGREES, bottom + TILE_DEGREES)
        if src.crs is None or src.crs.to_epsg() != 4326:
            raise ValueError(f'EPSG:4326 expected, got {src.crs}')
        # Less than a tenth of a pixel
        if not np.allclose(src.bounds, bounds, rtol=0, atol=1e-6):
            raise ValueError(f'bounds {bounds} expected, got {tuple(src.bounds)}')
        windows = dict(src.block_windows(1))
        for block in _check_blocks(src):
            src.read(1, window=windows[block])
