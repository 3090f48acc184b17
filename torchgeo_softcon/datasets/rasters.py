# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Finding rasters that belong together, and reading windows of them."""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from ..bands import RGB_BANDS, SENTINEL1_BANDS, SENTINEL2_BANDS, normalize_band_names
from .handles import OpenFiles

#: File types that a folder is searched for.
SUFFIXES = ('.tif', '.tiff', '.jp2')

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
    """

    path: Path
    indexes: tuple[int, ...]
    grid: Grid
    nodata: tuple[float | None, ...]
    dtype: str


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


def find_files(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[Path]:
    """List the rasters in folders, searched recursively, and files.

    Args:
        paths: One or more folders or files.

    Returns:
        The files without those that are known not to be images, sorted within each
        folder.

    Raises:
        FileNotFoundError: If a path does not exist or there is no raster at all.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]

    files: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = (p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES)
            files |= dict.fromkeys(p for p in sorted(found) if not _skip(p))
        elif path.exists():
            files[path] = None
        else:
            raise FileNotFoundError(f'images has a path that does not exist: {path}')
    if not files:
        raise FileNotFoundError(
            f'images must have at least one raster ({", ".join(SUFFIXES)}), found none '
            f'in {", ".join(map(str, paths)) or "an empty list"}'
        )
    return list(files)


def _skip(path: Path) -> bool:
    return _NOT_A_BAND.search(path.stem) is not None


def find_scenes(
    files: Iterable[Path],
    bands: Sequence[str] | None = None,
    all_bands: Sequence[str] | None = None,
    nodata: float | None = None,
) -> list[Scene]:
    """Open files and put those together that hold bands of one scene.

    Args:
        files: Rasters, one per scene or one per band.
        bands: Names of the bands to use, None for all.
        all_bands: Names of the bands in file order, for files that do not tell.
        nodata: Value without data, None for what each file says.

    Returns:
        The scenes in the order of their first files.

    Raises:
        OSError: If a file can not be read.
        ValueError: If a file has no CRS, lacks a band, or if the scenes differ in
            their bands.
    """
    wanted = None if bands is None else normalize_band_names(bands)
    named = None if all_bands is None else normalize_band_names(all_bands)

    single: dict[tuple[Path, str], dict[str, Layer]] = {}
    scenes: list[Scene] = []
    for path in files:
        layer, names = _open_layer(path, named, nodata)
        match = _BAND_TOKEN.search(path.stem)
        if match is None or len(layer.indexes) > 1:
            scenes.append(_from_file(layer, names, wanted))
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
        _from_bands(str(folder / stem), group, wanted)
        for (folder, stem), group in single.items()
    ]

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
) -> tuple[Layer, tuple[str, ...] | None]:
    """Read what is known of a file, with all its bands."""
    with open_raster(path) as source:
        if source.crs is None:
            raise ValueError(
                f'{path} has no CRS, so its place is unknown. Use ImageMaskFolder for '
                'images that come with masks of their own'
            )
        count = source.count
        grid = Grid(source.crs, source.transform, source.height, source.width)
        dtype = str(source.dtypes[0])
        values = source.nodatavals if nodata is None else (nodata,) * count
        names = _names(source) if all_bands is None else all_bands
        # The last pixel of the last band is where a truncated file usually ends
        corner = Window(grid.width - 1, grid.height - 1, 1, 1)
        read_raster(source, path, [count], corner)

    if all_bands is not None and count > 1 and len(all_bands) != count:
        raise ValueError(
            f'all_bands must name the {count} bands of {path}, got {len(all_bands)}: '
            f'{", ".join(all_bands)}'
        )
    return Layer(path, tuple(range(1, count + 1)), grid, tuple(values), dtype), names


