# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import hashlib
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio.warp import reproject, transform_bounds

from torchgeo_softcon.bands import BAND_STATISTICS, SENTINEL1_BANDS, SENTINEL2_BANDS
from torchgeo_softcon.datasets.synthetic import SyntheticScenes
from torchgeo_softcon.datasets.worldcover import ESAWorldCover
from torchgeo_softcon.synthetic import scenes as made_up
from torchgeo_softcon.transforms.worldcover import WORLDCOVER_CODES, class_fractions

TILE = 'ESA_WorldCover_10m_2021_v200_N45E012_Map.tif'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScenes:
    return SyntheticScenes(tmp_path_factory.mktemp('synthetic'))


def small(root: Path, **kwargs: Any) -> SyntheticScenes:
    return SyntheticScenes(root, **{'size': 32, 'seasons': 1, **kwargs})


def files(scenes: SyntheticScenes) -> dict[str, str]:
    return {
        str(path.relative_to(scenes.root)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(scenes.root.rglob('*'))
        if path.is_file()
    }


def read(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """Image, and land cover by GDAL's own warp."""
    with rasterio.open(path) as src:
        image = src.read()
        codes = np.zeros(src.shape, np.uint8)
        with rasterio.open(path.parents[1] / 'worldcover' / TILE) as tile:
            reproject(
                rasterio.band(tile, 1),
                codes,
                dst_transform=src.transform,
                dst_crs=src.crs,
            )
    return image, codes


def write_in_process(root: str) -> None:
    SyntheticScenes(root, size=64, seasons=2)


class TestFiles:
    def test_scenes_are_sentinel_2_products_of_two_zones(
        self, scenes: SyntheticScenes
    ) -> None:
        paths = sorted(scenes.images.iterdir())
        assert len(paths) == 8
        grids: dict[str, set[Any]] = {}
        for path in paths:
            with rasterio.open(path) as src:
                assert src.descriptions == SENTINEL2_BANDS
                assert set(src.dtypes) == {'uint16'}
                assert src.nodata == 0
                assert src.res == (10, 10)
                assert src.shape == (256, 256)
                assert src.crs.to_epsg() == {'T32': 32632, 'T33': 32633}[path.name[:3]]
                grids.setdefault(path.name[:6], set()).add(src.transform)
        assert sorted(grids) == ['T32TQR', 'T33TTL']
        assert all(len(transforms) == 1 for transforms in grids.values())

    def test_tile_is_official_and_small(self, scenes: SyntheticScenes) -> None:
        path = scenes.worldcover / TILE
        with rasterio.open(path) as src:
            assert src.shape == (36000, 36000)
            assert tuple(src.bounds) == pytest.approx((12, 45, 15, 48), abs=1e-9)
            assert src.crs.to_epsg() == 4326
            assert src.nodata == 0
            assert src.dtypes == ('uint8',)
            table = src.colormap(1)
            assert {code: table[code] for code in ESAWorldCover.colors} == (
                ESAWorldCover.colors
            )
        size = sum(file.stat().st_size for file in scenes.root.rglob('*.tif'))
        assert path.stat().st_size < 1e6
        assert size < 10e6

    def test_land_cover_lies_under_every_pixel(self, scenes: SyntheticScenes) -> None:
        dataset = ESAWorldCover(scenes.worldcover)
        for path in scenes.images.iterdir():
            with rasterio.open(path) as src:
                assert dataset.covers(src.crs, src.bounds, wholly=True)
                mask = dataset.read_window(src.crs, src.transform, *src.shape)
            assert (mask > 0).all()
            # GDAL is allowed an error of an eighth of a pixel
            assert (mask.numpy() != read(path)[1]).mean() < 1e-3

    def test_neighbouring_patches_have_other_labels(
        self, scenes: SyntheticScenes
    ) -> None:
        dataset = ESAWorldCover(scenes.worldcover)
        labels = []
        for path in sorted(scenes.images.glob('*0118_0.tif')):
            with rasterio.open(path) as src:
                mask = dataset.read_window(src.crs, src.transform, *src.shape)
            patches = mask.view(4, 64, 4, 64).transpose(1, 2).flatten(0, 1)
            labels.append(class_fractions(patches) >= 0.05)
        for label in labels:
            assert 1.5 < label.sum(1).float().mean() < 4
            assert len(np.unique(label.numpy(), axis=0)) > 6
        present = (labels[0] | labels[1]).any(0).sum()
        assert present >= 6

    def test_only_one_scene_has_a_rim_without_data(
        self, scenes: SyntheticScenes
    ) -> None:
        shares = {}
        for path in sorted(scenes.images.iterdir()):
            empty = read(path)[0] == 0
            assert (empty.all(0) == empty.any(0)).all()
            if empty.any():
                shares[path.name] = empty.mean()
        assert list(shares) == ['T32TQR_20211019_0.tif']
        assert 0.05 < shares['T32TQR_20211019_0.tif'] < 0.4

    def test_coarse_bands_are_repeated(self, scenes: SyntheticScenes) -> None:
        image, _ = read(next(scenes.images.glob('T33*')))
        for band, pixels in (('B11', 2), ('B9', 6), ('B8', 1)):
            values = image[SENTINEL2_BANDS.index(band)]
            same = (np.diff(values.astype(int), axis=1) == 0).mean(0)
            inside = np.arange(1, 256) % pixels != 0
            assert (same[inside] == 1).all()
            assert same[~inside].mean() < 0.2


class TestContent:
    def test_values_are_in_the_range_of_real_ones(
        self, scenes: SyntheticScenes
    ) -> None:
        images = np.stack([read(path)[0] for path in scenes.images.glob('T33*')])
        for i, band in enumerate(SENTINEL2_BANDS):
            mean, std = BAND_STATISTICS[band]
            assert abs(images[:, i].mean() - mean) < 2 * std, band

    def test_land_cover_can_be_seen_but_depends_on_the_season(
        self, scenes: SyntheticScenes
    ) -> None:
        # A linear discriminant of single pixels, learned in the north of each scene
        def pixels(date: str, rows: slice) -> tuple[Any, Any]:
            pairs = [read(path) for path in sorted(scenes.images.glob(f'*_{date}_*'))]
            images = [
                image[:, rows, ::4][:, ::4].reshape(13, -1).T for image, _ in pairs
            ]
            codes = [codes[rows, ::4][::4].ravel() for _, codes in pairs]
            return np.concatenate(images).astype(float), np.concatenate(codes)

        north, south = slice(0, 128), slice(128, 256)
        x, y = pixels('20210719', north)
        known = np.array([code for code in np.unique(y) if (y == code).sum() > 50])
        means = np.stack([x[y == code].mean(0) for code in known])
        centred = x - means[np.searchsorted(known, y).clip(max=len(known) - 1)]
        weights = np.linalg.solve(np.cov(centred[np.isin(y, known)].T), means.T)

        accuracy = {}
        for date in ('20210719', '20210118'):
            x, y = pixels(date, south)
            score = x @ weights - (means.T * weights).sum(0) / 2
            right = known[score.argmax(1)] == y
            accuracy[date] = right[np.isin(y, known)].mean()
        assert len(known) >= 6
        assert 0.7 < accuracy['20210719'] < 0.97
        assert 0.2 < accuracy['20210118'] < accuracy['20210719'] - 0.1

    def test_vegetation_has_seasons_and_towns_have_not(
        self, scenes: SyntheticScenes
    ) -> None:
        change = {}
        for name in ('T32TQR', 'T33TTL'):
            index = []
            for date in ('20210118', '20210719'):
                image, codes = read(scenes.images / f'{name}_{date}_0.tif')
                red, nir = image[3].astype(float), image[7].astype(float)
                index.append((nir - red) / (nir + red))
            for code in np.unique(codes):
                there = codes == code
                if there.sum() > 200:
                    change[code] = (index[1] - index[0])[there].mean()
        assert abs(change[50]) < 0.1
        assert change[10] > 0.25

    def test_bands_can_be_chosen(self, tmp_path: Path) -> None:
        whole = small(tmp_path)
        some = small(tmp_path, bands=('b04', 'B8A'))
        assert some.bands == ('B4', 'B8A')
        for path in some.images.iterdir():
            with rasterio.open(path) as src:
                assert src.descriptions == ('B4', 'B8A')
                expected = read(whole.images / path.name)[0][[3, 8]]
                np.testing.assert_array_equal(src.read(), expected)

    def test_radar(self, tmp_path: Path) -> None:
        scenes = small(tmp_path, bands=SENTINEL1_BANDS, seasons=2, size=96)
        for path in scenes.images.iterdir():
            image, codes = read(path)
            assert image.dtype == np.float32
            assert set(np.unique(codes)) <= set(WORLDCOVER_CODES)
            with rasterio.open(path) as src:
                assert src.descriptions == SENTINEL1_BANDS
                assert np.isnan(src.nodata)
            vv, vh = (float(np.nanmean(band)) for band in image)
            assert -30 < vh < vv < 0

    def test_places_do_not_depend_on_how_many_there_are(self, tmp_path: Path) -> None:
        one, five = small(tmp_path), small(tmp_path, places=5)
        assert len(list(five.images.iterdir())) == 10
        for path in one.images.iterdir():
            np.testing.assert_array_equal(
                read(path)[0], read(five.images / path.name)[0]
            )
            np.testing.assert_array_equal(
                read(path)[1], read(five.images / path.name)[1]
            )

    def test_largest_places_do_not_touch(self) -> None:
        boxes = []
        for site in made_up.find_sites(made_up.MAX_SITES, made_up.MAX_SIZE):
            crs = site.grid.crs.to_wkt()
            boxes.append(transform_bounds(crs, 'EPSG:4326', *site.grid.bounds))
        margin = 2 * made_up._MARGIN / 12000
        for i, a in enumerate(boxes):
            assert 12 + margin < a[0] < a[2] < 15 - margin
            assert 45 + margin < a[1] < a[3] < 48 - margin
            for b in boxes[:i]:
                beside = a[0] > b[2] + margin or b[0] > a[2] + margin
                above = a[1] > b[3] + margin or b[1] > a[3] + margin
                assert beside or above


class TestCache:
    @pytest.mark.parametrize(
        ('bands', 'expected'),
        [
            (SENTINEL2_BANDS, [1525.959, 1216.1465, 1542.874, 2049.1345]),
            (SENTINEL1_BANDS, [-17.0672, -15.4409, -18.2824, -18.1281]),
        ],
    )
    def test_pixels_stay_the_same(
        self, tmp_path: Path, bands: tuple[str, ...], expected: list[float]
    ) -> None:
        """Results in the README and in the notebooks depend on them."""
        scenes = small(tmp_path, bands=bands, seasons=2)
        found = [read(path) for path in sorted(scenes.images.iterdir())]
        means = [float(np.nanmean(image)) for image, _ in found]
        assert means == pytest.approx(expected, rel=1e-5)
        codes = [float(codes.mean()) for _, codes in found]
        assert codes == pytest.approx([28.0957, 28.0957, 56.9531, 56.9531], rel=1e-5)

    def test_same_arguments_give_the_same_bytes(self, tmp_path: Path) -> None:
        assert files(small(tmp_path / 'a')) == files(small(tmp_path / 'b'))

    def test_seed_changes_the_ground(self, tmp_path: Path) -> None:
        first, second = small(tmp_path), small(tmp_path, seed=1)
        assert first.root != second.root
        a, b = (read(next(s.images.glob('T32*')))[1] for s in (first, second))
        assert (a != b).any()

    def test_written_only_once(self, tmp_path: Path) -> None:
        path = next(small(tmp_path).images.iterdir())
        before = path.stat().st_mtime_ns
        assert path == next(small(tmp_path).images.iterdir())
        assert path.stat().st_mtime_ns == before

    def test_default_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv('TORCHGEO_SOFTCON_CACHE', str(tmp_path))
        scenes = SyntheticScenes(size=32, seasons=1)
        assert scenes.root.parent == tmp_path / 'synthetic'

    def test_interrupted_write_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as context:
            context.setattr(made_up, '_write_images', interrupt)
            with pytest.raises(KeyboardInterrupt):
                small(tmp_path)
        assert not list(tmp_path.iterdir())
        assert small(tmp_path).images.exists()

    def test_incomplete_folder_is_refused(self, tmp_path: Path) -> None:
        path = next(small(tmp_path).images.iterdir())
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(OSError, match=rf'{path.name}.*delete this folder'):
            small(tmp_path)

        shutil.rmtree(path.parent)
        with pytest.raises(OSError, match='delete this folder'):
            small(tmp_path)

    def test_processes_that_start_at_once(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context('fork')
        args = (str(tmp_path),)
        processes = [
            context.Process(target=write_in_process, args=args) for _ in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert len(os.listdir(tmp_path)) == 1
        scenes = SyntheticScenes(tmp_path, size=64, seasons=2)
        assert len(list(scenes.images.iterdir())) == 4

    @pytest.mark.parametrize(
        ('name', 'value'),
        [
            ('places', 0),
            ('places', 17),
            ('size', 31),
            ('size', 513),
            ('seasons', 0),
            ('seed', -1),
        ],
    )
    def test_out_of_range(self, tmp_path: Path, name: str, value: int) -> None:
        with pytest.raises(ValueError, match=f'{name} must be from .* got {value}'):
            small(tmp_path, **{name: value})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize('bands', [(), ('B4', 'VV'), ('R', 'G', 'B')])
    def test_bands_of_no_or_both_sensors(
        self, tmp_path: Path, bands: tuple[str, ...]
    ) -> None:
        with pytest.raises(ValueError, match='bands must be some of'):
            small(tmp_path, bands=bands)
