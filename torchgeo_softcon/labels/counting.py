# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pixels of every land-cover class in footprints.

A pixel grid has, at every pixel, the class that the map has at the pixel's centre, which
is the nearest-neighbour warp of the map onto that grid. An outline without pixels has the
pixels of the map whose centres lie inside of it.

Nearly all grids lie in one official tile. For those, positions come from a polynomial of
the map projection, made for many grids at once, and pixels from blocks that are decoded
once. Everything else takes the way of :class:`.Mosaic`, with the same result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import rasterio
import shapely
from affine import Affine
from numpy.polynomial import chebyshev
from pyproj import CRS
from pyproj.exceptions import ProjError
from rasterio.features import geometry_mask

from ..geo.antimeridian import Floats
from ..geo.footprints import by_crs, to_crs, transforms_of
from ..geo.grid import Grid, apply, parse_crs
from ..geo.mosaic import Tile
from ..geo.warp import EDGE, node_positions, project, to_coefficients, vandermonde
from .blocks import BlockMosaic, gdal_options

Counts = npt.NDArray[np.int64]

#: Nodes per axis of the polynomial that stands for a map projection. For a grid of
#: 264 pixels of 10 m in UTM, it is off by 1e-9 pixels.
_NODES = 4

#: Largest error of that polynomial, in pixels of the map.
_TOLERANCE = 1e-5

#: Largest part of a grid or of a tile, in pixels, that is looked at at once.
_MAX_PIXELS = 2**22

#: Pixels of a grid that are looked up at once.
_STRIP = 24_000

#: Pixels of all official tiles together, for outlines where no tile is.
_LATTICE = Grid(
    parse_crs('EPSG:4326'), Affine(1 / 12000, 0, -180, 0, -1 / 12000, 84), 0, 0
)


#: What a footprint or the tiles under it may be wrong in.
_FAILURES = (OSError, ProjError, ValueError, shapely.errors.GEOSException)


@dataclass
class Counted:
    """Pixels of some footprints, and how many blocks were decoded for them."""

    counts: Counts  # of every class, (N, K)
    pixels: Counts  # all of them, those without data as well, (N,)
    reasons: dict[int, str] = field(default_factory=dict)  # why no counts, by row
    decoded: int = 0


def count_pixels(
    table: pa.Table,
    tiles: Sequence[Tile],
    codes: Sequence[int],
    no_data: Sequence[int] = (0,),
) -> Counted:
    """Count the pixels of every class in footprints.

    Best in the order of the blocks under them. All codes but *codes*, the K of the
    classes, and *no_data* are errors. Tiles are in order of precedence.
    """
    out = Counted(
        np.zeros((len(table), len(codes)), np.int64), np.zeros(len(table), np.int64)
    )
    with rasterio.Env(**gdal_options(tile.path for tile in tiles)):
        mosaic = BlockMosaic(tiles, codes, no_data)
        counter = _Counter(mosaic, codes)
        grids = _Grids(table, tiles)
        for row in range(len(table)):
            try:
                out.counts[row], out.pixels[row] = counter.count(table, grids, row)
            except _FAILURES as error:
                out.reasons[row] = ' '.join(str(error).split())
    out.decoded = mosaic.decoded
    return out


