# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The order in which footprints are counted, and the units of work."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from ..geo.antimeridian import TURNS, Floats, turned_boxes
from ..geo.grid import LONLAT, Bounds, outline, parse_crs
from ..geo.mosaic import Tile
from .counting import Counted, count_pixels

#: Footprints per unit, at least and at most. What a unit has counted is lost if the run
#: is killed, and blocks where one unit ends and another begins are decoded twice.
_SMALLEST, _LARGEST = 256, 4096

#: Rows and columns of a block of an official tile.
_BLOCK = 1024

#: Boxes that are compared with the tiles at once.
_CHUNK = 2**16


class Unit(NamedTuple):
    """Footprints to count, with the tiles under them, see :func:`.count_pixels`."""

    table: pa.Table
    tiles: list[Tile]
    codes: tuple[int, ...]
    no_data: tuple[int, ...]


def count_unit(unit: Unit) -> tuple[pa.Array, Counted]:
    """Count the footprints of a work unit: ids, and the counts in their order."""
    return unit.table['id'].combine_chunks(), count_pixels(*unit)


class Plan:
    """Which tiles are under which footprints."""

    def __init__(self, boxes: Floats, tiles: Sequence[Tile]) -> None:
        """Find the tiles, in order of precedence, under footprints.

        *boxes*, of shape (N, 4), are left, bottom, right and top in degrees.
        """
        self.boxes, self.tiles = boxes, list(tiles)
        bounds = np.array([_degrees(tile) for tile in tiles]).reshape(-1, 4)
        self._bounds = bounds
        # Boxes may leave [-180, 180] on either side
        turns = np.repeat(TURNS, len(bounds))
        moved = turned_boxes(np.tile(bounds, (len(TURNS), 1)), turns)
        self._index = shapely.STRtree(shapely.box(*moved.T))
        #: First tile under each footprint, -1 if there is none.
        self.first = np.full(len(boxes), -1)
        for start in range(0, len(boxes), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(boxes)))
            found, tile = self._pairs(rows)
            order = np.lexsort((tile, found))
            found, where = np.unique(found[order], return_index=True)
            self.first[start + found] = tile[order][where]

    def units(
        self,
        table: pa.Table,
        todo: npt.NDArray[np.bool_],
        codes: Sequence[int],
        workers: int,
        no_data: Sequence[int] = (0,),
    ) -> Iterator[Unit]:
        """Cut footprints, those of the boxes, into units of neighbours.

        *todo*, of shape (N,), tells which are to be counted, *workers* how many units run
        at once.
        """
        order, rows_of_blocks = self._order(np.flatnonzero(todo))
        size = int(np.clip(len(order) / (2 * workers), _SMALLEST, _LARGEST))
        for start, stop in _cut(rows_of_blocks, size):
            rows = order[start:stop]
            tiles = [self.tiles[tile] for tile in np.unique(self._pairs(rows)[1])]
            yield Unit(table.take(pa.array(rows)), tiles, tuple(codes), tuple(no_data))

    def _order(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sort footprints by tile, row of blocks and column, and number these rows."""
        tile = self.first[rows]
        down = np.zeros(len(rows))
        if self.tiles:
            _, bottom, _, top = self._bounds[tile].T
            height = np.array([t.height for t in self.tiles])[tile]
            down = (top - self.boxes[rows, 3]) / (top - bottom) * height / _BLOCK
        row = np.where(tile < 0, 0, np.floor(down).clip(0)).astype(np.int64)
        order = np.lexsort((self.boxes[rows, 0], row, tile))
        number = (tile * (row.max(initial=0) + 1) + row)[order]
        return rows[order], number

    def _pairs(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return pairs of a footprint, as a position in *rows*, and a tile that it touches."""
        found, tile = self._index.query(shapely.box(*self.boxes[rows].T))
        return found, tile % max(len(self.tiles), 1)


def _cut(numbers: npt.NDArray[np.int64], size: int) -> Iterator[tuple[int, int]]:
    """Cut a sorted list where its numbers change, into parts of about a size."""
    ends = np.append(np.flatnonzero(np.diff(numbers)) + 1, len(numbers))
    start = 0
    while start < len(numbers):
        where = int(np.searchsorted(ends, start + size))
        change = ends[min(where, len(ends) - 1)]
        # Very many patches in one row of blocks
        stop = min(int(change), start + 2 * size)
        yield start, stop
        start = stop


def _degrees(tile: Tile) -> Bounds:
    """Return the box of a tile in degrees of longitude and latitude."""
    if tile.crs.is_geographic:
        return tile.bounds
    return tuple(outline(tile.crs, parse_crs(LONLAT), tile.bounds).bounds)
