# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Find the files of a land-cover product."""

import functools
import os
import re
import warnings
from collections.abc import Iterable, Mapping

from ..geo.find_files import AnyPath, find_files, path_list
from ..geo.mosaic import Tile
from ..geo.rasters import open_raster
from .product import LandCoverProduct

#: Metadata of official tiles with their year, which GDAL keeps in clips.
_YEAR_TAGS = ('time_start', 'title', 'description', 'TIFFTAG_IMAGEDESCRIPTION')


def find_map_files(
    paths: AnyPath | Iterable[AnyPath], product: LandCoverProduct, year: int | None
) -> list[str]:
    """Find the rasters of a year of a land-cover map, official tiles first.

    In a folder, files are taken if they are of *year*, or if nothing tells their year,
    see :func:`map_year`. Files that are named in *paths* are always taken.

    Raises:
        FileNotFoundError: If there are none.
    """
    named = path_list(paths)
    files: set[str] = set()
    years: set[str] = set()
    for path in named:
        for file in find_files(path, ('.tif', '.tiff')):
            match = product.official.search(os.path.basename(file))
            if match is not None and match['map'] is None and file != path:
                continue
            found = map_year(file, product)
            if file == path or found in (None, year):
                files.add(file)
            else:
                years.add(str(found))

    if not files:
        raise FileNotFoundError(
            f'paths={", ".join(named)!r} has no {product.title} '
            + ('tile' if product.tiles else 'file')
            + (f' of {year}' if year is not None else '')
            + (f', but tiles of {", ".join(sorted(years))}' if years else '')
            + _hint(product, year)
        )
    return sorted(files, key=lambda file: (not is_official(file, product), file))


def map_year(path: str, product: LandCoverProduct) -> int | None:
    """Return the year of a file of a land-cover map, None if nothing tells it.

    The official name tells it, or a year or version in another name, or in what a clip
    has kept of the metadata of official tiles.
    """
    if len(product.years) < 2:
        return None
    name = os.path.basename(path)
    match = product.official.search(name)
    if match is not None and match.groupdict().get('year'):
        return int(match['year'])
    found = _find_year(os.path.splitext(name)[0], product)
    if found is None and os.path.isfile(path):
        tags = _read_tags(path, os.stat(path).st_mtime_ns)
        years = (_find_year(tags.get(tag, ''), product) for tag in _YEAR_TAGS)
        found = next((year for year in years if year is not None), None)
    return found


def _find_year(text: str, product: LandCoverProduct) -> int | None:
    """Return the year of a product that a text has, or whose version it has."""
    words = {*re.split(r'[^a-z0-9.]+', text.lower())}
    found = {
        year
        for year in product.years
        if words & {str(year), product.version(year).lower()}
    }
    return found.pop() if len(found) == 1 else None


@functools.lru_cache(maxsize=4096)
def _read_tags(path: str, changed: int) -> Mapping[str, str]:
    """Read the metadata of a file, none if it is damaged, which is told elsewhere."""
    try:
        with open_raster(path) as source:
            return dict(source.tags())
    except OSError:
        return {}


def assumed_year(
    files: Iterable[str], product: LandCoverProduct, year: int | None
) -> str | None:
    """Say which year clips are assumed to be of, None if all tell it."""
    unknown = [file for file in files if map_year(file, product) is None]
    if not unknown or len(product.years) < 2:
        return None
    return (
        f'{len(unknown)} files of {product.title} such as {unknown[0]} do not tell their '
        f'year in name or metadata, they are taken for {year}. If that is not so, give '
        'year, or have it in their names'
    )


def _hint(product: LandCoverProduct, year: int | None) -> str:
    """Say how the files are named and where they are."""
    if not product.path:
        return ': name a folder with .tif or .tiff files'
    # On land, if the product has it
    tiles = product.tiles.names_under((4, 52, 4, 52)) if product.tiles else []
    tile = next(iter(tiles), 'TILE')
    named = f'. Files are named like {product.file_name(tile, year)}'
    url = f' and are at {product.url}/{product.file_path(tile, year)}'
    return named + (url if product.url else '')


def is_official(path: str, product: LandCoverProduct) -> bool:
    """Return whether a file has exactly an official name."""
    name = os.path.basename(path)
    match = product.official.match(name)
    if match is None or match['map'] is None:
        return False
    return name[match.end() :].lower() in ('.tif', '.tiff')


def warn_of_resampled(raster: Tile, product: LandCoverProduct, stacklevel: int) -> None:
    """Warn of a raster that has the name of a tile, but another size.

    *stacklevel* is that of :func:`warnings.warn`, seen from the caller.
    """
    grid = product.tiles
    if grid is None or raster.width == raster.height == grid.pixels:
        return
    if is_official(raster.path, product):
        warnings.warn(
            f'{raster.path} has the name of an official tile, but {raster.width} x '
            f'{raster.height} pixels of {abs(raster.transform.a):.3g} instead of '
            f'{grid.pixels} x {grid.pixels} of {grid.degrees / grid.pixels:.3g} degrees: '
            'it was resampled, so small patches of land cover may be lost',
            UserWarning,
            stacklevel + 1,
        )
