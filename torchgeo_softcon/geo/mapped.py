# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""GeoTIFFs without compression, whose pixels are mapped into memory and read without GDAL."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from ..storage.whole_file import whole_file
from .rasters import DamagedFileError, has_mask, open_raster, read_raster

#: Tag of the files that are written here.
_TAG = 'TORCHGEO_SOFTCON_MAPPED'

#: Rows that are read and written at once.
_ROWS = 512


class MappedRaster:
    """An open raster of :func:`create_mapped`, with all attributes that rasterio gives."""

    def __init__(self, source: Any, places: list[int], mode: Any = 'r') -> None:
        """Map the pixels of an open raster, of which each band is at a place."""
        self._source = source
        shape, dtype = source.shape, np.dtype(source.dtypes[0])
        #: Bands, each of shape (H, W).
        self.bands = [np.memmap(source.name, dtype, mode, p, shape) for p in places]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the raster as it was opened."""
        return getattr(self._source, name)

    def read(
        self, indexes: list[int], window: Window | None = None
    ) -> npt.NDArray[Any]:
        """Copy a window of bands, by position from 1, shape (C, H, W)."""
        rows, columns = (slice(None),) * 2 if window is None else window.toslices()
        return np.stack([self.bands[index - 1][rows, columns] for index in indexes])


def open_mapped(path: str | os.PathLike[str]) -> Any:
    """Open a raster as :func:`.open_raster` does, mapped into memory if it can be."""
    source = open_raster(path)
    places = _find_bands(source) if _TAG in source.tags() else None
    try:
        return source if places is None else MappedRaster(source, places)
    except ValueError as error:
        message = f'cannot open {path}, it is cut off: delete it, and pack again'
        raise DamagedFileError(message, path) from error


def _find_bands(source: Any) -> list[int] | None:
    """Return where each band begins, None if one is not in one piece as it is.

    A copy by another program has the tag, too.
    """
    rows, columns = source.block_shapes[0]
    if source.compression is not None or columns != source.width:
        return None
    last = (source.height - 1) // rows
    ends = [
        [source.get_tag_item(f'BLOCK_OFFSET_0_{n}', 'TIFF', bidx=b) for n in (0, last)]
        for b in source.indexes
    ]
    size = last * rows * columns * np.dtype(source.dtypes[0]).itemsize
    if any(end is None for pair in ends for end in pair):
        return None
    places = [int(first) for first, _ in ends]
    whole = all(int(end) - int(first) == size for first, end in ends)
    return places if whole and len({*places}) == len(places) else None


@contextmanager
def create_mapped(
    path: Path, like: Any | None = None, **profile: Any
) -> Iterator[list[Any]]:
    """Write a raster by its bands, which are there once it is complete.

    Args:
        path: The file.
        like: An open raster whose tags, names, colours, scales and mask it gets.
        **profile: Options of :func:`rasterio.open`.

    Yields:
        Its bands of zeros, each of shape (H, W), to be filled.
    """
    options = {'BIGTIFF': 'IF_SAFER', 'interleave': 'band', 'blockysize': 16}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(unfinished, 'w', 'GTiff', **profile, **options) as file,
        ):
            file.update_tags(**{_TAG: '1'})
            if like is not None:
                file.update_tags(**like.tags())
                for name in ('descriptions', 'colorinterp', 'scales', 'offsets'):
                    setattr(file, name, getattr(like, name))
                for index, color in enumerate(like.colorinterp, 1):
                    if color == ColorInterp.palette:
                        file.write_colormap(index, like.colormap(index))
            # In order, so that each band is in one piece. A full disk is an error here,
            # when mapped memory is written it would end the process
            for index in file.indexes:
                for top in range(0, file.height, _ROWS):
                    rows = min(_ROWS, file.height - top)
                    zeros = np.zeros((rows, file.width), file.dtypes[0])
                    file.write(zeros, index, window=Window(0, top, file.width, rows))
            if like is not None and has_mask(like):
                file.write_mask(like.dataset_mask())
        with rasterio.open(unfinished) as source:
            places = _find_bands(source)
            if places is None:
                raise OSError(f'cannot write {path} in one piece: remove it, try again')
            bands = MappedRaster(source, places, 'r+').bands
        yield bands
        for band in bands:
            band.flush()


def write_mapped(path: str, target: Path) -> None:
    """Write the pixels of a raster as they are, with all that it tells about them.

    Raises:
        OSError: If a file cannot be read or written.
    """
    with open_raster(path) as source:
        names = ('width', 'height', 'count', 'dtype', 'crs', 'transform', 'nodata')
        profile = {name: source.profile[name] for name in names}
        with create_mapped(target, source, **profile) as bands:
            for top in range(0, source.height, _ROWS):
                rows = min(_ROWS, source.height - top)
                window = Window(0, top, source.width, rows)
                values = read_raster(source, source.indexes, window)
                for band, pixels in zip(bands, values, strict=True):
                    band[top : top + rows] = pixels


def try_write_mapped(unit: tuple[str, Path]) -> tuple[str, str | None]:
    """Write a raster to a file as :func:`write_mapped` does.

    Returns the path of the raster, and the reason if it could not be read or written.
    """
    try:
        write_mapped(*unit)
    except OSError as error:
        return unit[0], str(error)
    return unit[0], None
