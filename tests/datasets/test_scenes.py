# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import logging
import multiprocessing
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from affine import Affine
from matplotlib import pyplot as plt
from pyproj import Transformer
from torch import nn
from torch.utils.data import DataLoader

from tests.datamodules.helpers import (
    DATA,
    make_two_zones,
    two_zones,
    write_raster,
    write_worldcover,
)
from torchgeo_softcon.bands import BAND_STATISTICS, SENTINEL2_BANDS, SENTINEL2_SUBSETS
from torchgeo_softcon.datasets.scaling import resolve_value_range, to_unit_range
from torchgeo_softcon.datasets.scene_grid import SceneGrid
from torchgeo_softcon.datasets.scenes import WorldCoverScenes
from torchgeo_softcon.datasets.worldcover import ESAWorldCover
from torchgeo_softcon.geo.rasters import interpolate_axis
from torchgeo_softcon.geo.sentinel2 import Products


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_two_zones(tmp_path_factory)


def scenes(root: Path, **kwargs: Any) -> WorldCoverScenes:
    options: dict[str, Any] = {'patch_size': 32, 'transforms': nn.Identity()}
    options |= kwargs
    return WorldCoverScenes(root / 'images', root / 'worldcover', **options)


def unlabelled(images: Any, **kwargs: Any) -> WorldCoverScenes:
    options: dict[str, Any] = {'patch_size': 4, 'transforms': nn.Identity()}
    options |= kwargs
    return WorldCoverScenes(images, None, allow_unlabelled=True, **options)


