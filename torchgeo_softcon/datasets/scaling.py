# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From the numbers in a file to [0, 1], per band."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS, Level, band_statistics
from ..geo.rasters import Scene

#: What a dataset accepts as *value_range*, see :func:`resolve_value_range`.
ValueRange = Literal['softcon'] | tuple[float, float] | list[tuple[float, float]] | None

#: Standard deviations on each side of the mean. SoftCon clips to them and rounds the
#: result to 8 bits, we keep the fractions.
#: https://github.com/zhu-xlab/softcon/blob/main/README.md
_DEVIATIONS = 2


#: Bands that have statistics.
_STATISTICS = (*SENTINEL2_BANDS, *SENTINEL1_BANDS)

#: Share of the pixels of a window that are clipped if its numbers are not what the
#: statistics are of. Snow and clouds are that bright, too, so it is no error.
_CLIPPED = 0.95

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
) -> tuple[tuple[float, float], ...]:
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
        known = softcon_range([b for b in bands or () if b in _STATISTICS])
        if bands and known and len(known) < len(bands):
            others = [band for band in bands if band not in _STATISTICS]
            raise ValueError(
                f'bands have no statistics of {", ".join(others)}: choose bands without '
                f'them, bands={[b for b in bands if b in _STATISTICS]}, or give '
                'value_range, one pair (low, high) per band'
            )
        optical = any(band not in SENTINEL1_BANDS for band in bands or ())
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
            if not bands:
                raise ValueError('there are no names')
            statistics = band_statistics(bands, level)
        except ValueError as error:
            raise ValueError(
                f'value_range must be given for these {count} bands, {error}: '
                'a pair such as (0, 10000), or one pair per band'
            ) from error
        return _deviations(statistics)

    values = np.asarray(value_range, dtype=np.float64)
    if values.shape == (2,):
        values = np.tile(values, (count, 1))
    if values.shape != (count, 2) or not (values[:, 0] < values[:, 1]).all():
        raise ValueError(
            "value_range must be 'softcon', one pair (low, high) with low < high, or "
            f'{count} such pairs, one per band, got {value_range!r}'
        )
    return tuple((float(low), float(high)) for low, high in values)


def scene_level(scene: Scene) -> Level:
    """Return the level whose statistics scale a scene, L1C where nothing tells it."""
    return scene.kind.level or 'L1C'


def scene_ranges(
    scenes: Sequence[Scene], value_range: ValueRange
) -> dict[Level, tuple[tuple[float, float], ...]]:
    """Find the values that become 0 and 1, for the scenes of each level.

    Args:
        scenes: Scenes of the same bands.
        value_range: See :func:`resolve_value_range`.

    Returns:
        Pairs ``(low, high)``, one per band, for each level of :func:`scene_level`.
    """
    # The unit of others is known, whatever their type
    dtypes = {
        layer.dtype
        for scene in scenes
        for layer in scene.layers
        if scene.kind.unit in ('', '8 bit')
    }
    first = scenes[0]
    return {
        level: resolve_value_range(value_range, first.bands, first.count, dtypes, level)
        for level in dict.fromkeys(map(scene_level, scenes))
    }


def describe_scenes(
    scenes: Sequence[Scene], value_range: ValueRange
) -> list[tuple[str, Scene]]:
    """Describe each kind of scene in a line, with the first scene of that kind.

    The line is such as "12 files, Sentinel-2 L2A, offset -1000 from MTD_MSIL2A.xml, scaled
    by L2A statistics".

    Args:
        scenes: Scenes of the same bands.
        value_range: See :func:`resolve_value_range`.
    """
    kinds: dict[object, list[Scene]] = {}
    for scene in scenes:
        dtypes = tuple(sorted({layer.dtype for layer in scene.layers}))
        kinds.setdefault((scene.kind, dtypes), []).append(scene)
    lines = []
    for some in kinds.values():
        first, kind = some[0], some[0].kind
        files = len({layer.path for scene in some for layer in scene.layers})
        bands = {*(first.bands or ())}
        optical = bool(bands & {*SENTINEL2_BANDS})
        by_statistics = value_range == 'softcon' or (
            value_range is None and kind.unit != '8 bit'
        )
        level = f' {kind.level or "of unknown level"}' * by_statistics
        parts = [f'{files} file{"s" * (files > 1)}']
        parts += [f'Sentinel-2{level}'] * optical
        parts += ['Sentinel-1'] * bool(bands & {*SENTINEL1_BANDS})
        if len(parts) == 1:
            parts.append(', '.join(first.bands or [f'{first.count} unnamed bands']))
        parts += [kind.unit] * (kind.unit not in ('', 'digital numbers'))
        parts += [kind.source] * bool(kind.source)
        if by_statistics:
            whose = (
                f'{scene_level(first)} statistics' if optical else 'statistics in dB'
            )
            parts.append(f'scaled by {whose}')
        else:
            given = value_range is not None
            parts.append('scaled by value_range' if given else 'scaled from 0 to 255')
        source = f', the level is from {kind.level_source}' * bool(kind.level_source)
        line = (
            f'{", ".join(parts)} (such as {first.layers[0].path}{source}; if that is not '
            'so, give level, offset or value_range)'
        )
        lines.append((line, first))
    return lines


