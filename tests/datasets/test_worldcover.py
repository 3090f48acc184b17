# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import os
import pickle
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pytest
import rasterio
import torch
from affine import Affine
from pyproj import CRS, Transformer
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject
from torch.utils.data import DataLoader
from torchgeo.datasets import stack_samples
from torchgeo.samplers import GridGeoSampler, RandomGeoSampler

from torchgeo_softcon._compat import DatasetNotFoundError, RasterDataset, Sample
from torchgeo_softcon.datasets.worldcover import ESAWorldCover
from torchgeo_softcon.geo import mosaic
from torchgeo_softcon.landcover.products import WORLDCOVER, WORLDCOVER_CODES
from torchgeo_softcon.transforms.worldcover import WorldCoverMultiLabel

REAL = Path(__file__).parents[2].parent / 'shared' / 'data' / 'worldcover_tiles'
N00E006 = 'ESA_WorldCover_10m_2021_v200_N00E006_Map.tif'
N66E177 = 'ESA_WorldCover_10m_2020_v100_N66E177_Map.tif'
UTM32 = CRS.from_epsg(32632)
WGS84 = CRS.from_epsg(4326)
RES = 1 / 12000

pytestmark = pytest.mark.filterwarnings('ignore:.*official tile.*:UserWarning')


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip('real data are not there')
    return path


