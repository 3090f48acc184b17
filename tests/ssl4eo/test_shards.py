# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
import logging
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr
import zarr

from tests.ssl4eo.zarr_archives import (
    DATES,
    sample,
    write_chunk_files,
    write_shards,
    write_tar,
    zip_bytes,
)
from torchgeo_softcon.__main__ import main
from torchgeo_softcon.datamodules import SSL4EOS12MLDataModule
from torchgeo_softcon.datasets import SSL4EOS12ML
from torchgeo_softcon.labels.sources import find_layout
from torchgeo_softcon.landcover import find_product
from torchgeo_softcon.ssl4eo import shards
from torchgeo_softcon.ssl4eo.pack import Unpacked, pack, unpack, verify
from torchgeo_softcon.ssl4eo.shards import ShardArchive

Samples = dict[tuple[str, str], xr.Dataset]

ESRI = find_product('esri')


@pytest.fixture(scope='module')
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples]:
    """One archive as shards and as chunk files, and what is in it."""
    root = tmp_path_factory.mktemp('v11')
    for form in ('shards', 'chunks'):
        (root / form).mkdir()
    samples = write_shards(root / 'shards')
    write_chunk_files(root / 'chunks', samples)
    return root, samples


@pytest.fixture(params=['shards', 'chunks'])
def root(request: pytest.FixtureRequest, written: tuple[Path, Samples]) -> Path:
    return written[0] / request.param


@pytest.fixture
def samples(written: tuple[Path, Samples]) -> Samples:
    return written[1]


def step(samples: Samples, modality: str, name: str) -> tuple[xr.Dataset, int]:
    """The location of an image, and the number of its date."""
    location, season = name.split('/')
    one = samples[modality, location]
    days = [str(time)[:10].replace('-', '') for time in one['time'].values]
    return one, days.index(season[:8] if season[0] == '2' else season[17:25])


def fractions(samples: Samples, name: str) -> list[float]:
    """The shares of Esri's classes under an image."""
    one, number = step(samples, 'LULC', name)
    codes = one['bands'].values[number]
    return [float((codes == code).mean()) for code in ESRI.codes]


