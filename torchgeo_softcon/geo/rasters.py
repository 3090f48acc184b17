# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Reading images: windows of scenes, which may have a file for each band."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from ..bands import Level
from .find_files import readable_name
from .grid import LONLAT, Grid, apply, parse_crs, projection
from .open_files import OpenFiles

Values = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

#: Colours of the bands of a photograph.
RGB_COLORS = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)

#: Datasets that a process keeps open. Four dates of thirteen files fit twice.
_MAX_OPEN = 128


@dataclass(frozen=True)
class Layer:
    """One or more bands of one file.

    Attributes:
        path: The file.
        indexes: Positions of the bands in the file, from 1.
        grid: Pixels of the file.
        nodata: Value without data of each band, None if there is none.
        dtype: Type of the file.
        alpha: Position of a band that is 0 where all others have no data.
        scale: Factor of the values of the file, one for each band.
        offset: What is added to the values then, one for each band.
        palette: Part of the colour (0 red, 1 green, 2 blue) that each band is of the
            file's colour table, empty if its values are no numbers of colours.
    """

    path: str
    indexes: tuple[int, ...]
    grid: Grid
    nodata: tuple[float | None, ...]
    dtype: str
    alpha: int | None = None
    scale: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    palette: tuple[int, ...] = ()

    def select(self, positions: Sequence[int]) -> 'Layer':
        """Return some of the bands."""
        names = ('indexes', 'nodata', 'scale', 'offset', 'palette')
        values = {name: getattr(self, name) for name in names}
        chosen: dict[str, Any] = {
            name: tuple(of_bands[p] for p in positions)
            for name, of_bands in values.items()
            if of_bands
        }
        return replace(self, **chosen)

    @property
    def declared(self) -> bool:
        """Whether the file declares a scale or an offset."""
        return any(factor != 1 for factor in self.scale) or any(self.offset)


@dataclass(frozen=True)
class Kind:
    """The numbers of a scene, as far as its files tell.

    Attributes:
        level: Processing level of Sentinel-2, None if nothing tells it.
        level_source: What tells the level.
        unit: ``'digital numbers'``, ``'reflectance'``, ``'dB'``, ``'linear'``, ``'8 bit'``,
            or several of them, '' if nothing tells it.
        source: In words, where the scale and offset that are applied are from.
    """

    level: Level | None = None
    level_source: str = ''
    unit: str = ''
    source: str = ''


@dataclass(frozen=True)
class Scene:
    """An image of one date.

    It is named after its file, or the common part of the names of its files. *layers*
    are in the order of *bands* (None if unknown), *grid* is that of the finest, *year* is
    when it was taken (None if nothing tells it).
    """

    name: str
    bands: tuple[str, ...] | None
    layers: tuple[Layer, ...]
    grid: Grid
    kind: Kind = Kind()
    year: int | None = None

    @property
    def count(self) -> int:
        """Number of bands."""
        return sum(len(layer.indexes) for layer in self.layers)


class DamagedFileError(OSError):
    """Raised if a raster, the file *path*, cannot be opened or read."""

    def __init__(self, message: str, path: str | os.PathLike[str] = '') -> None:
        """Initialize a new DamagedFileError instance."""
        super().__init__(message)
        self.path = os.fspath(path)


def open_raster(path: str | os.PathLike[str], alone: bool = False) -> Any:
    """Open a raster with rasterio.

    Files beside it, such as its mask, are looked for unless it is *alone*, whatever the
    environment of the process says.
    """
    siblings = 'EMPTY_DIR' if alone else 'FALSE'
    try:
        with (
            warnings.catch_warnings(),
            rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN=siblings),
        ):
            # The caller looks at the CRS, and images in a folder have none
            warnings.simplefilter('ignore', NotGeoreferencedWarning)
            return rasterio.open(path)
    except UnicodeEncodeError as error:
        name = readable_name(path)
        raise OSError(
            f'cannot open {name}: its name is not UTF-8, rename it'
        ) from error
    except RasterioError as error:
        message = f'cannot open {path} as a raster: {error}'
        raise DamagedFileError(message, path) from error


def read_raster(
    source: Any, indexes: Sequence[int], window: Window | None = None
) -> npt.NDArray[Any]:
    """Read bands, by position from 1, as (C, H, W) in the type of the file."""
    windows = [window]
    whole = Window(0, 0, source.width, source.height)
    if window in (None, whole) and source.driver == 'PNG' and source.height > 1:
        # The fast way of GDAL for whole PNGs does not notice if one is truncated
        first = Window(0, 0, source.width, 1)
        windows = [first, Window(0, 1, source.width, source.height - 1)]
    # Without this, GDAL fills the missing part of a truncated JPEG with grey
    with _naming(source), rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING=True):
        rows = [source.read(list(indexes), window=w) for w in windows]
        return np.concatenate(rows, 1) if len(rows) > 1 else np.asarray(rows[0])