class TestWorldCoverScenes:
    def test_mask_lies_under_the_image_in_every_zone(self, root: Path) -> None:
        dataset = scenes(root, patch_size=96)
        codes = set()
        for number in range(4):
            sample = dataset[number]
            built = sample['image'][0] > 0.6
            wrong = (sample['mask'] == 50) != built
            # Pixels of the image and of the map meet anywhere on the borders
            assert wrong.float().mean() < 0.02
            codes |= set(sample['mask'].unique().tolist())
        assert codes == {40, 50}
        assert len(dataset.places) == 2
        assert sample['image'].dtype == torch.float32
        assert sample['mask'].dtype == torch.long

    @pytest.mark.parametrize(
        'pixel',
        [
            Affine.scale(10, -10),
            Affine.scale(10, 10),
            Affine.rotation(30) * Affine.scale(10, -7),
        ],
        ids=['north_up', 'south_up', 'rotated'],
    )
    def test_a_window_is_read_where_it_lies(
        self, tmp_path: Path, pixel: Affine
    ) -> None:
        codes = np.random.default_rng(0).choice([10, 20, 30, 40, 50], (1, 600, 600))
        codes = codes.astype(np.uint8)
        tile = tmp_path / 'map.tif'
        write_raster(tile, codes, 'EPSG:4326', (14.999, 50.05), 1 / 12000, nodata=0)
        # The pixels tell where they are
        numbers = np.mgrid[:40, :50].astype(np.int16)
        transform = Affine.translation(501000, 5541000) * pixel
        image = tmp_path / 'images' / 'a.tif'
        write_raster(image, numbers, transform=transform)
        dataset = WorldCoverScenes(
            image, tile, patch_size=8, value_range=(0, 64), transforms=nn.Identity()
        )
        to_degrees = Transformer.from_crs('EPSG:32633', 'EPSG:4326', always_xy=True)
        for number in range(5):
            sample = dataset[number]
            top, left = (sample['image'][:, 0, 0] * 64).round().int().tolist()
            assert min(top, left) > 0
            window = numbers[:, top : top + 8, left : left + 8]
            assert np.array_equal((sample['image'] * 64).numpy(), window)
            ours = transform * Affine.translation(left, top)
            for row in range(8):
                for column in range(8):
                    lon, lat = to_degrees.transform(*(ours * (column + 0.5, row + 0.5)))
                    y, x = int((50.05 - lat) * 12000), int((lon - 14.999) * 12000)
                    assert sample['mask'][row, column] == codes[0, y, x]

    def test_mask_is_empty_where_a_date_has_no_data(self, tmp_path: Path) -> None:
        to_metres = Transformer.from_crs('EPSG:4326', 'EPSG:32633', always_xy=True)
        x, y = to_metres.transform(15.01, 50.04)
        tile = write_worldcover(tmp_path / 'map.tif', 14.999, 50.05)
        for date in range(2):
            values = np.full((2, 8, 8), 9, np.uint8)
            values[:, :, date] = 0
            values[0, :, 5] = 0
            path = tmp_path / 'images' / f'{date}.tif'
            write_raster(path, values, origin=(x, y), nodata=0)
        options: dict[str, Any] = {'patch_size': 8, 'transforms': nn.Identity()}
        images = tmp_path / 'images'
        dataset = WorldCoverScenes(images, tile, seasons=2, **options)
        empty = (dataset[0]['mask'] == 0).all(0)
        assert empty.tolist() == [True, True, *[False] * 6]
        one = (WorldCoverScenes(images, tile, **options)[0]['mask'] == 0).all(0)
        assert one[:2].sum() == one.sum() == 1

    def test_a_pixel_counts_if_any_band_has_data(self, tmp_path: Path) -> None:
        to_metres = Transformer.from_crs('EPSG:4326', 'EPSG:32633', always_xy=True)
        x, y = to_metres.transform(15.01, 50.04)
        tile = write_worldcover(tmp_path / 'map.tif', 14.999, 50.05)
        values = np.full((2, 8, 8), 9, np.int16)
        values[0] = -9999
        path = tmp_path / 'images' / 'a.tif'
        write_raster(path, values, origin=(x, y), nodata=-9999)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            sample = WorldCoverScenes(
                path, tile, patch_size=8, value_range=(0, 9), transforms=nn.Identity()
            )[0]
        assert (sample['mask'] > 0).all()
        assert sample['image'].mean((1, 2)).tolist() == [0, 1]

    def test_streams_are_different_for_all_seeds(self, tmp_path: Path) -> None:
        numbers = np.mgrid[:300, :300].astype(np.int16)
        write_raster(tmp_path / 'a.tif', numbers)
        dataset = unlabelled(tmp_path, value_range=(0, 300))
        seen = [
            dataset.with_windows(seed=seed, stream=stream)[index]['image']
            for seed in range(2)
            for stream in range(3)
            for index in range(3)
        ]
        same = [torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i]]
        assert not any(same)
        for seed in (-1, 2**32):
            with pytest.raises(ValueError, match=f'seed must be from 0 .*, got {seed}'):
                dataset.with_windows(seed=seed)
            with pytest.raises(ValueError, match=f'seed must be from 0 .*, got {seed}'):
                unlabelled(tmp_path, value_range=(0, 1), seed=seed)

    def test_a_window_depends_on_seed_and_index_alone(self, root: Path) -> None:
        forward = [scenes(root)[i]['image'] for i in range(6)]
        dataset = scenes(root)
        for i in reversed(range(6)):
            assert torch.equal(dataset[i]['image'], forward[i])
        others = [scenes(root, seed=1)[i]['image'] for i in range(6)]
        assert not all(map(torch.equal, forward, others))

    def test_indices_go_on_after_the_length(self, root: Path) -> None:
        dataset = scenes(root)
        assert len(dataset) == 2 * 96 * 96 // 32**2 == len(list(dataset))
        windows = [dataset[i]['image'] for i in range(len(dataset) * 2)]
        assert not all(map(torch.equal, windows[::2], windows[1::2]))
        with pytest.raises(IndexError, match='at least 0, got -1'):
            dataset[-1]

    def test_seasons_are_different_dates_of_one_window(self, root: Path) -> None:
        dataset = scenes(root, seasons=2)
        firsts = set()
        for i in range(8):
            image = dataset[i]['image']
            assert image.shape == (2, 2, 32, 32)
            difference = (image[1] - image[0]) * 255
            torch.testing.assert_close(difference.abs(), torch.ones(2, 32, 32))
            firsts.add(difference[0, 0, 0].sign().item())
        assert firsts == {-1, 1}

    def test_label_is_the_default(self, root: Path) -> None:
        sample = scenes(root, transforms=None, seasons=2)[0]
        assert set(sample) == {'image', 'label'}
        assert sample['label'].shape == (11,)
        assert 1 <= sample['label'].sum() <= 2

    @pytest.mark.parametrize(
        'context', ['fork', pytest.param('spawn', marks=pytest.mark.slow)]
    )
    def test_workers_read_what_the_process_reads(
        self, root: Path, context: str
    ) -> None:
        if context not in multiprocessing.get_all_start_methods():
            pytest.skip(f'no {context} here')
        dataset = scenes(root, length=8)
        expected = torch.stack([dataset[i]['image'] for i in range(8)])
        loader = DataLoader(dataset, 4, num_workers=2, multiprocessing_context=context)
        actual = torch.cat([batch['image'] for batch in loader])
        assert torch.equal(actual, expected)

    def test_pickle(self, root: Path) -> None:
        dataset = scenes(root)
        image = dataset[3]['image']
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[3]['image'], image)

    def test_places_are_drawn_by_area(self, tmp_path: Path) -> None:
        write_raster(tmp_path / 'a.tif', np.full((1, 10, 10), 50, np.uint8))
        write_raster(tmp_path / 'b.tif', np.full((1, 30, 10), 100, np.uint8))
        dataset = unlabelled(tmp_path, value_range=(0, 100))
        bright = sum(dataset[i]['image'].mean().item() > 0.9 for i in range(400))
        assert 270 < bright < 330

    def test_windows_without_data_are_redrawn(self, tmp_path: Path) -> None:
        values = np.full((1, 8, 64), 0, np.uint8)
        values[..., 32:] = 255
        write_raster(tmp_path / 'a.tif', values, nodata=0)
        dataset = unlabelled(tmp_path, min_valid=0.75)
        assert all((dataset[i]['image'] > 0).float().mean() >= 0.75 for i in range(50))
        everything = unlabelled(tmp_path, min_valid=0)
        assert min(everything[i]['image'].max() for i in range(50)) == 0

    def test_an_empty_raster_gives_empty_windows(self, tmp_path: Path) -> None:
        path = write_raster(tmp_path / 'a.tif', np.zeros((1, 8, 8), 'u1'), nodata=0)
        dataset = unlabelled(tmp_path)
        with pytest.warns(UserWarning, match=f'one of {path} with 0 is taken'):
            assert dataset[0]['image'].max() == 0
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            assert dataset[1]['image'].max() == 0
            assert unlabelled(tmp_path, min_valid=0)[0]['image'].max() == 0

    def test_zero_is_no_data_if_all_bands_have_it(self, tmp_path: Path) -> None:
        values = np.full((2, 4, 4), 100, np.uint16)
        values[:, 0] = 0
        values[1, 1] = 0
        write_raster(tmp_path / 'a.tif', values, descriptions=('B9', 'B10'))

        def rows(**kwargs: Any) -> list[list[float]]:
            options: dict[str, Any] = {'value_range': (-100, 100)} | kwargs
            return unlabelled(tmp_path, **options)[0]['image'][:, :3, 0].tolist()

        # Sentinel-2 does not say so
        assert rows() == [[0, 1, 1], [0, 0.5, 1]]
        assert rows(nodata=65535) == [[0.5, 1, 1], [0.5, 0.5, 1]]
        # Of other bands, nothing is known
        names = ('NIR', 'SWIR1')
        assert rows(all_bands=names) == [[0.5, 1, 1], [0.5, 0.5, 1]]
        assert rows(all_bands=names, nodata=0) == [[0, 1, 1], [0, 0.5, 1]]

    def test_alpha_tells_where_data_is(self, tmp_path: Path) -> None:
        values = np.full((4, 4, 4), 255, np.uint8)
        values[3, 0] = 0
        options: dict[str, Any] = {'photometric': 'RGB', 'alpha': 'yes'}
        write_raster(tmp_path / 'a.tif', values, **options)
        dataset = unlabelled(tmp_path)
        assert dataset.bands == ('R', 'G', 'B')
        image = dataset[0]['image']
        assert image[..., 0].tolist() == [[0, 1, 1, 1]] * 3
        named = unlabelled(tmp_path, all_bands=('R', 'G', 'B', 'NIR'))
        assert named[0]['image'].shape == (4, 4, 4)

    @pytest.mark.parametrize(
        ('name', 'expected'), [('N0301', 1.0), ('N0400', 0.0), ('N0510', 0.0)]
    )
    def test_offset_of_the_baseline(
        self, tmp_path: Path, name: str, expected: float
    ) -> None:
        folder = tmp_path / f'S2A_MSIL1C_20220601T101031_{name}_R022_T32UNE.SAFE'
        for band in ('B02', 'B10'):
            values = np.full((1, 4, 4), 1000, np.uint16)
            values[:, 0] = 0
            write_raster(folder / f'T32UNE_{band}.tif', values)
        image = unlabelled(folder, value_range=(0, 1000))[0]['image']
        assert (image[:, 1:] == expected).all()
        assert (image[:, 0] == 0).all()
        image = unlabelled(folder, value_range=(0, 1000), offset=-500)[0]['image']
        assert (image[:, 1:] == 0.5).all()
        # No data is no number that could be moved
        image = unlabelled(folder, value_range=(-1000, 1000), offset=500)[0]['image']
        assert (image[:, 0] == 0).all()

    def test_missing_values_become_zero(self, tmp_path: Path) -> None:
        values = np.full((2, 4, 4), 5, np.float64)
        values[0, 0] = np.nan, np.inf, -np.inf, -1e300
        write_raster(tmp_path / 'a.tif', values, nodata=-1e300)
        image = unlabelled(tmp_path, value_range=(-10, 10))[0]['image']
        assert image[0, 0].tolist() == [0, 0, 0, 0]
        assert (image[0, 1:] == 0.75).all()
        assert (image[1] == 0.75).all()

    def test_rows_keep_windows_apart(self, tmp_path: Path) -> None:
        values = np.zeros((1, 20, 8), np.uint8)
        values[:, 15:] = 255
        write_raster(tmp_path / 'a.tif', values)
        whole = unlabelled(tmp_path)
        upper = whole.with_windows(rows=(0, 0.75))
        lower = whole.with_windows(rows=(0.75, 1), seed=7, length=9)
        assert max(upper[i]['image'].max() for i in range(50)) == 0
        assert min(lower[i]['image'].min() for i in range(50)) == 1
        assert (len(upper), len(lower), len(whole)) == (7, 9, 10)
        with pytest.raises(ValueError, match=r'rows 0 to 2 of 20'):
            whole.with_windows(rows=(0, 0.1))
        for bad in ({'seasons': 0}, {'length': 0}, {'rows': (0.5, 0.2)}):
            with pytest.raises(ValueError, match=f'{next(iter(bad))}.* must be'):
                whole.with_windows(**bad)

    def test_plot(self, root: Path) -> None:
        figure = scenes(root, seasons=2).plot(scenes(root, seasons=2)[0], 'a title')
        assert len(figure.axes) == 3
        assert figure.get_suptitle() == 'a title'
        plt.close(figure)