def tell_scenes(
    scenes: Sequence[Scene],
    value_range: ValueRange,
    ranges: Mapping[Level, Sequence[tuple[float, float]]],
    read: Callable[[Scene], npt.NDArray[np.float32]],
) -> list[tuple[str, Scene]]:
    """Say what each kind of scene is taken for, and check a window of it.

    Args:
        scenes: Scenes of the same bands.
        value_range: See :func:`resolve_value_range`.
        ranges: Those of :func:`scene_ranges`.
        read: Reads a window of a scene, before it is scaled.

    Returns:
        What :func:`describe_scenes` says.
    """
    kinds = describe_scenes(scenes, value_range)
    for line, scene in kinds:
        rank_zero_info(line)
        if value_range in (None, 'softcon') and scene.kind.unit != '8 bit':
            with contextlib.suppress(OSError):  # damaged, which its windows will say
                check_sample(read(scene), scene, ranges[scene_level(scene)])
    return kinds


def with_level(scenes: Iterable[Scene], level: Level | None) -> list[Scene]:
    """Give scenes the level that the user says, if any."""
    if level is None:
        return list(scenes)
    return [
        replace(s, kind=replace(s.kind, level=level, level_source='level'))
        for s in scenes
    ]


def check_sample(
    values: npt.NDArray[np.float32],
    scene: Scene,
    value_range: Sequence[tuple[float, float]],
) -> None:
    """Check that a window of an image is what the statistics of its bands are of.

    Args:
        values: The window, shape (C, H, W), NaN without data.
        scene: The image.
        value_range: Pairs ``(low, high)``, one per band.

    Raises:
        ValueError: If a band of radar is scaled as dB and has no negative pixel, as of
            linear power or amplitude, or all are below the range, as of dB times 100.

    Warns:
        UserWarning: If nearly all pixels of bands that are scaled by statistics are below
            or above them, or if an offset makes many of them negative.
    """
    clipped = []
    for band, pixels, pair in zip(scene.bands or (), values, value_range, strict=False):
        pixels = pixels[np.isfinite(pixels)]
        if not pixels.size or pair not in (
            softcon_range([band], scene_level(scene)) or ()
        ):
            continue
        low, high = float(pixels.min()), float(pixels.max())
        clipped.append(float(((pixels <= pair[0]) | (pixels >= pair[1])).mean()))
        if band not in SENTINEL1_BANDS or (low < 0 and high >= pair[0]):
            continue
        remedy = (
            'convert it by 10 * log10(power), 20 * log10(amplitude)'
            if low >= 0
            else 'divide it by its factor'
        )
        raise ValueError(
            f'{scene.name} has values of {band} from {low:.4g} to {high:.4g}, '
            f'which is not radar backscatter in dB: {remedy}, or give value_range'
        )
    corrected = any(offset < 0 for layer in scene.layers for offset in layer.offset)
    negative = float((values[np.isfinite(values)] < _NEGATIVE).sum() / values.size)
    if corrected and negative > 1 - _CLIPPED and scene.kind.unit == 'digital numbers':
        warnings.warn(
            f'{negative:.0%} of the pixels in the middle of {scene.name} are negative with '
            f'{scene.kind.source}. If the numbers were corrected before, give offset=0',
            UserWarning,
            stacklevel=3,
        )
    if clipped and np.mean(clipped) > _CLIPPED:
        warnings.warn(
            f'{np.mean(clipped):.0%} of the pixels in the middle of {scene.name}, which '
            f'range from {np.nanmin(values):.4g} to {np.nanmax(values):.4g}, are clipped '
            'by the statistics of their bands. If they are no snow or clouds, give '
            'value_range, a pair such as (0, 10000), or offset',
            UserWarning,
            stacklevel=3,
        )


def clip_radar(
    values: npt.NDArray[np.float32], bands: Sequence[str] | None
) -> npt.NDArray[np.float32]:
    """Clip bands of radar of shape (C, H, W) to their own 1 and 99 % quantiles, in place.

    SoftCon's authors do so before they scale by mean and standard deviation.
    """
    for band, pixels in zip(bands or (), values, strict=False):
        known = pixels[np.isfinite(pixels)]
        if band in SENTINEL1_BANDS and known.size:
            np.clip(pixels, *np.quantile(known, _RADAR_QUANTILES), out=pixels)
    return values


def softcon_range(
    bands: Sequence[str] | None, level: Level = 'L1C'
) -> tuple[tuple[float, float], ...] | None:
    """Return the range ``'softcon'`` of some bands, None if they have no statistics."""
    try:
        return _deviations(band_statistics(bands or (), level)) or None
    except ValueError:
        return None


def _deviations(
    statistics: Iterable[tuple[float, float]],
) -> tuple[tuple[float, float], ...]:
    return tuple(
        (mean - _DEVIATIONS * std, mean + _DEVIATIONS * std) for mean, std in statistics
    )


def to_unit_range(
    values: npt.NDArray[np.float32], value_range: Sequence[tuple[float, float]]
) -> npt.NDArray[np.float32]:
    """Map bands of shape (C, H, W) to [0, 1], in place. What is not finite becomes 0."""
    low, high = np.asarray(value_range, dtype=np.float32).T[:, :, None, None]
    missing = ~np.isfinite(values)
    values -= low
    values /= high - low
    np.clip(values, 0, 1, out=values)
    values[missing] = 0
    return values
