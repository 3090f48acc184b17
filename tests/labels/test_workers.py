# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from torchgeo_softcon import label_archive
from torchgeo_softcon.labels import plan, workers
from torchgeo_softcon.labels.archive import count_unit
from torchgeo_softcon.labels.workers import InProcess, LocalWorkers, open_workers

from .helpers import write_tile
from .test_archive import boxes

pytestmark = pytest.mark.filterwarnings('ignore:.*official tile.*:UserWarning')


def square(number: int) -> int:
    return number**2


def die_once(unit: tuple[Path, int]) -> int:
    """Kill the worker the first time that unit 3 comes up."""
    marker, number = unit
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int) -> int:
    raise ValueError(f'number {number}')


class TestLocal:
    def test_every_unit_once(self) -> None:
        assert sorted(LocalWorkers(2).map(square, range(9))) == [n**2 for n in range(9)]
        assert list(InProcess().map(square, range(9))) == [n**2 for n in range(9)]

    def test_units_are_taken_as_workers_are_free(self) -> None:
        taken: list[int] = []

        def units() -> Iterator[int]:
            for number in range(50):
                taken.append(number)
                yield number

        results = LocalWorkers(2).map(square, units())
        next(results)
        assert len(taken) <= 6
        assert len(list(results)) == 49

    def test_a_worker_that_dies_is_replaced(self, tmp_path: Path) -> None:
        units = [(tmp_path / 'died', number) for number in range(12)]
        assert sorted(LocalWorkers(2).map(die_once, units)) == list(range(12))
        assert (tmp_path / 'died').exists()

    def test_a_worker_that_dies_while_nobody_waits(self, tmp_path: Path) -> None:
        units = [(tmp_path / 'died', number) for number in range(12)]
        results = []
        for result in LocalWorkers(2).map(die_once, units):
            results.append(result)
            if len(results) == 1:
                # Now the next unit is handed to processes that are no longer there
                while not (tmp_path / 'died').exists():
                    time.sleep(0.01)
                time.sleep(0.3)
        assert sorted(results) == list(range(12))

    def test_a_unit_that_kills_its_workers(self) -> None:
        with pytest.raises(RuntimeError, match=r'died 3 times.*use fewer workers'):
            list(LocalWorkers(2).map(die, range(6)))

    def test_errors_come_through(self) -> None:
        with pytest.raises(ValueError, match='number 0'):
            list(LocalWorkers(1).map(fail, range(1)))

    def test_choice(self) -> None:
        with open_workers(1, None) as one, open_workers(3, None) as three:
            assert isinstance(one, InProcess)
            assert isinstance(three, LocalWorkers)
            assert three.count == 3


def slow_count_unit(unit: Any) -> Any:
    """Units take so long that one is under way when a worker is killed."""
    time.sleep(0.1)
    return count_unit(unit)


@pytest.fixture(scope='module')
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        yield cluster


class TestDask:
    def test_every_unit_once(self, cluster: Any) -> None:
        with open_workers(9, cluster.scheduler_address) as pool:
            assert pool.count == 2
            assert sorted(pool.map(abs, range(-8, 1))) == [*range(9)]

    def test_a_killed_worker_changes_nothing(
        self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_tile(tmp_path / 'tiles', 6, 45)
        write_tile(tmp_path / 'tiles', 9, 45)
        monkeypatch.setattr(plan, '_SMALLEST', 8)
        monkeypatch.setattr(plan, '_LARGEST', 8)
        options: Any = {
            'footprints': boxes(tmp_path / 'a.csv', 160),
            'worldcover': tmp_path / 'tiles',
            'progress': False,
        }
        label_archive(**options, out=tmp_path / 'local.parquet', workers=1)

        monkeypatch.setattr(
            'torchgeo_softcon.labels.archive.count_unit', slow_count_unit
        )
        parts = tmp_path / 'dask.parquet.parts'
        first = cluster.workers[0].pid
        killed = []

        def kill() -> None:
            # In the middle: some units are done, and more are not
            while len(list(parts.glob('counts-*.parquet'))) < 3:
                time.sleep(0.01)
            os.kill(first, signal.SIGKILL)
            killed.append(len(list(parts.glob('counts-*.parquet'))))

        thread = threading.Thread(target=kill)
        thread.start()
        labelled = label_archive(
            **options,
            out=tmp_path / 'dask.parquet',
            scheduler=cluster.scheduler_address,
        )
        thread.join()
        assert killed
        assert killed[0] < 16
        assert (labelled.rows, labelled.failures) == (160, {})
        local, ours = (
            pq.read_table(tmp_path / f'{n}.parquet') for n in ('local', 'dask')
        )
        assert ours.equals(local)
        assert (tmp_path / 'dask.parquet').read_bytes() == (
            tmp_path / 'local.parquet'
        ).read_bytes()

    def test_no_scheduler(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip('distributed')
        monkeypatch.setattr(workers, '_TIMEOUT', '1s')
        with (
            pytest.raises(OSError, match=r'127\.0\.0\.1:9 does not answer'),
            open_workers(2, 'tcp://127.0.0.1:9'),
        ):
            pass

    def test_without_dask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, 'distributed', None)
        with (
            pytest.raises(ImportError, match=r'pip install "torchgeo-softcon\[dask\]"'),
            open_workers(2, 'tcp://127.0.0.1:9'),
        ):
            pass
