# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Band names, and what is known of the values of the bands behind them."""

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, get_args

from ._checks import require

#: Bands of a Sentinel-2 Level-1C product, in the order of SSL4EO-S12 and of SoftCon.
#: https://github.com/zhu-xlab/SSL4EO-S12/blob/main/src/download_data/convert_rgb.py
SENTINEL2_BANDS = (
    *(f'B{number}' for number in range(1, 9)),
    'B8A',
    *(f'B{number}' for number in range(9, 13)),
)

#: Which bands of Sentinel-2 a number of bands stands for, where nothing else is said: all
#: of Level-1C, Level-2A (which has no B10), those of 10 and 20 m, those of 10 m, colours.
SENTINEL2_SUBSETS = {
    13: SENTINEL2_BANDS,
    12: tuple(band for band in SENTINEL2_BANDS if band != 'B10'),
    10: ('B2', 'B3', 'B4', 'B5', 'B6', 'B7', 'B8', 'B8A', 'B11', 'B12'),
    4: ('B2', 'B3', 'B4', 'B8'),
    3: ('B4', 'B3', 'B2'),
}

#: Bands of a Sentinel-1 GRD product, in the order of SSL4EO-S12 and of SoftCon.
SENTINEL1_BANDS = ('VV', 'VH')

#: Names for the colours of a photograph, in the order of an image file.
RGB_BANDS = ('R', 'G', 'B')

#: Names that are understood. The last ones have no statistics.
KNOWN_BANDS = (
    *SENTINEL2_BANDS,
    *SENTINEL1_BANDS,
    *RGB_BANDS,
    *('HH', 'HV', 'NIR', 'SWIR1', 'SWIR2', 'COASTAL'),
)

#: Other spellings, after upper case and the removal of leading zeros.
_ALIASES = {'RED': 'R', 'GREEN': 'G', 'BLUE': 'B'}

#: Processing levels of Sentinel-2: top of the atmosphere, and ground.
Level = Literal['L1C', 'L2A']

#: Mean and standard deviation of SSL4EO-S12: digital numbers (reflectance times 10,000)
#: for Sentinel-2 of Level-1C, dB for Sentinel-1.
#: https://github.com/zhu-xlab/DeCUR/blob/f190e9a/src/transfer_classification_BE/linear_BE_resnet.py#L286
#: and, for Sentinel-2, the table of TorchGeo's SSL4EO-S12 weights.
BAND_STATISTICS = {
    'B1': (1612.9, 791.0),
    'B2': (1397.6, 854.3),
    'B3': (1322.3, 878.7),
    'B4': (1373.1, 1144.9),
    'B5': (1561.0, 1127.5),
    'B6': (2108.4, 1164.2),
    'B7': (2390.7, 1276.0),
    'B8': (2318.7, 1249.5),
    'B8A': (2581.0, 1345.9),
    'B9': (837.7, 577.5),
    'B10': (22.0, 47.5),
    'B11': (2195.2, 1340.0),
    'B12': (1537.4, 1142.9),
    'VV': (-12.59, 5.26),
    'VH': (-20.26, 5.91),
}

#: The same of Level-2A, which has no B10, by SoftCon's authors.
#: https://github.com/zhu-xlab/Copernicus-Bench (cobench_bigearthnet_s2.yaml)
#: https://github.com/zhu-xlab/SSL4EO-S12 (S2A_MEAN, S2A_STD)
LEVEL2A_STATISTICS = {
    'B1': (752.40, 1108.03),
    'B2': (884.30, 1155.15),
    'B3': (1144.16, 1183.63),
    'B4': (1297.47, 1368.11),
    'B5': (1624.91, 1370.27),
    'B6': (2194.64, 1355.55),
    'B7': (2422.21, 1416.51),
    'B8': (2517.76, 1474.79),
    'B8A': (2581.65, 1439.31),
    'B9': (2645.52, 1582.28),
    'B11': (2368.51, 1455.52),
    'B12': (1805.07, 1343.48),
}


