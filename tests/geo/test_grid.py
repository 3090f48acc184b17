# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from torchgeo_softcon.geo.grid import Grid, group_by_grid, overlapping, parse_crs

UTM, WGS84 = parse_crs('EPSG:32632'), parse_crs('EPSG:4326')


def grid(x: float = 600000, y: float = 5600000, res: float = 10) -> Grid:
    return Grid(UTM, Affine(res, 0, x, 0, -res, y), 64, 48)


@pytest.mark.parametrize(
    'transform',
    [
        Affine(10, 0, 600000, 0, -10, 5600000),
        Affine(10, 0, 600000, 0, 10, 5600000),
        Affine(7, 7, 600000, 7, -7, 5600000),
    ],
)
def test_as_rasterio_sees_it(tmp_path: Path, transform: Affine) -> None:
    profile = {
        'width': 48,
        'height': 64,
        'count': 1,
        'dtype': 'uint8',
        'crs': 'EPSG:32632',
    }
    path = tmp_path / 'a.tif'
    with rasterio.open(path, 'w', 'GTiff', transform=transform, **profile):
        pass
    with rasterio.open(path) as source:
        grid = Grid.of(source)
        corners = [source.xy(*e, offset='ul') for e in ((0, 0), (0, 48), (64, 0))]
        corners.append(source.xy(64, 48, offset='ul'))
        x, y = np.array(corners).T
        assert grid.bounds == (x.min(), y.min(), x.max(), y.max())
        window = grid.window(7, 5, 3, 2)
        part = rasterio.windows.Window(5, 7, 2, 3)
        assert window.transform == source.window_transform(part)
        assert (window.height, window.width, window.crs) == (3, 2, UTM)


class TestMatches:
    def test_the_last_digit_is_another_number_of_the_same_grid(self) -> None:
        same = grid(y=float(np.nextafter(5600000.0, np.inf)))
        assert same != grid()
        assert grid().matches(same)
        assert grid().matches(grid(x=600000.05))

    @pytest.mark.parametrize(
        'other',
        [
            grid(x=600001),
            grid(res=10.01),
            replace(grid(), height=63),
            replace(grid(), crs=parse_crs('EPSG:32633')),
            replace(grid(), transform=Affine(10, 0.01, 600000, 0, -10, 5600000)),
        ],
    )
    def test_other_grids(self, other: Grid) -> None:
        assert not grid().matches(other)

    @pytest.mark.parametrize('x', [600000, 600004.99, 600000 - 1e-6])
    def test_groups_do_not_depend_on_where_numbers_are_rounded(self, x: float) -> None:
        grids = [
            grid(x + shift, y)
            for y in (5600000, 4000000)
            for shift in (0, 1e-8, 100, -1e-8, 0.06, -0.06)
        ]
        expected = [[0, 1, 3, 4, 5], [2], [6, 7, 9, 10, 11], [8]]
        assert group_by_grid(grids) == expected

    def test_as_the_slow_form_of_it(self) -> None:
        rng = np.random.default_rng(0)
        numbers = rng.integers(0, 40, (60, 2)) + rng.uniform(-4e-4, 4e-4, (60, 2))
        grids = [grid(600000 + 10 * x, 5600000 + 10 * y) for x, y in numbers]
        slow: list[list[int]] = []
        for number, one in enumerate(grids):
            for group in slow:
                if grids[group[0]].matches(one):
                    group.append(number)
                    break
            else:
                slow.append([number])
        assert group_by_grid(grids) == slow
        assert 1 < len(slow) < 60


class TestOverlapping:
    def test_neighbours_do_not(self) -> None:
        grids = [grid(), grid(600480), grid(600470), grid(500000)]
        assert overlapping(grids) == [(0, 2), (1, 2)]

    def test_across_the_antimeridian(self) -> None:
        def degrees(west: float) -> Grid:
            return Grid(WGS84, Affine(0.01, 0, west, 0, -0.01, 50), 20, 20)

        grids = [degrees(179.9), degrees(-180), degrees(180.05), degrees(-179.85)]
        assert overlapping(grids) == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]
