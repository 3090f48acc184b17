# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Rasters whose pixels are mapped into memory: GeoTIFFs without compression.

Everything that reads GeoTIFFs reads them, and windows of them are copied without GDAL.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.windows import Window

from ..storage.whole_file import whole_file
from .rasters import has_mask, open_raster, read_raster

#: Tag of the files that are written here.
_TAG = 'TORCHGEO_SOFTCON_MAPPED'

#: Rows that are read and written at once.
_ROWS = 512


class MappedRaster:
    """An open raster of :func:`write_mapped`, with the attributes that rasterio gives it."""

    def __init__(self, source: Any) -> None:
        """Map the pixels of an open raster."""
        self._source = source
        self._bands = map_bands(source, 'r')

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the raster as it was opened."""
        return getattr(self._source, name)

    def read(
        self, indexes: list[int], window: Window | None = None
    ) -> npt.NDArray[Any]:
        """Copy a window of bands, by position from 1, shape (C, H, W)."""
        rows, columns = (slice(None),) * 2 if window is None else window.toslices()
        return np.stack([self._bands[index - 1][rows, columns] for index in indexes])


def open_mapped(path: str | os.PathLike[str]) -> Any:
    """Open a raster as :func:`.open_raster` does, mapped into memory if it can be."""
    source = open_raster(path)
    return MappedRaster(source) if _TAG in source.tags() else source


def map_bands(source: Any, mode: Any) -> list[Any]:
    """Map the bands of an open raster of :func:`create_mapped`, each of shape (H, W)."""
    shape, dtype = source.shape, np.dtype(source.dtypes[0])
    places = [
        int(source.get_tag_item('BLOCK_OFFSET_0_0', 'TIFF', bidx=index))
        for index in source.indexes
    ]
    return [np.memmap(source.name, dtype, mode, place, shape) for place in places]


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
            # In order, so that each band is in one piece
            for index in file.indexes:
                for top in range(0, file.height, _ROWS):
                    rows = min(_ROWS, file.height - top)
                    zeros = np.zeros((rows, file.width), file.dtypes[0])
                    file.write(zeros, index, window=Window(0, top, file.width, rows))
            if like is not None and has_mask(like):
                file.write_mask(like.dataset_mask())
        with rasterio.open(unfinished) as source:
            bands = map_bands(source, 'r+')
        yield bands
        for band in bands:
            band.flush()


def write_mapped(path: str, target: Path) -> None:
    """Write the pixels of a raster as they are, with all that it tells about them.

    Raises:
        OSError: If a file cannot be read or written.
    """
    with open_raster(path) as source:
        profile = {
            key: source.profile[key]
            for key in (
                'width',
                'height',
                'count',
                'dtype',
                'crs',
                'transform',
                'nodata',
            )
        }
        with create_mapped(target, source, **profile) as bands:
            for top in range(0, source.height, _ROWS):
                rows = min(_ROWS, source.height - top)
                window = Window(0, top, source.width, rows)
                values = read_raster(source, source.indexes, window)
                for band, pixels in zip(bands, values, strict=True):
                    band[top : top + rows] = pixels