def spell_band_name(band: str) -> str:
    """Bring one band name to our spelling, without a look at whether it is known."""
    name = re.sub(r'^B0+(?=\d)', 'B', str(band).upper())
    return _ALIASES.get(name, name)


def _reject_text(bands: Sequence[str]) -> None:
    """Raise for one text, whose characters would be taken for names."""
    require(
        not isinstance(bands, str),
        f"bands must be a list of names, such as ['B4', 'B3', 'B2'], got {bands!r}",
    )


def normalize_band_names(
    bands: Sequence[str], also: Sequence[str] = ()
) -> tuple[str, ...]:
    """Bring band names to one spelling.

    ``B02``, ``b2`` and ``B2`` are one band, ``B8a`` and ``B08A`` are one band, ``red``
    and ``R`` are one band.
    """
    _reject_text(bands)
    known = (*KNOWN_BANDS, *also)
    names = []
    for band in bands:
        name = spell_band_name(band)
        if name not in known:
            close = difflib.get_close_matches(name, known)
            hint = f', did you mean {" or ".join(close)}?' if close else '.'
            raise ValueError(
                f'bands has the unknown name {band!r}{hint} Known are '
                f'{", ".join(known)}. Leave bands out for any other sensor'
            )
        names.append(name)

    require(len({*names}) == len(names), f'bands must be unique, got {tuple(bands)}')
    return tuple(names)


def band_statistics(
    bands: Sequence[str], level: Level = 'L1C'
) -> tuple[tuple[float, float], ...]:
    """Look up mean and standard deviation of bands in SSL4EO-S12, in our spelling.

    In digital numbers (reflectance times 10,000) of Sentinel-2 and dB of Sentinel-1.

    Raises:
        ValueError: If *level* is unknown, or bands have no statistics at that level.
    """
    levels = get_args(Level)
    require(level in levels, f'level must be one of {", ".join(levels)}, got {level!r}')
    table = BAND_STATISTICS
    if level == 'L2A':
        radar = {band: BAND_STATISTICS[band] for band in SENTINEL1_BANDS}
        table = {**LEVEL2A_STATISTICS, **radar}
    unknown = ', '.join(band for band in bands if band not in table)
    require(not unknown, f'there are no statistics of {unknown} of Sentinel-2 {level}')
    return tuple(table[band] for band in bands)


def bands_of_count(count: int, known: Sequence[str]) -> tuple[str, ...]:
    """Tell which bands a number of bands stands for, or raise a ValueError.

    All of *known* if there are as many, else one of :data:`SENTINEL2_SUBSETS`.
    """
    require(
        count <= len(known),
        f'{count} bands are too many, there are {len(known)}: {", ".join(known)}. Choose '
        'fewer, or weights for more',
    )
    sets = {n: bands for n, bands in SENTINEL2_SUBSETS.items() if {*bands} < {*known}}
    sets[len(known)] = tuple(known)
    require(
        count in sets,
        f'{count} bands of {", ".join(known)} could be any, only '
        f'{" or ".join(map(str, sorted(sets)))} would be clear. Name them: bands=[...]',
    )
    return sets[count]


def rgb_indices(bands: Sequence[str]) -> tuple[int, int, int]:
    """Find red, green and blue among band names in any spelling, or raise ValueError."""
    _reject_text(bands)
    names = [spell_band_name(band) for band in bands]
    for red, green, blue in (SENTINEL2_SUBSETS[3], RGB_BANDS):
        if {red, green, blue} <= set(names):
            return names.index(red), names.index(green), names.index(blue)
    raise ValueError(
        'bands must have red, green and blue (B4, B3, B2 or R, G, B), got '
        f'{tuple(bands)}'
    )


def shown_channels(bands: Sequence[str] | None, count: int) -> list[int]:
    """Choose the channels to show of an image."""
    if bands is not None:
        with suppress(ValueError):  # other bands
            return list(rgb_indices(bands))
    return [0, 1, 2] if count >= 3 else [0]