class TestBands:
    def test_named_by_descriptions(self, tmp_path: Path) -> None:
        values = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), 'u1')
        write_raster(tmp_path / 'a.tif', values, descriptions=('B02', 'B8a', 'B04'))
        dataset = unlabelled(tmp_path, bands=('B4', 'B02'), value_range=(0, 2))
        assert dataset.bands == ('B4', 'B2')
        assert dataset[0]['image'][:, 0, 0].tolist() == [1, 0]

    def test_other_bands_of_a_described_file(self, tmp_path: Path) -> None:
        names = [*SENTINEL2_BANDS, 'QA10', 'QA20', 'QA60']
        values = np.arange(16, dtype=np.uint16)[:, None, None] * np.ones((4, 4), 'u2')
        write_raster(tmp_path / 'a.tif', values, descriptions=names)
        options: dict[str, Any] = {'value_range': (0, 16), 'nodata': 99}
        dataset = unlabelled(tmp_path, bands=('B4', 'B3', 'B2'), **options)
        assert (dataset[0]['image'][:, 0, 0] * 16).tolist() == [3, 2, 1]
        with pytest.raises(ValueError, match=r"unknown name 'QA60'\. Known are"):
            unlabelled(tmp_path, bands=('QA60',), **options)
        dataset = unlabelled(tmp_path, bands=('QA60',), all_bands=names, **options)
        assert (dataset[0]['image'][:, 0, 0] * 16).tolist() == [15]
        everything = unlabelled(tmp_path, **options)
        assert everything.bands == (*SENTINEL2_BANDS, 'QA10', 'QA20', 'QA60')
        plt.close(everything.plot(everything[0]))
        with pytest.raises(ValueError, match='all_bands must be unique'):
            unlabelled(tmp_path, all_bands=('a', 'A'))

    def test_landsat_has_other_bands(self, tmp_path: Path) -> None:
        for band in ('B4', 'B10'):
            path = tmp_path / f'LC08_L2SP_193026_20200605_02_T1_SR_{band}.TIF'
            write_raster(path, np.ones((1, 4, 4), np.uint16))
        with pytest.raises(ValueError, match=r'LC08.*got B4: .*Leave bands out'):
            unlabelled(tmp_path, bands=('B4',))
        with pytest.raises(ValueError, match='value_range must be given'):
            unlabelled(tmp_path)
        dataset = unlabelled(tmp_path, value_range=(0, 2))
        assert dataset.bands is None
        assert dataset[0]['image'].shape == (2, 4, 4)

        stack = tmp_path / 'b' / 'HLS.L30.T33UUP.2020157.tif'
        write_raster(stack, np.ones((2, 4, 4), np.uint16), descriptions=('B4', 'B5'))
        with pytest.raises(ValueError, match=r'HLS.*with all_bands'):
            unlabelled(stack, bands=('B4',))
        named = unlabelled(stack, all_bands=('R', 'NIR'), value_range=(0, 1))
        assert named.bands == ('R', 'NIR')

    def test_bands_that_look_like_dates(self, tmp_path: Path) -> None:
        for band in ('red', 'nir'):
            path = tmp_path / f'T33_{band}_10m_clip.tif'
            write_raster(path, np.ones((1, 4, 4), np.uint16))
        with pytest.warns(UserWarning, match=r'2 files of one band .*nir_10m_clip'):
            unlabelled(tmp_path, value_range=(0, 1))
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            unlabelled(tmp_path, value_range=(0, 1), all_bands=('NIR',))

    def test_guesses_are_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in 'ab':
            values = np.full((2, 4, 4), -12, np.float32)
            path = write_raster(tmp_path / f'{name}.tif', values)
        with caplog.at_level(logging.INFO):
            unlabelled(path.parent)
            assert caplog.text.count('they are taken for VV, VH') == 1
            caplog.clear()
            unlabelled(tmp_path, all_bands=('VV', 'VH'))
            assert 'taken for' not in caplog.text

    def test_named_by_number(self, tmp_path: Path) -> None:
        write_raster(tmp_path / '13' / 'a.tif', np.ones((13, 4, 4), np.uint16))
        write_raster(tmp_path / '12' / 'a.tif', np.ones((12, 4, 4), np.uint16))
        write_raster(tmp_path / '2' / 'a.tif', -np.ones((2, 4, 4), np.float32))
        assert unlabelled(tmp_path / '13').bands == SENTINEL2_BANDS
        l2a = unlabelled(tmp_path / '12').bands
        assert l2a == tuple(band for band in SENTINEL2_BANDS if band != 'B10')
        assert unlabelled(tmp_path / '2').bands == ('VV', 'VH')

    def test_named_by_hand(self, tmp_path: Path) -> None:
        values = np.stack([np.full((4, 4), i, np.uint8) for i in range(3)])
        write_raster(tmp_path / 'a.tif', values)
        dataset = unlabelled(
            tmp_path, all_bands=('B8', 'B3', 'B2'), bands=('B2',), value_range=(0, 2)
        )
        assert dataset[0]['image'].mean() == 1
        with pytest.raises(ValueError, match=r'name the 3 bands of .*a.tif, got 2'):
            unlabelled(tmp_path, all_bands=('B8', 'B3'))

    def test_one_file_per_band(self, tmp_path: Path) -> None:
        folder = tmp_path / 'T32UNE.SAFE' / 'IMG_DATA'
        stem = 'T32UNE_20200101T101031'
        fine = np.full((1, 12, 12), 3, np.uint16)
        for band in ('B02', 'B8A'):
            write_raster(folder / 'R10m' / f'{stem}_{band}_10m.tif', fine)
        for band, size in (('B02', 20), ('B11', 20), ('B01', 60)):
            side = 120 // size
            write_raster(
                folder / f'R{size}m' / f'{stem}_{band}_{size}m.tif',
                np.arange(side, dtype=np.uint16)[None, None] * np.ones((1, side, 1)),
                resolution=size,
            )
        # Beside the bands, a product has these
        write_raster(folder / 'R10m' / f'{stem}_TCI_10m.tif', np.ones((3, 4, 4), 'u1'))
        write_raster(folder / 'R20m' / 'MSK_QUALIT_B02.tif', np.ones((1, 6, 6), 'u1'))
        dataset = unlabelled(tmp_path, value_range=(0, 10), patch_size=12)
        assert dataset.bands == ('B1', 'B2', 'B8A', 'B11')
        image = dataset[0]['image'] * 10
        assert (image[1:3] == 3).all()
        # Bilinear between centres, constant beyond the outermost ones
        column = (torch.arange(12) + 0.5) / 2 - 0.5
        torch.testing.assert_close(image[3], column.clip(0, 5).expand(12, 12))
        column = (torch.arange(12) + 0.5) / 6 - 0.5
        torch.testing.assert_close(image[0], column.clip(0, 1).expand(12, 12))

    def test_a_window_of_a_coarse_band_is_a_part_of_the_whole(
        self, tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(0)
        fine = rng.integers(1, 99, (1, 24, 24), np.uint16)
        write_raster(tmp_path / 'B2.tif', fine)
        coarse = rng.integers(1, 99, (1, 12, 12), np.uint16)
        coarse[0, 5, 5] = 999
        write_raster(tmp_path / 'B5.tif', coarse, resolution=20, nodata=999)
        dataset = unlabelled(tmp_path, patch_size=24, value_range=(0, 99))
        whole = dataset[0]['image']
        # A missing pixel spreads to those that are interpolated from it
        assert (whole[1] == 0).sum() == 16
        reader, scene = dataset._reader, dataset.places[0].scenes[0]
        for top, left in ((0, 0), (3, 7), (16, 15)):
            part = to_unit_range(
                reader.read(scene, top, left, 8, 9), dataset.value_range
            )
            np.testing.assert_allclose(part, whole[:, top : top + 8, left : left + 9])

    def test_a_coarse_band_that_ends_elsewhere_is_read_by_location(
        self, tmp_path: Path
    ) -> None:
        write_raster(tmp_path / 'B2.tif', np.ones((1, 9, 9), np.uint16))
        columns = np.arange(6, dtype=np.uint16)[None, None] * np.ones((1, 6, 1), 'u2')
        write_raster(
            tmp_path / 'B5.tif', columns, origin=(499990, 5540010), resolution=20
        )
        image = unlabelled(tmp_path, patch_size=9, value_range=(0, 10))[0]['image']
        # The first pixel is the right half of the first coarse one
        expected = (torch.arange(9) + 1.5) / 2 - 0.5
        torch.testing.assert_close(image[1] * 10, expected.expand(9, 9))

    def test_a_shifted_coarse_band_is_read_by_location(self, tmp_path: Path) -> None:
        columns = np.arange(1, 9, dtype=np.uint16)[None, None] * np.ones((8, 1), 'u2')
        write_raster(tmp_path / 'B2.tif', columns)
        coarse = np.arange(1, 5, dtype=np.uint16)[None, None] * np.ones((4, 1), 'u2')

        def first(left: float) -> list[float]:
            path = tmp_path / 'B5.tif'
            write_raster(path, coarse, origin=(left, 5540000), resolution=20)
            image = unlabelled(tmp_path, patch_size=8, value_range=(0, 10))[0]['image']
            return (image[1, 0, :3] * 10).tolist()

        cut = pytest.approx([1, 1.25, 1.75])
        assert first(500000) == cut == first(500010)
        # A whole coarse pixel is no rounding
        assert first(499980) == pytest.approx([1.75, 2.25, 2.75])

    def test_zeros_of_a_coarse_band_are_data(self, tmp_path: Path) -> None:
        fine = np.full((1, 8, 8), 100, np.uint16)
        fine[..., :2] = 0
        write_raster(tmp_path / 'B2.tif', fine)
        coarse = np.full((1, 4, 4), 40, np.uint16)
        coarse[..., 0] = coarse[..., 2] = 0
        write_raster(tmp_path / 'B10.tif', coarse, resolution=20)
        dataset = unlabelled(tmp_path, patch_size=8, value_range=(-100, 100))
        image = dataset[0]['image'][:, 0] * 200 - 100
        expected = [-100, -100, 30, 30, 10, 10, 30, 40]
        torch.testing.assert_close(image[1], torch.tensor(expected).float())
        assert image[0].tolist() == [-100, -100, *[100] * 6]

    def test_bands_on_different_ground(self, tmp_path: Path) -> None:
        write_raster(tmp_path / 'B2.tif', np.ones((1, 8, 8), np.uint16))
        path = write_raster(
            tmp_path / 'B3.tif', np.ones((1, 8, 8), np.uint16), origin=(600000, 5540000)
        )
        with pytest.raises(ValueError, match=rf'same ground, {path} covers'):
            unlabelled(tmp_path)
        write_raster(path, np.ones((1, 8, 8), np.uint16), crs='EPSG:32634')
        with pytest.raises(ValueError, match='share one CRS'):
            unlabelled(tmp_path)


def test_a_neighbour_of_weight_0_does_not_count() -> None:
    values = np.array([[1, np.nan, 3, 5]], np.float32)
    positions = np.array([0, 0.5, 1, 2, 2.5, 3])
    expected = [[1, np.nan, np.nan, 3, 4, 5]]
    np.testing.assert_array_equal(interpolate_axis(values, positions, 1), expected)


class TestErrors:
    def test_no_raster(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match='found none in'):
            unlabelled(tmp_path)
        with pytest.raises(FileNotFoundError, match=r'not exist: .*nowhere'):
            unlabelled(tmp_path / 'nowhere')

    def test_no_crs(self, tmp_path: Path) -> None:
        path = write_raster(tmp_path / 'a.tif', np.ones((1, 8, 8), 'u1'), crs=None)
        with pytest.raises(ValueError, match=f'{path} has no CRS'):
            unlabelled(tmp_path)

    def test_no_tile(self, tmp_path: Path) -> None:
        two_zones(tmp_path)
        tile = write_worldcover(tmp_path / 'elsewhere.tif', 0, 0)
        with pytest.raises(FileNotFoundError) as error:
            WorldCoverScenes(tmp_path / 'images', tile, patch_size=32)
        message = str(error.value)
        assert str(tmp_path / 'images' / '32633' / '0.tif') in message
        assert 'ESA_WorldCover_10m_2021_v200_N48E015_Map.tif' in message
        assert 'ESA_WorldCover_10m_2021_v200_S12W078_Map.tif' in message
        assert 'amazonaws.com/v200/2021/map/' in message
        dataset = WorldCoverScenes(
            tmp_path / 'images', tile, patch_size=32, allow_unlabelled=True
        )
        assert dataset[0]['label'].sum() == 0
        with pytest.raises(ValueError, match='worldcover must be given'):
            WorldCoverScenes(tmp_path / 'images', None, patch_size=32)

    def test_missing_tile_under_a_part(self, tmp_path: Path) -> None:
        two_zones(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            scenes(tmp_path)
        # Cut off in the north
        x, y = 14.999, 50.025
        write_worldcover(tmp_path / 'worldcover' / '32633.tif', x, y)
        with pytest.warns(
            UserWarning, match='1 images are only partly covered'
        ) as all_:
            scenes(tmp_path)
        assert 'ESA_WorldCover_10m_2021_v200_N48E015_Map.tif' in str(all_[0].message)

    def test_a_dataset_of_tiles_is_taken_as_it_is(self, root: Path) -> None:
        tiles = ESAWorldCover(root / 'worldcover')
        dataset = WorldCoverScenes(root / 'images', tiles, patch_size=32)
        assert dataset.worldcover is tiles

    def test_window_larger_than_a_raster(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r'got 97 and .*0\.tif of 96 x 96'):
            scenes(root, patch_size=97)

    def test_missing_band(self, tmp_path: Path) -> None:
        values = np.ones((2, 8, 8), np.uint16)
        path = write_raster(tmp_path / 'a.tif', values, descriptions=('B2', 'B3'))
        with pytest.raises(
            ValueError, match=rf'{path} lacks the band B8, it has B2, B3'
        ):
            unlabelled(tmp_path, bands=('B2', 'B8'))
        write_raster(tmp_path / 'b' / 'x_B02.tif', values[:1])
        with pytest.raises(ValueError, match=r'x lacks the bands B3, B4, it has B2'):
            unlabelled(tmp_path / 'b', bands=('B2', 'B3', 'B4'))

    def test_unnamed_bands(self, tmp_path: Path) -> None:
        path = write_raster(tmp_path / 'a.tif', np.ones((5, 8, 8), np.uint16))
        with pytest.raises(ValueError, match=f'{path} does not name its 5 bands'):
            unlabelled(tmp_path, bands=('B2',))
        with pytest.raises(ValueError, match=r'5 bands, there are no names'):
            unlabelled(tmp_path)
        assert unlabelled(tmp_path, value_range=(0, 2))[0]['image'].mean() == 0.5

    def test_too_few_dates(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r'seasons=3 .* got 2: .*0\.tif'):
            scenes(root, seasons=3)

    def test_different_bands(self, tmp_path: Path) -> None:
        write_raster(tmp_path / 'a.tif', np.ones((2, 8, 8), 'u1'))
        write_raster(tmp_path / 'b.tif', np.ones((5, 8, 8), 'u1'))
        with pytest.raises(ValueError, match=r'a\.tif has 2 unnamed .*b\.tif has 5'):
            unlabelled(tmp_path)

    @pytest.mark.parametrize('keep', [0.6, 0.02])
    def test_truncated_file_is_named_at_construction(
        self, tmp_path: Path, keep: float
    ) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64), np.uint8)
        path = write_raster(tmp_path / 'a.tif', noise)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])
        # Without its end, the file may have lost its CRS as well
        with pytest.raises((OSError, ValueError), match=str(path)):
            unlabelled(tmp_path)

    def test_damaged_file_is_named_at_read(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (1, 64, 64), np.uint8)
        path = write_raster(
            tmp_path / 'a.tif', noise, compress='deflate', blockysize=16
        )
        content = bytearray(path.read_bytes())
        middle = len(content) // 3
        content[middle : middle + 200] = bytes(200)
        path.write_bytes(content)
        dataset = unlabelled(tmp_path, patch_size=64)
        with pytest.raises(OSError, match=f'cannot read {path}, is it truncated'):
            dataset[0]

    @pytest.mark.parametrize(
        ('argument', 'message'),
        [
            ({'patch_size': 0}, 'patch_size must be at least 1, got 0'),
            ({'seasons': 0}, 'seasons must be at least 1, got 0'),
            ({'min_valid': 1.1}, r'min_valid must be in \[0, 1\], got 1.1'),
            ({'rows': (0.5, 0.5)}, 'rows must be 0 <= first < last <= 1'),
            ({'length': 0}, 'length must be at least 1, got 0'),
            ({'year': 2019}, 'year must be 2020 or 2021'),
            ({'bands': ('B99',)}, "unknown name 'B99'"),
        ],
    )
    def test_bad_argument(
        self, root: Path, argument: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            scenes(root, **argument)


class TestSceneGrid:
    def test_windows_cover_every_date_of_every_place(self, root: Path) -> None:
        dataset = scenes(root, patch_size=40)
        grid = SceneGrid(dataset)
        assert len(grid) == 2 * 2 * 3 * 3
        assert [window[2:] for window in grid.windows[:4]] == [
            (0, 0),
            (0, 40),
            (0, 56),
            (40, 0),
        ]
        sample = grid[len(grid) - 1]
        assert sample['image'].shape == (2, 40, 40)
        assert sample['mask'].shape == (40, 40)


class TestValueRange:
    def test_softcon_is_two_deviations(self) -> None:
        ((low, high), _) = resolve_value_range(None, ('B4', 'VV'), 2, ['uint16'])
        mean, std = BAND_STATISTICS['B4']
        assert (low, high) == (mean - 2 * std, mean + 2 * std)

    @pytest.mark.parametrize(
        ('names', 'bands', 'expected'),
        [
            (['S2B_MSIL2A_20200601T101031_N0400_R022_T32UNE_1/B02.jp2'], ['B2'], 'L2A'),
            (['S2A_MSIL1C_20200601.SAFE/T32UNE_20200601_B02.jp2'], ['B2'], 'L1C'),
            (['GRANULE/L2A_T32UNE_A012/IMG_DATA/x_B02_10m.jp2'], ['B2'], 'L2A'),
            (['S2B_32UNE_20200101_0_L2A/B02.tif'], ['B2'], 'L2A'),
            (['PROL2AB/image.tif', 'XL1C2.tif'], SENTINEL2_SUBSETS[4], 'L1C'),
            (['image.tif'], SENTINEL2_SUBSETS[12], 'L2A'),
            (['image.tif'], SENTINEL2_BANDS, 'L1C'),
        ],
    )
    def test_level(self, names: list[str], bands: Any, expected: str) -> None:
        found = {Products().level(name, bands=bands)[0] or 'L1C' for name in names}
        assert found == {expected}

    def test_level_2a_is_scaled_by_its_statistics(self) -> None:
        ((low, high),) = resolve_value_range('softcon', ('B1',), 1, ['uint16'], 'L2A')
        assert (low, high) == (752.40 - 2 * 1108.03, 752.40 + 2 * 1108.03)

    def test_bytes_are_256_steps(self) -> None:
        assert resolve_value_range(None, ('B4',), 1, ['uint8']) == ((0, 255),)

    @pytest.mark.parametrize('dtypes', [{'float32'}, {'uint8', 'uint16'}])
    def test_unknown_unit(self, dtypes: set[str]) -> None:
        with pytest.raises(ValueError, match='whose unit is unknown'):
            resolve_value_range(None, ('B4',), 1, dtypes)
        assert resolve_value_range('softcon', ('B4',), 1, dtypes)

    def test_no_statistics(self) -> None:
        with pytest.raises(ValueError, match='no statistics of HH, NIR'):
            resolve_value_range(None, ('HH', 'B4', 'NIR'), 3, ['int16'])

    @pytest.mark.parametrize(
        'value_range', [(1, 1), (0, 1, 2), [(0, 1)] * 3, [(0, 1), (1, 0)]]
    )
    def test_malformed(self, value_range: Any) -> None:
        with pytest.raises(ValueError, match='or 2 such pairs, one per band, got'):
            resolve_value_range(value_range, None, 2, ['uint16'])

    def test_clips(self) -> None:
        values = np.array([-1, 0, 5, 10, 11, np.nan], np.float32).reshape(1, 1, 6)
        actual = to_unit_range(values, ((0, 10),))
        assert actual.ravel().tolist() == [0, 0, 0.5, 1, 1, 0]


class TestRealData:
    def test_ssl4eo_layout(self) -> None:
        folder = DATA / 'ssl4eo_s12_layout'
        if not folder.is_dir():
            pytest.skip('no real data')
        dataset = unlabelled(folder, patch_size=264)
        assert dataset.bands == SENTINEL2_BANDS
        assert len(dataset.places) == 2
        image = dataset[0]['image']
        assert image.shape == (13, 264, 264)
        # Red edge and near infrared show the same ground at 20 m and at 10 m
        bands = image[[SENTINEL2_BANDS.index(band) for band in ('B7', 'B8')]].flatten(1)
        assert torch.corrcoef(bands)[0, 1] > 0.92

    def test_dates_of_one_place(self) -> None:
        folder = DATA / 's2_timeseries_boadella'
        if not folder.is_dir():
            pytest.skip('no real data')
        image = unlabelled(folder, patch_size=64, seasons=4)[0]['image']
        assert image.shape == (4, 12, 64, 64)
        assert torch.corrcoef(image[:, 7].flatten(1)).min() > 0.3