class TestReading:
    @pytest.mark.parametrize('split', ['S2L1C', 'S2L2A', 'S1GRD', 'S2RGB'])
    def test_images_are_those_of_xarray(
        self, root: Path, samples: Samples, split: Any
    ) -> None:
        dataset = SSL4EOS12ML(root, split).images()
        assert len(dataset) == 12
        for index in range(len(dataset)):
            (name,) = dataset.names(index)
            one, number = step(samples, split, name)
            assert one['file_id'].values[number] == name.split('/')[1]
            image = dataset[index]['image'][0]
            assert image.dtype == torch.float32
            expected = one['bands'].values[number].astype(np.float32)
            assert np.array_equal(image.numpy(), expected)
            outline, crs, day = dataset.footprint(index)
            assert crs == 'EPSG:32632'
            assert str(day) == str(one['time'].values[number])[:10]
            x, y = one['x'].values, one['y'].values
            assert outline.bounds == (x[0] - 5, y[-1] - 5, x[-1] + 5, y[0] + 5)
            if split[:2] == 'S2':
                mask = one['cloud_mask'].values[number]
                assert np.array_equal(dataset.cloud_masks(index)[0], mask)

    def test_stacks(self, root: Path, samples: Samples) -> None:
        dataset = SSL4EOS12ML(root, ['S1GRD', 's2c', 'S2RGB'], seasons=2)
        sample = dataset[1]
        assert sample['image'].shape == (2, 18, 24, 24)
        for image, name in zip(sample['image'], dataset.names(1), strict=True):
            expected = np.concatenate(
                [
                    one['bands'].values[number]
                    for one, number in (
                        # Three days later
                        (samples['S1GRD', name[:7]], step(samples, 'S2L1C', name)[1]),
                        step(samples, 'S2L1C', name),
                        step(samples, 'S2RGB', name),
                    )
                ],
                dtype=np.float32,
            )
            assert np.array_equal(image.numpy(), expected)

    def test_labels_of_the_layer(self, root: Path, samples: Samples) -> None:
        dataset = SSL4EOS12ML(root, 'S1GRD', labels='lulc', fractions=True).images()
        assert dataset.codes == ESRI.codes
        for index, one in enumerate(dataset):
            location = dataset.names(index)[0][:7]
            number = index % 4
            name = f'{location}/{DATES[number].replace("-", "")}'
            expected = torch.tensor([fractions(samples, name)])
            torch.testing.assert_close(one['label'], expected)
        present = SSL4EOS12ML(root, 's2a', labels='lulc', min_fraction=0.15)[0]['label']
        assert present.dtype == torch.int64

    def test_clouds(self, root: Path, samples: Samples) -> None:
        dataset = SSL4EOS12ML(root, ['S1GRD', 'S2L2A'], max_cloud=0.3).images()
        found = {name for index in range(len(dataset)) for name in dataset.names(index)}
        assert found == {
            f'{location}/{one["file_id"].values[number]}'
            for (modality, location), one in samples.items()
            if modality == 'S2L2A'
            for number in range(4)
            if (one['cloud_mask'].values[number] == 4).mean() <= 0.3
        }
        with pytest.raises(
            ValueError, match='max_cloud needs cloud masks, which s1 of'
        ):
            SSL4EOS12ML(root, 'S1GRD', max_cloud=0.3)

    def test_packed(self, root: Path, tmp_path: Path) -> None:
        splits: Any = ['s2c', 'S1GRD']
        assert pack(root, tmp_path / 'out', splits, 'lulc', shard_size=5) == []
        assert verify(tmp_path / 'out') == []
        one, other = (
            SSL4EOS12ML(path, splits, labels=labels, max_cloud=0.3).images()
            for path, labels in ((root, 'lulc'), (tmp_path / 'out', None))
        )
        assert len(one) == len(other) > 0
        for index in range(len(one)):
            assert one.names(index) == other.names(index)
            assert one.footprint(index) == other.footprint(index)
            assert torch.equal(one[index]['image'], other[index]['image'])
            assert torch.equal(one[index]['label'], other[index]['label'])
            assert np.array_equal(one.cloud_masks(index), other.cloud_masks(index))
        assert pack(root, tmp_path / 'out', splits, 'lulc') == []
        assert unpack(tmp_path / 'out', tmp_path / 'back') == Unpacked(24, 0)
        back = SSL4EOS12ML(tmp_path / 'back', splits).images()
        assert torch.equal(
            back[3]['image'], SSL4EOS12ML(root, splits).images()[3]['image']
        )
        with pytest.raises(ValueError, match='root must not be packed already'):
            pack(tmp_path / 'out', tmp_path / 'again')

    def test_land_cover_is_counted(self, root: Path, tmp_path: Path) -> None:
        pack(root, tmp_path, 'S2L2A')
        for path in (root, tmp_path):
            table = find_layout('ssl4eo-s12', path)
            assert 's2a/0000001/20200604T054639_20200604T054639_T32TQM' in (
                table.ids.to_pylist()
            )
            (unit,) = table.units(pa.array([0]))
            row = unit.table.to_pylist()[0]
            assert (row['crs'], row['height'], row['width']) == ('EPSG:32632', 24, 24)
            assert row['transform'] == [10, 0, 500000, 0, -10, 5400000]

    def test_datamodule(self, root: Path) -> None:
        datamodule = SSL4EOS12MLDataModule(
            str(root), ['S2L2A', 'S2RGB'], 2, labels='lulc', max_cloud=0.9
        )
        datamodule.setup('fit')
        batch: Any = next(iter(datamodule.train_dataloader()))
        batch = datamodule.on_after_batch_transfer(batch, 0)
        batch = datamodule.aug(batch)
        assert batch['image'].shape == (2, 15, 24, 24)
        assert 0 <= batch['image'].min() <= batch['image'].max() <= 1
        assert datamodule.value_range is not None
        assert datamodule.value_range[-1] == (0, 255)
        assert batch['label'].shape == (2, 8)

    def test_in_other_processes(self, root: Path) -> None:
        dataset = SSL4EOS12ML(root, 'S2L2A')
        expected = dataset[1]['image']
        assert torch.equal(pickle.loads(pickle.dumps(dataset))[1]['image'], expected)


