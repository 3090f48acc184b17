# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Legends of land-cover maps: codes and names of their classes."""

from collections.abc import Mapping
from dataclasses import dataclass

#: Class codes of ESA WorldCover v100 and v200 in ordinal order, 0 is no data.
#: https://worldcover2021.esa.int/data/docs/WorldCover_PUM_V2.0.pdf
WORLDCOVER_CODES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)

#: Class names, in the order of :data:`WORLDCOVER_CODES`.
WORLDCOVER_CLASSES = (
    'Tree cover',
    'Shrubland',
    'Grassland',
    'Cropland',
    'Built-up',
    'Bare / sparse vegetation',
    'Snow and ice',
    'Permanent water bodies',
    'Herbaceous wetland',
    'Mangroves',
    'Moss and lichen',
)

#: Class names of Dynamic World, whose codes are 0 to 8.
#: https://doi.org/10.1038/s41597-022-01307-4
DYNAMICWORLD_CLASSES = (
    'Water',
    'Trees',
    'Grass',
    'Flooded vegetation',
    'Crops',
    'Shrub and scrub',
    'Built',
    'Bare',
    'Snow and ice',
)

#: Dynamic World's class for every class of WorldCover. Nine pairs have one meaning.
#: Mangroves are flooded vegetation by the definition of Dynamic World. Moss and lichen
#: have no counterpart there: low vegetation of the tundra, they are taken for grass.
WORLDCOVER_TO_DYNAMICWORLD = {
    10: 1,
    20: 5,
    30: 2,
    40: 4,
    50: 6,
    60: 7,
    70: 8,
    80: 0,
    90: 3,
    95: 3,
    100: 2,
}


@dataclass(frozen=True)
class Legend:
    """Classes to count the pixels of WorldCover in.

    Attributes:
        name: Name of the legend.
        codes: Codes of its classes, in the order of a label.
        classes: Names of its classes, in the same order.
        of_worldcover: Its code for every code of WorldCover.
    """

    name: str
    codes: tuple[int, ...]
    classes: tuple[str, ...]
    of_worldcover: Mapping[int, int]


#: Legends by name.
LEGENDS = {
    legend.name: legend
    for legend in (
        Legend(
            'worldcover',
            WORLDCOVER_CODES,
            WORLDCOVER_CLASSES,
            {code: code for code in WORLDCOVER_CODES},
        ),
        Legend(
            'dynamicworld',
            tuple(range(9)),
            DYNAMICWORLD_CLASSES,
            WORLDCOVER_TO_DYNAMICWORLD,
        ),
    )
}
