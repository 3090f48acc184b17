# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import csv
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from tests.ssl4eo import archives
from tests.ssl4eo.archives import season, write_archive, write_image
from torchgeo_softcon.__main__ import main
from torchgeo_softcon._workers import Workers
from torchgeo_softcon.datasets import SSL4EOS12ML
from torchgeo_softcon.ssl4eo.pack import Unpacked, pack, unpack, verify
from torchgeo_softcon.ssl4eo.record_archive import SCHEMA, RecordArchive, write_index
from torchgeo_softcon.storage.lock import exclusive

JUNE, SEPTEMBER = '20200604', '20200902'

#: Two images each of five locations of Sentinel-2, and of one of Sentinel-1.
DAYS = {
    's2a': {f'{place:07}': [JUNE, SEPTEMBER] for place in range(5)},
    's1': {'0000003': [JUNE, SEPTEMBER]},
}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of small sizes, with the published ratios."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, 'SIDES', {10: 24, 20: 12, 60: 4})
        return write_archive(tmp_path_factory.mktemp('archive'), DAYS)


def index(out: Path, split: str = 's2a') -> list[dict[str, Any]]:
    return list(pq.read_table(out / split / 'index.parquet').to_pylist())


def names(out: Path) -> list[str]:
    return [f'{row["id"]}/{row["season"]}' for row in index(out)]


def contents(out: Path) -> dict[str, tuple[Any, ...]]:
    """What there is of each image, wherever it lies."""
    dataset = SSL4EOS12ML(out, 's2a').images()
    (archive,) = dataset.archives
    return {
        name: (archive.read([row]).tobytes(), archive.georeference(row))
        for row, name in enumerate(names(out))
    }