def write(
    path: Path,
    codes: npt.NDArray[Any],
    crs: str | None = 'EPSG:4326',
    transform: Affine | None = None,
    **kwargs: Any,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile: dict[str, Any] = {
        'driver': 'GTiff',
        'width': codes.shape[-1],
        'height': codes.shape[-2],
        'count': 1 if codes.ndim == 2 else len(codes),
        'dtype': codes.dtype.name,
        'crs': crs,
        'transform': transform or Affine(RES, 0, 9, 0, -RES, 48),
        **kwargs,
    }
    with rasterio.open(path, 'w', **profile) as dst:
        dst.write(codes if codes.ndim == 3 else codes[None])
    return path


def random_codes(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.choice(np.array(WORLDCOVER_CODES, np.uint8), (height, width))


def utm_window(lon: float, lat: float, crs: CRS = UTM32, res: float = 10) -> Affine:
    x, y = Transformer.from_crs(WGS84, crs, always_xy=True).transform(lon, lat)
    return Affine(res, 0, x, 0, -res, y)


def tilted(transform: Affine) -> Affine:
    return Affine(8, 5, transform.c, 5, -8, transform.f)


def south_up(transform: Affine) -> Affine:
    return Affine(10, 0, transform.c, 0, 10, transform.f)


def slow_read(
    path: Path, crs: CRS, transform: Affine, height: int, width: int
) -> npt.NDArray[np.int64]:
    out = np.zeros((height, width), np.int64)
    with rasterio.open(path) as src:
        to_tile = Transformer.from_crs(crs, CRS(src.crs), always_xy=True)
        col, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        a, b, c, d, e, f = transform[:6]
        x, y = to_tile.transform(a * col + b * row + c, d * col + e * row + f)
        for i in range(height):
            points = zip(x[i], y[i], strict=True)
            out[i] = [value[0] for value in src.sample(points, masked=False)]
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / 'a' / 'ESA_WorldCover_10m_2021_v200_N45E009_Map.tif', clip())
    return tmp_path


def clip() -> npt.NDArray[np.uint8]:
    return random_codes(60, 80).repeat(5, 0).repeat(5, 1)


class TestFiles:
    @pytest.fixture
    def mixed(self, tmp_path: Path) -> Path:
        names = [
            'x/y/ESA_WorldCover_10m_2020_v100_N45E009_Map.tif',
            'x/ESA_WorldCover_10m_2021_v200_N45E009_Map.tif',
            'ESA_WorldCover_10m_2021_v200_N45E009_InputQuality.tif',
            'ESA_WorldCover_10m_2020_v100_N45E012_Map_clip.tif',
            'a clip.TIFF',
            '.ESA_WorldCover_10m_2021_v200_N45E009_Map.tif',
            'readme.txt',
        ]
        for name in names:
            write(tmp_path / name, random_codes(4, 4))
        return tmp_path

    @pytest.mark.parametrize('year', [2020, 2021])
    def test_folder_gives_the_year_and_clips(self, mixed: Path, year: Any) -> None:
        dataset = ESAWorldCover(mixed, year=year)
        names = [os.path.basename(file) for file in dataset.files]
        expected = {
            2020: [
                'ESA_WorldCover_10m_2020_v100_N45E009_Map.tif',
                'ESA_WorldCover_10m_2020_v100_N45E012_Map_clip.tif',
                'a clip.TIFF',
            ],
            2021: ['ESA_WorldCover_10m_2021_v200_N45E009_Map.tif', 'a clip.TIFF'],
        }
        assert names == expected[year]
        assert len(dataset) == len(names)

    def test_named_files_are_always_taken(self, mixed: Path) -> None:
        file = mixed / 'x/y/ESA_WorldCover_10m_2020_v100_N45E009_Map.tif'
        dataset = ESAWorldCover(iter([file]), year=2021)
        assert dataset.files == [str(file)]

    def test_official_tiles_go_before_clips(self, tmp_path: Path) -> None:
        ten, twenty = (np.full((4, 4), code, np.uint8) for code in (10, 20))
        twenty[0] = 0
        write(tmp_path / 'ESA_WorldCover_10m_2021_v200_N45E009_Map.tif', twenty)
        write(tmp_path / 'A.tif', ten)
        mask = ESAWorldCover(tmp_path)[:, :]['mask']
        assert mask[:, 0].tolist() == [10, 20, 20, 20]

    def test_no_tile_of_the_year(self, mixed: Path) -> None:
        with pytest.raises(DatasetNotFoundError) as error:
            ESAWorldCover(mixed / 'x' / 'y')
        message = str(error.value)
        assert 'of 2021, but tiles of 2020' in message
        assert str(mixed) in message
        assert 'ESA_WorldCover_10m_2021_v200_N51E003_Map.tif' in message

    def test_no_such_path(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetNotFoundError, match=r'gone\.tif'):
            ESAWorldCover(tmp_path / 'gone.tif')

    def test_odd_size_warns(self, folder: Path) -> None:
        with pytest.warns(UserWarning, match='N45E009_Map.tif has the name') as record:
            ESAWorldCover(folder)
        assert len([w for w in record if 'official' in str(w.message)]) == 1
        assert record[0].filename == __file__

    def test_official_size_does_not_warn(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            ESAWorldCover(real(N00E006))


class TestBadInput:
    def test_unknown_year(self) -> None:
        with pytest.raises(ValueError, match='year must be 2020 or 2021, got 2019'):
            ESAWorldCover(year=2019)  # type: ignore[arg-type]

    @pytest.mark.parametrize('classes', [(), (10, 10), (10, 15), (0, 10)])
    def test_unknown_classes(self, classes: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match='classes must be some of'):
            ESAWorldCover(classes=classes)

    def test_no_crs(self, tmp_path: Path) -> None:
        write(tmp_path / 'lost.tif', random_codes(4, 4), crs=None)
        with pytest.raises(ValueError, match=r'lost\.tif has no CRS'):
            ESAWorldCover(tmp_path)

    def test_many_bands(self, tmp_path: Path) -> None:
        write(tmp_path / 'image.tif', np.zeros((13, 4, 4), np.uint16))
        with pytest.raises(ValueError, match=r'image\.tif must have one band.*13'):
            ESAWorldCover(tmp_path)

    def test_floats(self, tmp_path: Path) -> None:
        write(tmp_path / 'float.tif', random_codes(4, 4).astype(np.float32))
        with pytest.raises(ValueError, match=r'float\.tif must hold.*float32'):
            ESAWorldCover(tmp_path)

    def test_no_raster(self, folder: Path) -> None:
        (folder / 'half.tif').write_bytes(b'II*\0')
        with pytest.raises(OSError, match=r'half\.tif cannot be opened'):
            ESAWorldCover(folder)

    def test_truncated_tile(self, tmp_path: Path) -> None:
        path = write(tmp_path / 'cut.tif', random_codes(512, 512), compress='deflate')
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(OSError, match=r'cut\.tif cannot be'):
            ESAWorldCover(tmp_path)[:, :]

    def test_truncated_official_tile(self, tmp_path: Path) -> None:
        path = tmp_path / N00E006
        data = real(N00E006).read_bytes()
        path.write_bytes(data[: len(data) // 2])
        dataset = ESAWorldCover(path)  # its directory comes first, so it opens
        with pytest.raises(OSError, match=r'N00E006_Map\.tif cannot be read at'):
            # The end of the file is the south of the tile
            dataset.read_window(WGS84, Affine(RES, 0, 6.6, 0, -RES, 0.3), 64, 64)

    @pytest.mark.parametrize(
        ('dtype', 'value'), [('uint8', 15), ('int16', -1), ('int16', 300)]
    )
    def test_foreign_codes(self, tmp_path: Path, dtype: str, value: int) -> None:
        codes = random_codes(8, 8).astype(dtype)
        codes[3, 3] = value
        write(tmp_path / 'odd.tif', codes)
        dataset = ESAWorldCover(tmp_path)
        with pytest.raises(ValueError, match=rf'odd\.tif must hold.*got also {value}:'):
            dataset[:, :]

    def test_outside(self, folder: Path) -> None:
        with pytest.raises(IndexError, match='not found in index'):
            ESAWorldCover(folder)[20:21, 40:41]

    @pytest.mark.parametrize('shape', [(0, 4), (4, -1)])
    def test_no_pixels(self, folder: Path, shape: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match='height and width must be positive'):
            ESAWorldCover(folder).read_window(WGS84, Affine.identity(), *shape)


class TestReadWindow:
    @pytest.mark.parametrize(
        'transform',
        [
            utm_window(9.005, 47.997),
            utm_window(8.999, 48.001),  # over the corner
            utm_window(9.005, 47.997, res=23),
            tilted(utm_window(9.005, 47.997)),
            south_up(utm_window(9.005, 47.990)),
        ],
    )
    @pytest.mark.parametrize('shape', [(70, 50), (1, 40), (3, 1)])
    def test_every_pixel_has_the_class_at_its_centre(
        self, folder: Path, transform: Affine, shape: tuple[int, int]
    ) -> None:
        dataset = ESAWorldCover(folder)
        actual = dataset.read_window(UTM32, transform, *shape)
        assert actual.dtype == torch.long
        expected = slow_read(Path(dataset.files[0]), UTM32, transform, *shape)
        np.testing.assert_array_equal(actual.numpy(), expected)

    @pytest.mark.parametrize('lonlat', [(7.41, 1.65), (6.72, 0.36)])
    @pytest.mark.parametrize(
        'name', [N00E006, N00E006.replace('2021_v200', '2020_v100')]
    )
    def test_official_tile_against_gdal(
        self, name: str, lonlat: tuple[float, float]
    ) -> None:
        path = real(name)
        transform = utm_window(*lonlat)
        actual = ESAWorldCover(path).read_window(UTM32, transform, 264, 250).numpy()
        assert len(np.unique(actual)) > 2

        expected = np.zeros((264, 250), np.uint8)
        with rasterio.open(path) as src:
            reproject(
                rasterio.band(src, 1),
                expected,
                dst_transform=transform,
                dst_crs=UTM32.to_wkt(),
            )
            with WarpedVRT(
                src, crs=UTM32.to_wkt(), transform=transform, height=264, width=250
            ) as vrt:
                virtual = vrt.read(1)
        # GDAL is allowed an error of an eighth of a pixel
        assert (actual != expected).mean() < 1e-3
        assert (actual != virtual).mean() < 1e-3
        np.testing.assert_array_equal(
            actual[:100, :90], slow_read(path, UTM32, transform, 100, 90)
        )

    def test_clip_in_another_projection(self) -> None:
        path = real('worldcover_quito_epsg3857.tif')
        crs = CRS.from_epsg(32717)
        transform = utm_window(-78.2, -0.03, crs)
        actual = ESAWorldCover(path).read_window(crs, transform, 128, 128)
        assert len(np.unique(actual.numpy())) > 2
        np.testing.assert_array_equal(
            actual.numpy(), slow_read(path, crs, transform, 128, 128)
        )

    def test_same_grid_gives_the_pixels_themselves(self) -> None:
        path = real(N00E006)
        window = ((16000, 16300), (16500, 16900))  # Principe
        with rasterio.open(path) as src:
            expected = src.read(1, window=window)
            transform = src.window_transform(
                rasterio.windows.Window.from_slices(*window)
            )
        actual = ESAWorldCover(path).read_window(WGS84, transform, 300, 400)
        np.testing.assert_array_equal(actual.numpy(), expected)

    def test_tiles_are_joined_without_a_seam(self, tmp_path: Path) -> None:
        whole = random_codes(100, 90)
        write(tmp_path / 'whole' / 'a.tif', whole)
        for i, rows in enumerate((slice(0, 40), slice(40, 100))):
            for j, cols in enumerate((slice(0, 50), slice(50, 90))):
                corner = Affine(RES, 0, 9 + RES * 50 * j, 0, -RES, 48 - RES * 40 * i)
                path = tmp_path / 'parts' / f'{i}{j}.tif'
                write(path, whole[rows, cols], transform=corner)
        transform = utm_window(9.0005, 47.9995)
        masks = [
            ESAWorldCover(tmp_path / name).read_window(UTM32, transform, 70, 50)
            for name in ('whole', 'parts')
        ]
        assert (masks[0] > 0).all()
        assert torch.equal(*masks)

    def test_clips_of_different_projections_are_joined(self, tmp_path: Path) -> None:
        left = utm_window(9.1, 47.9)
        codes = random_codes(40, 40)
        write(tmp_path / 'left.tif', codes, 'EPSG:32632', left)
        write(tmp_path / 'right.tif', codes)
        dataset = ESAWorldCover(tmp_path)
        first = dataset.read_window(UTM32, left, 40, 40)
        np.testing.assert_array_equal(first.numpy(), codes)
        second = dataset.read_window(WGS84, Affine(RES, 0, 9, 0, -RES, 48), 40, 40)
        np.testing.assert_array_equal(second.numpy(), codes)

    def test_antimeridian(self) -> None:
        path = real(N66E177)
        crs = CRS.from_epsg(32660)
        transform = utm_window(179.5, 68.5, crs, 500)
        actual = ESAWorldCover(path).read_window(crs, transform, 60, 100).numpy()
        expected = slow_read(path, crs, transform, 60, 100)
        np.testing.assert_array_equal(actual, expected)
        assert (actual[:, 0] > 0).all()
        assert (actual[:, -1] == 0).all()

    def test_nodata_of_a_clip_becomes_zero(self, tmp_path: Path) -> None:
        codes = random_codes(8, 8).astype(np.int16)
        codes[2, 2] = -9999
        write(tmp_path / 'a.tif', codes, nodata=-9999)
        codes[2, 2] = 255
        write(tmp_path / 'b.tif', codes.astype(np.uint8))
        for name in 'ab':
            mask = ESAWorldCover(tmp_path / f'{name}.tif')[:, :]['mask']
            assert mask[2, 2] == 0
            assert (mask == 0).sum() == 1

    @pytest.mark.parametrize(
        'crs', ['+proj=gnom +lat_0=-48 +lon_0=-171', '+proj=utm +zone=32', 'EPSG:4326']
    )
    def test_places_that_do_not_exist(self, folder: Path, crs: str) -> None:
        # Far out of the domain of the projection: no data, not an error
        transform = Affine(1e9, 0, -1e10, 0, -1e9, 1e10)
        assert not ESAWorldCover(folder).read_window(crs, transform, 20, 20).any()

    def test_large_grids_are_read_in_parts(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = ESAWorldCover(folder)
        transform = utm_window(9.0005, 47.9995)
        expected = dataset.read_window(UTM32, transform, 101, 203)
        monkeypatch.setattr(mosaic, '_MAX_SOURCE', 1000)
        assert torch.equal(dataset.read_window(UTM32, transform, 101, 203), expected)

    def test_only_blocks_of_the_window_are_read(self) -> None:
        path = real(N00E006)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dataset = ESAWorldCover(path)
        # 60 m pixels over the whole island, then a window of full resolution
        dataset.read_window(UTM32, utm_window(6.4, 0.5, res=60), 256, 256)
        dataset.read_window(UTM32, utm_window(7.4, 1.6), 256, 256)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert after - before < 300 * 1024  # KiB, the tile has 1.3 GB

    def test_files_stay_few(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mosaic, '_MAX_OPEN', 2)
        codes = random_codes(20, 50)
        for i in range(5):
            corner = Affine(RES, 0, 9 + 10 * i * RES, 0, -RES, 48)
            write(tmp_path / f'{i}.tif', codes[:, 10 * i :][:, :10], transform=corner)
        dataset = ESAWorldCover(tmp_path)
        np.testing.assert_array_equal(dataset[:, :]['mask'].numpy(), codes)
        assert len(dataset._mosaic.files) == 2
        dataset = ESAWorldCover(tmp_path, cache=False)
        np.testing.assert_array_equal(dataset[:, :]['mask'].numpy(), codes)
        assert not dataset._mosaic.files


class TestMapping:
    def test_classes_that_are_left_out_are_no_data(self, folder: Path) -> None:
        dataset = ESAWorldCover(folder, classes=(80, 10))
        mask = dataset[:, :]['mask'].numpy()
        codes = clip()
        expected = np.where(np.isin(codes, (10, 80)), codes, 0)
        np.testing.assert_array_equal(mask, expected)

    def test_ordinal(self, folder: Path) -> None:
        mask = ESAWorldCover(folder, ordinal=True)[:, :]['mask'].numpy()
        for i, code in enumerate(WORLDCOVER_CODES):
            np.testing.assert_array_equal(mask == i + 1, clip() == code)

    def test_ordinal_follows_the_order_of_the_classes(self, folder: Path) -> None:
        dataset = ESAWorldCover(folder, classes=(80, 10), ordinal=True)
        mask = dataset[:, :]['mask'].numpy()
        np.testing.assert_array_equal(mask == 1, clip() == 80)
        np.testing.assert_array_equal(mask == 2, clip() == 10)
        np.testing.assert_array_equal(mask == 0, ~np.isin(clip(), (10, 80)))

    def test_transforms_see_the_mapped_mask(self, folder: Path) -> None:
        seen = []

        def transform(sample: Sample) -> Sample:
            seen.append(sample['mask'].clone())
            return {'mask': sample['mask'] + 100}

        dataset = ESAWorldCover(folder, ordinal=True, transforms=transform)
        sample = dataset[:, :]
        assert seen[0].max() == 11
        assert torch.equal(sample['mask'], seen[0] + 100)

    def test_multi_label_as_transform(self, folder: Path) -> None:
        sample = ESAWorldCover(folder, transforms=WorldCoverMultiLabel())[:, :]
        assert sample['label'].tolist() == [1] * 11


class TestHost:
    """Together with TorchGeo's own datasets and samplers."""

    @pytest.fixture
    def images(self, tmp_path_factory: pytest.TempPathFactory) -> RasterDataset:
        folder = tmp_path_factory.mktemp('images')

        class Images(RasterDataset):  # type: ignore[misc]
            filename_glob = '*.tif'
            filename_regex = r'image_(?P<date>\d{8})'

        for date in ('20180101', '20260101'):
            write(
                folder / f'image_{date}.tif',
                np.ones((2, 120, 100), np.uint16),
                'EPSG:32632',
                utm_window(9.005, 47.996),
            )
        return Images(folder)

    def test_sample_has_the_keys_of_a_host_dataset(
        self, folder: Path, images: RasterDataset
    ) -> None:
        dataset = ESAWorldCover(folder)
        x, y, t = dataset.bounds
        query = (slice(x.start, x.stop, x.step), slice(y.start, y.stop, y.step), t)
        theirs = RasterDataset.__getitem__(dataset, query)
        ours = dataset[query]
        assert set(ours) == set(theirs)
        assert torch.equal(ours['mask'], theirs['mask'])
        for key in set(ours) - {'mask'}:
            assert type(ours[key]) is type(theirs[key])
            if isinstance(ours[key], torch.Tensor):
                torch.testing.assert_close(ours[key], theirs[key])
            else:
                assert ours[key] == theirs[key]

    def test_partial_slices(self, folder: Path) -> None:
        dataset = ESAWorldCover(folder)
        x, y, _ = dataset.bounds
        whole = dataset[:, :]['mask']
        assert torch.equal(dataset[x.start :]['mask'], whole)
        half = dataset[:, y.start + 150 * RES :]['mask']
        assert torch.equal(half, whole[:150])
        coarse = dataset[:: 5 * RES, :: 5 * RES]['mask']
        assert torch.equal(coarse, whole[2::5, 2::5])

    def test_intersection_of_any_date(
        self, folder: Path, images: RasterDataset
    ) -> None:
        dataset = images & ESAWorldCover(folder)
        assert len(dataset) == 2
        sampler = RandomGeoSampler(dataset, size=32, length=8)
        for query in sampler:
            sample = dataset[query]
            assert sample['image'].shape == (2, 32, 32)
            x, y, _ = query[:3]
            transform = Affine(10, 0, x.start, 0, -10, y.stop)
            expected = slow_read(
                folder / 'a' / 'ESA_WorldCover_10m_2021_v200_N45E009_Map.tif',
                UTM32,
                transform,
                32,
                32,
            )
            np.testing.assert_array_equal(sample['mask'].numpy(), expected)

    def test_tiles_far_from_the_images_do_no_harm(
        self, folder: Path, images: RasterDataset
    ) -> None:
        far = Affine(0.01, 0, -177, 0, -0.01, 69)
        write(folder / 'far.tif', random_codes(300, 300), transform=far)
        near = Affine(0.01, 0, 177, 0, -0.01, -15)
        write(folder / 'too.tif', random_codes(300, 300), transform=near)
        dataset = images & ESAWorldCover(folder)
        queries = list(GridGeoSampler(dataset, size=32, stride=32))
        assert queries
        assert all((dataset[query]['mask'] > 0).all() for query in queries[:4])

    # Spawned workers import everything again
    @pytest.mark.parametrize(
        'context', ['fork', pytest.param('spawn', marks=pytest.mark.slow)]
    )
    def test_workers(self, folder: Path, context: str) -> None:
        dataset = ESAWorldCover(folder, crs=UTM32, res=10)
        dataset[dataset.bounds]  # files are open here when the workers start
        sampler = GridGeoSampler(dataset, size=64, stride=64)
        batches: dict[int, Iterator[Sample]] = {
            workers: iter(
                DataLoader(
                    dataset,
                    batch_size=2,
                    sampler=sampler,
                    collate_fn=_stack_masks,
                    num_workers=workers,
                    multiprocessing_context=context if workers else None,
                )
            )
            for workers in (0, 2)
        }
        pairs = list(zip(batches[0], batches[2], strict=True))
        assert len(pairs) > 5
        assert all(torch.equal(a['mask'], b['mask']) for a, b in pairs)

    def test_pickle(self, folder: Path) -> None:
        dataset = ESAWorldCover(folder, ordinal=True)
        before = dataset[:, :]['mask']
        copy = pickle.loads(pickle.dumps(dataset))
        assert not copy._mosaic.files
        assert torch.equal(copy[:, :]['mask'], before)

    def test_plot(self, folder: Path) -> None:
        dataset = ESAWorldCover(folder, classes=(10, 80), ordinal=True)
        sample = dataset[:, :]
        sample['prediction'] = torch.ones_like(sample['mask'])
        figure = dataset.plot(sample, suptitle='Title')
        axes = figure.axes
        assert [ax.get_title() for ax in axes] == ['Mask', 'Prediction']
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [
            '0 No data',
            '1 Tree cover',
            '2 Permanent water bodies',
        ]
        shown = np.asarray(axes[0].images[0].get_array())
        tree = clip() == 10
        assert (shown[tree] == (0, 100, 0, 255)).all()
        assert figure.get_suptitle() == 'Title'
        assert not dataset.plot(dataset[:, :], show_titles=False).axes[0].get_title()
        plt.close('all')


class TestNames:
    def test_tiles_and_covers(self, folder: Path) -> None:
        dataset = ESAWorldCover(folder)
        left, bottom, right, top = 9.0, 48 - 300 * RES, 9 + 400 * RES, 48.0
        inside = (left + RES, bottom + RES, right - RES, top - RES)
        assert dataset.covers('EPSG:4326', inside, wholly=True)
        assert dataset.covers('EPSG:4326', (left, bottom, right, top), wholly=True)

        across = (left - 1, bottom, right, top)
        assert dataset.covers('EPSG:4326', across)
        assert not dataset.covers('EPSG:4326', across, wholly=True)
        assert dataset.tiles('EPSG:4326', across) == [
            'ESA_WorldCover_10m_2021_v200_N45E006_Map.tif',
            'ESA_WorldCover_10m_2021_v200_N45E009_Map.tif',
        ]

        beside = (right, bottom, right + 1, top)
        assert not dataset.covers('EPSG:4326', beside)
        assert not dataset.covers(4326, (77.2, 28.6, 77.3, 28.7))

        x, y = Transformer.from_crs(WGS84, UTM32, always_xy=True).transform(9.01, 47.99)
        assert dataset.covers(UTM32, (x, y, x + 500, y + 500), wholly=True)
        assert dataset.tiles(UTM32, (x, y, x + 500, y + 500)) == [
            'ESA_WorldCover_10m_2021_v200_N45E009_Map.tif'
        ]

    def test_covers_across_the_antimeridian(self) -> None:
        dataset = ESAWorldCover(real(N66E177), year=2020)
        crs = CRS.from_epsg(32660)
        corner = utm_window(179.9, 68, crs)
        box = (corner.c, corner.f - 1000, corner.c + 20_000, corner.f)
        assert dataset.covers(crs, box)
        assert not dataset.covers(crs, box, wholly=True)
        assert dataset.tiles(crs, box) == [
            N66E177,
            'ESA_WorldCover_10m_2020_v100_N66W180_Map.tif',
        ]

    def test_names_and_colours_are_those_of_the_official_tile(self) -> None:
        with rasterio.open(real(N00E006)) as src:
            table = src.colormap(1)
            legend = src.tags()['legend']
        dataset = ESAWorldCover(real(N00E006))
        assert {code: table[code] for code in dataset.colors} == dataset.colors
        lines = [line.split(maxsplit=1) for line in legend.strip().splitlines()]
        names = {int(code): name.strip() for code, name in lines}
        assert tuple(names) == WORLDCOVER_CODES
        official = tuple(name.replace('/', ' / ') for name in names.values())
        assert official == WORLDCOVER.class_names

    def test_url(self) -> None:
        assert ESAWorldCover.url.format(
            year=2020, version='v100', tile='N51E003'
        ).endswith('/v100/2020/map/ESA_WorldCover_10m_2020_v100_N51E003_Map.tif')


def _stack_masks(samples: list[Sample]) -> Sample:
    return dict(stack_samples([{'mask': sample['mask']} for sample in samples]))
