# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The tiles under an archive: in folders, to be downloaded, or read where they are."""

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import shapely

from ..geo.antimeridian import Floats
from ..geo.find_files import AnyPath as Path
from ..geo.find_files import path_list
from ..geo.mosaic import Tile
from ..landcover.download import download_tiles
from ..landcover.files import assumed_year, find_map_files, map_year, warn_of_resampled
from ..landcover.product import LandCoverProduct
from .blocks import open_path
from .workers import Workers


@dataclass
class Cover:
    """Tiles that may lie under an archive, in order of precedence.

    Official tiles are *absent*, by name, if they do not exist (sea), and *failed* if they
    could not be fetched, with the reason.
    """

    tiles: list[Tile] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)


def find_cover(
    worldcover: Path | Iterable[Path],
    product: LandCoverProduct,
    year: int | None,
    boxes: Floats,
    workers: Workers,
    base_url: str | None = None,
    progress: bool = True,
) -> Cover:
    """Find the tiles of a product and year under boxes.

    Args:
        worldcover: Folders and files, or the address of a bucket as
            ``/vsicurl/https://...``.
        product: The land-cover product.
        year: Year of the map.
        boxes: Left, bottom, right and top in degrees of longitude and latitude, (N, 4).
        workers: Processes that open the files.
        base_url: Address to download missing tiles from, None for no download.
        progress: Whether to show a progress bar for downloads.
    """
    bucket = remote_bucket(worldcover)
    if bucket is not None:
        names = product.grid.names_under(boxes)
        paths = [f'{bucket}/{product.file_path(name, year)}' for name in names]
        cover = Cover()
        for name, path, opened in zip(names, paths, _open(paths, workers), strict=True):
            if isinstance(opened, Tile):
                cover.tiles.append(opened)
            # The address itself may have the number, too
            elif 'HTTP response code: 404' in opened.replace(path, ''):
                cover.absent.add(name)
            else:
                cover.failed[name] = opened
        return cover

    cover = Cover()
    if base_url is not None:
        result = download_tiles(
            product.grid.names_under(boxes),
            download_folder(worldcover),
            year,
            base_url,
            progress=progress,
            product=product,
        )
        cover.absent, cover.failed = set(result.absent), result.failed
    try:
        files = find_year(worldcover, product, year)
    except FileNotFoundError:
        if base_url is None:
            raise
        return cover
    for file, opened in zip(files, _open(files, workers), strict=True):
        if not isinstance(opened, Tile):
            raise OSError(opened if file in opened else f'{file}: {opened}')
        # Of the caller of label_archive
        warn_of_resampled(opened, product, stacklevel=5)
        cover.tiles.append(opened)
    if text := assumed_year(files, product, year):
        warnings.warn(text, UserWarning, stacklevel=5)
    return cover


def find_year(
    worldcover: Path | Iterable[Path], product: LandCoverProduct, year: int | None
) -> list[str]:
    """Find the tiles of a year, also among files that are named one by one.

    A dataset takes every file that is named. Labels are said to be those of one map, so
    here their year counts, too.
    """
    files = find_map_files(worldcover, product, year)
    chosen = [file for file in files if map_year(file, product) in (None, year)]
    if not chosen:
        raise FileNotFoundError(
            f'worldcover must have tiles of {year}, got only those of other years, such '
            f'as {files[0]}: choose their year, or name files of {year}'
        )
    return chosen


def remote_bucket(worldcover: Path | Iterable[Path]) -> str | None:
    """Return the address of a bucket to read in place, None for folders and files."""
    address, *more = (path.rstrip('/') for path in path_list(worldcover) or [''])
    is_file = address.lower().endswith(('.tif', '.tiff', '.vrt'))
    if more or is_file or not address.startswith(('/vsi', 'http')):
        return None
    return f'/vsicurl/{address}' if address.startswith('http') else address


def download_folder(worldcover: Path | Iterable[Path]) -> str:
    """Return the one folder that tiles are downloaded to."""
    paths = path_list(worldcover)
    if len(paths) != 1 or os.path.isfile(paths[0]):
        raise ValueError(
            f'worldcover must be one folder to download to, got {", ".join(paths)}'
        )
    return paths[0]


def reasons(
    cover: Cover,
    boxes: Floats,
    uncovered: Sequence[int],
    product: LandCoverProduct,
    year: int | None,
) -> dict[int, str]:
    """Return why boxes have no land cover, by row.

    That is, tiles under the box failed, or those of the rows *uncovered* do not exist and
    it is not known that there is only sea.
    """
    out = {}
    for row in uncovered:
        try:
            names = product.grid.names_under(boxes[row])
        except ValueError:
            names = []
        if names and cover.absent.issuperset(names):
            continue
        files = ', '.join(product.file_name(name, year) for name in names[:3])
        more = ', ...' if names[3:] else ''
        example = f': {files}{more} would be' if files else ''
        edition = '' if year is None else f' of {year}'
        out[int(row)] = f'no tile{edition} is under it{example}'
    if cover.failed:
        failed = list(cover.failed)
        bounds = np.array([product.grid.bounds(name) for name in failed])
        index = shapely.STRtree(shapely.box(*bounds.T))
        found, tile = index.query(shapely.box(*boxes.T))
        for row, number in zip(found.tolist(), tile.tolist(), strict=True):
            name = failed[number]
            out[row] = (
                f'{product.file_name(name, year)} cannot be downloaded: {cover.failed[name]}'
            )
    return out


def _open(paths: list[str], workers: Workers) -> list[Tile | str]:
    """Open files in workers, as it takes its time on a server."""
    opened = dict(workers.map(open_path, paths))
    return [opened[path] for path in paths]
