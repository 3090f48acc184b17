# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Windows out of many rasters of class codes, on any grid, by nearest neighbour."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import rasterio
import shapely
from affine import Affine
from numpy.polynomial import chebyshev
from pyproj import CRS, Transformer
from rasterio.errors import RasterioError

from .open_files import OpenFiles

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.int32]

#: Nodes per axis of the polynomial that stands for a map projection. 8 keep the error
#: of a 100 km window between UTM and latitude/longitude below 1e-6 pixels.
_NODES = 8

#: Largest error of that polynomial, in pixels. Above, every pixel is projected.
_TOLERANCE = 1e-3

#: Pixel centres this close to an edge, in pixels, belong to the next pixel: without it,
#: rounding would decide, differently from pixel to pixel.
EDGE = 1e-6

#: Largest part of a raster, in pixels, that is in memory at once (16 MiB of bytes).
_MAX_SOURCE = 2**24

#: Farther than any raster reaches, in pixels, and little enough for 32 bits.
_FAR = 2**30

#: Rasters that are open at once in one process.
_MAX_OPEN = 32


class Tile(NamedTuple):
    """What must be known of a raster to find it."""

    path: str
    crs: CRS
    transform: Affine
    width: int
    height: int
    nodata: float | None

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top in units of the CRS."""
        x, y = _apply(
            self.transform,
            np.array([0.0, self.width, 0, self.width]),
            np.array([0.0, 0, self.height, self.height]),
        )
        return x.min(), y.min(), x.max(), y.max()


def open_tile(path: str) -> Tile:
    """Check a raster of class codes.

    Args:
        path: Path of the raster.

    Returns:
        Its georeference.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has no CRS, more than one band or is not of integers.
    """
    try:
        with rasterio.open(path) as src:
            crs, count, dtype = src.crs, src.count, src.dtypes[0]
            tile = (src.transform, src.width, src.height, src.nodata)
    except RasterioError as error:
        raise OSError(
            f'{path} cannot be opened, it is truncated or no raster: fetch it again or '
            f'take it out of the folder ({error})'
        ) from error

    if crs is None:
        raise ValueError(
            f'{path} has no coordinate reference system: set it, for example with '
            '`rio edit-info --crs EPSG:4326`'
        )
    if count != 1:
        raise ValueError(
            f'{path} must have one band of class codes, got {count} bands: keep other '
            'rasters in another folder'
        )
    if not np.issubdtype(np.dtype(dtype), np.integer):
        raise ValueError(
            f'{path} must hold class codes as whole numbers, got {dtype}: convert it '
            'with `gdal_translate -ot Byte`'
        )
    return Tile(path, CRS.from_user_input(crs), *tile)


@functools.lru_cache(maxsize=256)
def projection(source: CRS, target: CRS) -> Transformer | None:
    """Transformer between two CRSs with the order x, y, or None if they are one."""
    if source == target:
        return None
    return Transformer.from_crs(source, target, always_xy=True)


@functools.lru_cache(maxsize=256)
def _vandermonde(size: int) -> Floats:
    """Chebyshev polynomials at the pixel centres of an axis, (size, nodes)."""
    centres = (np.arange(size) + 0.5) * 2 / size - 1
    return np.asarray(chebyshev.chebvander(centres, _NODES - 1), np.float64)


@functools.cache
def _to_coefficients() -> Floats:
    """Matrix from values at the nodes to coefficients of the polynomials."""
    nodes = chebyshev.chebpts1(_NODES)
    to_values = chebyshev.chebvander(nodes, _NODES - 1)
    return np.asarray(np.linalg.inv(to_values), np.float64)


def _interpolate(values: Floats, height: int, width: int) -> Floats:
    """Values at the nodes of a window to values at its pixel centres, (H, W)."""
    coefficients = _to_coefficients() @ values @ _to_coefficients().T
    rows = _vandermonde(height) @ coefficients  # (H, nodes)

    # Over a few hundred pixels, a projection bends so little that two or three terms
    # are left. Their sum is faster than a product of matrices, which on a busy machine
    # also waits for the threads of its library.
    cols = _vandermonde(width).T
    out = np.repeat(rows[:, :1], width, 1)
    term = np.empty_like(out)
    for k in range(1, _NODES):
        if not np.abs(rows[:, k]).max() < 0.01 * _TOLERANCE:
            out += np.multiply(rows[:, k, None], cols[k], out=term)
    return out


def _apply(transform: Affine, cols: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """Transform arrays. Affine has `*` for that up to version 2, and `@` from 3 on."""
    a, b, c, d, e, f = transform[:6]
    return a * cols + b * rows + c, d * cols + e * rows + f


def _shift(transform: Affine, cols: int, rows: int) -> Affine:
    """Georeference of the pixels from a column and a row on."""
    a, b, c, d, e, f = transform[:6]
    return Affine(a, b, a * cols + b * rows + c, d, e, d * cols + e * rows + f)


def _project(
    to_tile: Transformer | None, transform: Affine, rows: Floats, cols: Floats
) -> tuple[Floats, Floats]:
    """Pixel positions of a window to coordinates of a tile."""
    x, y = _apply(transform, cols, rows)
    if to_tile is not None:
        x, y = to_tile.transform(x, y)
    return x, y


class Window:
    """The grid of a read, seen from the CRS of some tiles."""

    def __init__(
        self, to_tile: Transformer | None, transform: Affine, height: int, width: int
    ) -> None:
        """Project the nodes of the window.

        Args:
            to_tile: From the CRS of the window to the CRS of the tiles.
            transform: Georeference of the window.
            height: Rows of the window.
            width: Columns of the window.
        """
        self.to_tile, self.transform = to_tile, transform
        self.height, self.width = height, width

        nodes = (chebyshev.chebpts1(_NODES) + 1) / 2
        rows, cols = np.meshgrid(nodes * height, nodes * width, indexing='ij')
        self.nodes = _project(to_tile, transform, rows, cols)

        # Real pixel centres, the outermost among them, to see how good the nodes are
        near = [
            np.unique(np.linspace(0, size - 1, 6).round().astype(int))
            for size in (height, width)
        ]
        self.checked = np.ix_(near[0], near[1])
        rows, cols = np.meshgrid(near[0] + 0.5, near[1] + 0.5, indexing='ij')
        self.checks = _project(to_tile, transform, rows, cols)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Box that holds the centres of all pixels, a little too large."""
        box = []
        for i in range(2):
            values = np.concatenate([self.nodes[i].ravel(), self.checks[i].ravel()])
            low, high = values.min(), values.max()
            margin = 0.05 * (high - low)
            box.append((low - margin, high + margin))
        (left, right), (bottom, top) = box
        return left, bottom, right, top

    def pixels(self, tile: Tile) -> tuple[Pixels, Pixels]:
        """Row and column in a tile for every pixel of the window, (H, W) each."""
        inverse = ~tile.transform
        expected = _apply(inverse, *self.checks)
        positions = [
            _interpolate(values, self.height, self.width)
            for values in _apply(inverse, *self.nodes)
        ]
        errors = [
            np.abs(position[self.checked] - check).max()
            for position, check in zip(positions, expected, strict=True)
        ]
        # Not a number and infinity (no such place in the CRS) come here, too
        reach = max(np.abs(check).max() for check in expected)
        if not (max(errors) <= _TOLERANCE and reach < _FAR):
            rows, cols = np.indices((self.height, self.width)) + 0.5
            x, y = _project(self.to_tile, self.transform, rows, cols)
            bad = ~(np.isfinite(x) & np.isfinite(y))
            positions = [
                np.where(bad, -1, axis).clip(-1, _FAR) for axis in _apply(inverse, x, y)
            ]

        for position in positions:
            position += EDGE
            np.floor(position, out=position)
        col, row = (position.astype(np.int32) for position in positions)
        return row, col


