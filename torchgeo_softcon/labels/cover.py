# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The tiles under an archive: in folders, to be downloaded, or read where they are."""

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import shapely

from .._checks import require
from .._workers import Workers
from ..geo.antimeridian import Floats
from ..geo.find_files import AnyPath as Path
from ..geo.find_files import path_list
from ..geo.mosaic import Tile
from ..landcover.download import download_tiles
from ..landcover.files import assumed_year, find_map_files, map_year, warn_of_resampled
from ..landcover.product import LandCoverProduct
from .blocks import open_path


@dataclass
class Cover:
    """Tiles that may lie under an archive, in order of precedence.

    Official tiles are *absent*, by name, if they do not exist (sea), and *failed* if they
    could not be fetched, with the reason.
    """

    tiles: list[Tile] = field(default_factory=list)
    absent: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)


class LandCover:
    """The tiles of a land-cover product, where the user says that they are."""

    def __init__(
        self,
        paths: Path | Iterable[Path],
        product: LandCoverProduct,
        url: str | None = None,
        progress: bool = True,
    ) -> None:
        """Initialize a new LandCover instance.

        Args:
            paths: Folders and files, or the address of a bucket as ``/vsicurl/https://...``.
            product: The land-cover product.
            url: Address to download missing tiles from, None for no download.
            progress: Whether to show a progress bar for downloads.

        Raises:
            ValueError: If *paths* is not one folder to download to, or if the product has
                no tiles to download or to find in a bucket.
        """
        self.paths, self.product, self.progress = path_list(paths), product, progress
        self.url, self.bucket = url, remote_bucket(self.paths)
        if not self.local:
            product.grid  # noqa: B018, raises an error if there is none
        require(
            url is None or (len(self.paths) == 1 and not os.path.isfile(self.paths[0])),
            f'worldcover must be one folder to download to, got {", ".join(self.paths)}',
        )

    @property
    def local(self) -> bool:
        """Whether there are no other tiles than those on the disk."""
        return self.url is None and self.bucket is None

    def files(self, year: int | None) -> list[str]:
        """Find the tiles of a year, also among files that are named one by one.

        A dataset takes every file that is named. Labels are said to be those of one map,
        so here their year counts, too.
        """
        files = find_map_files(self.paths, self.product, year)
        chosen = [f for f in files if map_year(f, self.product) in (None, year)]
        if not chosen:
            raise FileNotFoundError(
                f'worldcover must have tiles of {year}, got only those of other years, '
                f'such as {files[0]}: choose their year, or name files of {year}'
            )
        return chosen

    def find_years(self, years: Sequence[int | None]) -> list[int | None]:
        """Return the years that there may be tiles of, an error if there are none."""
        if not self.local:
            return [*years]
        found: list[int | None] = []
        for year in years:
            with suppress(FileNotFoundError):
                self.files(year)
                found.append(year)
        if not found:
            self.files(years[0])  # says what is missing
        return found

    def names(self, years: Iterable[int | None]) -> list[str]:
        """Return the names of the tiles that are there, none if they are on a server."""
        files = set()
        for year in years if self.bucket is None else ():
            with suppress(FileNotFoundError):
                files |= {*self.files(year)}
        return sorted(map(os.path.basename, files))

    def cover(self, year: int | None, boxes: Floats, workers: Workers) -> Cover:
        """Find the tiles of a year under boxes, which workers open.

        *boxes* are left, bottom, right and top in degrees, of shape (N, 4).
        """
        product, cover = self.product, Cover()
        if self.bucket is not None:
            names = product.grid.names_under(boxes)
            paths = [f'{self.bucket}/{product.file_path(n, year)}' for n in names]
            tiles = _open(paths, workers)
            for name, path, opened in zip(names, paths, tiles, strict=True):
                if isinstance(opened, Tile):
                    cover.tiles.append(opened)
                # The address itself may have the number, too
                elif 'HTTP response code: 404' in opened.replace(path, ''):
                    cover.absent.add(name)
                else:
                    cover.failed[name] = opened
            return cover

        if self.url is not None:
            result = download_tiles(
                product.grid.names_under(boxes),
                self.paths[0],
                year,
                self.url,
                progress=self.progress,
                product=product,
            )
            cover.absent, cover.failed = set(result.absent), result.failed
        try:
            files = self.files(year)
        except FileNotFoundError:
            if self.url is None:
                raise
            return cover
        for file, opened in zip(files, _open(files, workers), strict=True):
            if not isinstance(opened, Tile):
                raise OSError(opened if file in opened else f'{file}: {opened}')
            # Of the caller of label_archive
            warn_of_resampled(opened, product, stacklevel=4)
            cover.tiles.append(opened)
        if text := assumed_year(files, product, year):
            warnings.warn(text, UserWarning, stacklevel=4)
        return cover

    def reasons(
        self, cover: Cover, boxes: Floats, uncovered: Sequence[int], year: int | None
    ) -> dict[int, str]:
        """Return why boxes have no land cover, by row.

        That is, tiles under the box failed, or those of the rows *uncovered* do not exist
        and it is not known that there is only sea.
        """
        out, product = {}, self.product
        for row in uncovered:
            names = []
            with suppress(ValueError):  # it has no tiles
                names = product.grid.names_under(boxes[row])
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
                name = product.file_name(failed[number], year)
                reason = cover.failed[failed[number]]
                out[row] = f'{name} cannot be downloaded: {reason}'
        return out


def remote_bucket(worldcover: Path | Iterable[Path]) -> str | None:
    """Return the address of a bucket to read in place, None for folders and files."""
    address, *more = (path.rstrip('/') for path in path_list(worldcover) or [''])
    is_file = address.lower().endswith(('.tif', '.tiff', '.vrt'))
    if more or is_file or not address.startswith(('/vsi', 'http')):
        return None
    return f'/vsicurl/{address}' if address.startswith('http') else address


def _open(paths: list[str], workers: Workers) -> list[Tile | str]:
    """Open files in workers, as it takes its time on a server."""
    opened = dict(workers.map(open_path, paths))
    return [opened[path] for path in paths]