def repack(content: bytes, path: Path, how: str) -> bytes:
    """Write a ZIP file in another way."""
    folder = path / 'files'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        (path / 'in.zip').write_bytes(content)
        shutil.unpack_archive(path / 'in.zip', folder)
        if how == 'not consolidated':
            (folder / '.zmetadata').unlink()
        base = path / 'folder' if how == 'in a folder' else folder
        if base != folder:
            shutil.move(folder, base / 'one.zarr')
        shutil.make_archive(str(path / 'out'), 'zip', base)
    return (path / 'out.zip').read_bytes()


def write_group(root: Path, parts: Any, **options: Any) -> ShardArchive:
    """Write two dates of 12 bands of 8 x 8 pixels, all 7 but for parts at some places."""
    path = root / 'S2L2A' / '0000003.zarr.zip'
    path.parent.mkdir()
    with zarr.storage.ZipStore(path, mode='w') as store:
        group = zarr.create_group(store, zarr_format=2)
        array = group.create_array(
            'bands', shape=(2, 12, 8, 8), fill_value=7, **options
        )
        for place, values in parts:
            array[place] = values
        times = np.array(['2020-01-02', '2020-02-03'], 'datetime64[ns]')
        group['time'] = times.astype(np.int64)
        group['band'] = np.array([f'B{n}' for n in (*range(1, 9), '8A', 9, 11, 12)])
        group['center_lon'], group['center_lat'] = np.array([9.0]), np.array([48.7])
        group['crs'] = np.array([32632])
    return ShardArchive(path.parent, 's2a', offset=0)


