# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""An opened file: its bands, their names, and a sample of its numbers."""

import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from ..bands import (
    KNOWN_BANDS,
    RGB_BANDS,
    SENTINEL1_BANDS,
    SENTINEL2_BANDS,
    SENTINEL2_SUBSETS,
    spell_band_name,
)
from .grid import Grid
from .rasters import RGB_COLORS, Layer, Values, drop_empty, find_alpha, read_values

#: Files of Landsat, whose B1 to B12 are not those of Sentinel-2.
_LANDSAT = re.compile(r'(?<![A-Za-z0-9])L[CET]0\d_|HLS\.L30')

#: A band within a description or a name, such as 0_B2, B2_median or Sigma0_VH_db, and its
#: resolution.
BAND_WORD = re.compile(
    r'(?<![A-Za-z0-9])(B(?:0?8A|0?[1-9]|1[0-2])|VV|VH|HH|HV)(?![A-Za-z0-9])'
    r'(?:_(?:10|20|60)m(?![A-Za-z0-9]))?',
    re.IGNORECASE,
)

#: Statistics of a band that do not have its unit, as Earth Engine's reducers name them.
_NO_VALUES = re.compile(
    r'(?:std(?:dev)?|var(?:iance)?|count|cv|kurtosis|skew|slope|trend|phase|ratio)'
    r'(?![a-z])',
    re.IGNORECASE,
)

#: Side of the window that tells the unit of a file, in pixels.
_SAMPLE = 64

#: Pixels of it along each side that are kept.
_KEPT = 16

#: Order of bands without names in the files of EuroSAT, where B8A is the last.
_EUROSAT = (*(band for band in SENTINEL2_BANDS if band != 'B8A'), 'B8A')

#: TIFF's tag for private data in which SNAP keeps names of bands.
_SNAP = 65000


class OpenedFile(NamedTuple):
    """A file that was opened, and all that it tells of itself.

    Attributes:
        layer: All of its bands.
        names: Their names, None if unknown.
        guess: Why these are guessed, empty if the file tells them.
        tags: Its tags.
        sample: A window of numbers as they are stored, NaN without data, if they are
            needed to tell the unit.
    """

    layer: Layer
    names: tuple[str, ...] | None
    guess: str
    tags: Mapping[str, Any]
    sample: Values | None

    def choose(self, positions: Sequence[int]) -> 'OpenedFile':
        """Return the same with some of the bands."""
        return self._replace(
            layer=self.layer.select(positions),
            sample=None if self.sample is None else self.sample[list(positions)],
        )


def describe_file(
    source: Any,
    grid: Grid,
    all_bands: tuple[str, ...] | None = None,
    nodata: float | None = None,
    indexes: Sequence[int] | None = None,
    skip: int | None = None,
) -> OpenedFile:
    """Return all that an open raster tells.

    Args:
        source: The raster.
        grid: Its pixels.
        all_bands: Names of its bands. An alpha band among them is one of the image, and
            one band alone is no colour.
        nodata: Value without data, None for what the file says.
        indexes: Bands to take as they are stored, None for all but an alpha band.
        skip: Band that is no part of the image, such as a mask.
    """
    path, count = source.name, None if all_bands is None else len(all_bands)
    layer = _describe_layer(source, grid, nodata, indexes, skip, count)
    if layer.dtype.startswith('complex'):
        raise ValueError(
            f'{path} has complex numbers: make backscatter of them (SNAP: Calibration, '
            'Multilook and Terrain Correction)'
        )
    names, sure = all_bands, True
    if all_bands is None:
        names, sure = _name_bands(source, layer)
    band = BAND_WORD.search(PurePath(path).stem)
    radar = {*SENTINEL1_BANDS} & {*(names or ()), (band or ('',))[0].upper()}
    real = layer.dtype.startswith('float') or any(s != 1 for s in layer.scale)
    sample = None
    if real or radar or (not sure and len(layer.indexes) == len(SENTINEL2_BANDS)):
        sample = _read_sample(source, layer)
    guess = ''
    if not sure:
        names, guess = _guess_bands(len(layer.indexes), layer.dtype, sample)
    if all_bands is None and is_landsat(path) and set(names or ()) - set(RGB_BANDS):
        names = None
    return OpenedFile(layer, names, guess, source.tags(), sample)


def _describe_layer(
    source: Any,
    grid: Grid,
    nodata: float | None,
    indexes: Sequence[int] | None,
    skip: int | None,
    count: int | None,
) -> Layer:
    """Return the bands of :func:`describe_file`, whose user has named *count* of them."""
    alpha = find_alpha(source)
    if alpha == skip or alpha in (indexes or ()) or count == source.count:
        alpha = None
    chosen = tuple(indexes or (i for i in source.indexes if i not in (alpha, skip)))
    dtype = str(source.dtypes[0])
    palette: tuple[int, ...] = ()
    colors = [source.colorinterp[i - 1] for i in chosen]
    if colors == [ColorInterp.palette] and indexes is None and count != 1:
        chosen, palette, dtype = chosen * 3, (0, 1, 2), 'uint8'
    empty, scales, offsets = (
        tuple(of_bands[i - 1] for i in chosen)
        for of_bands in (source.nodatavals, source.scales, source.offsets)
    )
    if nodata is not None:
        empty = (nodata,) * len(chosen)
    return Layer(
        source.name, chosen, grid, empty, dtype, alpha, scales, offsets, palette
    )


