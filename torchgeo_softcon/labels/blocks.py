# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Rasters of class codes, read by blocks that are decoded once."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio

from ..geo.mosaic import Block, Mosaic, Tile, open_tile

#: Size of a cell in pixels, if the blocks of a file divide it: that of official tiles.
_CELL = 1024

#: Largest cell in pixels, for files whose blocks are whole rows.
_MAX_CELL = 2**22

#: Decoded cells that are kept, in bytes. Two rows of an official tile are 75 MB.
_MAX_BYTES = 2**27

#: What GDAL is told for rasters on a server: not to look for files beside them, and to
#: try again what a busy server did not answer.
_REMOTE = {
    'GDAL_DISABLE_READDIR_ON_OPEN': 'EMPTY_DIR',
    'GDAL_HTTP_MAX_RETRY': '3',
    'GDAL_HTTP_RETRY_DELAY': '1',
    'GDAL_HTTP_TIMEOUT': '60',
}

#: Block cache of GDAL in megabytes. It is of no use, blocks are kept here.
_GDAL_CACHE = 16


def gdal_options(paths: Iterable[str]) -> dict[str, Any]:
    """Return options of :class:`rasterio.Env` for reading tiles."""
    remote = any(path.startswith('/vsi') for path in paths)
    return {'GDAL_CACHEMAX': _GDAL_CACHE, **(_REMOTE if remote else {})}


def open_path(path: str) -> tuple[str, Tile | str]:
    """Open a tile."""
    try:
        with rasterio.Env(**gdal_options([path])):
            return path, open_tile(path)
    except (OSError, ValueError) as error:
        return path, str(error)


class BlockMosaic(Mosaic):
    """A mosaic that keeps the blocks it has decoded.

    A cell is a block of a file, or as many blocks as make about 1024 x 1024 pixels.
    Footprints that come in the order of their cells get each of them decoded once.
    """

    def __init__(
        self, tiles: Sequence[Tile], codes: Sequence[int], no_data: Sequence[int] = (0,)
    ) -> None:
        """Initialize a new BlockMosaic instance, see :class:`.Mosaic`."""
        super().__init__(tiles, codes, True, no_data)
        self._cells: OrderedDict[tuple[str, int, int], npt.NDArray[Any]] = OrderedDict()
        self._shapes: dict[str, tuple[int, int]] = {}
        self._dtypes: dict[str, npt.DTypeLike] = {}
        # Memory of cells that are not needed any more. New memory costs more time than
        # the decoding, as the system has to clear it
        self._spare: list[npt.NDArray[Any]] = []
        self._top = ('', 0)
        self._bytes = 0
        #: How many cells were decoded.
        self.decoded = 0

    def flat(self, tile: Tile, part: Block) -> tuple[npt.NDArray[Any], int, int]:
        """Return pixels of shape (N,) as they are stored, and where a part is in them.

        Returns:
            The pixels, the number of the first one of the part, and how many are in a row.
        """
        (top, bottom), (left, right) = part
        height, width = self._shape(tile)
        row, col = top // height, left // width
        if self._top != (tile.path, row):
            self._forget(tile, row)
        if (bottom - 1) // height == row and (right - 1) // width == col:
            cell = self._cell(tile, row, col)
            first = (top - row * height) * cell.shape[1] + left - col * width
            return cell.reshape(-1), first, cell.shape[1]
        return self._stored(tile, part).reshape(-1), 0, right - left

    def _forget(self, tile: Tile, row: int) -> None:
        """Give up the cells above a row of cells."""
        self._top = (tile.path, row)
        for key in [k for k in self._cells if k[0] == tile.path and k[1] < row]:
            self._drop(key)

    def _drop(self, key: tuple[str, int, int]) -> None:
        cell = self._cells.pop(key)
        self._bytes -= cell.nbytes
        self._spare.append(cell)

    def _stored(
        self, tile: Tile, part: Block, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Put a part of a tile together from its cells."""
        (top, bottom), (left, right) = part
        height, width = self._shape(tile)
        for i in range(top // height, (bottom - 1) // height + 1):
            for j in range(left // width, (right - 1) // width + 1):
                cell = self._cell(tile, i, j)
                if out is None:
                    out = np.empty((bottom - top, right - left), cell.dtype)
                # From and to rows and columns of the tile
                first, last = max(top, i * height), min(bottom, (i + 1) * height)
                start, stop = max(left, j * width), min(right, (j + 1) * width)
                out[first - top : last - top, start - left : stop - left] = cell[
                    first - i * height : last - i * height,
                    start - j * width : stop - j * width,
                ]
        assert out is not None  # windows have pixels
        return out

    def _cell(self, tile: Tile, row: int, col: int) -> npt.NDArray[Any]:
        """Return a cell, decoded unless it is kept."""
        key = (tile.path, row, col)
        cell = self._cells.get(key)
        if cell is None:
            height, width = self._shape(tile)
            rows = (row * height, min((row + 1) * height, tile.height))
            cols = (col * width, min((col + 1) * width, tile.width))
            shape = (rows[1] - rows[0], cols[1] - cols[0])
            spare = self._spare.pop() if self._spare else None
            if spare is not None and (
                spare.shape != shape or spare.dtype != self._dtypes[tile.path]
            ):
                spare = None
            cell = super()._stored(tile, (rows, cols), spare)
            self.decoded += 1
            self._cells[key] = cell
            self._bytes += cell.nbytes
            while self._bytes > _MAX_BYTES and len(self._cells) > 1:
                self._drop(next(iter(self._cells)))
        else:
            self._cells.move_to_end(key)
        return cell

    def _shape(self, tile: Tile) -> tuple[int, int]:
        """Return the height and width of the cells of a tile."""
        if tile.path not in self._shapes:
            with self.files.use(tile.path) as source:
                height, width = source.block_shapes[0]
                self._dtypes[tile.path] = np.dtype(source.dtypes[0])
            width = min(-(-_CELL // width) * width, tile.width)
            rows = max(min(_CELL, _MAX_CELL // width), 1)
            self._shapes[tile.path] = (-(-rows // height) * height, width)
        return self._shapes[tile.path]