class TestFormats:
    @pytest.mark.parametrize('how', ['deflated', 'not consolidated', 'in a folder'])
    def test_zip_files(self, tmp_path: Path, how: str) -> None:
        one = sample('S2L2A', '0000007', np.random.default_rng(1))
        # Chunks that are cut by the edges
        content = zip_bytes(one, tmp_path, {'bands': (3, 5, 24, 10)})
        content = repack(content, tmp_path, how)
        write_tar(tmp_path / 'S2L2A' / 'a.tar', {'x_0000007': content})
        archive = ShardArchive(tmp_path / 'S2L2A', 's2a')
        assert archive.location.tolist() == [b'0000007'] * 4
        for row in range(4):
            assert np.array_equal(archive.pixels(row), one['bands'].values[row])

    @pytest.mark.parametrize(
        ('dtype', 'compressor', 'order', 'filters'),
        [
            ('<i2', None, 'C', None),
            ('>i2', 'zlib', 'C', None),
            ('<u2', 'zstd', 'F', None),
            ('<i2', 'blosc', 'C', ['delta']),
        ],
    )
    def test_codecs(
        self, tmp_path: Path, dtype: str, compressor: Any, order: Any, filters: Any
    ) -> None:
        values = np.random.default_rng(0).integers(0, 4000, (2, 12, 8, 8)).astype(dtype)
        names = {'zlib': numcodecs.Zlib(), 'zstd': numcodecs.Zstd(), None: None}
        names |= {'blosc': numcodecs.Blosc(cname='zstd')}
        archive = write_group(
            tmp_path,
            [(0, values[0])],  # the other date is not stored
            chunks=(1, 12, 8, 8),
            dtype=dtype,
            compressors=names[compressor],
            order=order,
            filters=[numcodecs.Delta(dtype)] if filters else None,
        )
        assert np.array_equal(archive.pixels(0), values[0])
        assert (archive.pixels(1) == 7).all()
        assert archive.season.tolist() == [b'20200102T000000', b'20200203T000000']
        # From its middle
        grids = archive.georeference(0)
        left, bottom, right, top = grids.bounds
        assert (right - left, top - bottom) == (80, 80)
        assert abs((left + right) / 2 - 500000) < 1e-3

    def test_chunks_of_which_some_are_not_stored(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).integers(0, 4000, (2, 6, 8, 8)).astype('<i2')
        later = [((date, slice(6, 12)), values[date]) for date in range(2)]
        archive = write_group(tmp_path, later, chunks=(1, 6, 8, 8), dtype='<i2')
        for date in range(2):
            assert (archive.pixels(date)[:6] == 7).all()
            assert np.array_equal(archive.pixels(date)[6:], values[date])

    def test_terramesh(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        renumbered = {1: 1, 2: 2, 4: 3, 5: 4, 7: 5, 11: 9}
        layers = {}
        for modality in ('S2L2A', 'S1RTC', 'LULC'):
            members = {}
            for number in range(3):
                one = sample(modality, f'{number:07}', rng, steps=1)
                one['sample'] = f'cell_{number}'
                if modality == 'LULC':
                    layers[number] = one['bands'].values.copy()
                    for code, new in renumbered.items():
                        one['bands'].values[layers[number] == code] = new
                members[f'majortom_train_{number:07}'] = zip_bytes(one, tmp_path, {})
            write_tar(
                tmp_path / 'train' / modality / 'majortom_shard_000001.tar', members
            )
        dataset = SSL4EOS12ML(
            tmp_path, ['S1RTC', 'S2L2A'], labels='lulc', fractions=True
        ).images()
        assert dataset.bands is not None
        assert dataset.bands[:2] == ('VV', 'VH')
        for number, image in enumerate(dataset):
            assert dataset.names(number)[0].startswith(
                f'majortom_train_{number:07}/2020'
            )
            expected = [(layers[number] == code).mean() for code in ESRI.codes]
            torch.testing.assert_close(image['label'][0].tolist(), expected)
        pack(tmp_path, tmp_path / 'out', 'S1RTC')
        assert len(SSL4EOS12ML(tmp_path / 'out', 'S1RTC')) == 3


class TestOffsets:
    def offset(self, root: Path, split: str, change: Any, **kwargs: Any) -> set[int]:
        modality = {'s2c': 'S2L1C', 's2a': 'S2L2A'}[split]
        one = change(sample(modality, '0000001', np.random.default_rng(0)))
        write_tar(root / modality / 'a.tar', {'x_0000001': zip_bytes(one, root, {})})
        archive = ShardArchive(root / modality, split, **kwargs)
        return {*archive.offset.tolist()}

    def test_bright_ground(self, tmp_path: Path) -> None:
        # Nothing dark, and yet nothing added: B10 tells it, the mean of a desert as well
        sand = {'s2c': 2000, 's2a': 900}
        for split, least in sand.items():

            def desert(one: xr.Dataset, least: int = least) -> xr.Dataset:
                bands = one['bands'].values
                bands[:] = bands // 4 + least
                if bands.shape[1] == 13:
                    bands[:, 10] = 20
                return one

            assert self.offset(tmp_path, split, desert) == {0}

    def test_two_times_of_processing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def change(one: xr.Dataset) -> xr.Dataset:
            one['bands'].values[2:] += 1000
            late = one['time'].values + np.array([0, 0, 1000, 1000], 'timedelta64[D]')
            return one.assign_coords(time=late).drop_vars('file_id')

        with caplog.at_level(logging.INFO):
            assert self.offset(tmp_path, 's2a', change) == {0, 1000}
        assert 'since 2022-01-25) have 1000 added' in caplog.text
        assert 'have no offset, as dark pixels are at' in caplog.text

    def test_told(self, tmp_path: Path) -> None:
        def change(one: xr.Dataset) -> xr.Dataset:
            one['bands'].attrs['add_offset'] = -900.0
            return one

        assert self.offset(tmp_path, 's2a', change) == {900}
        assert self.offset(tmp_path, 's2a', change, offset=0) == {0}

    def test_disagreement(self, tmp_path: Path) -> None:
        def change(one: xr.Dataset) -> xr.Dataset:
            one['bands'].values[1] += 1000
            return one

        with pytest.raises(ValueError, match='must have one offset, but their darkest'):
            self.offset(tmp_path, 's2c', change)


class TestIndex:
    @pytest.fixture
    def archive(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv('TORCHGEO_SOFTCON_CACHE', str(tmp_path / 'cache'))
        (tmp_path / 'root').mkdir()
        write_shards(tmp_path / 'root', ['S2L2A'])
        return tmp_path / 'root'

    def test_is_made_once(
        self, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        described: list[str] = []
        describe = shards.describe_images

        def spy(path: str) -> Any:
            described.append(os.path.basename(path))
            return describe(path)

        monkeypatch.setattr(shards, 'describe_images', spy)
        first = SSL4EOS12ML(archive, 'S2L2A')
        assert len(described) == 2
        again = SSL4EOS12ML(archive, 'S2L2A')
        assert len(described) == 2
        assert torch.equal(first[0]['image'], again[0]['image'])

        # A file that changes is read again, the other one is not
        path = archive / 'train/S2L2A/ssl4eos12_shard_000002.tar'
        one = sample('S2L2A', '0000005', np.random.default_rng(1))
        write_tar(path, {'x_0000005': zip_bytes(one, tmp_path, {})})
        with pytest.raises(
            ValueError, match=f'{path} has changed since it was indexed'
        ):
            first.images()[0]
        assert SSL4EOS12ML(archive, 'S2L2A').images().names(11)[0][:7] == '0000005'
        assert described[2:] == ['ssl4eos12_shard_000002.tar']

        # A cache that is damaged is made again
        for cached in (tmp_path / 'cache').glob('shards-*.parquet'):
            cached.write_bytes(cached.read_bytes()[:-9])
        assert len(SSL4EOS12ML(archive, 'S2L2A')) == 3
        assert len(described) == 5

    def test_without_a_cache(
        self, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / 'cache').write_text('a file, where a folder should be')
        assert len(SSL4EOS12ML(archive, 'S2L2A')) == 3


class TestErrors:
    @pytest.mark.parametrize('left', [0, 300, 512 + 100, -20_000, 'members'])
    def test_truncated_shard(self, tmp_path: Path, left: Any) -> None:
        write_shards(tmp_path, ['S2L2A'], [['0000001', '0000002']])
        path = tmp_path / 'train/S2L2A/ssl4eos12_shard_000001.tar'
        content = path.read_bytes()
        if left == 'members':  # only the blocks of zeros at its end are missing
            left = len(content.rstrip(b'\0')) // 512 * 512 + 512
        path.write_bytes(content[:left])
        with pytest.raises(ValueError, match=f'{path} is cut off after .*download it'):
            SSL4EOS12ML(tmp_path, 'S2L2A')

    def test_truncated_chunk_file(self, tmp_path: Path, written: Any) -> None:
        shutil.copytree(written[0] / 'chunks/train/S2L2A', tmp_path / 'S2L2A')
        (path,) = (tmp_path / 'S2L2A').iterdir()
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(ValueError, match=f'{path} is not a complete ZIP file'):
            SSL4EOS12ML(tmp_path, 'S2L2A')

    @pytest.mark.parametrize('other', ['S2L2A', 'LULC'])
    def test_not_aligned(self, tmp_path: Path, other: str) -> None:
        write_shards(tmp_path, ['S2L1C'], [['0000001', '0000002']])
        write_shards(tmp_path, [other], [['0000002', '0000001']])
        message = r'S2L1C/ssl4eos12_shard_000001\.tar and .* must have the same samples'
        options: Any = {'split': ['S2L1C', 'S2L2A']}
        if other == 'LULC':
            options = {'split': 'S2L1C', 'labels': 'lulc'}
        with pytest.raises(ValueError, match=message):
            SSL4EOS12ML(tmp_path, **options)

    def test_shards_of_one_modality_alone(self, tmp_path: Path) -> None:
        write_shards(tmp_path, ['S2L1C', 'S2L2A'])
        (tmp_path / 'train/S2L2A/ssl4eos12_shard_000002.tar').unlink()
        with pytest.warns(UserWarning, match='4 of 12 images of s2c are left out'):
            assert len(SSL4EOS12ML(tmp_path, ['S2L1C', 'S2L2A'])) == 2

    @pytest.mark.parametrize('version', [1, 3])
    def test_other_versions_of_zarr(self, tmp_path: Path, version: int) -> None:
        path = tmp_path / 'S2L2A' / '0000001.zarr.zip'
        path.parent.mkdir()
        name = 'zarr.json' if version == 3 else '.zgroup'
        with zipfile.ZipFile(path, 'w') as file:
            file.writestr(name, json.dumps({'zarr_format': version}))
        with pytest.raises(
            ValueError, match=f'{path} is of Zarr format {version}, and'
        ):
            SSL4EOS12ML(tmp_path, 'S2L2A')

    def test_damaged_pixels(self, tmp_path: Path) -> None:
        write_shards(tmp_path, ['S2L2A'], [['0000001']])
        dataset = SSL4EOS12ML(tmp_path, 'S2L2A', offset=0)
        archive: Any = dataset.archives[0]
        path = archive.files[0]
        times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
        with open(path, 'r+b') as file:
            file.seek(archive._table['bands'][0]['offset'][0].as_py())
            file.write(bytes(40))
        os.utime(path, ns=times)
        with pytest.raises(OSError, match=f'0000001/2020.* in {path} cannot be read'):
            dataset.images()[0]

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'labels': 'lulc'}, 'labels=lulc needs the folder LULC'),
            ({'max_cloud': 0.0, 'split': 'S2L2A'}, 'max_cloud=0.0 leaves no image'),
            ({'max_cloud': 2}, r'max_cloud must be in \[0, 1\], got 2'),
            ({'offset': -1}, 'offset must be at least 0, got -1'),
            ({'split': 'S2L1C'}, 'must have the bands B1, .*, got VV, VH'),
        ],
    )
    def test_arguments(self, tmp_path: Path, options: Any, message: str) -> None:
        one = sample('S2L2A', '0000001', np.random.default_rng(0))
        one['cloud_mask'][:] = 3
        members = {'x_0000001': zip_bytes(one, tmp_path, {})}
        write_tar(tmp_path / 'S2L2A' / 'a.tar', members)
        other = sample('S1GRD', '0000001', np.random.default_rng(0))
        members = {'x_0000001': zip_bytes(other, tmp_path, {})}
        write_tar(tmp_path / 'S2L1C' / 'a.tar', members)
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            SSL4EOS12ML(tmp_path, **{'split': 'S2L2A', **options})

    def test_one_form_in_a_folder(self, tmp_path: Path, written: Any) -> None:
        for form in ('shards', 'chunks'):
            source = written[0] / form / 'train/S2L2A'
            shutil.copytree(source, tmp_path / 'S2L2A', dirs_exist_ok=True)
        with pytest.raises(ValueError, match='images must be there once, got 000'):
            SSL4EOS12ML(tmp_path, 'S2L2A')


def test_command(written: tuple[Path, Samples], tmp_path: Path) -> None:
    arguments = ['pack', str(written[0] / 'shards'), str(tmp_path), '--split', 'S2L2A']
    assert main([*arguments, '--labels', 'lulc', '--verify']) == 0
    index = pq.read_table(tmp_path / 's2a' / 'index.parquet')
    assert index['cloud'].null_count == 0
    assert len(index['label'][0]) == 8