class _Grids:
    """Pixel grids that lie in one tile each: polynomials from pixels to its pixels."""

    def __init__(self, table: pa.Table, tiles: Sequence[Tile]) -> None:
        """Project all footprints that are grids at once."""
        count = len(table)
        self.tiles = tiles
        self.shapes = np.stack(
            [table[name].to_numpy() for name in ('height', 'width')], 1
        )
        #: Tile of each grid, -1 for those that are to be counted in another way.
        self.tile = np.full(count, -1)
        #: Coefficients of row and column in the tile, (N, 2, nodes, nodes).
        self.coefficients = np.zeros((count, 2, _NODES, _NODES))
        #: Whether rows and columns of the grid are parallel to those of the tile.
        self.parallel = np.zeros(count, np.bool_)
        #: First and last row, first and last column in the tile that may be met.
        self.windows = np.zeros((count, 2, 2), np.int64)
        if len({tile.crs for tile in tiles}) != 1:
            return
        transforms = transforms_of(table)
        for crs, rows in by_crs(table):
            rows = rows[self.shapes[rows, 0] > 0]
            if len(rows):
                self._place(crs, rows, transforms[rows])

    def _place(self, crs: str, rows: npt.NDArray[np.int64], transforms: Floats) -> None:
        """Find the tiles of grids of one CRS."""
        height, width = self.shapes[rows, :1], self.shapes[rows, 1:]
        nodes = node_positions(_NODES)
        y, x = (axis.ravel() for axis in np.meshgrid(nodes, nodes, indexing='ij'))
        # Corner pixels and the middle tell how good the polynomial is
        ends = np.array([0, 0, 1, 1, 0.5]), np.array([0, 1, 0, 1, 0.5])
        checks = ends[0] * (height - 1) + 0.5, ends[1] * (width - 1) + 0.5
        row = np.concatenate([y * height, checks[0]], 1)
        col = np.concatenate([x * width, checks[1]], 1)
        numbers, target = transforms.T[:, :, None], self.tiles[0].crs
        try:
            east, north = project(parse_crs(crs), target, numbers, col, row)
        except (ProjError, ValueError):
            return
        # Values of the polynomials there, (N, checks, nodes) each
        basis = [
            chebyshev.chebvander(2 * check / size - 1, _NODES - 1)
            for check, size in zip(checks, (height, width), strict=True)
        ]
        for number, tile in enumerate(self.tiles):
            tile_col, tile_row = apply(~tile.transform, east, north)
            position = np.stack([tile_row, tile_col], 1)  # (N, 2, nodes² + checks)
            self._fit(rows, number, position, basis)

    def _fit(
        self,
        rows: npt.NDArray[np.int64],
        number: int,
        position: Floats,
        basis: Sequence[Floats],
    ) -> None:
        """Take the grids that lie in a tile, and give up those that only touch it."""
        tile = self.tiles[number]
        size = np.array([tile.height, tile.width])
        with np.errstate(invalid='ignore'):
            touches = (position.max(2) > -1) & (position.min(2) < size + 1)
        near = np.flatnonzero(touches.all(1))
        rows, position = rows[near], position[near]

        values = position[..., : _NODES**2].reshape(-1, 2, _NODES, _NODES)
        matrix = to_coefficients(_NODES)
        coefficients = matrix @ values @ matrix.T
        y, x = (axis[near] for axis in basis)
        found = np.einsum('nci,naij,ncj->nac', y, coefficients, x)
        error = abs(found - position[..., _NODES**2 :]).max((1, 2), initial=0)
        coefficients[:, :, 0, 0] += EDGE
        # No Chebyshev polynomial leaves [-1, 1]
        middle = coefficients[:, :, 0, 0]
        reach = abs(coefficients).sum((2, 3)) - abs(middle)
        low, high = np.floor(middle - reach), np.floor(middle + reach)
        inside = ((low >= 0) & (high < size)).all(1)
        small = (high - low + 1).prod(1) <= _MAX_PIXELS
        small &= self.shapes[rows].prod(1, dtype=np.int64) <= _MAX_PIXELS
        sound = inside & small & (error <= _TOLERANCE)
        # Not where another tile has a part or may have it
        alone = self.tile[rows] == -1
        self.tile[rows] = np.where(sound & alone, number, -2)
        self.coefficients[rows] = coefficients
        across = abs(coefficients[:, 0, :, 1:]).sum((1, 2))
        down = abs(coefficients[:, 1, 1:]).sum((1, 2))
        self.parallel[rows] = across + down < 0.1 * EDGE
        self.windows[rows[sound]] = np.stack([low, high + 1], 2)[sound]


