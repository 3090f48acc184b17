# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From the numbers in a file to [0, 1], per band."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..bands import BAND_STATISTICS, SENTINEL1_BANDS

#: What a dataset accepts as *value_range*, see :func:`resolve_value_range`.
ValueRange = Literal['softcon'] | tuple[float, float] | list[tuple[float, float]] | None

#: Standard deviations on each side of the mean. SoftCon clips to them and rounds the
#: result to 8 bits, we keep the fractions.
#: https://github.com/zhu-xlab/softcon/blob/main/README.md
_DEVIATIONS = 2


def resolve_value_range(
    value_range: ValueRange,
    bands: Sequence[str] | None,
    count: int,
    dtypes: Iterable[str],
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

    Returns:
        One pair ``(low, high)`` per band.
    """
    kinds = set(dtypes)
    if value_range is None:
        if kinds == {'uint8'}:
            return ((0.0, 255.0),) * count
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
        unknown = [band for band in bands or () if band not in BAND_STATISTICS]
        if not bands or unknown:
            what = f'no statistics of {", ".join(unknown)}' if unknown else 'no names'
            raise ValueError(
                f'value_range must be given for these {count} bands, there are {what}: '
                'a pair such as (0, 10000), or one pair per band'
            )
        return tuple(
            (mean - _DEVIATIONS * std, mean + _DEVIATIONS * std)
            for mean, std in (BAND_STATISTICS[band] for band in bands)
        )

    values = np.asarray(value_range, dtype=np.float64)
    if values.shape == (2,):
        values = np.tile(values, (count, 1))
    if values.shape != (count, 2) or not (values[:, 0] < values[:, 1]).all():
        raise ValueError(
            "value_range must be 'softcon', one pair (low, high) with low < high, or "
            f'{count} such pairs, one per band, got {value_range!r}'
        )
    return tuple((float(low), float(high)) for low, high in values)


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
