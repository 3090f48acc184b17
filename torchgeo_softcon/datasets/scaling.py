# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From the numbers in a file to [0, 1], per band."""

import contextlib
import functools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from .._checks import require
from .._compat import Sample
from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS, Level, band_statistics
from ..geo.rasters import RasterReader, Scene, Values

#: What a dataset accepts as *value_range*, see :func:`resolve_value_range`.
ValueRange = Literal['softcon'] | tuple[float, float] | list[tuple[float, float]] | None

#: The values that become 0 and 1, for each band.
Pairs = tuple[tuple[float, float], ...]

#: Standard deviations on each side of the mean. SoftCon clips to them and rounds the
#: result to 8 bits, we keep the fractions.
#: https://github.com/zhu-xlab/softcon/blob/main/README.md
_DEVIATIONS = 2

#: Share of the pixels of a window that are clipped if its numbers are not what the
#: statistics are of. Snow and clouds are that bright, too, so it is no error.
_CLIPPED = 0.95

#: Side of the window that is looked at before the training, in pixels.
_SAMPLE = 256

#: Digital numbers that the atmospheric correction of dark ground does not go below.
_NEGATIVE = -100

#: Quantiles that bands of radar are clipped to by the authors of SoftCon.
#: https://github.com/zhu-xlab/Copernicus-Bench (wrappers of Sentinel-1)
_RADAR_QUANTILES = (0.01, 0.99)


def resolve_value_range(
    value_range: ValueRange,
    bands: Sequence[str] | None,
    count: int,
    dtypes: Iterable[str],
    level: Level = 'L1C',
) -> Pairs:
    """Find the values of each band that become 0 and 1.

    Args:
        value_range: ``'softcon'`` for the mean -2 and +2 standard deviations of
            SSL4EO-S12, one ``(low, high)`` for all bands, or a list with one pair per
            band. None takes ``(0, 255)`` for files of type uint8 and ``'softcon'`` for
            known bands in digital numbers (Sentinel-2) or dB (Sentinel-1).
        bands: Names of the bands, None if they are unknown.
        count: Number of bands.
        dtypes: Types of the files, as rasterio and NumPy call them.
        level: Processing level of Sentinel-2, which chooses the statistics.

    Returns:
        One pair ``(low, high)`` per band.
    """
    kinds = set(dtypes)
    if value_range is None:
        if kinds == {'uint8'}:
            return ((0.0, 255.0),) * count
        known = [b for b in bands or () if b in (*SENTINEL2_BANDS, *SENTINEL1_BANDS)]
        if known and (others := [band for band in bands or () if band not in known]):
            raise ValueError(
                f'bands have no statistics of {", ".join(others)}: choose bands without '
                f'them, bands={known}, or give value_range, one pair (low, high) per band'
            )
        optical = not {*(bands or ())} <= {*SENTINEL1_BANDS}
        if 'uint8' in kinds or (optical and any(k.startswith('float') for k in kinds)):
            # Reflectance in [0, 1] and digital numbers look the same from here, and
            # the wrong guess gives an image that is constant
            raise ValueError(
                f'value_range must be given for files of type {", ".join(sorted(kinds))}'
                ', whose unit is unknown: a pair such as (0, 1) or (0, 10000), one '
                "pair per band, or 'softcon' for digital numbers and dB"
            )
        value_range = 'softcon'

    if value_range == 'softcon':
        try:
            require(bands, 'there are no names')
            return _deviations(band_statistics(bands or (), level))
        except ValueError as error:
            raise ValueError(
                f'value_range must be given for these {count} bands, {error}: '
                'a pair such as (0, 10000), or one pair per band'
            ) from error

    values = np.asarray(value_range, dtype=np.float64)
    if values.shape == (2,):
        values = np.tile(values, (count, 1))
    if values.shape != (count, 2) or not (values[:, 0] < values[:, 1]).all():
        raise ValueError(
            "value_range must be 'softcon', one pair (low, high) with low < high, or "
            f'{count} such pairs, one per band, got {value_range!r}'
        )
    return tuple((float(low), float(high)) for low, high in values)


@functools.cache
def _tell_once(line: str) -> None:
    """Say what a run says once, though training and validation read the same files."""
    rank_zero_info(line)


