# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The numbers in image files: their unit, their scale, and which bands they are of."""

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from rasterio.windows import Window

from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS, SENTINEL2_SUBSETS
from .rasters import Layer, Values, drop_empty, read_values
from .sentinel2 import Products

#: Digital numbers of Sentinel-2 per unit of reflectance.
_PER_REFLECTANCE = 10_000

#: Largest reflectance, of bright clouds, and digital numbers that are small: what lies
#: between the two is neither for sure.
_MOST_REFLECTANCE, _SOME_DIGITAL = 2.0, 100.0

#: Side of the window that tells the unit of a file, in pixels.
_SAMPLE = 64

#: Pixels of it along each side that are kept.
_KEPT = 16

#: Order of bands without names in the files of EuroSAT, where B8A is the last.
_EUROSAT = (*(band for band in SENTINEL2_BANDS if band != 'B8A'), 'B8A')

#: TIFF's tag for private data in which SNAP keeps names of bands, and types of one byte.
_SNAP = 65000
_BYTES = (1, 2, 6, 7)


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


def read_sample(source: Any, layer: Layer) -> Values:
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


def guess_bands(count: int, dtype: str, sample: Values | None) -> tuple[Any, str]:
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


def snap_bands(path: str) -> list[str]:
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
    """Read a tag of text from the first directory of a TIFF or BigTIFF, empty if none."""
    start = file.read(16)
    order = {b'II': '<', b'MM': '>'}.get(start[:2])
    if order is None:
        return b''
    (version,) = struct.unpack_from(f'{order}H', start, 2)
    big = version == 43
    where, count, entry = ('Q', 'Q', 20) if big else ('I', 'H', 12)
    (directory,) = struct.unpack_from(order + where, start, 8 if big else 4)
    file.seek(directory)
    (entries,) = struct.unpack(order + count, file.read(struct.calcsize(count)))
    content = file.read(entries * entry)
    for at in range(0, len(content), entry):
        tag, kind, size = struct.unpack_from(f'{order}HH{where}', content, at)
        if tag == number and kind in _BYTES:
            place = at + 4 + struct.calcsize(where)
            if size <= struct.calcsize(where):
                return content[place : place + size]
            file.seek(struct.unpack_from(order + where, content, place)[0])
            return file.read(size)
    return b''


def optical_unit(file: OpenedFile) -> str:
    """Tell the unit of optical bands from their type, their scale and their values."""
    layer = file.layer
    if not layer.declared and layer.dtype == 'uint8':
        return '8 bit'
    whole = not layer.dtype.startswith('float')
    if whole and not layer.declared:
        return 'digital numbers' if np.iinfo(layer.dtype).max > 255 else ''
    if whole and max(map(abs, layer.scale)) * np.iinfo(layer.dtype).max <= 10:
        return 'reflectance'
    if file.sample is None:
        return ''
    values = _physical(file)
    values = values[np.isfinite(values)]
    top = float(np.quantile(values, 0.98)) if values.size else 0.0
    if 0 < top <= _MOST_REFLECTANCE:
        return 'reflectance'
    return 'digital numbers' if top >= _SOME_DIGITAL else ''


def _physical(file: OpenedFile) -> Values:
    """Return the sample with scale and offset of the file applied."""
    assert file.sample is not None
    layer = file.layer
    scale, offset = (
        np.array(numbers, np.float32)[:, None, None]
        for numbers in (layer.scale, layer.offset)
    )
    return np.asarray(file.sample * scale + offset, np.float32)


class Numbers:
    """Completes what is known of the numbers in files.

    Attributes:
        untold: Files with digital numbers of Sentinel-2 whose baseline nothing tells.
        products: The products that files belong to.
    """

    def __init__(
        self, files: Iterable[OpenedFile], offset: float | None, to_digital: bool
    ) -> None:
        """Initialize a new Numbers instance.

        Args:
            files: All files: a dark one alone does not tell its unit.
            offset: What is added to all numbers, None for what files tell.
            to_digital: Whether to bring reflectance to digital numbers, of which the
                statistics of bands are.
        """
        self.offset, self.to_digital = offset, to_digital
        self.products = Products()
        self.untold: list[str] = []
        units = {optical_unit(file) for file in files if file.sample is not None} - {''}
        self._unit = units.pop() if len(units) == 1 else ''

    def apply(
        self, file: OpenedFile, names: tuple[str, ...] | None
    ) -> tuple[Layer, str, str]:
        """Complete the nodata value, scale and offset of some bands.

        Returns:
            The bands, their unit, and in words, where scale and offset are from.
        """
        layer, text = file.layer, ''
        count = len(layer.indexes)
        positions = [i for i, name in enumerate(names or ()) if name in SENTINEL2_BANDS]
        others = [i for i in range(count) if i not in positions]
        optical = not others
        # Bytes and floats were scaled by someone, who knows what became of 0 and 1000
        whole = layer.dtype in ('uint16', 'uint32', 'uint64')
        empty = all(value is None for value in layer.nodata)
        if optical and whole and empty:
            layer = replace(layer, nodata=(0.0,) * count)
        if self.offset is not None:
            # It says nothing of the unit
            file = file._replace(
                layer=replace(layer, scale=(1.0,) * count, offset=(0.0,) * count)
            )
            layer = replace(file.layer, offset=(self.offset,) * count)
            text = f'offset {self.offset:g} as given'
        elif layer.declared:
            text = (
                f'scale {layer.scale[0]:g} and offset {layer.offset[0]:g} of the files'
            )
        units = []
        if positions:
            units.append(optical_unit(file.choose(positions)) or self._unit)
        if others:
            named = [names[i] for i in others] if names else []
            units.append(self._other_unit(file.choose(others), named))
        if optical and units == ['digital numbers'] and not text:
            layer, text = self._add_offset(layer, file.tags, whole)
        known = '' not in units
        if known and empty and layer.dtype.startswith('float'):
            # Exactly 0 in all bands is the frame around an image
            layer = replace(layer, nodata=(0.0,) * count)
        if self.to_digital and 'reflectance' in units:
            factors = [_PER_REFLECTANCE if i in positions else 1 for i in range(count)]
            scale, offset = (
                tuple(
                    float(f'{f * v:.12g}') for f, v in zip(factors, values, strict=True)
                )
                for values in (layer.scale, layer.offset)
            )
            layer = replace(layer, scale=scale, offset=offset)
        return layer, ', '.join(dict.fromkeys(units)) * known, text

    def _add_offset(
        self, layer: Layer, tags: Mapping[str, Any], whole: bool
    ) -> tuple[Layer, str]:
        """Add the offset of the product to digital numbers, and say where it is from."""
        found = self.products.offset(layer.path, tags)
        if found.source is None:
            self.untold += [layer.path] * whole
            return layer, ''
        if whole:
            offset = (found.value,) * len(layer.indexes)
            text = f'offset {found.value:g} from {found.source}'
            return replace(layer, offset=offset), text
        told = f'though {found.source} tells {found.value:g}'
        return layer, f'no offset as they are {layer.dtype}, {told}' * bool(found.value)

    def _other_unit(self, file: OpenedFile, names: Sequence[str]) -> str:
        """Tell the unit of bands that are not of Sentinel-2."""
        if optical_unit(file) == '8 bit':
            return '8 bit'
        if not set(names) & {*SENTINEL1_BANDS} or file.sample is None:
            return ''
        return 'linear' if np.nanmin(_physical(file), initial=np.inf) >= 0 else 'dB'
