# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Where the files of ESA WorldCover are."""

import os
import warnings
from collections.abc import Iterable

from ..geo.find_files import find_files
from ..geo.mosaic import Tile
from .tiles import BUCKET, OFFICIAL, TILE_DEGREES, TILE_SIZE, tile_file, tile_path

#: What TorchGeo accepts as a path.
Path = str | os.PathLike[str]


def find_tiles(paths: Path | Iterable[Path], year: int) -> list[str]:
    """Find the tiles of a year.

    Args:
        paths: One or more folders to search, with all their subfolders, or files. In a
            folder, official tiles of *year* are taken and those of other years are not.
            TIFFs with any other name are taken as clips of *year*. Files that are named
            here are always taken.
        year: Year of the map.

    Returns:
        The files, official tiles first.

    Raises:
        FileNotFoundError: If there is none.
    """
    named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files: set[str] = set()
    years: set[str] = set()
    for path in map(os.fspath, named):
        for file in find_files(path, ('.tif', '.tiff')):
            match = OFFICIAL.search(os.path.basename(file))
            if match is None or file == path:
                files.add(file)
            elif match['layer'] == 'Map':
                years.add(match['year'])
                if match['year'] == str(year):
                    files.add(file)

    if not files:
        found = f', but tiles of {", ".join(sorted(years))}' if years else ''
        searched = ', '.join(map(os.fspath, named))
        raise FileNotFoundError(
            f'paths={searched!r} has no ESA WorldCover tile of {year}{found}. '
            f'Tiles are called {tile_file("N51E003", year)} after their south-west '
            f'corner, every 3 degrees. They are at {BUCKET}/{tile_path("N51E003", year)}'
        )
    return sorted(files, key=lambda file: (official_tile(file) is None, file))


def official_tile(path: str) -> str | None:
    """Name of the tile, if a file has exactly an official name.

    Args:
        path: Path of the file.

    Returns:
        A name like N51E003, or None.
    """
    name = os.path.basename(path)
    match = OFFICIAL.match(name)
    if match is None or match['layer'] != 'Map':
        return None
    return match['tile'] if name[match.end() :].lower() in ('.tif', '.tiff') else None


def warn_size(tile: Tile, stacklevel: int) -> None:
    """Warn of a tile that has an official name, but is not what ESA publishes.

    Args:
        tile: The tile.
        stacklevel: As for :func:`warnings.warn`, seen from the caller.
    """
    official = tile.width == tile.height == TILE_SIZE
    if official_tile(tile.path) is not None and not official:
        degrees = abs(tile.transform.a)
        warnings.warn(
            f'{tile.path} has the name of an official tile, but {tile.width} x '
            f'{tile.height} pixels of {degrees:.3g} instead of {TILE_SIZE} x '
            f'{TILE_SIZE} of {TILE_DEGREES / TILE_SIZE:.3g} degrees: it was '
            'resampled, so small patches of land cover may be lost',
            UserWarning,
            stacklevel + 1,
        )