class Mosaic:
    """Rasters of class codes as one map.

    Where rasters overlap, the first one that has data at a pixel is taken. A mosaic
    can be pickled, forked, and used by several threads: open files are never shared
    between processes, and one thread reads at a time.
    """

    def __init__(
        self,
        tiles: Sequence[Tile],
        codes: Sequence[int],
        cache: bool,
        no_data: Sequence[int] = (0,),
    ) -> None:
        """Initialize a new Mosaic instance.

        Args:
            tiles: Rasters, in order of precedence.
            codes: Codes of the classes.
            cache: Whether files stay open after a read.
            no_data: Codes of pixels without data. The first one stands for them.
        """
        self.tiles = list(tiles)
        self._boxes = np.array([tile.bounds for tile in self.tiles])
        self._crs = list(dict.fromkeys(tile.crs for tile in self.tiles))
        self._group = np.array([self._crs.index(tile.crs) for tile in self.tiles])
        self.fill = no_data[0]
        self._legend = np.isin(np.arange(256), [self.fill, *codes])
        # Bytes often have 255 for no data without saying so
        self._ignored = np.setdiff1d([*no_data, 255], [self.fill, *codes])
        self.files = OpenFiles(rasterio.open, _MAX_OPEN if cache else 0)

    def read(self, crs: CRS, transform: Affine, height: int, width: int) -> Codes:
        """Read the codes at the pixel centres of a grid.

        Args:
            crs: Coordinate reference system of the grid.
            transform: Georeference of the grid.
            height: Rows of the grid.
            width: Columns of the grid.

        Returns:
            Codes of shape (height, width), the code of no data where no tile has data.

        Raises:
            OSError: If a tile cannot be read.
            ValueError: If a tile has codes that are not in the legend.
        """
        out = np.full((height, width), self.fill, np.uint8)
        # Places that do not exist in the CRS of a tile are infinite, which is handled
        with np.errstate(invalid='ignore'):
            return self._read(out, crs, transform)

    def _read(self, out: Codes, crs: CRS, transform: Affine) -> Codes:
        """Fill *out*, the codes of a grid, from all tiles."""
        height, width = out.shape
        for i, tile_crs in enumerate(self._crs):
            window = Window(projection(crs, tile_crs), transform, height, width)
            for j in self._find(i, window.bounds):
                if not self._fill(out, self.tiles[j], window):
                    return self._read_halves(crs, transform, height, width)
        return out

    def _read_halves(
        self, crs: CRS, transform: Affine, height: int, width: int
    ) -> Codes:
        """Read a grid that spans too much of a tile for the memory."""
        if height >= width:
            half = height // 2
            lower = _shift(transform, 0, half)
            first = self.read(crs, transform, half, width)
            return np.vstack([first, self.read(crs, lower, height - half, width)])
        half = width // 2
        right = _shift(transform, half, 0)
        first = self.read(crs, transform, height, half)
        return np.hstack([first, self.read(crs, right, height, width - half)])

    def _find(self, group: int, box: tuple[float, float, float, float]) -> list[int]:
        """Indices of the tiles of one CRS that touch a box of that CRS."""
        left, bottom, right, top = self._boxes.T
        # Not `left < box[2]`: a box that is not finite touches everything
        apart = (left > box[2]) | (right < box[0]) | (bottom > box[3]) | (top < box[1])
        return [int(i) for i in np.flatnonzero(~apart & (self._group == group))]

    def _fill(self, out: Codes, tile: Tile, window: Window) -> bool:
        """Fill the gaps of *out* from a tile, False if that would need too much."""
        row, col = window.pixels(tile)
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

    def _block(
        self, tile: Tile, window: tuple[tuple[int, int], tuple[int, int]]
    ) -> Codes:
        """Read a part of a tile, all codes of no data as the first of them."""
        block = self._stored(tile, window)
        if tile.nodata is not None and tile.nodata != self.fill:
            block[block == tile.nodata] = self.fill
        if block.dtype != np.uint8:
            foreign = block[(block < 0) | (block > 255)]
            self._check(tile, np.unique(foreign))
            block = block.astype(np.uint8)
        known = self._legend[block]
        if not known.all():
            self._check(tile, np.setdiff1d(block[~known], self._ignored))
            block[~known] = self.fill
        return block

    def _stored(
        self,
        tile: Tile,
        window: tuple[tuple[int, int], tuple[int, int]],
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Read a part of a tile as it is stored, into *out* if it is given."""
        try:
            with self.files.use(tile.path) as source:
                return np.asarray(source.read(1, window=window, out=out))
        except RasterioError as error:
            raise OSError(
                f'{tile.path} cannot be read at rows and columns {window}, it is '
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
    def footprint(self) -> shapely.Geometry:
        """The ground under all tiles, in degrees of longitude and latitude."""
        lonlat = CRS.from_epsg(4326)
        boxes = [outline(tile.crs, lonlat, tile.bounds) for tile in self.tiles]
        return shapely.union_all(boxes).buffer(1e-9)


def join_halves(lon: Floats) -> Floats:
    """Bring the halves of an outline across the antimeridian together.

    Args:
        lon: Degrees of longitude of its corners, in [-180, 180].

    Returns:
        The same places, beyond 180 if it crosses that line.
    """
    return np.where(lon < 0, lon + 360, lon) if np.ptp(lon) > 180 else lon


def outline(
    source: CRS, target: CRS, bounds: tuple[float, float, float, float]
) -> shapely.Polygon:
    """Outline of a box in another CRS, with the bends of its edges.

    Args:
        source: CRS of the box.
        target: CRS of the outline.
        bounds: Left, bottom, right and top of the box.

    Returns:
        The outline. In degrees, it leaves [-180, 180] where it crosses that line.
    """
    left, bottom, right, top = bounds
    size = max(right - left, top - bottom)
    ring = shapely.segmentize(shapely.box(left, bottom, right, top), size / 32)
    x, y = shapely.get_coordinates(ring).T
    to_target = projection(source, target)
    if to_target is not None:
        x, y = to_target.transform(x, y)
        if target.is_geographic:
            x = join_halves(x)
    return shapely.Polygon(np.column_stack([x, y]))