class SceneScaler:
    """Scales windows of scenes to [0, 1], those of each level by its statistics.

    Attributes:
        level: Level of the first scene, L1C where nothing tells it.
        value_range: The values that become 0 and 1 at that level.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        value_range: ValueRange,
        radar_quantiles: bool = False,
    ) -> None:
        """Find the range of each level, for scenes of the same bands."""
        self.given = value_range
        self.radar_quantiles = radar_quantiles
        # The unit of others is known, whatever their type
        unclear = [s for s in scenes if s.kind.unit in ('', '8 bit')]
        dtypes = {layer.dtype for scene in unclear for layer in scene.layers}
        bands, count = scenes[0].bands, scenes[0].count
        self._ranges = {
            level: resolve_value_range(value_range, bands, count, dtypes, level)
            for level in dict.fromkeys(map(_level, scenes))
        }
        self.level = _level(scenes[0])
        self.value_range = self._ranges[self.level]

    def __call__(self, scene: Scene, values: Values) -> Values:
        """Scale a window of a scene, shape (C, H, W), in place."""
        if self.radar_quantiles:
            for band, pixels in zip(scene.bands or (), values, strict=False):
                known = pixels[np.isfinite(pixels)]
                if band in SENTINEL1_BANDS and known.size:
                    np.clip(pixels, *np.quantile(known, _RADAR_QUANTILES), out=pixels)
        return to_unit_range(values, self._ranges[_level(scene)])

    def sample(
        self, windows: Sequence[tuple[Scene, Values]], mask: Tensor, fill: int = 0
    ) -> Sample:
        """Make a sample of windows of one place and the codes under them.

        Codes become *fill* where a window has no data in any band: a label must not speak
        of what the image does not show. Masks of floats stay as they are.
        """
        if not mask.is_floating_point():
            for _, values in windows:
                empty = ~np.isfinite(values).any(0)
                mask = mask.masked_fill(torch.from_numpy(empty), fill)
        images = [self(scene, values) for scene, values in windows]
        image = images[0] if len(images) == 1 else np.stack(images)
        return {'image': torch.from_numpy(image), 'mask': mask}

    def tell(
        self, scenes: Sequence[Scene], reader: RasterReader
    ) -> list[tuple[str, Scene]]:
        """Say what each kind of scene is taken for, and check a window of it.

        Returns:
            A line of each kind, such as "12 files, Sentinel-2 L2A, offset -1000 from
            MTD_MSIL2A.xml, scaled by L2A statistics", and its first scene.
        """
        kinds: dict[object, list[Scene]] = {}
        for scene in scenes:
            dtypes = frozenset(layer.dtype for layer in scene.layers)
            kinds.setdefault((scene.kind, dtypes), []).append(scene)
        lines = [(self._describe(some), some[0]) for some in kinds.values()]
        for line, scene in lines:
            _tell_once(line)
            if self.given in (None, 'softcon') and scene.kind.unit != '8 bit':
                with contextlib.suppress(OSError):  # damaged, as its windows will say
                    self._check(scene, read_middle(reader, scene))
        return lines

    def _describe(self, scenes: Sequence[Scene]) -> str:
        """Describe scenes of one kind in a line."""
        first, kind = scenes[0], scenes[0].kind
        files = len({layer.path for scene in scenes for layer in scene.layers})
        bands = {*(first.bands or ())}
        optical, radar = bands & {*SENTINEL2_BANDS}, bands & {*SENTINEL1_BANDS}
        level, scaled = '', 'by value_range'
        if self.given is None and kind.unit == '8 bit':
            scaled = 'from 0 to 255'
        elif self.given in (None, 'softcon'):
            level = f' {kind.level or "of unknown level"}'
            scaled = (
                f'by {_level(first)} statistics' if optical else 'by statistics in dB'
            )
        unnamed = ', '.join(first.bands or [f'{first.count} unnamed bands'])
        parts = [
            f'{files} file{"s" * (files > 1)}',
            f'Sentinel-2{level}' if optical else '',
            'Sentinel-1' if radar else '',
            '' if optical or radar else unnamed,
            '' if kind.unit == 'digital numbers' else kind.unit,
            kind.source,
            f'scaled {scaled}',
        ]
        source = f', the level is from {kind.level_source}' * bool(kind.level_source)
        return (
            f'{", ".join(filter(None, parts))} (such as {first.layers[0].path}{source}; '
            'if that is not so, give level, offset or value_range)'
        )

    def _check(self, scene: Scene, values: Values) -> None:
        """Check that a window of a scene is what the statistics of its bands are of.

        It is an error if radar has no negative value, as linear power, or is below the
        range as a whole, as dB times 100.
        """
        level, clipped = _level(scene), []
        pairs = self._ranges[level]
        for band, pixels, pair in zip(scene.bands or (), values, pairs, strict=False):
            pixels = pixels[np.isfinite(pixels)]
            if not pixels.size or pair not in (softcon_range([band], level) or ()):
                continue
            low, high = float(pixels.min()), float(pixels.max())
            clipped.append(float(((pixels <= pair[0]) | (pixels >= pair[1])).mean()))
            if band in SENTINEL1_BANDS and (low >= 0 or high < pair[0]):
                remedy = 'divide it by its factor'
                if low >= 0:
                    remedy = 'convert it by 10 * log10(power), 20 * log10(amplitude)'
                raise ValueError(
                    f'{scene.name} has values of {band} from {low:.4g} to {high:.4g}, '
                    f'which is not radar backscatter in dB: {remedy}, or give value_range'
                )
        middle = f'of the pixels in the middle of {scene.name}'
        corrected = any(offset < 0 for layer in scene.layers for offset in layer.offset)
        corrected = corrected and scene.kind.unit == 'digital numbers'
        negative = float((values[np.isfinite(values)] < _NEGATIVE).sum() / values.size)
        if corrected and negative > 1 - _CLIPPED:
            warnings.warn(
                f'{negative:.0%} {middle} are negative with {scene.kind.source}. If the '
                'numbers were corrected before, give offset=0',
                UserWarning,
                stacklevel=3,
            )
        if clipped and np.mean(clipped) > _CLIPPED:
            warnings.warn(
                f'{np.mean(clipped):.0%} {middle}, which range from '
                f'{np.nanmin(values):.4g} to {np.nanmax(values):.4g}, are clipped by the '
                'statistics of their bands. If they are no snow or clouds, give '
                'value_range, a pair such as (0, 10000), or offset',
                UserWarning,
                stacklevel=3,
            )


def read_middle(reader: RasterReader, scene: Scene) -> Values:
    """Read the window in the middle of a scene, before it is scaled."""
    grid = scene.grid
    height, width = min(_SAMPLE, grid.height), min(_SAMPLE, grid.width)
    top, left = (grid.height - height) // 2, (grid.width - width) // 2
    return reader.read(scene, top, left, height, width)


def _level(scene: Scene) -> Level:
    """Return the level whose statistics scale a scene."""
    return scene.kind.level or 'L1C'


def with_level(scenes: Iterable[Scene], level: Level | None) -> list[Scene]:
    """Give scenes the level that the user says, if any."""
    if level is None:
        return list(scenes)
    return [
        replace(s, kind=replace(s.kind, level=level, level_source='level'))
        for s in scenes
    ]


def softcon_range(bands: Sequence[str] | None, level: Level = 'L1C') -> Pairs | None:
    """Return the range ``'softcon'`` of some bands, None if they have no statistics."""
    try:
        return _deviations(band_statistics(bands or (), level)) or None
    except ValueError:
        return None


def _deviations(statistics: Iterable[tuple[float, float]]) -> Pairs:
    return tuple(
        (mean - _DEVIATIONS * std, mean + _DEVIATIONS * std) for mean, std in statistics
    )


def to_unit_range(values: Values, value_range: Sequence[tuple[float, float]]) -> Values:
    """Map bands of shape (C, H, W) to [0, 1], in place. What is not finite becomes 0."""
    low, high = np.asarray(value_range, dtype=np.float32).T[:, :, None, None]
    missing = ~np.isfinite(values)
    values -= low
    values /= high - low
    np.clip(values, 0, 1, out=values)
    values[missing] = 0
    return values
