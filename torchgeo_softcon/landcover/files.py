# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Find the files of a land-cover product."""

import os
import warnings
from collections.abc import Iterable

from ..geo.find_files import AnyPath, find_files, path_list
from ..geo.mosaic import Tile
from .product import LandCoverProduct


def find_map_files(
    paths: AnyPath | Iterable[AnyPath], product: LandCoverProduct, year: int | None
) -> list[str]:
    """Find the rasters of a year of a land-cover map, official tiles first.

    In a folder, files with an official name are taken if they are of *year*. TIFFs with
    any other name are taken as clips of *year*. Files that are named in *paths* are
    always taken.

    Raises:
        FileNotFoundError: If there are none.
    """
    named = path_list(paths)
    files: set[str] = set()
    years: set[str] = set()
    for path in named:
        for file in find_files(path, ('.tif', '.tiff')):
            match = product.official.search(os.path.basename(file))
            if match is None or file == path:
                files.add(file)
            elif match['map'] is not None:
                found = match.groupdict().get('year')
                if found in (None, str(year)):
                    files.add(file)
                else:
                    years.add(found)

    if not files:
        raise FileNotFoundError(
            f'paths={", ".join(named)!r} has no {product.title} '
            + ('tile' if product.tiles else 'file')
            + (f' of {year}' if year is not None else '')
            + (f', but tiles of {", ".join(sorted(years))}' if years else '')
            + _hint(product, year)
        )
    return sorted(files, key=lambda file: (not is_official(file, product), file))


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
