# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from pathlib import Path

import numpy as np
import pytest

from torchgeo_softcon.datasets import ESAWorldCover
from torchgeo_softcon.landcover.download import check_official, is_readable, tiles_of
from torchgeo_softcon.landcover.products import WORLDCOVER

GRID = WORLDCOVER.grid

Box = tuple[float, float, float, float]


@pytest.mark.parametrize(
    ('box', 'expected'),
    [
        ((3.1, 51.1, 5.9, 53.9), ['N51E003']),
        ((3, 51, 6, 54), ['N51E003']),
        ((77.2, 28.6, 77.3, 28.7), ['N27E075']),
        ((-0.1, -0.1, 0.1, 0.1), ['N00E000', 'N00W003', 'S03E000', 'S03W003']),
        ((-78.4, -0.2, -78, 0), ['S03W081']),
        ((179.9, 66.5, -179.9, 66.6), ['N66E177', 'N66W180']),
        ((179.9, 66.5, 180.1, 66.6), ['N66E177', 'N66W180']),
        ((-180.1, 66.5, -179.9, 66.6), ['N66E177', 'N66W180']),
        ((179, 66.5, 180, 66.6), ['N66E177']),
        ((-180, 66.5, -179, 66.6), ['N66W180']),
        ((180, 66.5, -179, 66.6), ['N66W180']),
        # Projected coordinates are not exact
        ((3 - 1e-10, 51 - 1e-10, 6 + 1e-10, 54 + 1e-10), ['N51E003']),
        ((3 - 1e-6, 51, 6, 54), ['N51E000', 'N51E003']),
        # Points and lines
        ((5, 50, 5, 50), ['N48E003']),
        ((6, 51, 6, 54), ['N51E006']),
        ((180, 0, 180, 0), ['N00W180']),
        # The end of the map, and what is beyond
        ((10, 81, 11, 82.75), ['N81E009']),
        ((10, 83, 11, 90), ['N81E009']),
        ((10, 84, 11, 90), []),
        ((10, -62, 11, -59), ['S60E009']),
        ((10, -90, 11, -60), []),
        ((10, 90, 10, 90), []),
    ],
)
def test_tiles_of_one_box(box: Box, expected: list[str]) -> None:
    assert tiles_of(box) == expected


def test_tiles_of_the_whole_earth() -> None:
    everything = tiles_of((-180, -90, 180, 90))
    assert len(everything) == 48 * 120
    assert tiles_of((-10, -90, 360, 90)) == everything
    assert everything[0] == 'N00E000'
    assert {GRID.corners[tile][0] for tile in everything} == {*range(-180, 180, 3)}


def test_tiles_of_many_boxes_are_those_of_each() -> None:
    generator = np.random.default_rng(0)
    corner = generator.uniform((-180, -70), (180, 89), (300, 2)).round(1)
    size = generator.choice([0, 0.1, 0.4, 3, 8], (300, 2))
    far = corner + size
    far[:, 0] = (far[:, 0] + 180) % 360 - 180  # across the antimeridian
    boxes = np.hstack([corner, np.minimum(far, (180, 90))])

    expected = set()
    for left, bottom, right, top in boxes:
        right += 360 if right < left else 0
        # In tenths of a degree, so that nothing is rounded
        west, south, east, north = (round(10 * x) for x in (left, bottom, right, top))
        rows = range(south // 30, max(math.ceil(north / 30), south // 30 + 1))
        cols = range(west // 30, max(math.ceil(east / 30), west // 30 + 1))
        expected |= {(row, col % 120) for row in rows for col in cols}
    corners = {
        ((col * 3 + 180) % 360 - 180, row * 3)
        for row, col in expected
        if -20 <= row < 28
    }
    names = tiles_of(boxes)
    assert {GRID.corners[name] for name in names} == corners
    assert names == sorted(names)
    assert tiles_of(map(tuple, boxes.tolist())) == names


@pytest.mark.parametrize('bounds', [[], np.empty((0, 4)), iter(())])
def test_tiles_of_nothing(bounds: object) -> None:
    assert tiles_of(bounds) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ('bounds', 'message'),
    [
        ((0, 1, 2), r'bounds must be of shape \(N, 4\), got \(1, 3\)'),
        ((0, 5, 1, 4), r'got \(0\.0, 5\.0, 1\.0, 4\.0\) at 0'),
        ([(0, 0, 1, 1), (0, 0, 1, math.nan)], r'got \(0\.0, 0\.0, 1\.0, nan\) at 1'),
        ((500000, 4649776, 509999, 4659999), 'degrees of longitude and latitude'),
        ((0, 0, math.inf, 1), 'degrees of longitude and latitude'),
        ((0, 89, 1, 91), 'degrees of longitude and latitude'),
    ],
)
def test_no_boxes(bounds: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiles_of(bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    'name', ['N52E003', 'N51E004', 'N84E000', 'S63E000', 'N51E180', 'N51', 'S00E000']
)
def test_bounds_of_no_tile(name: str) -> None:
    with pytest.raises(ValueError, match=f'names must be .* got {name!r}'):
        GRID.bounds(name)


def test_bounds() -> None:
    assert GRID.bounds('N51E003') == (3, 51, 6, 54)
    assert GRID.bounds('S03W180') == (-180, -3, -177, 0)


@pytest.mark.parametrize(('year', 'version'), [(2020, 'v100'), (2021, 'v200')])
def test_path_is_that_of_the_dataset(year: int, version: str) -> None:
    url = ESAWorldCover.url.format(year=year, version=version, tile='N51E003')
    assert url.endswith(f'.com/{WORLDCOVER.file_path("N51E003", year)}')


def test_year() -> None:
    with pytest.raises(ValueError, match='year must be 2020 or 2021, got 2019'):
        WORLDCOVER.check_year(2019)


def test_official_file(shared: Path) -> None:
    path = shared / 'worldcover_tiles' / WORLDCOVER.file_name('N00E006', 2020)
    assert is_readable(path)
    check_official(str(path), 'N00E006', GRID)
    with pytest.raises(ValueError, match=r'bounds \(3, 0, 6, 3\) expected, got \(6'):
        check_official(str(path), 'N00E003', GRID)
