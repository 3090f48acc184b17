# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From the numbers in a file to [0, 1], per band."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS, Level, band_statistics

#: What a dataset accepts as *value_range*, see :func:`resolve_value_range`.
ValueRange = Literal['softcon'] | tuple[float, float] | list[tuple[float, float]] | None

#: Standard deviations on each side of the mean. SoftCon clips to them and rounds the
#: result to 8 bits, we keep the fractions.
#: https://github.com/zhu-xlab/softcon/blob/main/README.md
_DEVIATIONS = 2


#: Bands that have statistics.
_STATISTICS = (*SENTINEL2_BANDS, *SENTINEL1_BANDS)

#: The level in the names of products (S2B_MSIL2A_...), of their granules (L2A_T32UNE_...)
#: and of items of STAC catalogues (S2B_32UNE_20200101_0_L2A).
_LEVEL = re.compile(r'(?:MSI|(?<![A-Za-z0-9]))(L1C|L2A)(?![A-Za-z0-9])')


def choose_level(
    level: Level | None,
    bands: Sequence[str] | None,
    names: Iterable[str | os.PathLike[str]],
    scaled: bool,
) -> Level:
    """Choose whose statistics images are scaled by, and say so where it matters.

    The names of Sentinel-2 products tell their level. Without them, a band B10 is of
    Level-1C, and all twelve other bands together are of Level-2A.

    Args:
        level: What the user says, None for what the images tell.
        bands: Names of the bands, None if they are unknown.
        names: Files or scenes.
        scaled: Whether images are scaled by these statistics.

    Returns:
        The level, L1C where nothing tells it.

    Raises:
        ValueError: If images are of both levels, and would be scaled alike.
    """
    optical = {*(bands or ())} & {*SENTINEL2_BANDS}
    if level is not None or not optical or not scaled:
        return level or 'L1C'
    found: dict[str, str] = {}
    for name in names:
        for match in _LEVEL.findall(os.path.realpath(name)):
            found.setdefault(match, os.fspath(name))
    if len(found) > 1:
        raise ValueError(
            f'images must be of one level of Sentinel-2, got {found["L1C"]} of L1C and '
            f'{found["L2A"]} of L2A: give them to two datasets, or give level'
        )
    if found:
        ((told, name),) = found.items()
        reason = f'as {name} says'
    elif 'B10' in optical:
        told, reason = 'L1C', 'as they have B10'
    elif len(optical) == len(SENTINEL2_BANDS) - 1:
        told, reason = 'L2A', 'as B10 alone is missing'
    else:
        told, reason = 'L1C', 'which nothing in names and bands confirms'
    rank_zero_info(
        f'Images of Sentinel-2 are taken for {told}, {reason}, and scaled by the '
        'statistics of that level. If that is not so, give level'
    )
    return cast(Level, told)


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


def check_radar(
    values: npt.NDArray[np.float32],
    bands: Sequence[str] | None,
    value_range: Sequence[tuple[float, float]],
    name: str,
) -> None:
    """Check that radar bands which are scaled as dB are in dB.

    Args:
        values: A window of an image, shape (C, H, W), NaN without data.
        bands: Names of its bands.
        value_range: Pairs ``(low, high)``, one per band.
        name: The image, for the message.

    Raises:
        ValueError: If no pixel of a band is negative, as of linear power or amplitude,
            or all are below its range, as of dB that are stored times 100.
    """
    for band, pixels, pair in zip(bands or (), values, value_range, strict=False):
        pixels = pixels[np.isfinite(pixels)]
        if band not in SENTINEL1_BANDS or pair not in (softcon_range([band]) or ()):
            continue
        if not pixels.size or (pixels.min() < 0 and pixels.max() >= pair[0]):
            continue
        remedy = (
            'convert it by 10 * log10(power), 20 * log10(amplitude)'
            if pixels.min() >= 0
            else 'divide it by its factor'
        )
        raise ValueError(
            f'{name} has values of {band} from {pixels.min():.4g} to {pixels.max():.4g}, '
            f'which is not radar backscatter in dB: {remedy}, or give value_range'
        )


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