class _Counter:
    """Counts footprints one after the other."""

    def __init__(self, mosaic: BlockMosaic, codes: Sequence[int]) -> None:
        """Initialize a new _Counter instance for a map and the codes to count."""
        self.mosaic = mosaic
        # Bytes are compared with bytes eight times as fast as with int64
        self.codes = np.array(codes, np.uint8)
        self.plain = [
            tile.plain and tile.nodata in (None, mosaic.fill) for tile in mosaic.tiles
        ]
        # The most frequent first: once all pixels are found, no other code has any
        self.order = list(range(len(codes)))

    def count(self, table: pa.Table, grids: _Grids, row: int) -> tuple[Counts, int]:
        """Return the pixels of every class in a footprint, and all of its pixels."""
        counts = self._placed(grids, row)
        height, width = grids.shapes[row].tolist()
        if counts is not None:
            return counts, height * width
        crs = parse_crs(table['crs'][row].as_py())
        if height:
            transform = Affine(*table['transform'][row].as_py())
            return self._read(Grid(crs, transform, height, width))
        return self._polygon(crs, shapely.from_wkb(table['polygon'][row].as_py()))

    def _placed(self, grids: _Grids, row: int) -> Counts | None:
        """Count a grid that lies in one tile, None if it does not or has odd codes."""
        number = int(grids.tile[row])
        if number < 0 or not self.plain[number]:
            return None
        height, width = grids.shapes[row].tolist()
        (top, bottom), (left, right) = grids.windows[row].tolist()
        pixels, first, stride = self.mosaic.flat(
            grids.tiles[number], ((top, bottom), (left, right))
        )
        if pixels.dtype != np.uint8:
            return None

        weights = np.matmul(vandermonde(height, _NODES), grids.coefficients[row])
        weights[0, :, 0] -= top
        weights[1, :, 0] -= left
        columns = vandermonde(width, _NODES).T
        if grids.parallel[row]:
            # One row of the tile for each row of the grid, and so the columns
            rows = weights[0, :, 0].astype(np.intp) + first // stride
            cols = (weights[1, :1] @ columns)[0].astype(np.intp) + first % stride
            block = pixels.reshape(-1, stride)
            values = _steps(block, rows, 0)
            return self._histogram(_steps(values, cols, 1))
        values = np.empty((height, width), np.uint8)
        # Strips that stay in the cache of the processor
        strip = max(_STRIP // width, 1)
        for start in range(0, height, strip):
            position = weights[:, start : start + strip] @ columns
            # They are positive, so this is the floor
            index, col = position.astype(np.int32)
            index *= stride
            index += col
            values[start : start + strip] = pixels[first:].take(index)
        return self._histogram(values)

    def _histogram(self, values: npt.NDArray[np.uint8]) -> Counts | None:
        """Count the pixels of every code, None if there are others but no data."""
        counts = np.zeros(len(self.codes), np.int64)
        left = values.size
        for position in self.order:
            counts[position] = found = np.count_nonzero(values == self.codes[position])
            left -= int(found)
            if not left:
                break
        if left:
            # Bytes are counted twice as fast as they are compared
            known = values != self.mosaic.fill if self.mosaic.fill else values
            if left != values.size - np.count_nonzero(known):
                return None
        # The next footprint is a neighbour
        self.order = np.argsort(-counts, kind='stable').tolist()
        return counts

    def _read(
        self, grid: Grid, polygon: shapely.Geometry | None = None
    ) -> tuple[Counts, int]:
        """Count a grid of any size piece by piece, or what is inside of a polygon."""
        counts, pixels = np.zeros(len(self.codes), np.int64), 0
        for piece in _pieces(grid):
            chosen: Any = slice(None)
            if polygon is not None:
                shape = piece.height, piece.width
                chosen = geometry_mask([polygon], shape, piece.transform, invert=True)
                if not chosen.any():
                    continue
            values = self.mosaic.read(piece)[chosen].ravel()
            counts += np.bincount(values, minlength=256)[self.codes]
            pixels += values.size
        return counts, pixels

    def _polygon(self, crs: CRS, polygon: shapely.Geometry) -> tuple[Counts, int]:
        """Count the pixels of the map whose centres lie in an outline."""
        tile = self._home(crs, polygon)
        polygon = to_crs(polygon, crs, tile.crs)
        box = np.array(polygon.bounds)
        cols, rows = apply(~tile.transform, box[[0, 0, 2, 2]], box[[1, 3, 1, 3]])
        left, top = np.floor(cols.min()), np.floor(rows.min())
        right, bottom = np.ceil(cols.max()), np.ceil(rows.max())
        size = max(int(bottom - top), 1), max(int(right - left), 1)
        return self._read(tile.window(int(top), int(left), *size), polygon)

    def _home(self, crs: CRS, polygon: shapely.Geometry) -> Grid:
        """Return the tile whose pixels an outline is filled with: the first under it."""
        for tile in self.mosaic.tiles:
            box = shapely.box(*to_crs(polygon, crs, tile.crs).bounds)
            if box.intersection(shapely.box(*tile.bounds)).area > 0:
                return tile
        return self.mosaic.tiles[0] if self.mosaic.tiles else _LATTICE


def _steps(
    values: npt.NDArray[Any], numbers: npt.NDArray[np.intp], axis: int
) -> npt.NDArray[Any]:
    """Take rows or columns, without a copy if they are neighbours."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        part = slice(first, last + 1)
        return values[part] if axis == 0 else values[:, part]
    return values.take(numbers, axis)


def _pieces(grid: Grid) -> Iterator[Grid]:
    """Split a grid into pieces that fit into memory."""
    side = int(_MAX_PIXELS**0.5)
    for top in range(0, grid.height, side):
        for left in range(0, grid.width, side):
            size = min(side, grid.height - top), min(side, grid.width - left)
            yield grid.window(top, left, *size)
