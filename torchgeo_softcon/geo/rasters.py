# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Finding rasters that belong together, and reading windows of them."""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from ..bands import (
    KNOWN_BANDS,
    RGB_BANDS,
    SENTINEL1_BANDS,
    SENTINEL2_BANDS,
    normalize_band_names,
    spell_band_name,
)
from .find_files import RASTERS, AnyPath, find_files
from .open_files import OpenFiles

#: Datasets that a process keeps open. Four dates of thirteen files fit twice.
_MAX_OPEN = 128

#: A band at the end of a file name, as Sentinel products, SSL4EO-S12 and BigEarthNet
#: write it: B2, B02, B8A, B08A, VV, with or without a resolution.
_BAND_TOKEN = re.compile(
    r'(?:^|[_.\-])(?P<band>B(?:0?8A|0?[1-9]|1[0-2])|VV|VH|HH|HV)(?:_(?:10|20|60)m)?$',
    re.IGNORECASE,
)

#: Files of a Sentinel-2 product that are not bands, and WorldCover itself.
_NOT_A_BAND = re.compile(
    r'(?:_(?:TCI|AOT|WVP|SCL|PVI)(?:_(?:10|20|60)m)?$)|^MSK_|^ESA_WorldCover_'
)

#: Files of Landsat, whose B1 to B12 are not those of Sentinel-2.
_LANDSAT = re.compile(r'(?<![A-Za-z0-9])L[CET]0\d_|HLS\.L30')

#: Sentinel-2 products since baseline 04.00 (January 2022) have 1000 added, which their
#: metadata call RADIO_ADD_OFFSET or BOA_ADD_OFFSET.
_WITH_OFFSET = re.compile(r'_N(?:0[4-9]|[1-9]\d)\d\d_')
_OFFSET = -1000.0

