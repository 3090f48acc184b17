# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from affine import Affine
from torch import nn

from tests.datamodules.helpers import write_raster
from tests.labels.helpers import CODES, SIZE, codes_at, histogram, write_tile
from torchgeo_softcon.datasets.scenes import WorldCoverScenes
from torchgeo_softcon.datasets.worldcover import ESAWorldCover
from torchgeo_softcon.geo.antimeridian import center, join_halves, near, unwrap
from torchgeo_softcon.geo.grid import outline, parse_crs
from torchgeo_softcon.labels import label_archive

RES, N = 3 / SIZE, 48

pytestmark = pytest.mark.filterwarnings('ignore:.*official tile.*:UserWarning')


@pytest.fixture(scope='module')
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sides of the antimeridian."""
    folder = tmp_path_factory.mktemp('world')
    for west in (177, -180):
        write_tile(folder, west, 48)
    return folder


class TestLongitudes:
    def test_what_is_near_stays_to_the_last_bit(self) -> None:
        lon = np.random.default_rng(0).uniform(-89, 89, (3, 50))
        np.testing.assert_array_equal(unwrap(lon), lon)
        np.testing.assert_array_equal(near(lon, lon.mean()), lon)

    def test_halves_come_together(self) -> None:
        lon = np.array([179.5, -179.5, 181])
        assert unwrap(lon).tolist() == [179.5, 180.5, 181]
        assert join_halves(lon[:2]).tolist() == [179.5, 180.5]
        assert center(lon[:2] + 1).tolist() == [-179.5, -178.5]

    def test_an_outline_in_its_own_degrees(self) -> None:
        crs = parse_crs('EPSG:4326')
        assert outline(crs, crs, (179, 1, 182, 2)).bounds == (179, 1, 182, 2)


@pytest.mark.parametrize('crs', ['EPSG:4326', 'EPSG:4258', 'OGC:CRS84', 'EPSG:32601'])
@pytest.mark.parametrize('west', [-178.9, 181.1, 180 - N / 2 * RES, N / 3 * RES - 180])
def test_datasets_and_labels_agree(
    world: Path, tmp_path: Path, crs: str, west: float
) -> None:
    corner, res = (west, 50.0), RES
    if crs == 'EPSG:32601':
        box = outline(
            parse_crs('EPSG:4326'), parse_crs(crs), (west, 49.9, west + 1, 50)
        )
        corner, res = (box.bounds[0], box.bounds[3]), 200
    image = tmp_path / 'images' / 'a.tif'
    write_raster(image, np.full((1, N, N), 9, np.uint8), crs, corner, res)
    dataset = WorldCoverScenes(image, world, patch_size=N, transforms=nn.Identity())
    mask = dataset[0]['mask'].numpy()
    assert (mask > 0).all()
    if crs != 'EPSG:32601':
        centres = (np.arange(N) + 0.5) * RES
        np.testing.assert_array_equal(
            mask, codes_at(west + centres[None], (50 - centres)[:, None])
        )

    out = tmp_path / 'labels.parquet'
    label_archive(images=image, worldcover=world, out=out, workers=1, progress=False)
    row = pd.read_parquet(out).iloc[0]
    assert [row[f'count_{code}'] for code in CODES] == histogram(mask)


@pytest.mark.parametrize('west', [179, -181])
def test_a_clip_that_goes_on_beyond_180_degrees(tmp_path: Path, west: float) -> None:
    codes = np.random.default_rng(0).choice(CODES, (1, 200, 200))
    clip = tmp_path / 'clip.tif'
    write_raster(clip, codes, 'EPSG:4326', (west, 50), 0.01, nodata=0)
    dataset = ESAWorldCover(clip)
    for left in (179.2, -179.8, 179.8, -180.3, 180.2):
        mask = dataset.read_window(
            'EPSG:4326', Affine(0.01, 0, left, 0, -0.01, 50), 9, 9
        )
        first = round((left - west) * 100) % 36000
        np.testing.assert_array_equal(mask, codes[0, :9, first : first + 9])
        box = (left, 49.8, left + 0.1, 50)
        assert dataset.covers('EPSG:4326', box, wholly=True)
    assert not dataset.covers('EPSG:4326', (178, 49, 178.9, 50))


def test_tiles_all_around_the_earth(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).choice(CODES, (1, 60, 360))
    clip = tmp_path / 'clip.tif'
    write_raster(clip, codes, 'EPSG:4326', (-180, 90), 1, nodata=0)
    dataset = ESAWorldCover(clip)
    window = dataset.read_window('EPSG:4326', Affine(1, 0, 170, 0, -1, 80), 5, 20)
    expected = np.roll(codes[0], 10, 1)[10:15, :20]
    np.testing.assert_array_equal(window, expected)
    # Around the pole, where no polynomial follows the longitude
    polar = dataset.read_window('EPSG:3995', Affine(9e4, 0, -9e5, 0, -9e4, 9e5), 20, 20)
    assert (polar > 0).all()
