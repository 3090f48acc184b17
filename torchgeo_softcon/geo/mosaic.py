# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Windows out of many rasters of class codes, on any grid, by nearest neighbour."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from pyproj import CRS
from rasterio.errors import RasterioError
from shapely.affinity import translate

from .antimeridian import TURNS, Floats
from .grid import LONLAT, Bounds, Grid, outline, parse_crs
from .open_files import OpenFiles
from .rasters import check_place, find_alpha, has_mask, open_raster
from .warp import Warp

Codes = npt.NDArray[np.uint8]

#: First and last row, first and last column of a part of a raster, without the last.
Block = tuple[tuple[int, int], tuple[int, int]]

#: Largest part of a raster, in pixels, that is in memory at once (16 MiB of bytes).
_MAX_SOURCE = 2**24

#: Rasters that are open at once in one process.
_MAX_OPEN = 32


@dataclass(frozen=True)
class Tile(Grid):
    """A raster file of class codes.

    Attributes:
        path: The file.
        nodata: Code for no data, None if there is none.
        masked: Whether a mask in the file or beside it, or an alpha band, tells, too.
        scale: Factor from the numbers in the file to codes.
        offset: What is added to them then.
    """

    path: str
    nodata: float | None
    masked: bool = False
    scale: float = 1.0
    offset: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether codes are stored as they are, and nothing but *nodata* is no data."""
        return not self.masked and (self.scale, self.offset) == (1, 0)


def _open(path: str) -> Any:
    """Open a raster, on a server without a look at what lies beside it."""
    return open_raster(path, alone=not os.path.exists(path))


def open_tile(path: str) -> Tile:
    """Check a raster of class codes."""
    try:
        source = _open(path)
    except OSError as error:
        raise OSError(
            f'{path} cannot be opened, it is truncated or no raster: fetch it again or '
            f'take it out of the folder ({error})'
        ) from error
    with source:
        check_place(source)
        alpha, dtype = find_alpha(source), source.dtypes[0]
        if [i for i in source.indexes if i != alpha] != [1]:
            raise ValueError(
                f'{path} must have one band of class codes, got {source.count} bands: '
                'keep other rasters in another folder'
            )
        if not np.issubdtype(np.dtype(dtype), np.integer):
            raise ValueError(
                f'{path} must hold class codes as whole numbers, got {dtype}: convert '
                'it with `gdal_translate -ot Byte`'
            )
        return Tile(
            **vars(Grid.of(source)),
            path=path,
            nodata=source.nodata,
            masked=alpha is not None or has_mask(source),
            scale=source.scales[0],
            offset=source.offsets[0],
        )


def scale_codes(
    codes: npt.NDArray[Any], scale: float, offset: float
) -> npt.NDArray[Any]:
    """Apply the scale and offset of a file to codes, which become whole if they can."""
    if (scale, offset) == (1, 0):
        return codes
    values = codes * scale + offset
    whole = np.rint(values)
    near = np.allclose(values, whole, rtol=0, atol=1e-3)
    return whole.astype(np.int64) if near else values


class Mosaic:
    """Rasters of class codes as one map. Safe to pickle, to fork and to share.

    Where rasters overlap, the first one that has data at a pixel is taken.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        codes: Sequence[int],
        cache: bool,
        no_data: Sequence[int] = (0,),
    ) -> None:
        """Initialize a new Mosaic instance of tiles in order of precedence.

        With *cache*, files stay open. The first code of *no_data* stands for all of them.
        """
        self.tiles = list(tiles)
        by_crs: dict[CRS, list[Tile]] = {}
        for tile in self.tiles:
            # Tiles in degrees are there at every turn around the Earth
            for turns in TURNS if tile.crs.is_geographic else TURNS[:1]:
                a, b, c, d, e, f = tile.transform[:6]
                moved = Affine(a, b, c + 360 * turns, d, e, f)
                by_crs.setdefault(tile.crs, []).append(replace(tile, transform=moved))
        self._by_crs = [
            (crs, copies, np.array([copy.bounds for copy in copies]))
            for crs, copies in by_crs.items()
        ]
        self.fill = no_data[0]
        self._legend = np.isin(np.arange(256), [self.fill, *codes])
        # Bytes often have 255 for no data without saying so
        self._ignored = np.setdiff1d([*no_data, 255], [self.fill, *codes])
        self.files = OpenFiles(_open, _MAX_OPEN if cache else 0)

    def read(self, grid: Grid) -> Codes:
        """Read the codes at the pixel centres of a grid, no data where no tile has any.

        In degrees, the grid may lie beyond [-180, 180].
        """
        out = np.full((grid.height, grid.width), self.fill, np.uint8)
        # Places that do not exist in the CRS of a tile are infinite, which is handled
        with np.errstate(invalid='ignore'):
            for crs, copies, boxes in self._by_crs:
                warp = Warp(grid, crs)
                for number in _touched(boxes, warp.bounds):
                    if not self._fill(out, warp, copies[number]):
                        return self._read_halves(grid)
        return out

    def _read_halves(self, grid: Grid) -> Codes:
        """Read a grid that spans too much of a tile for the memory."""
        height, width = grid.height, grid.width
        half = max(height, width) // 2
        parts = [(0, 0, half, width), (half, 0, height - half, width)]
        if height < width:
            parts = [(0, 0, height, half), (0, half, height, width - half)]
        halves = [self.read(grid.window(*part)) for part in parts]
        return np.concatenate(halves, int(height < width))

    def _fill(self, out: Codes, warp: Warp, tile: Tile) -> bool:
        """Fill the gaps of *out* from a tile, False if that would need too much."""
        row, col = warp.pixels(tile)
        whole = row.min() >= 0 and row.max() < tile.height
        whole = whole and col.min() >= 0 and col.max() < tile.width
        target: Any = slice(None)
        if not whole or (out != self.fill).any():
            target = (out == self.fill) & (row >= 0) & (row < tile.height)
            target &= (col >= 0) & (col < tile.width)
            row, col = row[target], col[target]
            if not len(row):
                return True

        top, left = int(row.min()), int(col.min())
        shape = (int(row.max()) + 1 - top, int(col.max()) + 1 - left)
        if shape[0] * shape[1] > _MAX_SOURCE and out.size > 1:
            return False
        block = self._block(tile, ((top, top + shape[0]), (left, left + shape[1])))
        # At most _MAX_SOURCE, so 32 bits are enough
        index = (row - top) * shape[1]
        index += col
        index -= left
        out[target] = block.ravel().take(index)
        return True

    def _block(self, tile: Tile, part: Block) -> Codes:
        """Read a part of a tile, all codes of no data as the first of them."""
        block = self._stored(tile, part)
        if not tile.plain:
            empty = block == tile.nodata
            if tile.masked:
                empty |= self._read(tile, part, 'dataset_mask') == 0
            block = scale_codes(block, tile.scale, tile.offset)
            block[empty] = self.fill
        elif tile.nodata not in (None, self.fill):
            block[block == tile.nodata] = self.fill
        if block.dtype != np.uint8:
            foreign = block[(block < 0) | (block > 255) | (block != np.rint(block))]
            self._check(tile, np.unique(foreign))
            block = block.astype(np.uint8)
        known = self._legend[block]
        if not known.all():
            self._check(tile, np.setdiff1d(block[~known], self._ignored))
            block[~known] = self.fill
        return block

    def _stored(
        self, tile: Tile, part: Block, out: npt.NDArray[Any] | None = None
    ) -> npt.NDArray[Any]:
        """Read a part of a tile as it is stored, into *out* if it is given."""
        return self._read(tile, part, 'read', 1, out=out)

    def _read(
        self, tile: Tile, part: Block, method: str, *args: Any, **options: Any
    ) -> npt.NDArray[Any]:
        """Read a part of a tile by a method of rasterio."""
        try:
            with self.files.use(tile.path) as source:
                read = getattr(source, method)
                return np.asarray(read(*args, window=part, **options))
        except RasterioError as error:
            raise OSError(
                f'{tile.path} cannot be read at rows and columns {part}, it is '
                f'truncated or damaged: fetch it again ({error})'
            ) from error

    def _check(self, tile: Tile, foreign: npt.NDArray[Any]) -> None:
        """Raise an error if there are foreign codes."""
        if len(foreign):
            more = ', ...' if len(foreign) > 5 else ''
            names = ', '.join(map(str, foreign[:5])) + more
            codes = ', '.join(map(str, np.flatnonzero(self._legend)))
            raise ValueError(
                f'{tile.path} must hold the class codes {codes}, got also {names}: it '
                'is another product, or was interpolated (resample it with nearest '
                'neighbour), or its codes were changed'
            )

    @functools.cached_property
    def _ground(self) -> shapely.Geometry:
        """The ground under all tiles in degrees, at every turn around the Earth."""
        lonlat = parse_crs(LONLAT)
        boxes = [outline(tile.crs, lonlat, tile.bounds) for tile in self.tiles]
        ground = shapely.union_all(boxes).buffer(1e-9)
        moved = [translate(ground, 360.0 * turns) for turns in TURNS]
        return shapely.union_all(moved)

    def covers(self, crs: CRS, bounds: Bounds, wholly: bool = False) -> bool:
        """Tell whether there are tiles under a box, or under all of it."""
        box = outline(crs, parse_crs(LONLAT), bounds)
        if wholly:
            return bool(self._ground.covers(box))
        return bool(self._ground.intersection(box).area > 1e-6 * box.area)


def _touched(boxes: Floats, box: Bounds) -> npt.NDArray[np.int64]:
    """Find the boxes of shape (N, 4) that touch a box, all if that is not finite."""
    left, bottom, right, top = boxes.T
    # Not `left < box[2]`, which is not true either if it is not finite
    apart = (left > box[2]) | (right < box[0]) | (bottom > box[3]) | (top < box[1])
    return np.flatnonzero(~apart)