#: Folders of a Level-2A product that hold bands of one scene.
_RESOLUTION_FOLDER = re.compile(r'R(?:10|20|60)m')


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a raster are.

    Attributes:
        crs: Coordinate reference system.
        transform: From column and row to coordinates.
        height: Number of rows.
        width: Number of columns.
    """

    crs: CRS
    transform: Affine
    height: int
    width: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for rasters on the same grid."""
        # 9 decimals: below a millimetre in degrees, above the noise of a float
        return (
            self.crs.to_string(),
            tuple(round(value, 9) for value in self.transform[:6]),
            self.height,
            self.width,
        )

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top, also of a rotated raster."""
        a, b, c, d, e, f = self.transform[:6]
        corners = [(x, y) for x in (0, self.width) for y in (0, self.height)]
        xs = [a * x + b * y + c for x, y in corners]
        ys = [d * x + e * y + f for x, y in corners]
        return min(xs), min(ys), max(xs), max(ys)

    def window_transform(self, top: int, left: int) -> Affine:
        """Transform of a window that starts at a row and a column."""
        a, b, c, d, e, f = self.transform[:6]
        return Affine(a, b, a * left + b * top + c, d, e, d * left + e * top + f)


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
        offset: What is added to the values of the file.
    """

    path: Path
    indexes: tuple[int, ...]
    grid: Grid
    nodata: tuple[float | None, ...]
    dtype: str
    alpha: int | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One place at one date.

    Attributes:
        name: The file, or the common part of the names of its files.
        bands: Band names, None if they are unknown.
        layers: Where the bands are, in the order of *bands*.
        grid: Pixels of the finest layer.
    """

    name: str
    bands: tuple[str, ...] | None
    layers: tuple[Layer, ...]
    grid: Grid

    @property
    def count(self) -> int:
        """Number of bands."""
        return sum(len(layer.indexes) for layer in self.layers)


def find_rasters(paths: AnyPath | Iterable[AnyPath]) -> list[str]:
    """List the rasters that may be images.

    Args:
        paths: Files, folders and patterns, see :func:`.find_files`.

    Returns:
        The files. Those in folders without what is known not to be an image.

    Raises:
        FileNotFoundError: If a path does not exist or there is no raster at all.
    """
    named = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [
        file
        for path in map(os.fspath, named)
        for file in find_files(path, RASTERS, 'images')
        if file == path or not _NOT_A_BAND.search(Path(file).stem)
    ]
    if not files:
        raise FileNotFoundError(
            f'images must have at least one raster ({", ".join(RASTERS)}), found none in '
            f'{", ".join(map(os.fspath, named)) or "an empty list"}'
        )
    return list(dict.fromkeys(files))


def find_scenes(
    files: Iterable[Path],
    bands: Sequence[str] | None = None,
    all_bands: Sequence[str] | None = None,
    nodata: float | None = None,
    offset: float | None = None,
) -> list[Scene]:
    """Open files and put those together that hold bands of one scene.

    Args:
        files: Rasters, one per scene or one per band.
        bands: Names of the bands to use, None for all.
        all_bands: Names of the bands in file order, for files that do not tell.
        nodata: Value without data, None for what each file says, or 0 if it does not
            and has digital numbers of Sentinel-2.
        offset: What is added to the values, None for -1000 if a path tells that digital
            numbers of Sentinel-2 are of baseline 04.00 or later, else 0.

    Returns:
        The scenes in the order of their first files.

    Raises:
        OSError: If a file can not be read.
        ValueError: If a file has no CRS, lacks a band, or if the scenes differ in
            their bands.
    """
    named = None if all_bands is None else tuple(map(spell_band_name, all_bands))
    if named is not None and len(set(named)) != len(named):
        raise ValueError(f'all_bands must be unique, got {tuple(all_bands or ())}')
    wanted = None if bands is None else normalize_band_names(bands, named or ())
    guessed: dict[tuple[str, ...], Path] = {}

    single: dict[tuple[Path, str], dict[str, Layer]] = {}
    scenes: list[Scene] = []
    for path in files:
        layer, names, sure = _open_layer(path, named, nodata)
        if names is not None and not sure:
            guessed.setdefault(names, path)
        match = _BAND_TOKEN.search(path.stem)
        if match is None or len(layer.indexes) > 1:
            scenes.append(_from_file(layer, names, wanted, offset))
            continue
        (band,) = normalize_band_names([match['band']])
        folder = path.parent
        if _RESOLUTION_FOLDER.fullmatch(folder.name):
            folder = folder.parent
        group = single.setdefault((folder, path.stem[: match.start()]), {})
        # Level-2A has the same band at several resolutions, only the finest counts
        if band not in group or _pixel(layer.grid) < _pixel(group[band].grid):
            group[band] = layer
    scenes += [
        _from_bands(str(folder / stem), group, wanted, offset)
        for (folder, stem), group in single.items()
    ]
    alphas = [
        layer for scene in scenes for layer in scene.layers if layer.alpha is not None
    ]
    if alphas:
        rank_zero_info(
            f'band {alphas[0].alpha} of {alphas[0].path} is alpha, it tells where the '
            'others have data. If that is not so, name it, too, with all_bands'
        )
    for names, path in guessed.items():
        rank_zero_info(
            f'{path} does not name its bands, they are taken for {", ".join(names)}. '
            'If that is not so, give all_bands'
        )

    first = scenes[0]
    for scene in scenes[1:]:
        if (scene.bands, scene.count) != (first.bands, first.count):
            raise ValueError(
                f'all images must have the same bands, {first.name} has '
                f'{_describe(first)} and {scene.name} has {_describe(scene)}. Choose '
                'common ones with bands'
            )
    return scenes


def _describe(scene: Scene) -> str:
    return ', '.join(scene.bands) if scene.bands else f'{scene.count} unnamed bands'


def _pixel(grid: Grid) -> float:
    """Area of a pixel."""
    return abs(grid.transform.determinant)


def open_raster(path: Path) -> Any:
    """Open a raster, with an error that names it.

    Args:
        path: The file.

    Returns:
        The open rasterio dataset.

    Raises:
        OSError: If the file can not be opened.
    """
    try:
        with warnings.catch_warnings():
            # The caller looks at the CRS, and images in a folder have none
            warnings.simplefilter('ignore', NotGeoreferencedWarning)
            return rasterio.open(path)
    except rasterio.errors.RasterioError as error:
        raise OSError(f'cannot open {path} as a raster: {error}') from error


def read_raster(
    source: Any, path: Path, indexes: Sequence[int], window: Window | None = None
) -> npt.NDArray[Any]:
    """Read bands of an open raster, with an error that names it.

    Args:
        source: The open rasterio dataset.
        path: The file, for the message.
        indexes: Positions of the bands, from 1.
        window: Pixels to read, None for all.

    Returns:
        Values of shape (C, H, W) in the type of the file.

    Raises:
        OSError: If the file is truncated or damaged.
    """
    windows = [window]
    if window is None and source.driver == 'PNG' and source.height > 1:
        # The fast way of GDAL for whole PNGs does not notice if one is truncated
        first = Window(0, 0, source.width, 1)
        windows = [first, Window(0, 1, source.width, source.height - 1)]
    try:
        # Without this, GDAL fills the missing part of a truncated JPEG with grey
        with rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING=True):
            parts = [source.read(list(indexes), window=part) for part in windows]
            return np.concatenate(parts, 1) if len(parts) > 1 else np.asarray(parts[0])
    except rasterio.errors.RasterioError as error:
        reason = error.__cause__ or error
        raise OSError(
            f'cannot read {path}, is it truncated or damaged? {reason}'
        ) from error


def _open_layer(
    path: Path, all_bands: tuple[str, ...] | None, nodata: float | None
) -> tuple[Layer, tuple[str, ...] | None, bool]:
    """Read what is known of a file: its bands, their names, whether these are sure."""
    with open_raster(path) as source:
        if source.crs is None:
            raise ValueError(
                f'{path} has no CRS, so its place is unknown. Use ImageMaskFolder for '
                'images that come with masks of their own'
            )
        alpha = find_alpha(source)
        if all_bands is not None and len(all_bands) == source.count:
            alpha = None
        indexes = tuple(i for i in source.indexes if i != alpha)
        grid = Grid(source.crs, source.transform, source.height, source.width)
        dtype = str(source.dtypes[0])
        values = tuple(
            source.nodatavals[i - 1] if nodata is None else nodata for i in indexes
        )
        names, sure = (
            _names(source, indexes) if all_bands is None else (all_bands, True)
        )
        # The last pixel of the last band is where a truncated file usually ends
        corner = Window(grid.width - 1, grid.height - 1, 1, 1)
        read_raster(source, path, [source.count], corner)

    count = len(indexes)
    if all_bands is not None and count > 1 and len(all_bands) != count:
        raise ValueError(
            f'all_bands must name the {count} bands of {path}, got {len(all_bands)}: '
            f'{", ".join(all_bands)}'
        )
    if all_bands is None and _is_landsat(path) and set(names or ()) - set(RGB_BANDS):
        names = None
    return Layer(path, indexes, grid, values, dtype, alpha), names, sure


def find_alpha(source: Any) -> int | None:
    """Position of the band that tells where an open raster has data, from 1.

    Args:
        source: The open rasterio dataset.

    Returns:
        The alpha band, None if there is none, or if it has a description: GDAL takes
        the last of four bands of bytes for alpha unless it is told otherwise.
    """
    if source.count < 2 or ColorInterp.alpha not in source.colorinterp:
        return None
    index = source.colorinterp.index(ColorInterp.alpha)
    return None if source.descriptions[index] else index + 1


def _is_landsat(path: Path) -> bool:
    return _LANDSAT.search(f'{path.parent.name}/{path.name}') is not None


def _names(source: Any, indexes: Sequence[int]) -> tuple[tuple[str, ...] | None, bool]:
    """Band names of a file: written there, or told by the number of bands.

    Returns:
        The names, and whether they were written.
    """
    texts = [spell_band_name(source.descriptions[i - 1] or '') for i in indexes]
    known = [text for text in texts if text in KNOWN_BANDS]
    if known and len(set(known)) == len(known):
        # Earth Engine adds masks such as QA60, only all_bands can make use of them
        names = (t or f'BAND {i}' for i, t in zip(indexes, texts, strict=True))
        return tuple(names), True
    colors = tuple(source.colorinterp[i - 1] for i in indexes)
    if colors == (ColorInterp.red, ColorInterp.green, ColorInterp.blue):
        return RGB_BANDS, True
    if len(indexes) == 13:
        return SENTINEL2_BANDS, False
    if len(indexes) == 12:
        # Level-2A has no cirrus band
        return tuple(band for band in SENTINEL2_BANDS if band != 'B10'), False
    if len(indexes) == 2 and source.dtypes[0].startswith('float'):
        return SENTINEL1_BANDS, False
    return None, False


def _as_sentinel2(
    layer: Layer, names: tuple[str, ...] | None, offset: float | None
) -> Layer:
    """Add what Sentinel-2 products do not say of themselves."""
    # Bytes and floats were scaled by someone, who knows what became of 0 and 1000
    digital_numbers = (
        layer.dtype in ('uint16', 'uint32', 'uint64')
        and names is not None
        and set(names) <= set(SENTINEL2_BANDS)
    )
    nodata = layer.nodata
    if digital_numbers and all(value is None for value in nodata):
        nodata = (0.0,) * len(nodata)
    if offset is None:
        shifted = digital_numbers and _WITH_OFFSET.search(str(layer.path))
        offset = _OFFSET if shifted else 0.0
    return replace(layer, nodata=nodata, offset=offset)


def _landsat_error(name: str, wanted: Sequence[str]) -> ValueError:
    return ValueError(
        f'bands must not be given for {name}, got {", ".join(wanted)}: these are bands '
        'of Sentinel-2, and the bands of Landsat have other numbers. Leave bands out '
        'and give value_range, or name the bands of a file with all_bands'
    )


def _missing(name: str, missing: Sequence[str], present: Iterable[str]) -> ValueError:
    return ValueError(
        f'{name} lacks the band{"s" * (len(missing) > 1)} {", ".join(missing)}, it has '
        f'{", ".join(present)}'
    )


def _from_file(
    layer: Layer,
    names: tuple[str, ...] | None,
    wanted: tuple[str, ...] | None,
    offset: float | None,
) -> Scene:
    """A scene that is one file."""
    if wanted is None:
        layer = _as_sentinel2(layer, names, offset)
        return Scene(str(layer.path), names, (layer,), layer.grid)
    if names is None and _is_landsat(layer.path):
        raise _landsat_error(str(layer.path), wanted)
    if names is None:
        raise ValueError(
            f'{layer.path} does not name its {len(layer.indexes)} bands: give all_bands '
            'in file order, or leave bands out to use all of them'
        )
    if missing := [band for band in wanted if band not in names]:
        raise _missing(str(layer.path), missing, names)
    positions = [names.index(band) for band in wanted]
    chosen = replace(
        layer,
        indexes=tuple(layer.indexes[position] for position in positions),
        nodata=tuple(layer.nodata[position] for position in positions),
    )
    chosen = _as_sentinel2(chosen, wanted, offset)
    return Scene(str(layer.path), wanted, (chosen,), layer.grid)


def _from_bands(
    name: str,
    group: dict[str, Layer],
    wanted: tuple[str, ...] | None,
    offset: float | None,
) -> Scene:
    """A scene that is one file per band."""
    order = (*SENTINEL2_BANDS, *SENTINEL1_BANDS)
    present = sorted(
        group, key=lambda b: (order.index(b) if b in order else len(order), b)
    )
    names = wanted or tuple(present)
    if missing := [band for band in names if band not in group]:
        raise _missing(name, missing, present)
    landsat = any(_is_landsat(layer.path) for layer in group.values())
    if landsat and wanted:
        raise _landsat_error(name, wanted)
    layers = tuple(
        _as_sentinel2(group[band], None if landsat else (band,), offset)
        for band in names
    )
    finest = min((layer.grid for layer in layers), key=_pixel)
    for layer in layers:
        _check_same_ground(layer, finest, name)
    return Scene(name, None if landsat else names, layers, finest)


def _check_same_ground(layer: Layer, finest: Grid, name: str) -> None:
    """A coarse band may end within one of its pixels of the finest, not further."""
    if layer.grid.key == finest.key:
        return
    ours, theirs = layer.grid.transform, finest.transform
    if layer.grid.crs != finest.crs or any((ours.b, ours.d, theirs.b, theirs.d)):
        raise ValueError(
            f'the bands of {name} must share one CRS and be parallel to its axes, '
            f'{layer.path} is not like the others'
        )
    slack = (abs(ours.a), abs(ours.e), abs(ours.a), abs(ours.e))
    for a, b, pixel in zip(layer.grid.bounds, finest.bounds, slack, strict=True):
        if abs(a - b) > pixel:
            raise ValueError(
                f'the bands of {name} must cover the same ground, {layer.path} covers '
                f'{layer.grid.bounds} and the finest band {finest.bounds}'
            )


class RasterReader:
    """Reads windows of scenes. Safe to copy, to pickle and to fork.

    Every process opens files on first use and keeps the last ones open.
    """

    def __init__(self, max_open: int = _MAX_OPEN) -> None:
        """Initialize a new RasterReader instance.

        Args:
            max_open: Number of files to keep open.
        """
        self.files = OpenFiles(open_raster, max_open)

    def read(
        self, scene: Scene, top: int, left: int, height: int, width: int
    ) -> npt.NDArray[np.float32]:
        """Read a window on the scene's finest grid.

        Args:
            scene: What to read.
            top: First row.
            left: First column.
            height: Number of rows.
            width: Number of columns.

        Returns:
            Values of shape (C, H, W), NaN where a band has no data. If that is told by
            the number 0, only where no band has: 0 is a value of single bands, such as
            the one for cirrus.

        Raises:
            OSError: If a file can not be read.
        """
        parts, zeros = [], []
        for layer in scene.layers:
            if layer.grid.key == scene.grid.key:
                window = Window(left, top, width, height)
                values, zero = self._values(layer, window)
            else:
                values, zero = self._resampled(
                    layer, scene.grid, top, left, height, width
                )
            parts.append(values)
            zeros.append(zero)
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        zero = zeros[0] if len(zeros) == 1 else np.concatenate(zeros)
        values[:, (zero | ~np.isfinite(values)).all(0)] = np.nan
        return values

    def _values(
        self, layer: Layer, window: Window
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Values of some bands, and where they are a 0 that may mean no data."""
        indexes = list(layer.indexes)
        if layer.alpha is not None:
            indexes.append(layer.alpha)
        with self.files.use(layer.path) as source:
            raw = read_raster(source, layer.path, indexes, window)
        values, zero = to_float(raw[: len(layer.indexes)], layer.nodata)
        if layer.offset:
            values += layer.offset
        if layer.alpha is not None:
            values[:, raw[-1] == 0] = np.nan
        return values, zero

    def _resampled(
        self, layer: Layer, grid: Grid, top: int, left: int, height: int, width: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Bilinear interpolation of a coarser band."""
        # Centres of the wanted pixels, in pixels of the band
        to_columns, to_rows = _to_band(layer.grid, grid)
        columns = to_columns[0] * (left + 0.5 + np.arange(width)) + to_columns[1] - 0.5
        rows = to_rows[0] * (top + 0.5 + np.arange(height)) + to_rows[1] - 0.5
        # The outer half of an edge pixel has no neighbour, it repeats the edge
        columns = columns.clip(0, layer.grid.width - 1)
        rows = rows.clip(0, layer.grid.height - 1)

        x, y = int(columns.min()), int(rows.min())
        size = int(columns.max()) - x + 2, int(rows.max()) - y + 2
        size = min(size[0], layer.grid.width - x), min(size[1], layer.grid.height - y)
        values, zero = self._values(layer, Window(x, y, *size))
        share = zero.astype(np.float32)
        for positions, axis in ((rows - y, 1), (columns - x, 2)):
            values = _interpolate(values, positions, axis)
            share = _interpolate(share, positions, axis)
        return values, share > 0


def to_float(
    raw: npt.NDArray[Any], nodata: Sequence[float | None]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Make the values of a file float32, NaN where they are the nodata value.

    Args:
        raw: Values of shape (C, H, W).
        nodata: Value without data of each band, None if there is none.

    Returns:
        The values, and where a band of integers is 0 and that is its nodata value. They
        are not NaN, because they are no data only if all bands are.
    """
    # A float64 file may mark missing data with a number beyond float32
    with np.errstate(over='ignore'):
        values = raw.astype(np.float32)
    zero = np.zeros(raw.shape, np.bool_)
    for band, value in enumerate(nodata):
        if value == 0 and raw.dtype.kind in 'iu':
            zero[band] = raw[band] == 0
        elif value is not None:
            values[band][raw[band] == value] = np.nan
    return values, zero


def _to_band(band: Grid, grid: Grid) -> tuple[tuple[float, float], ...]:
    """Scale and offset from columns and rows of a grid to those of a coarser band."""
    ours, theirs = band.transform, grid.transform
    apart = max(abs((theirs.c - ours.c) / ours.a), abs((theirs.f - ours.f) / ours.e))
    divides = grid.width % band.width == 0 and grid.height % band.height == 0
    if divides and apart < 0.501:
        # Cut to the same ground. The files of SSL4EO-S12 are, but say that they are up
        # to half a pixel apart: B8A correlates with B8 by 0.93 so, by location with
        # 0.91. What is further apart is somewhere else.
        return (band.width / grid.width, 0), (band.height / grid.height, 0)
    return (
        (theirs.a / ours.a, (theirs.c - ours.c) / ours.a),
        (theirs.e / ours.e, (theirs.f - ours.f) / ours.e),
    )


def _interpolate(
    values: npt.NDArray[np.float32], positions: npt.NDArray[Any], axis: int
) -> npt.NDArray[np.float32]:
    """Linear interpolation along one axis. NaN spreads to what depends on it."""
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