@pytest.fixture(scope='module')
def expected(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp('packed')
    assert pack(root, out, shard_size=3) == []
    assert verify(out) == []
    assert len(names(out)) == len({*names(out)}) == 10
    return contents(out)


def files(root: Path) -> list[Path]:
    return sorted(p.relative_to(root) for p in root.rglob('*.tif'))


def test_unpacking_gives_all_back(root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(root, tmp_path / 'tiff'))
    image_with_nodata = root / 's1' / '0000003' / season('s1', JUNE) / 'VV.tif'
    with rasterio.open(image_with_nodata, 'r+') as file:
        file.nodata = -9999.0
    pack(root, tmp_path / 'packed', shard_size=4)
    assert unpack(tmp_path / 'packed', tmp_path / 'back') == Unpacked(12, 0)
    assert files(tmp_path / 'back') == files(root)
    for name in files(root):
        with (
            rasterio.open(root / name) as a,
            rasterio.open(tmp_path / 'back' / name) as b,
        ):
            assert np.array_equal(a.read(), b.read())
            assert (a.crs, a.transform, a.dtypes) == (b.crs, b.transform, b.dtypes)
            assert a.nodata == b.nodata
    # An interrupted run goes on
    shutil.rmtree(tmp_path / 'back' / 's2a' / '0000002')
    assert unpack(tmp_path / 'packed', tmp_path / 'back') == Unpacked(2, 10)


def test_index(root: Path, tmp_path: Path) -> None:
    pack(root, tmp_path, 's2a', shard_size=4)
    rows = index(tmp_path)
    assert [(row['shard'], row['offset']) for row in rows] == [
        (n // 4, n % 4) for n in range(10)
    ]
    for row in rows:
        with rasterio.open(root / 's2a' / row['id'] / row['season'] / 'B4.tif') as file:
            assert (row['crs'], row['bounds']) == (file.crs.to_string(), [*file.bounds])
            records = np.load(tmp_path / 's2a' / f'{row["shard"]:05}.npy')
            assert np.array_equal(records[row['offset']]['B4'], file.read(1))
    assert not list(tmp_path.rglob('*.tmp'))
    assert {p.name for p in (tmp_path / 's2a').iterdir()} == {
        *('.lock', 'index.parquet', '00000.npy', '00001.npy', '00002.npy')
    }


def test_second_run_does_only_what_is_missing(
    root: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    part = tmp_path / 'tiff'
    shutil.copytree(root / 's2a' / '0000001', part / 's2a' / '0000001')
    pack(part, tmp_path / 'out', shard_size=3)
    before = (tmp_path / 'out' / 's2a' / '00000.npy').stat()
    pack(root, tmp_path / 'out', 's2a', shard_size=3)
    after = (tmp_path / 'out' / 's2a' / '00000.npy').stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    # In order, though the second location was there first
    assert list(contents(tmp_path / 'out').items()) == list(expected.items())
    # What is packed may be gone from the folders
    pack(part, tmp_path / 'out')
    assert contents(tmp_path / 'out') == expected


def kill_at(number: int, after: bool) -> None:
    """Have the process killed at a call of :func:`os.replace`, before it or after it."""
    replace, calls = os.replace, itertools.count(1)

    def counted(*args: Any) -> None:
        now = next(calls) == number
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted  # type: ignore[assignment]


@pytest.mark.parametrize('after', [False, True])
# Of each file its records and then its rows, and at last the index
@pytest.mark.parametrize('number', range(1, 10))
def test_killed_at_any_time(
    root: Path, expected: dict[str, Any], tmp_path: Path, number: int, after: bool
) -> None:
    child = os.fork()
    if child == 0:
        try:
            kill_at(number, after)
            pack(root, tmp_path, 's2a', shard_size=3)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    folder = tmp_path / 's2a'
    assert (folder / 'index.parquet').exists() == (number == 9 and after)
    # Before a call there is something unfinished
    assert len(list(folder.glob('*.tmp'))) == (not after)
    complete = [p.with_suffix('.npy') for p in folder.glob('[0-9]*.parquet')]
    assert len(complete) == (number - 1 + after) // 2
    times = [path.stat().st_mtime_ns for path in complete]

    assert pack(root, tmp_path, 's2a', shard_size=3) == []
    assert [path.stat().st_mtime_ns for path in complete] == times
    assert list(contents(tmp_path).items()) == list(expected.items())
    assert verify(tmp_path) == []
    assert {p.name for p in folder.iterdir()} == {
        *('.lock', 'index.parquet', *(f'{n:05}.npy' for n in range(4)))
    }


def test_disk_full(
    root: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        status = main(['pack', str(root), str(tmp_path), '--split', 's2a'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    message = capsys.readouterr().err
    assert f'cannot write {tmp_path / "s2a" / "00000.npy"}: File too large' in message
    assert not list(tmp_path.rglob('*.tmp'))
    assert main(['pack', str(root), str(tmp_path), '--split', 's2a', '--verify']) == 0
    assert contents(tmp_path) == expected


def test_no_room_for_an_index(tmp_path: Path) -> None:
    path = tmp_path / 'index.parquet'
    # Takes a name and has no room for a byte
    (tmp_path / 'index.parquet.tmp').symlink_to('/dev/full')
    with pytest.raises(OSError, match=r'cannot write .*index\.parquet: .*make room'):
        write_index(path, SCHEMA.empty_table(), None)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiff, out = tmp_path / 'tiff', tmp_path / 'out'
    shutil.copytree(root, tiff)
    # The first one: what it is like is read from the next
    bad = tiff / 's2a' / '0000000' / season('s2a', JUNE) / 'B5.tif'
    whole = bad.read_bytes()
    bad.write_bytes(b'')
    arguments = ['pack', str(tiff), str(out), '--shard-size', '4']
    assert main(arguments) == 1
    assert f'cannot open {bad}' in capsys.readouterr().err
    with open(out / 's2a' / 'failures.csv') as file:
        (row,) = csv.DictReader(file)
    assert (row['id'], row['season']) == ('0000000', season('s2a', JUNE))
    assert str(bad) in row['reason']
    assert len(SSL4EOS12ML(out, 's2a').images()) == 9

    bad.write_bytes(whole)
    assert main(arguments) == 0
    assert not (out / 's2a' / 'failures.csv').exists()
    assert len(SSL4EOS12ML(out, 's2a').images()) == 10

    for path in tiff.rglob('B5.tif'):
        path.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r'none of the 10 images .* can be read'):
        pack(tiff, tmp_path / 'other', 's2a')


def test_verify_names_what_changed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(root, tmp_path, 's2a', shard_size=4)
    with open(tmp_path / 's2a' / '00001.npy', 'r+b') as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    # The padding at the end of a record is part of it
    (failure,) = verify(tmp_path)
    assert f'{failure.id}/{failure.season}' == names(tmp_path)[7]
    assert main(['pack', str(root), str(tmp_path), '--split', 's2a', '--verify']) == 1
    assert f'{names(tmp_path)[7]}: its checksum' in capsys.readouterr().err
    # All but that one are given back
    for written, there in ((9, 0), (0, 9)):
        assert main(['unpack', str(tmp_path), str(tmp_path / 'back')]) == 1
        out, err = capsys.readouterr()
        assert f'{written} images written, {there} were there' in out
        assert f'{names(tmp_path)[7]}: its checksum' in err
    assert len(files(tmp_path / 'back')) == 9 * 12
    # What the message says to do
    path = tmp_path / 's2a' / '00001.npy'
    assert f'Delete {path}, and pack again' in err
    path.unlink()
    assert main(['pack', str(root), str(tmp_path), '--split', 's2a', '--verify']) == 0


@pytest.mark.parametrize('limit', [600, 800, 1000, 1200])
def test_unpacking_to_a_full_disk(root: Path, tmp_path: Path, limit: int) -> None:
    pack(root, tmp_path / 'packed', 's2a')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r'cannot write .*\.tif: File too large'):
            unpack(tmp_path / 'packed', tmp_path / 'back')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / 'back').glob('s2a/*/[0-9]*'))
    assert unpack(tmp_path / 'packed', tmp_path / 'back') == Unpacked(10, 0)
    assert not list((tmp_path / 'back').rglob('*.tmp'))


def test_truncated_file_of_records(
    root: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    pack(root, tmp_path, 's2a')
    path = tmp_path / 's2a' / '00000.npy'
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f'{path} must have 10 records'):
        SSL4EOS12ML(tmp_path, 's2a')
    assert pack(root, tmp_path, 's2a') == []
    assert contents(tmp_path) == expected


@pytest.mark.parametrize('left', [None, 0, 60, 5000])
def test_lost_file_of_records(
    root: Path, expected: dict[str, Any], tmp_path: Path, left: int | None
) -> None:
    pack(root, tmp_path, 's2a', shard_size=3)
    path = tmp_path / 's2a' / '00001.npy'
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(content[:left])
    others = {p: p.stat().st_mtime_ns for p in path.parent.glob('*.npy') if p != path}
    assert pack(root, tmp_path, 's2a', shard_size=3) == []
    assert {p: p.stat().st_mtime_ns for p in others} == others
    assert list(contents(tmp_path).items()) == list(expected.items())
    assert verify(tmp_path) == []


def test_lost_file_whose_images_are_gone_too(root: Path, tmp_path: Path) -> None:
    pack(root, tmp_path / 'out', 's2a', shard_size=3)
    before = names(tmp_path / 'out')
    part = tmp_path / 'tiff'
    shutil.copytree(root / 's2a' / '0000000', part / 's2a' / '0000000')
    (tmp_path / 'out' / 's2a' / '00001.npy').unlink()
    failures = pack(part, tmp_path / 'out')
    assert [f'{f.id}/{f.season}' for f in failures] == before[3:6]
    assert names(tmp_path / 'out') == before[:3] + before[6:]
    assert verify(tmp_path / 'out') == []


@pytest.mark.parametrize(
    ('error', 'status', 'message'),
    [
        (BrokenProcessPool(), 2, 'fewer --workers, and start again'),
        (KeyboardInterrupt(), 130, 'interrupted, start again to go on'),
    ],
)
def test_interrupted(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    def stop(*_: Any) -> None:
        raise error

    monkeypatch.setattr('torchgeo_softcon.ssl4eo.pack._write_shard', stop)
    assert main(['pack', str(root), str(tmp_path)]) == status
    assert message in capsys.readouterr().err


def test_unpacking_is_interrupted(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    pack(root, tmp_path / 'packed', 's2a')
    monkeypatch.setattr('torchgeo_softcon.ssl4eo.pack._write_tiffs', stop)
    assert main(['unpack', str(tmp_path / 'packed'), str(tmp_path / 'back')]) == 130
    assert 'interrupted, start again to go on' in capsys.readouterr().err


def test_unpacking_into_the_same_folder(root: Path, tmp_path: Path) -> None:
    pack(root, tmp_path / 'packed', 's2a')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError, match='out must be another folder than root'):
        unpack(tmp_path / 'packed', tmp_path / 'x' / '..' / 'packed')
    assert sorted(tmp_path.rglob('*')) == before


def test_two_runs_do_not_unpack_at_once(root: Path, tmp_path: Path) -> None:
    pack(root, tmp_path / 'packed', 's2a')
    back = tmp_path / 'back'
    back.mkdir()
    with (
        exclusive(back / '.unpack.lock', back),
        pytest.raises(BlockingIOError, match=f'another run is writing {back}'),
    ):
        unpack(tmp_path / 'packed', back)
    assert unpack(tmp_path / 'packed', back) == Unpacked(10, 0)


def change_index(out: Path, **columns: Any) -> None:
    """Write other values into the first row of an index."""
    path = out / 's2a' / 'index.parquet'
    table = pq.read_table(path)
    for name, value in columns.items():
        values = [value, *table[name].to_pylist()[1:]]
        column = table.schema.get_field_index(name)
        table = table.set_column(column, name, pa.array(values))
    pq.write_table(table, path)


class TestNamesOfAnIndex:
    """An archive from elsewhere must not lead out of the folder that is written."""

    @pytest.mark.parametrize(
        'name', ['..', '../../evil', '/tmp/evil', 'a/b', '1/2', r'1\2', '1\0', '', None]
    )
    @pytest.mark.parametrize('column', ['id', 'season'])
    def test_not_those_of_images(
        self, root: Path, tmp_path: Path, column: str, name: str | None
    ) -> None:
        pack(root, tmp_path / 'packed', 's2a')
        change_index(tmp_path / 'packed', **{column: name})
        before = sorted(tmp_path.rglob('*'))
        for open_archive in (SSL4EOS12ML, RecordArchive):
            with pytest.raises(ValueError, match=r'index\.parquet has .* as the name'):
                open_archive(tmp_path / 'packed', 's2a')
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            unpack(tmp_path / 'packed', tmp_path / 'x' / 'y' / 'back')
        assert sorted(tmp_path.rglob('*')) == before

    @pytest.mark.parametrize('suffix', ['/..', '/../../evil', '\0', '\n', 'é', ' '])
    def test_almost_those_of_images(
        self, root: Path, tmp_path: Path, suffix: str
    ) -> None:
        pack(root, tmp_path, 's2a')
        change_index(tmp_path, season=season('s2a', JUNE) + suffix)
        with pytest.raises(ValueError, match=r'has .* as the name of image'):
            RecordArchive(tmp_path, 's2a')

    @pytest.mark.parametrize('column', ['id', 'season', 'shard', 'offset'])
    def test_columns_of_other_types(
        self, root: Path, tmp_path: Path, column: str
    ) -> None:
        pack(root, tmp_path, 's2a')
        path = tmp_path / 's2a' / 'index.parquet'
        table = pq.read_table(path)
        others: Any = (
            ['../../evil'] * 10 if column in ('shard', 'offset') else range(10)
        )
        position = table.schema.get_field_index(column)
        table = table.set_column(position, column, pa.array(others))
        pq.write_table(table, path)
        with pytest.raises(ValueError, match='must have the columns id, season, shard'):
            RecordArchive(tmp_path, 's2a')


def test_open_files_are_not_pickled(root: Path, tmp_path: Path) -> None:
    pack(root, tmp_path, 's2a')
    archive = RecordArchive(tmp_path, 's2a')
    records = archive.read([0, 9])
    pickled = pickle.dumps(archive)
    assert len(pickled) < archive.dtype.itemsize
    assert np.array_equal(pickle.loads(pickled).read([0, 9]), records)


def test_more_is_packed_while_an_archive_is_open(root: Path, tmp_path: Path) -> None:
    part = tmp_path / 'part'
    shutil.copytree(root / 's2a' / '0000003', part / 's2a' / '0000003')
    pack(part, tmp_path / 'packed', 's2a')
    opened = RecordArchive(tmp_path / 'packed', 's2a')
    record = opened.read([0])
    pack(root, tmp_path / 'packed', 's2a')
    assert np.array_equal(opened.read([0]), record)
    with pytest.raises(ValueError, match=r'index\.parquet has changed since it was'):
        opened.georeference(0)
    again = RecordArchive(tmp_path / 'packed', 's2a')
    assert np.array_equal(again.read([6]), record)


def test_labels_may_come_later(root: Path, tmp_path: Path) -> None:
    labels = tmp_path / 'l.json'
    entries = {
        p: {season('s2a', d): [int(p)] for d in DAYS['s2a'][p]} for p in DAYS['s2a']
    }
    labels.write_text(json.dumps(entries))
    out = tmp_path / 'out'
    part = tmp_path / 'tiff'
    shutil.copytree(root / 's2a' / '0000001', part / 's2a' / '0000001')
    pack(part, out)
    assert [row['label'] for row in index(out)] == [None, None]
    pack(part, out, labels=labels)
    assert [np.argmax(row['label']) for row in index(out)] == [1, 1]
    with pytest.raises(ValueError, match='labels must be given again'):
        pack(root, out, 's2a')
    pack(root, out, 's2a', labels=labels)
    assert [np.argmax(row['label']) for row in index(out)] == [
        n // 2 for n in range(10)
    ]
    # Nothing new: they stay
    pack(root, out, 's2a')
    assert SSL4EOS12ML(out, 's2a').codes == tuple(range(9))


def test_labels_of_another_archive_are_found_at_once(
    root: Path, tmp_path: Path
) -> None:
    labels = tmp_path / 'l.json'
    labels.write_text(json.dumps({'7': {season('s2a', JUNE): [1]}}))
    with pytest.raises(ValueError, match='10 of 10 images are not in'):
        pack(root, tmp_path / 'out', 's2a', labels=labels)
    assert not (tmp_path / 'out').exists()


def test_labels_of_images_that_can_not_be_read(root: Path, tmp_path: Path) -> None:
    part = tmp_path / 'tiff'
    shutil.copytree(root / 's2a' / '0000001', part / 's2a' / '0000001')
    labels = tmp_path / 'l.json'
    labels.write_text(json.dumps({'0000001': {season('s2a', JUNE): [1]}}))
    (part / 's2a' / '0000001' / season('s2a', JUNE) / 'B5.tif').write_bytes(b'')
    with pytest.warns(UserWarning, match='1 of 2 images are not in'):
        (failure,) = pack(part, tmp_path / 'out', labels=labels)
    assert failure.season == season('s2a', JUNE)
    (row,) = index(tmp_path / 'out')
    assert row['label'] == [0] * 9


@pytest.mark.slow
def test_processes_write_the_same(
    root: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    pack(root, tmp_path, 's2a', workers=2, shard_size=2)
    assert list(contents(tmp_path).items()) == list(expected.items())


def test_on_a_cluster(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers get paths that do not depend on their folder."""
    opened: list[Any] = []
    paths: list[Path] = []

    class Cluster(Workers):
        def map(self, function: Any, units: Any) -> Any:
            for archive, path in units:
                paths.extend((Path(archive.root), path))
                yield function((archive, path))

    def connect(*options: Any) -> Any:
        opened.append(options)
        return nullcontext(Cluster())

    monkeypatch.setattr('torchgeo_softcon.ssl4eo.pack.open_workers', connect)
    monkeypatch.chdir(root.parent)
    out = os.path.relpath(tmp_path)
    assert main(['pack', root.name, out, '--scheduler', 'tcp://10.0.0.1:8786']) == 0
    assert opened == [(1, 'tcp://10.0.0.1:8786')]
    assert len(paths) == 4
    assert all(path.is_absolute() for path in paths)
    assert verify(tmp_path) == []


class TestErrors:
    def test_arguments(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match='workers and shard_size must be at least 1'
        ):
            pack(root, tmp_path, workers=0)
        with pytest.raises(ValueError, match="got 's2'"):
            pack(root, tmp_path, 's2')
        with pytest.raises(FileNotFoundError, match='found none of them'):
            pack(tmp_path, tmp_path / 'out')
        with pytest.raises(FileNotFoundError, match='is not a packed archive'):
            unpack(root, tmp_path)
        with pytest.raises(FileNotFoundError, match='is not a packed archive'):
            verify(root)

    def test_images_of_another_kind(self, root: Path, tmp_path: Path) -> None:
        pack(root, tmp_path / 'out', 's2a')
        other = tmp_path / 'tiff'
        write_image(
            other / 's2a' / '0000000' / season('s2a', '20210101'),
            's2a',
            np.random.default_rng(0),
        )
        with pytest.raises(ValueError, match='images of another kind'):
            pack(other, tmp_path / 'out')

    def test_another_run(self, root: Path, tmp_path: Path) -> None:
        import fcntl

        (tmp_path / 's2a').mkdir()
        with open(tmp_path / 's2a' / '.lock', 'w') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(BlockingIOError, match=r'another run is writing .*s2a'):
                pack(root, tmp_path, 's2a')

    def test_other_format(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr('torchgeo_softcon.ssl4eo.record_archive.FORMAT', 2)
            pack(root, tmp_path, 's2a')
        with pytest.raises(ValueError, match='must be of format 1, got 2'):
            SSL4EOS12ML(tmp_path, 's2a')

    def test_index_of_something_else(self, root: Path, tmp_path: Path) -> None:
        path = tmp_path / 's2a' / 'index.parquet'
        path.parent.mkdir()
        pq.write_table(pa.table({'id': ['1']}), path)
        for content in (path.read_bytes(), b'xx'):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f'{path} is not an index'):
                SSL4EOS12ML(tmp_path, 's2a')
            with pytest.raises(ValueError, match=f'{path} is not an index'):
                pack(root, tmp_path, 's2a')

    def test_folder_of_something_else(self, root: Path, tmp_path: Path) -> None:
        other = tmp_path / 's2a' / '00007.npy'
        other.parent.mkdir()
        other.touch()
        with pytest.raises(ValueError, match=f'out must be a new folder .* {other}'):
            pack(root, tmp_path)
        assert not (tmp_path / 's1').exists()
        assert other.exists()
        with pytest.raises(ValueError, match='out must be another folder than root'):
            pack(root, root)

    def test_files_of_something_else_stay(self, root: Path, tmp_path: Path) -> None:
        pack(root, tmp_path, 's2a')
        folder = tmp_path / 's2a'
        others = [folder / n for n in ('mine.npy', 'notes.tmp', '1.npy', 'x.parquet')]
        for path in (*others, folder / '00007.npy', folder / 'index.parquet.tmp'):
            path.touch()
        pack(root, tmp_path, 's2a')
        assert all(path.exists() for path in others)
        assert not (folder / '00007.npy').exists()
        assert not (folder / 'index.parquet.tmp').exists()
