# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rasterio.warp import transform

from torchgeo_softcon import _workers as workers
from torchgeo_softcon import label_archive
from torchgeo_softcon._workers import LocalWorkers, Workers, open_workers
from torchgeo_softcon.labels import plan
from torchgeo_softcon.labels.blocks import open_path
from torchgeo_softcon.labels.plan import count_unit
from torchgeo_softcon.labels.sources import read

from .helpers import write_tile
from .test_archive import boxes
from .units import blocked_signals, die, die_once, fail, process, square, stop

pytestmark = pytest.mark.filterwarnings('ignore:.*official tile.*:UserWarning')


@pytest.fixture(scope='module')
def two() -> Iterator[Workers]:
    with open_workers(2, None) as pool:
        yield pool


class TestLocal:
    def test_every_unit_once(self, two: Workers) -> None:
        assert sorted(two.map(square, range(9))) == [n**2 for n in range(9)]
        assert list(Workers().map(square, range(9))) == [n**2 for n in range(9)]

    def test_one_pool_per_run(self, two: Workers) -> None:
        pids = {*two.map(process, range(9)), *two.map(process, range(9))}
        assert len(pids) <= 2
        assert os.getpid() not in pids

    def test_processes_are_new_ones(self, two: Workers) -> None:
        """A fork has copies of all modules, and of all locks."""
        (names,) = two.map(eval, ['[*__import__("sys").modules]'])
        assert {'rasterio', 'pyarrow'} <= {*sys.modules}
        assert not {'rasterio', 'pyarrow'} & {*names}

    def test_processes_start_fast(self) -> None:
        """Not even the command imports as much as they must not."""
        modules = {function.__module__ for function in (count_unit, read, open_path)}
        code = (
            f'import sys, {", ".join(modules)}\n'
            'print({"torch", "torchgeo", "geopandas", "pandas", "requests", "tqdm"}'
            ' & {*sys.modules})'
        )
        done = subprocess.run(
            [sys.executable, '-c', code], check=True, capture_output=True, text=True
        )
        assert done.stdout == 'set()\n'

    @pytest.mark.parametrize('runs', [2, pytest.param(25, marks=pytest.mark.slow)])
    def test_threads_that_use_proj(self, tmp_path: Path, runs: int) -> None:
        """Forks of such a process hang for ever, one of a hundred."""
        write_tile(tmp_path / 'tiles', 6, 45)
        table, out = boxes(tmp_path / 'a.csv', 20), tmp_path / 'a.parquet'
        over = threading.Event()

        def project() -> None:
            while not over.wait(5e-3):
                transform('EPSG:4326', 'EPSG:32632', [9.0] * 50, [46.0] * 50)

        threads = [threading.Thread(target=project) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(runs):
                labelled = label_archive(
                    footprints=table,
                    worldcover=tmp_path / 'tiles',
                    out=out,
                    workers=2,
                    progress=False,
                    overwrite=True,
                )
                assert labelled.rows + len(labelled.failures) == 20
        finally:
            over.set()
            for thread in threads:
                thread.join()

    def test_ctrl_c_is_for_the_parent(self, two: Workers) -> None:
        assert list(two.map(blocked_signals, [0])) == [{signal.SIGINT}]
        assert not blocked_signals(0)

    def test_a_script_need_not_ask_for_its_name(self, tmp_path: Path) -> None:
        script = tmp_path / 'script.py'
        script.write_text(
            'from torchgeo_softcon._workers import open_workers\n'
            'print("once")\n'
            'with open_workers(2, None) as pool:\n'
            '    print(sorted(pool.map(abs, range(-3, 0))))\n'
        )
        done = subprocess.run(
            [sys.executable, script],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[2])},
        )
        assert done.stdout.splitlines() == ['once', '[1, 2, 3]']
        assert not done.stderr

    def test_time_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LocalWorkers, 'limit', 3)
        pids: list[int] = []
        before = {*multiprocessing.active_children()}
        match = 'no result for 3 s. What is done is kept: start again'
        with pytest.raises(TimeoutError, match=match), open_workers(2, None) as pool:
            pids.extend(pool.map(stop, range(8)))
        assert {*multiprocessing.active_children()} == before

    def test_units_are_taken_as_workers_are_free(self, two: Workers) -> None:
        taken: list[int] = []

        def units() -> Iterator[int]:
            for number in range(50):
                taken.append(number)
                yield number

        results = two.map(square, units())
        next(results)
        assert len(taken) <= 6
        assert len(list(results)) == 49

    def test_a_worker_that_dies_is_replaced(self, two: Workers, tmp_path: Path) -> None:
        units = [(tmp_path / 'died', number) for number in range(12)]
        assert sorted(two.map(die_once, units)) == list(range(12))
        assert (tmp_path / 'died').exists()

    def test_a_worker_that_dies_while_nobody_waits(
        self, two: Workers, tmp_path: Path
    ) -> None:
        units = [(tmp_path / 'died', number) for number in range(12)]
        results = []
        for result in two.map(die_once, units):
            results.append(result)
            if len(results) == 1:
                # Now the next unit is handed to processes that are no longer there
                while not (tmp_path / 'died').exists():
                    time.sleep(0.01)
                time.sleep(0.3)
        assert sorted(results) == list(range(12))

    def test_a_unit_that_kills_its_workers(self, two: Workers) -> None:
        with pytest.raises(RuntimeError, match=r'died 3 times.*use fewer workers'):
            list(two.map(die, range(6)))

    def test_errors_come_through(self, two: Workers) -> None:
        with pytest.raises(ValueError, match='number 0'):
            list(two.map(fail, range(1)))

    def test_choice(self) -> None:
        with open_workers(1, None) as one, open_workers(3, None) as three:
            assert type(one) is Workers
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

    def test_packing(
        self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Not above: workers import this module, and must not wait for TorchGeo
        from torchgeo_softcon.datasets.scene_pack import pack_scenes, verify_scenes

        monkeypatch.chdir(tmp_path)  # where the workers are not
        for number in range(4):
            tile = write_tile(Path('scenes'), 6 + 3 * number, 45)
            tile.rename(tile.with_name(f'{number}.tif'))  # tiles are no scenes
        Path('scenes', 'broken.tif').write_bytes(b'II*\0')
        ((path, reason),) = pack_scenes(
            'scenes', 'packed', scheduler=cluster.scheduler_address
        )
        assert path == str(tmp_path / 'scenes' / 'broken.tif')
        assert reason.startswith(f'cannot open {path}')
        assert len(list(Path('packed', 'images').rglob('*.tif'))) == 4
        assert verify_scenes('packed') == []

    def test_no_scheduler(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip('distributed')
        monkeypatch.setattr(workers, '_ANSWER', '1s')
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
