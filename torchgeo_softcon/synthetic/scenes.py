# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Georeferenced scenes over a tile of land cover, all made up, as files on disk."""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from pyproj import CRS, Transformer

from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS
from ..geo.grid import Grid, outline
from ..geo.warp import Warp
from ..landcover.products import WORLDCOVER
from .landscape import Landscape, random_field
from .sensors import optical, radar

#: The tile that all scenes lie in, and its pixels.
_TILE = 'ESA_WorldCover_10m_2021_v200_N45E012_Map.tif'
_RES = 1 / 12000
_TILE_GRID = Grid(CRS.from_epsg(4326), Affine(_RES, 0, 12, 0, -_RES, 48), 36000, 36000)

#: UTM zones meet at 12 degrees east, at the edge of the tile. Products of zone 32 go
#: on for some kilometres to the east of that line. Zone and first latitude.
_ZONES = ((32, 45.3), (33, 45.7))

#: First longitude, and distance between sites in degrees for up to 3 km.
_FIRST_LON, _STEP = 12.03, 0.08

#: Sites per zone and their largest size, so that no two meet.
MAX_SITES, MAX_SIZE = 16, 512

#: Ground around a scene that has land cover, in pixels of the tile.
_MARGIN = 32

#: Stray pixels of the map, as real classifications have them.
_STRAY = 0.003


@dataclasses.dataclass(frozen=True)
class Site:
    """Ground of some scenes: the tile of Sentinel-2, a number, the zone, the pixels."""

    name: str
    index: int
    zone: int
    grid: Grid

    def rng(self, seed: int, *purpose: int) -> np.random.Generator:
        """Return random numbers that do not depend on how many sites or dates there are."""
        return np.random.default_rng([seed, self.zone, self.index, *purpose])


def write_scenes(
    root: Path, places: int, size: int, seasons: int, bands: Sequence[str], seed: int
) -> None:
    """Write the folders ``images`` and ``worldcover``, see :class:`.SyntheticScenes`."""
    for folder in ('images', 'worldcover'):
        (root / folder).mkdir()
    profile = _profile(_TILE_GRID, 'uint8', 1, 0, 1024)
    # Blocks without land cover take no space
    profile['sparse_ok'] = True
    with rasterio.open(root / 'worldcover' / _TILE, 'w', **profile) as dst:
        dst.write_colormap(1, WORLDCOVER.colors)
        dst.update_tags(description='Synthetic land cover, no ESA product')
        for site in find_sites(places, size):
            landscape, (top, left) = _landscape(site, seed)
            codes, rng = landscape.codes, site.rng(seed, 1)
            stray = rng.random(codes.shape) < _STRAY
            codes = np.where(stray, rng.choice(np.unique(codes), codes.shape), codes)
            height, width = codes.shape
            dst.write(codes, 1, window=((top, top + height), (left, left + width)))
            row, col = Warp(site.grid, _TILE_GRID.crs).pixels(_TILE_GRID)
            ground = landscape.take(row - top, col - left)
            _write_images(root / 'images', site, ground, seasons, bands, seed)


def _landscape(site: Site, seed: int) -> tuple[Landscape, tuple[int, int]]:
    """Draw land cover on the pixels of the tile around a site, and tell where it starts."""
    west, south, east, north = outline(
        site.grid.crs, _TILE_GRID.crs, site.grid.bounds
    ).bounds
    left, right = (round((x - 12) / _RES) for x in (west, east))
    top, bottom = (round((48 - y) / _RES) for y in (north, south))
    shape = (bottom - top + 2 * _MARGIN, right - left + 2 * _MARGIN)

    # A degree of longitude is shorter than one of latitude
    metres = 111_195 * _RES
    pixel = (metres, metres * np.cos(np.radians(south)))
    landscape = Landscape.random(site.rng(seed, 0), shape, pixel)
    return landscape, (top - _MARGIN, left - _MARGIN)


def _write_images(
    folder: Path,
    site: Site,
    ground: Landscape,
    dates: int,
    bands: Sequence[str],
    seed: int,
) -> None:
    """Write the images of all dates of a site."""
    is_radar = bands[0] in SENTINEL1_BANDS
    available = SENTINEL1_BANDS if is_radar else SENTINEL2_BANDS
    relief = random_field(site.rng(seed, 2), ground.codes.shape, (10, 10), 350)

    nodata = np.nan if is_radar else 0
    dtype, predictor = ('float32', 3) if is_radar else ('uint16', 2)
    profile = _profile(site.grid, dtype, len(bands), nodata, 128)
    profile |= {'predictor': predictor, 'interleave': 'band'}
    first = datetime.date(2021, 1, 18)
    for i in range(dates):
        date = first + datetime.timedelta(round(365 * i / dates))
        day = date.timetuple().tm_yday
        rng = site.rng(seed, 3, day)
        image: npt.NDArray[Any]
        image = (radar if is_radar else optical)(rng, ground, relief, day)
        # The last date of the first site is at the edge of an orbit
        last = i == dates - 1
        if last and site.index == 0 and site.zone == _ZONES[0][0]:
            image[:, _rim(rng, site.grid.width)] = nodata

        name = f'{site.name}_{date:%Y%m%d}_{site.index}.tif'
        with rasterio.open(folder / name, 'w', **profile) as dst:
            dst.write(image[[available.index(band) for band in bands]])
            dst.descriptions = bands
            dst.update_tags(description='Synthetic scene, no Copernicus product')


def _profile(
    grid: Grid, dtype: str, count: int, nodata: float, block: int
) -> dict[str, Any]:
    """Return the options that rasterio writes a file with."""
    return {
        'driver': 'GTiff',
        'dtype': dtype,
        'count': count,
        'width': grid.width,
        'height': grid.height,
        'crs': grid.crs.to_wkt(),
        'transform': grid.transform,
        'nodata': nodata,
        'tiled': True,
        'blockxsize': block,
        'blockysize': block,
        'compress': 'deflate',
    }


def find_sites(count: int, size: int) -> list[Site]:
    """Return where the scenes are: a grid of four columns in each zone."""
    sites = []
    for zone, first_lat in _ZONES:
        to_utm = Transformer.from_crs(4326, 32600 + zone, always_xy=True)
        for i in range(count):
            lon = _FIRST_LON + i % 4 * _STEP
            x, y = to_utm.transform(lon, first_lat + i // 4 * _STEP)
            # Real products begin at multiples of 20 m
            left, top = 20 * round(x / 20), 20 * round(y / 20) + 10 * size
            transform = Affine(10, 0, left, 0, -10, top)
            grid = Grid(CRS.from_epsg(32600 + zone), transform, size, size)
            sites.append(Site(_product_tile(zone, left, top), i, zone, grid))
    return sites


def _product_tile(zone: int, x: float, y: float) -> str:
    """Return the name of a Sentinel-2 tile: zone, latitude band T, and square of 100 km."""
    columns = ('STUVWXYZ', 'ABCDEFGH', 'JKLMNPQR')[zone % 3]
    rows = 'ABCDEFGHJKLMNPQRSTUV'
    row = int(y // 100_000) + (5 if zone % 2 == 0 else 0)
    return f'T{zone}T{columns[int(x // 100_000) - 1]}{rows[row % 20]}'


def _rim(rng: np.random.Generator, size: int) -> npt.NDArray[np.bool_]:
    """Return the pixels beyond the edge of an orbit: a slanted and ragged line."""
    row, col = np.indices((size, size)) / size
    ragged = np.repeat(rng.normal(0, 0.01, -(-size // 4)), 4)[:size, None]
    return np.asarray(col > 0.88 - 0.25 * row + ragged)