def is_landsat(path: str) -> bool:
    """Tell whether a file is named like those of Landsat."""
    name = PurePath(os.path.abspath(path))
    return _LANDSAT.search(f'{name.parent.name}/{name.name}') is not None


def _name_bands(source: Any, layer: Layer) -> tuple[tuple[str, ...] | None, bool]:
    """Name the bands of a file, and tell whether it says all that is to be known of them."""
    indexes = layer.indexes
    descriptions = [source.descriptions[i - 1] or '' for i in indexes]
    if len(indexes) > 1 and source.driver == 'GTiff' and not any(descriptions):
        of_snap = _snap_bands(source.name)
        if len(of_snap) == source.count:
            descriptions = [of_snap[i - 1] for i in indexes]
    texts = [_find_name(text) for text in descriptions]
    known = [text for text in texts if text in KNOWN_BANDS]
    if known and len(set(known)) == len(known):
        # Earth Engine adds masks such as QA60, only all_bands can make use of them
        names = (t or f'BAND {i}' for i, t in zip(indexes, texts, strict=True))
        return tuple(names), True
    colors = tuple(source.colorinterp[i - 1] for i in indexes)
    if layer.palette or colors == RGB_COLORS:
        return RGB_BANDS, True
    # Bands that have other names are other bands, whatever their number
    return None, any(texts)


def _find_name(description: str) -> str:
    """Return the band that a description names, else the description."""
    name = spell_band_name(description)
    words = {spell_band_name(word) for word in BAND_WORD.findall(description)}
    if name in KNOWN_BANDS or len(words) != 1 or _NO_VALUES.search(description):
        return name
    return words.pop()


def _read_sample(source: Any, layer: Layer) -> Values:
    """Read a window of an open raster that has data in half of its pixels, if there is one.

    Nine windows are tried, from the middle on.
    """
    side = min(_SAMPLE, source.height), min(_SAMPLE, source.width)
    found: list[tuple[float, Values]] = []
    for row, column in sorted(np.ndindex(3, 3), key=lambda at: at != (1, 1)):
        top = (source.height - side[0]) * (row + 1) // 4
        left = (source.width - side[1]) * (column + 1) // 4
        window = Window(left, top, *side[::-1])
        values = drop_empty(*read_values(source, layer, window))
        found.append((float(np.isfinite(values).mean()), values))
        if found[-1][0] >= 0.5:
            break
    _, best = max(found, key=lambda one: one[0])
    # Every nth is enough, and little to keep for a hundred thousand files
    return best[:, :: max(1, side[0] // _KEPT), :: max(1, side[1] // _KEPT)].copy()


def _guess_bands(count: int, dtype: str, sample: Values | None) -> tuple[Any, str]:
    """Guess the bands of a file that has no names from their number, and say why.

    What is physically so decides between the orders in use: the band for cirrus is the
    darkest of Sentinel-2, and VV is brighter than VH.
    """
    if count == 12:
        return SENTINEL2_SUBSETS[12], 'as they are 12'
    if sample is None or count not in (2, 13):
        return None, ''
    known = [band[np.isfinite(band)] for band in sample]
    middle = [float(np.median(band)) if band.size else 0.0 for band in known]
    if count == 13:
        cirrus = SENTINEL2_BANDS.index('B10')
        dark, other = middle[cirrus - 1], middle[cirrus]
        if other > 2 * dark and other - dark > 100:
            return _EUROSAT, 'as they are 13 and the tenth, not the eleventh, is dark'
        return SENTINEL2_BANDS, 'as they are 13'
    if not dtype.startswith('float'):
        return None, ''
    if middle[1] > middle[0] + 0.2 * abs(middle[0]):
        return SENTINEL1_BANDS[::-1], 'as the second is the brighter one'
    return SENTINEL1_BANDS, 'as they are 2'


def _snap_bands(path: str) -> list[str]:
    """Read the names of bands that SNAP keeps in a tag of its GeoTIFFs."""
    try:
        with open(path, 'rb') as file:
            text = _read_tag(file, _SNAP).decode('utf-8', 'replace')
    except (OSError, struct.error, OverflowError):
        return []
    bands = re.findall(
        r'<BAND_INDEX>(\d+)</BAND_INDEX>(?:(?!</?Spectral_Band_Info>).)*?'
        r'<BAND_NAME>([^<]*)</BAND_NAME>',
        text,
        re.DOTALL,
    )
    return [name for _, name in sorted(bands, key=lambda band: int(band[0]))]


def _read_tag(file: BinaryIO, number: int) -> bytes:
    """Read a long tag from the first directory of a TIFF or BigTIFF, empty if none."""
    start = file.read(16)
    order = {b'II': '<', b'MM': '>'}.get(start[:2])
    if order is None:
        return b''
    (version,) = struct.unpack_from(f'{order}H', start, 2)
    big = version == 43
    where, count = ('Q', 'Q') if big else ('I', 'H')
    (directory,) = struct.unpack_from(order + where, start, 8 if big else 4)
    file.seek(directory)
    (entries,) = struct.unpack(order + count, file.read(struct.calcsize(count)))
    content = file.read(entries * struct.calcsize(f'{order}HH{where}{where}'))
    for tag, _, size, place in struct.iter_unpack(f'{order}HH{where}{where}', content):
        if tag == number:
            file.seek(place)
            return file.read(size)
    return b''
