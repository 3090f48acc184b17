# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import csv
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from tests.datamodules.helpers import DATA, write_raster
from torchgeo_softcon.datasets import image_cache
from torchgeo_softcon.datasets.image_masks import ImageMaskFolder
from torchgeo_softcon.datasets.patches import Patch, PatchFiles
from torchgeo_softcon.transforms.worldcover import (
    WORLDCOVER_CODES,
    WorldCoverMultiLabel,
    class_fractions,
)


def save(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def folder(root: Path, **kwargs: Any) -> ImageMaskFolder:
    return ImageMaskFolder(root, **({'transforms': nn.Identity()} | kwargs))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images whose first colour, and mask, tell them apart."""
    for i, name in enumerate(('a', 'b', 'c.1')):
        save(tmp_path / 'images' / f'{name}.png', np.full((8, 8, 3), 100 + i))
        save(tmp_path / 'masks' / f'{name}.tif', np.full((8, 8), WORLDCOVER_CODES[i]))
    return tmp_path


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    """Two places with three dates, the pixels count up from left to right."""
    ramp = np.arange(8)[None, :, None] * np.ones((8, 1, 3))
    for place in range(2):
        for date in range(3):
            name = f'p{place}/2020-0{date + 1}'
            save(tmp_path / 'images' / f'{name}.png', 10 * date + 100 * place + ramp)
    save(tmp_path / 'masks' / 'p0.png', np.arange(8) // 4 * 10 + 10 * np.ones((8, 1)))
    for date, code in enumerate((30, 40, 50)):
        save(tmp_path / 'masks' / f'p1/2020-0{date + 1}.png', np.full((8, 8), code))
    return tmp_path


class TestImageMaskFolder:
    def test_masks_have_the_names_of_images(self, root: Path) -> None:
        dataset = folder(root)
        assert len(dataset) == 3 == len(list(dataset))
        assert dataset.bands == ('R', 'G', 'B')
        for i, sample in enumerate(dataset):
            torch.testing.assert_close(
                sample['image'], torch.full((3, 8, 8), (100 + i) / 255)
            )
            assert sample['mask'].dtype == torch.long
            assert (sample['mask'] == WORLDCOVER_CODES[i]).all()

    def test_indices_start_again_after_the_length(self, root: Path) -> None:
        dataset = folder(root)
        assert torch.equal(dataset[4]['image'], dataset[1]['image'])
        with pytest.raises(IndexError, match='at least 0, got -1'):
            dataset[-1]

    def test_label_is_the_default(self, root: Path) -> None:
        sample = pickle.loads(pickle.dumps(ImageMaskFolder(root)))[1]
        assert set(sample) == {'image', 'label'}
        assert sample['label'].nonzero().tolist() == [[1]]

    def test_seasons_of_a_folder(self, dated: Path) -> None:
        dataset = folder(dated, seasons=2)
        assert len(dataset) == 2
        for index in range(0, 20, 2):
            image = dataset[index]['image'] * 255
            assert image.shape == (2, 3, 8, 8)
            first, second = image[:, 0, 0, 0].round().tolist()
            assert first != second
            assert {first, second} <= {0, 10, 20}
        assert set(dataset[0]['mask'].flatten().tolist()) == {10, 20}
        seen = set()
        for index in range(1, 21, 2):
            # The mask is that of the first date
            first = dataset[index]['image'][0, 0, 0, 0].mul(255).round().item() - 100
            assert (dataset[index]['mask'] == 30 + first).all()
            seen.add(first)
        assert seen == {0, 10, 20}

    @pytest.mark.parametrize('seasons', [1, 2])
    def test_samples_read_together(self, dated: Path, seasons: int) -> None:
        seen: list[int] = []

        class Label(WorldCoverMultiLabel):
            def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
                seen.append(sample['mask'].ndim)
                return super().forward(sample)

        dataset = folder(dated, seasons=seasons, transforms=nn.Sequential(Label()))
        together = dataset.__getitems__([0, 5, 1])
        assert seen == [3]
        for sample, index in zip(together, (0, 5, 1), strict=True):
            assert sample.keys() == {'image', 'label'}
            assert torch.equal(sample['image'], dataset[index]['image'])
            assert torch.equal(sample['label'], dataset[index]['label'])

    @pytest.mark.parametrize(
        ('places', 'expected'),
        [
            (r'(\d+\.\d)\d*_(\d+\.\d)', ['28.2/76.8', '28.2/76.8', '28.2/76.9']),
            (r'(\d+)\.\d*_(\d+)', ['28/76'] * 3),
            (None, [None] * 3),
        ],
    )
    def test_a_place_of_several_groups(
        self, places: str | None, expected: list[str], tmp_path: Path
    ) -> None:
        for name in ('28.2056_76.8558', '28.2056_76.9001', '28.2944_76.8001'):
            save(tmp_path / f'images/{name}.png', np.full((8, 8, 3), 1))
            save(tmp_path / f'masks/{name}.png', np.full((8, 8), 10))
        dataset = folder(tmp_path, places=places)
        assert [dataset.place(index) for index in range(3)] == expected
        assert dataset.place(4) == expected[1]

    def test_one_season_makes_every_image_a_sample(self, dated: Path) -> None:
        assert len(folder(dated)) == 6

    def test_places_by_expression(self, dated: Path) -> None:
        dataset = folder(dated, seasons=2, places=r'2020-(\d\d)')
        assert len(dataset) == 3
        assert dataset.places == ['01', '02', '03']
        with pytest.raises(ValueError, match="'x' does not p0/2020-01"):
            folder(dated, places='x')
        # The group takes no part in a match of p alone
        with pytest.raises(ValueError, match=r"'p\(1\)\?' does not p0/2020-01"):
            folder(dated, places='p(1)?')

    def test_images_on_their_own(self, dated: Path) -> None:
        images = folder(dated, seasons=2, size=4).images()
        assert (len(images), images.seasons) == (6, 1)
        assert images.places == ['p0'] * 3 + ['p1'] * 3
        starts = [sample['image'][0, 0, 0].mul(255).round().item() for sample in images]
        # The middle begins at column 2
        assert starts == [2, 12, 22, 102, 112, 122]
        assert images[6]['image'].equal(images[0]['image'])
        assert [sample['mask'][0, 0].item() for sample in images][3:] == [30, 40, 50]
        wholes = folder(dated, seasons=2).images()
        assert wholes[0]['image'].shape == (3, 8, 8)

    def test_nodata_of_a_mask(self, root: Path) -> None:
        values = np.full((1, 8, 8), 10, np.uint8)
        values[:, :2] = 255
        write_raster(root / 'masks' / 'a.tif', values, nodata=255)
        mask = folder(root)[0]['mask']
        assert (mask[:2] == 0).all()
        assert (mask[2:] == 10).all()

    def test_crops_of_image_and_mask_are_the_same(self, dated: Path) -> None:
        dataset = folder(dated, seasons=3, size=4)
        lefts = set()
        for index in range(0, 40, 2):
            sample = dataset[index]
            assert torch.equal(sample['image'], dataset[index]['image'])
            # The place has 0 to 7 at its first date, and classes 10 and 20
            columns = (sample['image'][:, 0] * 255).round().min(0).values
            assert torch.equal(sample['mask'], 10 + columns.long() // 4 * 10)
            lefts.add(columns[0, 0].item())
        assert len(lefts) > 2

    def test_bands_and_mask_of_one_file(self, tmp_path: Path) -> None:
        values = np.arange(4, dtype=np.int16)[:, None, None] * np.ones((1, 4, 4), 'i2')
        values[3] = 40
        values[0, 0] = -9999
        write_raster(tmp_path / 'a.tif', values, crs=None, nodata=-9999)
        dataset = ImageMaskFolder(
            images=tmp_path,
            mask_band=4,
            image_bands=(3, 1),
            bands=('VV', 'VH'),
            value_range=[(0, 4), (-1, 1)],
            transforms=nn.Identity(),
        )
        image = dataset[0]['image']
        assert (image[0] == 0.5).all()
        assert (image[1, 0] == 0).all()
        assert (image[1, 1:] == 0.5).all()
        assert (dataset[0]['mask'] == 40).all()
        rest = ImageMaskFolder(images=tmp_path, mask_band=4, value_range=(0, 4))
        assert rest.image_bands == (1, 2, 3)

    def test_zero_is_no_data_if_all_bands_have_it(self, root: Path) -> None:
        values = np.full((8, 8, 3), 100)
        values[0] = 0
        values[1, :, 0] = 0
        save(root / 'images' / 'a.png', values)
        image = folder(root, nodata=0, value_range=(-100, 100))[0]['image']
        assert image[:, :3, 0].tolist() == [[0, 0.5, 1], [0, 1, 1], [0, 1, 1]]

    def test_alpha_tells_where_data_is(self, root: Path) -> None:
        for name in ('a', 'b', 'c.1'):
            values = np.full((8, 8, 4), 255)
            values[0, :, 3] = 0
            save(root / 'images' / f'{name}.png', values)
        dataset = folder(root)
        assert dataset.bands == ('R', 'G', 'B')
        image = dataset[0]['image']
        assert image[..., 0].tolist() == [[0, *[1] * 7]] * 3
        assert folder(root, image_bands=(1, 2, 3, 4))[0]['image'].shape == (4, 8, 8)

    def test_divide_by_place(self, dated: Path) -> None:
        for i in range(4):
            save(dated / 'images' / f'x{i}.png', np.zeros((8, 8, 3)))
            save(dated / 'masks' / f'x{i}.png', np.zeros((8, 8)))
        dataset = folder(dated, places=r'^p\d|^x\d')
        parts = dataset.divide(0.2)
        places = [set(part.places) for part in parts]
        assert set.union(*places) == set(dataset.places)
        assert sum(map(len, places)) == 6
        assert sum(map(len, parts)) == len(dataset) == 10
        with pytest.raises(ValueError, match=r'6 places cannot .* parts of 0.01'):
            dataset.divide(0.01)

    def test_plot(self, root: Path) -> None:
        figure = folder(root).plot(folder(root)[0])
        assert len(figure.axes) == 2
        plt.close(figure)


class TestErrors:
    def test_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match='images must be a folder with'):
            folder(tmp_path)
        with pytest.raises(ValueError, match='root must be given, or images together'):
            ImageMaskFolder(images=tmp_path)

    def test_image_without_mask(self, root: Path) -> None:
        (root / 'masks' / 'b.tif').unlink()
        with pytest.raises(FileNotFoundError, match=r'1 of 3 images .*masks: b$'):
            folder(root)

    def test_mask_of_another_size(self, root: Path) -> None:
        path = save(root / 'masks' / 'b.tif', np.zeros((8, 7)))
        with pytest.raises(ValueError, match=rf'b\.png has 8 x 8 and {path} 8 x 7'):
            folder(root)

    @pytest.mark.parametrize(
        ('value', 'message'), [(10.7, r'got 10\.7.*interpolated'), (np.nan, 'got NaN')]
    )
    def test_mask_of_fractions(self, root: Path, value: float, message: str) -> None:
        values = np.full((1, 8, 8), 10, np.float32)
        values[0, 0, 0] = value
        write_raster(root / 'masks' / 'b.tif', values, crs=None)
        with pytest.raises(ValueError, match=message):
            ImageMaskFolder(root)[1]

    def test_mask_of_colours(self, root: Path) -> None:
        path = save(root / 'masks' / 'b.tif', np.zeros((8, 8, 3)))
        with pytest.raises(ValueError, match=f'one band of WorldCover .*{path} has 3'):
            folder(root)

    def test_sizes_that_make_no_batch(self, root: Path) -> None:
        save(root / 'images' / 'd.png', np.zeros((9, 8, 3)))
        save(root / 'masks' / 'd.png', np.zeros((9, 8)))
        with pytest.raises(ValueError, match=r'or size must be given .*d\.png 9 x 8'):
            folder(root)
        assert folder(root, size=8)[3]['image'].shape == (3, 8, 8)
        with pytest.raises(ValueError, match=r'size must fit .* got 9 and .*a\.png of'):
            folder(root, size=9)

    def test_other_number_of_bands(self, root: Path) -> None:
        path = save(root / 'images' / 'b.png', np.zeros((8, 8)))
        with pytest.raises(ValueError, match=rf'{path} must have 3 bands .* got 1'):
            folder(root)

    def test_damaged_file_is_named(self, root: Path) -> None:
        path = root / 'images' / 'b.png'
        noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3))
        content = save(path, noise).read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(OSError, match=f'cannot read {path}'):
            folder(root)[1]
        path.write_bytes(b'not an image')
        with pytest.raises(OSError, match=f'cannot open {path}'):
            folder(root)

    def test_truncated_jpeg_is_not_filled_up(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
        path = save(tmp_path / 'images' / 'a.jpg', noise)
        save(tmp_path / 'masks' / 'a.png', np.zeros((64, 64)))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(OSError, match=f'cannot read {path}'):
            folder(tmp_path)[0]

    def test_two_files_of_one_name(self, root: Path) -> None:
        save(root / 'images' / 'b.tif', np.zeros((8, 8, 3)))
        with pytest.raises(ValueError, match=r'one file per name: .*b\.png, .*b\.tif'):
            folder(root)

    def test_too_few_dates(self, dated: Path) -> None:
        (dated / 'images' / 'p1' / '2020-02.png').unlink()
        with pytest.raises(ValueError, match='1 of 2 places have fewer: p1'):
            folder(dated, seasons=3)

    @pytest.mark.parametrize(
        ('argument', 'message'),
        [
            ({'seasons': 0}, 'seasons must be at least 1, got 0'),
            ({'size': 0}, 'size must be at least 1, got 0'),
            ({'seed': -1}, 'seed must be from 0 .*, got -1'),
            ({'mask_band': 4}, 'mask_band must be from 1 to 3'),
            ({'image_bands': (0, 1)}, 'image_bands must be from 1 to 3'),
            ({'bands': ('B4', 'B3')}, 'bands must name the 3 image_bands'),
            ({'masks': 'a', 'mask_band': 1}, 'masks = a and mask_band = 1'),
        ],
    )
    def test_bad_argument(
        self, root: Path, argument: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            folder(root, **argument)


class TestRealData:
    def test_hls_worldcover(self, tmp_path: Path) -> None:
        source = DATA / 'hls_worldcover'
        if not source.is_dir():
            pytest.skip('no real data')
        with open(source / 'labels.csv') as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            link = tmp_path / row['location'] / row['file']
            link.parent.mkdir(exist_ok=True)
            os.symlink(source / 'images' / row['file'], link)
        options: dict[str, Any] = {
            'images': tmp_path,
            'image_bands': range(1, 8),
            'mask_band': 11,
            'value_range': (0, 4000),
            'transforms': nn.Identity(),
        }
        dataset = ImageMaskFolder(**options)
        assert len(dataset) == len(rows) == 22
        for place, patch in zip(dataset.places, dataset.samples, strict=True):
            assert place.endswith(patch[0].image.stem)
        shares = {
            patch[0].image.name: class_fractions(sample['mask'])
            for patch, sample in zip(dataset.samples, dataset, strict=True)
        }
        for row in rows:
            expected = [float(row.get(f'wc_{code}', 0)) for code in WORLDCOVER_CODES]
            torch.testing.assert_close(
                shares[row['file']], torch.tensor(expected), atol=1e-3, rtol=0
            )

        for location in tmp_path.iterdir():
            if len(list(location.iterdir())) == 1:
                for link in location.iterdir():
                    link.unlink()
        pairs = ImageMaskFolder(**options, seasons=2)
        image = pairs[0]['image']
        assert image.shape == (2, 7, 128, 128)
        assert not torch.equal(image[0], image[1])


class TestCache:
    @pytest.mark.parametrize('kind', ['png', 'gap', 'float', 'band', 'seasons'])
    @pytest.mark.parametrize('size', [None, 5])
    def test_equals_the_files(
        self, kind: str, size: int | None, tmp_path: Path
    ) -> None:
        random = np.random.default_rng(0)
        options: dict[str, Any] = {'size': size, 'root': tmp_path}
        for number in range(4):
            name = f'p{number // 2}/{number}.{"png" if kind == "png" else "tif"}'
            values = random.integers(0, 9, (8, 9, 3)).astype(np.uint8)
            mask = random.choice([0, 10, 20], (8, 9)).astype(np.uint8)
            if kind == 'gap':  # 0 in all bands is no data, in one band a value
                values[:4, :, 0] = 0
                values[:2] = 0
            image: Any = values
            if kind == 'float':
                image = values.astype(np.float32)
                image[0, 0], image[1, 1, 1] = np.nan, np.inf
            if kind == 'band':
                image = np.dstack([values, mask])
            path = tmp_path / 'images' / name
            if kind == 'png':
                save(path, image)
            else:
                bands = np.moveaxis(image, -1, 0)
                write_raster(path, bands, nodata=0 if kind == 'gap' else None)
            write_raster(tmp_path / f'masks/{name[:4]}.tif', mask[None])
        if kind == 'band':
            options |= {'mask_band': 4, 'image_bands': (1, 2, 3)}
        if kind == 'seasons':
            options['seasons'] = 2
        options['value_range'] = (0, 8)
        plain = ImageMaskFolder(**options, transforms=lambda sample: sample)
        for _ in range(2):  # written, and then read
            cached = pickle.loads(
                pickle.dumps(ImageMaskFolder(**options, cache=tmp_path / 'cache'))
            )
            cached.transforms = plain.transforms
            for index in range(12):
                one, other = plain[index], cached[index]
                for key in ('image', 'mask'):
                    assert torch.equal(one[key], other[key])
                    assert one[key].dtype == other[key].dtype

    def test_follows_the_files(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(image_cache, '_SHARD', 1)  # a file per image
        options: Any = {'cache': root / 'cache'}
        before = folder(root, **options)
        decoded: list[int] = []
        read = PatchFiles.read_image

        def counted(self: PatchFiles, patch: Patch, part: Any) -> Any:
            decoded.append(patch.number)
            return read(self, patch, part)

        monkeypatch.setattr(PatchFiles, 'read_image', counted)
        first, second, _ = sorted((root / 'cache').rglob('*.npy'))
        first.write_bytes(first.read_bytes()[:-1])  # as an interrupted copy
        second.unlink()
        assert torch.equal(folder(root, **options)[0]['image'], before[0]['image'])
        assert decoded == [0, 0, 1]  # the first tells the size
        save(root / 'images/b.png', np.full((8, 8, 3), 7))
        assert (folder(root, **options)[1]['image'] * 255).round().unique() == 7
        # Files beside an image tell of its pixels, too
        caches = [*(root / 'cache').iterdir()]
        (root / 'images/b.png.aux.xml').write_text('<PAMDataset/>')
        folder(root, **options)
        assert len([*(root / 'cache').iterdir()]) == len(caches) + 1

    def test_other_sizes(self, root: Path) -> None:
        save(root / 'images/b.png', np.full((9, 8, 3), 7))
        save(root / 'masks/b.tif', np.full((9, 8), 10))
        with pytest.raises(ValueError, match='cache needs images of one size'):
            folder(root, size=8, cache=root / 'cache')
