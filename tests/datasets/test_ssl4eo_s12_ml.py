# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rasterio
import torch
from torch.utils.data import DataLoader
from torchgeo.datasets import SSL4EOS12

from tests.ssl4eo.archives import season, write_archive, write_image
from torchgeo_softcon.datasets import SSL4EOS12ML
from torchgeo_softcon.ssl4eo.image_records import decode, record_dtype
from torchgeo_softcon.ssl4eo.pack import pack
from torchgeo_softcon.ssl4eo.tiffs import BANDS

JUNE, SEPTEMBER, DECEMBER = '20200604', '20200902', '20201204'

#: Three locations with two, two and one images of Level-1C; less of the others.
DAYS = {
    's2c': {
        '0000000': [JUNE, SEPTEMBER],
        '0000001': [JUNE, DECEMBER],
        '0000007': [SEPTEMBER],
    },
    's2a': {'0000000': [SEPTEMBER], '0000001': [JUNE]},
    # 6 and 3 days later, and far from both dates of the second location
    's1': {'0000000': ['20200610', '20200905'], '0000001': ['20200901']},
}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, with labels whose class is the number of the image."""
    root = write_archive(tmp_path_factory.mktemp('archive'), DAYS)
    classes = iter(range(9))
    labels = {
        location: {season('s2c', day): [next(classes)] for day in days}
        for location, days in DAYS['s2c'].items()
    }
    labels['0000007'] = {season('s2c', SEPTEMBER): []}
    labels['0999999'] = {season('s2c', JUNE): [1]}
    (root / 'labels.json').write_text(json.dumps(labels))
    # Not images
    (root / 's2c' / 'notes').mkdir()
    (root / 's2c' / '0000000' / '.ipynb_checkpoints').mkdir()
    (root / 's2c' / 'ids.csv').touch()
    return root


@pytest.fixture(scope='module')
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('packed')
    assert pack(root, out, labels=root / 'labels.json', shard_size=2) == []
    return out


@pytest.fixture(params=['folders', 'packed'])
def archive(request: pytest.FixtureRequest, root: Path, packed: Path) -> Path:
    return root if request.param == 'folders' else packed


def read(root: Path, split: str, name: str) -> torch.Tensor:
    """The bands of an image, as TorchGeo reads them."""
    bands = []
    for band in BANDS[split]:
        with rasterio.open(root / split / name / f'{band}.tif') as file:
            bands.append(file.read(1, out_shape=(264, 264)).astype(np.float32))
    return torch.from_numpy(np.stack(bands))


def quiet(*args: Any, **kwargs: Any) -> SSL4EOS12ML:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return SSL4EOS12ML(*args, **kwargs)


class TestSSL4EOS12ML:
    @pytest.mark.parametrize('split', ['s1', 's2c', 's2a'])
    def test_images_are_those_of_torchgeo(
        self, root: Path, archive: Path, split: Any
    ) -> None:
        dataset = quiet(archive, split).images()
        theirs: Any = SSL4EOS12(str(root), split)
        assert len(dataset) == sum(map(len, DAYS[split].values()))
        seen = {}
        for index in range(len(dataset)):
            (name,) = dataset.names(index)
            image = dataset[index]['image']
            assert image.dtype == torch.float32
            assert torch.equal(image[0], read(root, split, name))
            seen[name] = image[0]
        # A location with one image, which TorchGeo cannot choose differently
        place, (day,) = next((p, d) for p, d in DAYS[split].items() if len(d) == 1)
        actual = theirs[int(place)]['image']
        assert torch.equal(actual, seen[f'{place}/{season(split, day)}'])

    def test_samples_are_locations_on_disk(self, root: Path, archive: Path) -> None:
        dataset = SSL4EOS12ML(archive)
        assert len(dataset) == 3
        sample = dataset[2]
        assert sample['image'].shape == (1, 13, 264, 264)
        assert ('label' in sample) == (archive != root)

    def test_labels_stay_with_their_images(self, root: Path, archive: Path) -> None:
        with pytest.warns(
            UserWarning, match='1 of 3 locations .* fewer than 2 .*0000007'
        ):
            dataset = SSL4EOS12ML(archive, labels=root / 'labels.json', seasons=2)
        assert len(dataset) == 2
        orders = set()
        for index in range(12):
            sample, names = dataset[index], dataset.names(index)
            assert sample['image'].shape == (2, 13, 264, 264)
            assert sample['label'].shape == (2, 9)
            assert sample['label'].dtype == torch.int64
            labels = json.loads((root / 'labels.json').read_text())
            for image, label, name in zip(
                sample['image'], sample['label'], names, strict=True
            ):
                location, image_id = name.split('/')
                assert label.nonzero().flatten().tolist() == labels[location][image_id]
                assert torch.equal(image, read(root, 's2c', name))
            orders.add(tuple(names))
        # Both orders of both locations
        assert len(orders) == 4

    def test_unlabelled_is_unknown(self, root: Path, archive: Path) -> None:
        dataset = SSL4EOS12ML(archive, labels=root / 'labels.json')
        assert dataset[2]['label'].tolist() == [[0] * 9]
        required = SSL4EOS12ML(
            archive, labels=root / 'labels.json', require_labels=True
        )
        assert len(required) == 2
        assert all(sample['label'].any() for sample in required)

    def test_packed_labels_are_used(self, packed: Path, tmp_path: Path) -> None:
        dataset = SSL4EOS12ML(packed)
        assert dataset.codes == tuple(range(9))
        name = dataset.names(0)[0].split('/')
        path = tmp_path / 'l.json'
        path.write_text(json.dumps({name[0]: {name[1]: [80]}}))
        other = quiet(packed, labels=path)
        assert (dataset[0]['label'].sum(), other[0]['label'].shape) == (1, (1, 11))

    def test_splits_are_paired(self, root: Path, archive: Path) -> None:
        with pytest.warns(UserWarning, match='3 of 5 images of s2c are left out'):
            dataset = SSL4EOS12ML(archive, ['s1', 's2c'])
        assert dataset.bands is not None
        assert dataset.bands[:3] == ('VV', 'VH', 'B1')
        for index in range(4):
            (name,) = dataset.names(index)
            day = {JUNE: '20200610', SEPTEMBER: '20200905'}[name[8:16]]
            image = dataset[index]['image'][0]
            sar = read(root, 's1', f'0000000/{season("s1", day)}')
            assert torch.equal(image[:2], sar)
            assert torch.equal(image[2:], read(root, 's2c', name))

    def test_levels_are_paired_by_name(self, root: Path, archive: Path) -> None:
        dataset = quiet(archive, ['s2c', 's2a'])
        assert [dataset.names(i)[0] for i in range(2)] == [
            f'0000000/{season("s2c", SEPTEMBER)}',
            f'0000001/{season("s2c", JUNE)}',
        ]
        image = dataset[0]['image'][0]
        assert torch.equal(image[13:], read(root, 's2a', dataset.names(0)[0]))

    def test_sentinel_1_has_the_labels_of_sentinel_2(
        self, root: Path, packed: Path
    ) -> None:
        for path, labels in ((root, root / 'labels.json'), (packed, None)):
            dataset = quiet(path, 's1', labels).images()
            assert [s['label'].argmax().item() for s in list(dataset)[:2]] == [0, 1]
            assert not dataset[2]['label'].any()

    def test_shares(self, root: Path, archive: Path, tmp_path: Path) -> None:
        import pandas as pd

        rows = [
            {'id': f's2c/{p}/{season("s2c", d)}', 'count_10': 97, 'count_80': 3}
            for p, days in DAYS['s2c'].items()
            for d in days
        ]
        pd.DataFrame(rows).to_parquet(tmp_path / 'l.parquet')
        labels = tmp_path / 'l.parquet'
        present = SSL4EOS12ML(archive, labels=labels)[0]['label']
        assert present.tolist() == [[1, 0]]
        both = SSL4EOS12ML(archive, labels=labels, min_fraction=0.03)[0]['label']
        assert both.tolist() == [[1, 1]]
        shares = SSL4EOS12ML(archive, labels=labels, fractions=True)[0]['label']
        torch.testing.assert_close(shares, torch.tensor([[0.97, 0.03]]))

    def test_draws_are_a_function_of_seed_and_index(self, archive: Path) -> None:
        first, again, other = (quiet(archive, seed=seed) for seed in (0, 0, 1))
        names = [[d.names(i) for i in range(30)] for d in (first, again, other)]
        assert names[0] == names[1] != names[2]
        # New choices in later rounds, of the same location
        assert {name for (name,) in names[0][::3]} == {
            f'0000000/{season("s2c", day)}' for day in (JUNE, SEPTEMBER)
        }
        with pytest.raises(IndexError, match='at least 0, got -1'):
            first[-1]

    def test_batches(self, archive: Path) -> None:
        dataset = quiet(archive, seasons=2)
        batch = dataset.__getitems__([1, 0, 3])
        assert len(batch) == 3
        for sample, index in zip(batch, (1, 0, 3), strict=True):
            assert torch.equal(sample['image'], dataset[index]['image'])
        native = batch.collate()['records']
        assert native['s2c'].shape == (3, 2, 778272)
        assert torch.equal(dataset.decode(native)[2], dataset[3]['image'])
        # Any other function that collates samples
        (stacked,) = DataLoader(dataset, batch_size=2)
        assert torch.equal(stacked['image'][1], dataset[1]['image'])

    def test_transforms(self, archive: Path) -> None:
        dataset = quiet(archive, transforms=lambda s: {**s, 'image': -s['image']})
        assert (dataset[0]['image'] <= 0).all()
        assert (dataset.__getitems__([0])[0]['image'] <= 0).all()

    def test_footprint(self, root: Path, archive: Path) -> None:
        dataset = quiet(archive).images()
        outline, crs, day = dataset.footprint(1)
        with rasterio.open(root / 's2c' / dataset.names(1)[0] / 'B2.tif') as file:
            assert outline.bounds == tuple(file.bounds)
            assert crs == file.crs.to_string()
        assert str(day) == '2020-09-02'
        assert quiet(archive, seasons=2).footprint(0)[2] is None

    def test_parts_share_no_location(self, archive: Path) -> None:
        parts = SSL4EOS12ML(archive).divide(1 / 3)
        names = [{d.names(i)[0][:7] for i in range(9)} for d in parts]
        assert [len(n) for n in names] == [1, 1, 1]
        assert set.union(*names) == set(DAYS['s2c'])
        with pytest.raises(ValueError, match='3 locations cannot be divided'):
            SSL4EOS12ML(archive).divide(0.1)

    def test_pickle(self, archive: Path) -> None:
        dataset = quiet(archive)
        expected = dataset[0]
        actual = pickle.loads(pickle.dumps(dataset))[0]
        assert torch.equal(actual['image'], expected['image'])

    def test_plot(self, archive: Path) -> None:
        dataset = quiet(archive, seasons=2)
        figure = dataset.plot(dataset[0], suptitle='June and September')
        assert len(figure.axes) == 2
        shown: Any = figure.axes[0].images[0].get_array()
        assert 0 <= shown.min() <= shown.max() <= 1
        plt.close(figure)


class TestErrors:
    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'split': 's2'}, "split must be 's1', 's2c'.* got 's2'"),
            ({'split': []}, 'one or several'),
            ({'split': ['s1', 's1']}, 'one or several'),
            ({'seasons': 0}, 'seasons must be at least 1'),
            ({'seasons': 3}, 'the most there are is 2'),
            ({'min_fraction': 0}, r'min_fraction must be in \(0, 1\], got 0'),
            ({'require_labels': True}, 'labels must be given for require_labels'),
            (
                {'fractions': True},
                'labels must be given for require_labels and fractions',
            ),
        ],
    )
    def test_arguments(self, root: Path, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SSL4EOS12ML(root, **options)

    def test_fractions_of_classes(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r'labels\.json tells which classes'):
            SSL4EOS12ML(root, labels=root / 'labels.json', fractions=True)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r'found none in .*s2c'):
            SSL4EOS12ML(tmp_path)

    def test_labels_of_another_archive(self, root: Path, tmp_path: Path) -> None:
        path = tmp_path / 'l.json'
        path.write_text(json.dumps({'200': {season('s2c', JUNE): [1]}}))
        with pytest.raises(ValueError, match=r'5 of 5 images are not in .*0000000/'):
            SSL4EOS12ML(root, labels=path)

    def test_no_date_in_common(self, root: Path, tmp_path: Path) -> None:
        shutil.copytree(root / 's2c' / '0000007', tmp_path / 's2c' / '0000007')
        shutil.copytree(root / 's1' / '0000000', tmp_path / 's1' / '0000000')
        with pytest.raises(ValueError, match='images of the same locations and dates'):
            SSL4EOS12ML(tmp_path, ['s1', 's2c'])

    @pytest.fixture
    def damaged(self, tmp_path: Path) -> tuple[Path, Path]:
        """An archive of two images, and a file of the second."""
        for day in (JUNE, SEPTEMBER):
            folder = tmp_path / 's2c' / '0000000' / season('s2c', day)
            write_image(folder, 's2c', np.random.default_rng(0))
        return tmp_path, folder / 'B11.tif'

    def test_truncated_file_is_named(self, damaged: tuple[Path, Path]) -> None:
        root, path = damaged
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(OSError, match=f'cannot read {path}, is it truncated'):
            list(SSL4EOS12ML(root).images())

    def test_missing_file_is_named(self, damaged: tuple[Path, Path]) -> None:
        root, path = damaged
        path.unlink()
        with pytest.raises(OSError, match=f'cannot open {path} as a raster'):
            list(SSL4EOS12ML(root).images())

    def test_other_size_is_named(self, damaged: tuple[Path, Path]) -> None:
        root, path = damaged
        shutil.copy(path.with_name('B1.tif'), path)
        with pytest.raises(ValueError, match=f'{path} is uint16 of 44 x 44 pixels'):
            list(SSL4EOS12ML(root).images())


class TestRecords:
    @pytest.mark.parametrize(
        'dtype', ['uint8', 'uint16', 'int16', 'float32', 'float64']
    )
    @pytest.mark.parametrize('size', [6, 24, 25])
    def test_decode_is_what_gdal_reads(
        self, tmp_path: Path, dtype: str, size: int
    ) -> None:
        """Also where sizes are no multiples, and larger than wanted."""
        rng = np.random.default_rng(0)
        sides = {'a': (4, 4), 'b': (12, 8), 'c': (30, 6)}
        types = record_dtype({'b': (dtype, sides['b']), 'a': ('uint8', sides['a'])})
        records = np.zeros(3, record_dtype({k: (dtype, v) for k, v in sides.items()}))
        expected = np.zeros((3, 3, size, size), np.float32)
        for i in range(3):
            for channel, (band, shape) in enumerate(sides.items()):
                values = rng.integers(0, 256, shape).astype(dtype)
                records[i][band] = values
                path = tmp_path / f'{i}{band}.tif'
                with rasterio.open(
                    path,
                    'w',
                    driver='GTiff',
                    height=shape[0],
                    width=shape[1],
                    count=1,
                    dtype=dtype,
                    crs='EPSG:32632',
                    transform=rasterio.transform.from_origin(0, 0, 10, 10),
                ) as file:
                    file.write(values, 1)
                with rasterio.open(path) as file:
                    expected[i, channel] = file.read(1, out_shape=(size, size))
        raw = torch.from_numpy(records.view(np.uint8).reshape(3, -1))
        actual = decode(raw, records.dtype, list(sides), size)
        assert np.array_equal(actual.numpy(), expected)
        # Numbers lie where a device can read them, whatever their order was
        assert types.itemsize % 8 == 0
        assert types.fields['b'][1] % np.dtype(dtype).itemsize == 0

    def test_values_beyond_15_bits(self) -> None:
        record = np.zeros(1, record_dtype({'a': ('uint16', (1, 1))}))
        record['a'] = 65535
        raw = torch.from_numpy(record.view(np.uint8).reshape(1, -1))
        assert decode(raw, record.dtype, ['a'], 2).unique().tolist() == [65535]
