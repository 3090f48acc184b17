# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import datetime
from typing import Any

import numpy as np
import pytest
import shapely

from torchgeo_softcon.evaluation.footprints import footprints


class Patches:
    """Patches of 2.64 km in UTM zone 1, the first one across the antimeridian."""

    def __init__(self, crs: Any, *boxes: tuple[float, float, float, float]) -> None:
        self.crs, self.boxes = crs, boxes

    def footprint(self, index: int) -> tuple[Any, Any, Any]:
        day = datetime.date(2020, 6, 30)
        return shapely.box(*self.boxes[index]), self.crs, day


@pytest.mark.parametrize(
    ('crs', 'box'),
    [
        ('EPSG:32601', (357_000, 7_200_000, 359_640, 7_202_640)),
        ('EPSG:32760', (800800, 7198500, 803440, 7201140)),
        ('EPSG:4326', (179.99, 60, 180.03, 60.02)),
        ('EPSG:3832', (3_338_000, 0, 3_342_000, 4_000)),
    ],
)
def test_outlines_stay_together_at_the_antimeridian(crs: str, box: Any) -> None:
    (found,) = footprints({}, [0], Patches(crs, box)) or []
    left, _, right, _ = found.outline.bounds
    assert right - left < 0.1
    assert 179 < abs(left + right) / 2 <= 180
    assert found.start is not None
    assert found.start.date() == datetime.date(2020, 6, 30)


def test_small_outlines_are_their_corners() -> None:
    patches = Patches('EPSG:32632', (5e5, 5e6, 502_640, 5_002_640))
    (found,) = footprints({}, [0], patches) or []
    assert shapely.get_num_coordinates(found.outline) == 5
    (long,) = footprints({}, [0], Patches('EPSG:32632', (5e5, 5e6, 6e5, 51e5))) or []
    assert shapely.get_num_coordinates(long.outline) > 50
    assert np.isfinite(shapely.get_coordinates(long.outline)).all()