def read_mask(
    source: Any, window: Window | None = None, band: int | None = None
) -> Flags:
    """Read where an open raster, or one band of it, has data, (H, W)."""
    with _naming(source):
        if band is None:
            return np.asarray(source.dataset_mask(window=window) > 0)
        return np.asarray(source.read_masks(band, window=window) > 0)


@contextmanager
def _naming(source: Any) -> Iterator[None]:
    """Name the file in errors of rasterio."""
    try:
        yield
    except RasterioError as error:
        reason = error.__cause__ or error
        message = f'cannot read {source.name}, is it truncated or damaged? {reason}'
        raise DamagedFileError(message, source.name) from error


def _centre(source: Any) -> tuple[float, float]:
    """Return longitude and latitude, infinite if the CRS or the transform has none."""
    grid = Grid.of(source)
    if not (grid.crs.is_projected or grid.crs.is_geographic):
        return math.inf, math.inf
    x, y = apply(grid.transform, grid.width / 2, grid.height / 2)
    to_degrees = projection(grid.crs, parse_crs(LONLAT))
    return to_degrees.transform(x, y) if to_degrees else (x, y)


def check_place(source: Any) -> None:
    """Check that an open raster tells where on Earth its pixels are."""
    for problem in _problems(source):
        raise ValueError(f'{source.name} {problem}')


def _problems(source: Any) -> Iterator[str]:
    """Tell why the place of a raster is unknown, and what to do about it."""
    crs, numbers = source.crs, tuple(source.transform[:6])
    if crs is None and source.gcps[0]:
        yield (
            f'has ground control points ({len(source.gcps[0])}) instead of a grid: warp it '
            'first, `gdalwarp -tps -r bilinear IN OUT`, or for radar, correct the terrain '
            '(SNAP: Range-Doppler Terrain Correction)'
        )
    if crs is None and source.rpcs is not None:
        yield (
            'has polynomial coefficients (RPCs) instead of a grid: correct it for the '
            'terrain first, `gdalwarp -rpc -to RPC_DEM=DEM -r bilinear IN OUT`'
        )
    if crs is None:
        yield (
            'has no CRS, so its place is unknown: set it, `gdal_edit.py -a_srs EPSG:CODE '
            'FILE`, or use ImageMaskFolder for images with masks of their own'
        )
    if source.transform.is_identity:
        yield (
            'has a CRS, but no georeference: write it again with the transform of its grid'
        )
    if not np.isfinite(numbers).all() or source.transform.determinant == 0:
        yield (
            f'has a georeference whose pixels have no size, {numbers}: write it again '
            'with the transform of its grid'
        )
    x, y = _centre(source)
    if not (math.isfinite(x) and abs(y) <= 90):
        yield (
            f'is nowhere on Earth by its CRS, {crs.to_wkt()[:60]!r}, and its transform, '
            f'{numbers}: set those it has, `gdal_edit.py -a_srs EPSG:CODE -a_ullr LEFT TOP '
            'RIGHT BOTTOM FILE`'
        )


def find_alpha(source: Any) -> int | None:
    """Return the position of the band that tells where an open raster has data.

    None if there is none, or if it has a description: GDAL takes the last of four bands
    of bytes for alpha unless it is told otherwise.
    """
    if source.count < 2 or ColorInterp.alpha not in source.colorinterp:
        return None
    index = source.colorinterp.index(ColorInterp.alpha)
    return None if source.descriptions[index] else index + 1


def has_mask(source: Any) -> bool:
    """Tell whether a file has a mask of its own, inside or beside it (.msk)."""
    flags = source.mask_flag_enums[0]
    return MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags


def read_values(source: Any, layer: Layer, window: Window) -> tuple[Values, Flags]:
    """Read a layer as float32 of (C, H, W) as it is stored, NaN where it has no data.

    Also returned is where a band is 0 and that is its nodata value: no data, too, but
    only if all bands are, so not NaN.
    """
    alpha = () if layer.alpha is None else (layer.alpha,)
    raw = read_raster(source, layer.indexes + alpha, window)
    # A float64 file may mark missing data with a number beyond float32
    with np.errstate(over='ignore'):
        values = raw[: len(layer.indexes)].astype(np.float32)
    zero = np.zeros(values.shape, np.bool_)
    for band, value in enumerate(layer.nodata):
        if value == 0:
            zero[band] = raw[band] == 0
        elif value is not None:
            values[band][raw[band] == value] = np.nan
    if alpha:
        values[:, raw[-1] == 0] = np.nan
    elif has_mask(source):
        values[:, ~read_mask(source, window)] = np.nan
    return values, zero


def drop_empty(values: Values, zero: Flags) -> Values:
    """Make pixels NaN, in place, that are 0 or have no data in all bands."""
    values[:, (zero | ~np.isfinite(values)).all(0)] = np.nan
    return values


