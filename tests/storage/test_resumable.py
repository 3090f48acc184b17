# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
import multiprocessing
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchgeo_softcon.storage import parquet
from torchgeo_softcon.storage.resumable import ResumableParquet


def rows(*index: int) -> pa.Table:
    return pa.table({'index': [*index]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / 'new' / 'a.parquet'


def written(path: Path) -> list[int]:
    return list(pq.read_table(path)['index'].to_pylist())


class TestParts:
    def test_origin_without_parts_does_not_matter(self, path: Path) -> None:
        with ResumableParquet(path, {'a': 1}).open():
            pass
        file = ResumableParquet(path, {'a': 2})
        with file.open():
            file.append('part', rows(0))
        with file.open():
            pass
        match = 'run with a = 2, not 3; b = None, not 4. Choose another file, or set'
        with (
            pytest.raises(ValueError, match=match),
            ResumableParquet(path, {'a': 3, 'b': 4}).open(),
        ):
            pass

    def test_parts_without_a_manifest_are_of_something_else(self, path: Path) -> None:
        file = ResumableParquet(path, {'a': 1})
        with file.open():
            file.append('part', rows(0))
        (file.folder / 'origin.json').unlink()
        with pytest.raises(ValueError, match='with a = None, not 1'), file.open():
            pass

    def test_parts_become_one_file(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parquet, '_GROUP_ROWS', 6)
        file = ResumableParquet(path, {})
        with file.open():
            for i in range(6):
                file.append('part', rows(2 * i, 2 * i + 1))
            assert file.join(12) == 12
        assert written(path) == [*range(12)]
        metadata = pq.read_metadata(path)
        assert [metadata.row_group(i).num_rows for i in range(2)] == [6, 6]
        assert [*path.parent.iterdir()] == [path]

    def test_parts_are_in_the_order_of_their_numbers(self, path: Path) -> None:
        """Runs of earlier versions have numbers of six digits."""
        file = ResumableParquet(path, {})
        with file.open():
            for number in range(3):
                part = file.folder / f'part-00000-{number:06d}.parquet'
                pq.write_table(rows(number), part)
            file.append('part-00000', rows(3))
            file.append('part-00001', rows(4))
            assert file.count_rows('part-00000') == 4
            file.join(5)
        assert written(path) == [0, 1, 2, 3, 4]

    def test_an_unfinished_part_does_not_count(self, path: Path) -> None:
        file = ResumableParquet(path, {})
        with file.open():
            file.append('part', rows(0))
            (file.folder / 'part-00000001.parquet.tmp').write_bytes(b'PAR1')
            assert file.count_rows() == 1
            assert file.join(1) == 1

    def test_what_follows_a_part_that_is_cut_off_is_done_again(
        self, path: Path
    ) -> None:
        file = ResumableParquet(path, {})
        with file.open():
            for i in range(3):
                file.append('a', rows(i))
                file.append('b', rows(i))
        second = file.part_files('a')[1]
        second.write_bytes(second.read_bytes()[:-4])
        with file.open():
            assert (file.count_rows('a'), file.count_rows('b')) == (1, 3)

    def test_columns_must_stay(self, path: Path) -> None:
        file = ResumableParquet(path, {})
        with file.open():
            file.append('part', rows(0))
            with pytest.raises(ValueError, match='features the same size'):
                file.append('part', pa.table({'index': [0.5]}))

    @pytest.mark.parametrize('samples', [3, 5])
    def test_as_many_rows_as_samples(self, path: Path, samples: int) -> None:
        file = ResumableParquet(path, {})
        match = (
            rf'a\.parquet\.parts has 4 rows, but there are {samples} samples: .* Set'
        )
        with file.open():
            file.append('part', rows(*range(4)))
            with pytest.raises(ValueError, match=match):
                file.join(samples)
        assert not path.exists()

    def test_nothing(self, path: Path) -> None:
        file = ResumableParquet(path, {})
        with file.open(), pytest.raises(ValueError, match='no rows'):
            file.join(0)


class TestOverwrite:
    def test_a_file_is_kept_unless_it_is_to_be_replaced(self, path: Path) -> None:
        path.parent.mkdir()
        path.write_text('precious')
        file = ResumableParquet(path, {})
        with pytest.raises(FileExistsError, match='set overwrite to'), file.open():
            pass
        assert [*path.parent.iterdir()] == [path]
        with file.open(overwrite=True):
            file.append('part', rows(0))
            assert path.read_text() == 'precious'
        # It goes on as it was started
        with file.open():
            assert file.count_rows() == 1
            file.join(1)
        assert written(path) == [0]

    def test_parts_are_deleted(self, path: Path) -> None:
        with (file := ResumableParquet(path, {'a': 1})).open():
            file.append('part', rows(0))
        with (file := ResumableParquet(path, {'a': 2})).open(overwrite=True):
            assert file.count_rows() == 0


def hold(path: Path, opened: Any, done: Any) -> None:
    with ResumableParquet(path, {}).open():
        opened.set()
        done.wait(60)


class TestOneWriter:
    @pytest.mark.parametrize('kind', ['thread', 'process'])
    def test_a_second_run_is_refused(self, path: Path, kind: str) -> None:
        spawn = multiprocessing.get_context('spawn')
        events: Any = threading if kind == 'thread' else spawn
        opened, done = events.Event(), events.Event()
        start: Any = threading.Thread if kind == 'thread' else spawn.Process
        first = start(target=hold, args=(path, opened, done))
        first.start()
        assert opened.wait(60)
        file = ResumableParquet(path, {})
        match = r'another run is writing .*a\.parquet: wait for it, or stop it first'
        for overwrite in (False, True):
            with pytest.raises(BlockingIOError, match=match), file.open(overwrite):
                pass
        done.set()
        first.join()
        with file.open():
            pass

    def test_a_lock_that_is_deleted_keeps_nobody_out(self, path: Path) -> None:
        file = ResumableParquet(path, {})
        with file.open():
            shutil.rmtree(file.folder)
            with file.open():
                file.append('part', rows(0))

    def test_manifest(self, path: Path) -> None:
        """The manifest is as that of earlier versions, whose runs can go on."""
        file = ResumableParquet(path, {'a': 1, 'b': None, 'c': ('x', 'y')})
        with file.open():
            file.append('part', rows(0))
        manifest = file.folder / 'origin.json'
        assert json.loads(manifest.read_text()) == {**file.origin, 'overwrite': False}
        with file.open():
            assert file.count_rows() == 1
        manifest.write_text('{"a": 1, "b": "None", "c": "(\'x\', \'y\')"}')
        with file.open():
            assert file.count_rows() == 1