def _names(source: Any) -> tuple[str, ...] | None:
    """Band names of a file: written there, or told by the number of bands."""
    try:
        return normalize_band_names([text or '' for text in source.descriptions])
    except ValueError:
        pass
    colors = tuple(source.colorinterp)
    if colors == (ColorInterp.red, ColorInterp.green, ColorInterp.blue):
        return RGB_BANDS
    if source.count == 13:
        return SENTINEL2_BANDS
    if source.count == 12:
        # Level-2A has no cirrus band
        return tuple(band for band in SENTINEL2_BANDS if band != 'B10')
    if source.count == 2 and source.dtypes[0].startswith('float'):
        return SENTINEL1_BANDS
    return None


def _missing(name: str, missing: Sequence[str], present: Iterable[str]) -> ValueError:
    return ValueError(
        f'{name} lacks the band{"s" * (len(missing) > 1)} {", ".join(missing)}, it has '
        f'{", ".join(present)}'
    )


def _from_file(
    layer: Layer, names: tuple[str, ...] | None, wanted: tuple[str, ...] | None
) -> Scene:
    """A scene that is one file."""
    if wanted is None:
        return Scene(str(layer.path), names, (layer,), layer.grid)
    if names is None:
        raise ValueError(
            f'{layer.path} does not name its {len(layer.indexes)} bands: give all_bands '
            'in file order, or leave bands out to use all of them'
        )
    if missing := [band for band in wanted if band not in names]:
        raise _missing(str(layer.path), missing, names)
    positions = [names.index(band) for band in wanted]
    chosen = Layer(
        layer.path,
        tuple(position + 1 for position in positions),
        layer.grid,
        tuple(layer.nodata[position] for position in positions),
        layer.dtype,
    )
    return Scene(str(layer.path), wanted, (chosen,), layer.grid)


def _from_bands(
    name: str, group: dict[str, Layer], wanted: tuple[str, ...] | None
) -> Scene:
    """A scene that is one file per band."""
    order = (*SENTINEL2_BANDS, *SENTINEL1_BANDS)
    present = sorted(
        group, key=lambda b: (order.index(b) if b in order else len(order), b)
    )
    names = wanted or tuple(present)
    if missing := [band for band in names if band not in group]:
        raise _missing(name, missing, present)
    layers = tuple(group[band] for band in names)
    finest = min((layer.grid for layer in layers), key=_pixel)
    for layer in layers:
        _check_same_ground(layer, finest, name)
    return Scene(name, names, layers, finest)


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
            Values of shape (C, H, W), NaN where a band has no data.

        Raises:
            OSError: If a file can not be read.
        """
        parts = []
        for layer in scene.layers:
            if layer.grid.key == scene.grid.key:
                window = Window(left, top, width, height)
                parts.append(self._values(layer, window))
            else:
                parts.append(
                    self._resampled(layer, scene.grid, top, left, height, width)
                )
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _values(self, layer: Layer, window: Window) -> npt.NDArray[np.float32]:
        with self.files.use(layer.path) as source:
            raw = read_raster(source, layer.path, layer.indexes, window)
        # A float64 file may mark missing data with a number beyond float32
        with np.errstate(over='ignore'):
            values = raw.astype(np.float32)
        for band, (data, nodata) in enumerate(zip(raw, layer.nodata, strict=True)):
            if nodata is not None:
                values[band][data == nodata] = np.nan
        return values

    def _resampled(
        self, layer: Layer, grid: Grid, top: int, left: int, height: int, width: int
    ) -> npt.NDArray[np.float32]:
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
        values = self._values(layer, Window(x, y, *size))
        values = _interpolate(values, rows - y, axis=1)
        return _interpolate(values, columns - x, axis=2)


def _to_band(band: Grid, grid: Grid) -> tuple[tuple[float, float], ...]:
    """Scale and offset from columns and rows of a grid to those of a coarser band."""
    if grid.width % band.width == 0 and grid.height % band.height == 0:
        # Cut to the same ground. The files of SSL4EO-S12 are, but say that they are
        # half a pixel apart: B8A correlates with B8 by 0.93 so, by location with 0.91
        return (band.width / grid.width, 0), (band.height / grid.height, 0)
    ours, theirs = band.transform, grid.transform
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