class RasterReader:
    """Reads windows of scenes. Safe to copy, to pickle and to fork.

    Every process opens files on first use and keeps the last ones open.
    """

    def __init__(
        self, opener: Callable[..., Any] = open_raster, max_open: int = _MAX_OPEN
    ) -> None:
        """Initialize a new RasterReader instance.

        Args:
            opener: Opens a file, see also :func:`.open_mapped`.
            max_open: Files that stay open.
        """
        self.files = OpenFiles(opener, max_open)

    def read(
        self, scene: Scene, top: int, left: int, height: int, width: int
    ) -> Values:
        """Read a window on the scene's finest grid, (C, H, W), NaN where no data is.

        Where 0 stands for no data, that is where all bands are 0: single ones may have
        it as a value, such as the one for cirrus.
        """
        window = Window(left, top, width, height)
        values, zeros = zip(
            *(
                self._read(layer, window)
                if layer.grid.matches(scene.grid)
                else self._resample(layer, scene.grid, window)
                for layer in scene.layers
            ),
            strict=True,
        )
        if len(values) == 1:
            return drop_empty(values[0], zeros[0])
        return drop_empty(np.concatenate(values), np.concatenate(zeros))

    def _read(self, layer: Layer, window: Window) -> tuple[Values, Flags]:
        """Read some bands as :func:`read_values` does."""
        with self.files.use(layer.path) as source:
            values, zero = read_values(source, layer, window)
            if layer.palette:
                _expand_colors(values, source.colormap(layer.indexes[0]), layer.palette)
        if any(factor != 1 for factor in layer.scale):
            values *= np.array(layer.scale, np.float32)[:, None, None]
        if any(layer.offset):
            values += np.array(layer.offset, np.float32)[:, None, None]
        return values, zero

    def _resample(
        self, layer: Layer, grid: Grid, window: Window
    ) -> tuple[Values, Flags]:
        """Read a window of a finer grid by bilinear interpolation."""
        offsets = (window.row_off, window.height), (window.col_off, window.width)
        sizes = layer.grid.height, layer.grid.width
        positions, parts = [], []
        for to_band, (start, count), size in zip(
            _to_band(layer.grid, grid), offsets, sizes, strict=True
        ):
            # Centres of the wanted pixels, in pixels of the band. The outer half of an
            # edge pixel has no neighbour, it repeats the edge
            at = to_band[0] * (start + 0.5 + np.arange(count)) + to_band[1] - 0.5
            at = at.clip(0, size - 1)
            first = int(at.min())
            positions.append(at - first)
            parts.append((first, min(int(at.max()) + 2, size)))
        values, zero = self._read(layer, Window.from_slices(*parts))
        share = zero.astype(np.float32)
        for axis, at in enumerate(positions, 1):
            values = interpolate_axis(values, at, axis)
            share = interpolate_axis(share, at, axis)
        return values, share > 0


def _expand_colors(
    values: Values, table: dict[int, tuple[int, ...]], parts: Sequence[int]
) -> None:
    """Replace numbers of colours, in place, NaN where a colour is transparent."""
    colors = np.full((max(table) + 2, 4), np.nan, np.float32)
    colors[list(table)] = list(table.values())
    colors[colors[:, 3] == 0] = np.nan
    # The last row stands for no data
    number = np.nan_to_num(values[0], nan=len(colors) - 1).astype(np.int64)
    values[:] = colors[number][..., list(parts)].transpose(2, 0, 1)


def _to_band(band: Grid, grid: Grid) -> tuple[tuple[float, float], ...]:
    """Return scale and offset from rows and columns of a grid to those of a band."""
    ours, theirs = band.transform, grid.transform
    row, column = (theirs.f - ours.f) / ours.e, (theirs.c - ours.c) / ours.a
    divides = grid.width % band.width == 0 and grid.height % band.height == 0
    if divides and max(abs(row), abs(column)) < 0.501:
        # Cut to the same ground. The files of SSL4EO-S12 are, but say that they are up
        # to half a pixel apart: B8A correlates with B8 by 0.93 so, by location with
        # 0.91. What is further apart is somewhere else.
        return (band.height / grid.height, 0), (band.width / grid.width, 0)
    return (theirs.e / ours.e, row), (theirs.a / ours.a, column)


def interpolate_axis(values: Values, positions: npt.NDArray[Any], axis: int) -> Values:
    """Interpolate linearly along one axis. NaN spreads to what depends on it."""
    last = values.shape[axis] - 1
    before = np.floor(positions).astype(np.int64)
    after = np.minimum(before + 1, last)
    shape = [1] * values.ndim
    shape[axis] = -1
    weight = (positions - before).astype(np.float32).reshape(shape)
    low = values.take(before, axis)
    # Where the weight is 0 the neighbour does not count, not even if it is NaN
    high = np.where(weight > 0, values.take(after, axis), low)
    return np.asarray(low + weight * (high - low), dtype=np.float32)
