# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The numbers in image files: their unit and their scale."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS
from .describe import OpenedFile
from .rasters import Layer, Values
from .sentinel2 import Products

#: Digital numbers of Sentinel-2 per unit of reflectance.
_PER_REFLECTANCE = 10_000

#: Largest reflectance, of bright clouds, and digital numbers that are small: what lies
#: between the two is neither for sure.
_MOST_REFLECTANCE, _SOME_DIGITAL = 2.0, 100.0


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
