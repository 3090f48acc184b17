# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from torchgeo_softcon.__main__ import main
from torchgeo_softcon._compat import HAS_TASKS
from torchgeo_softcon.callbacks import KNNProbe
from torchgeo_softcon.cli import data_speed
from torchgeo_softcon.cli.data_speed import Speed, _Measured, _MeasuredBatches
from torchgeo_softcon.ssl4eo.pack import pack
from torchgeo_softcon.tasks import SoftConTask

from ..callbacks.helpers import Patches
from ..ssl4eo import archives
from ..ssl4eo.archives import write_archive

SIMCLR = 'SimCLR' if HAS_TASKS else 'SimCLRTask'
CONFIG = """
model:
  class_path: {task}
  init_args: {{model: {model}, in_channels: 4, size: 32, hidden_dim: 16, output_dim: 8}}
data:
  class_path: tests.callbacks.helpers.PatchesDataModule
  init_args: {{batch_size: 4}}
  dict_kwargs: {{length: {length}}}
trainer:
  accelerator: cpu
  max_steps: 2
  limit_train_batches: 1
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: .}}}}
  callbacks: [{{class_path: lightning.pytorch.callbacks.ModelCheckpoint}}]
ckpt_path: null
"""

SPEED = Speed('cpu', 100, 900, 90, 64, 0, False, False, 16)


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to run in, and the environment as it was."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that an image and a step take, on a clock that knows nothing else."""
    seconds = {'now': 0.0, 'image': 1.0, 'step': 12.0}
    read, step = Patches.__getitem__, SoftConTask.training_step

    def slow_read(self: Patches, index: int) -> dict[str, Any]:
        seconds['now'] += seconds['image']
        return read(self, index)

    def slow_step(self: SoftConTask, *args: Any, **kwargs: Any) -> Any:
        seconds['now'] += seconds['step']
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Patches, '__getitem__', slow_read)
    monkeypatch.setattr(SoftConTask, 'training_step', slow_step)
    now = SimpleNamespace(perf_counter=lambda: seconds['now'])
    monkeypatch.setattr(data_speed, 'time', now)
    return seconds


def configure(
    task: str = 'SoftConTask', model: str = 'test_vit', length: int = 24
) -> list[str]:
    Path('run.yaml').write_text(CONFIG.format(task=task, model=model, length=length))
    return ['bench-data', '--config', 'run.yaml', '--steps', '3']


def test_rates_of_the_parts(
    clock: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    args = configure()
    assert main([*args, '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    # 4 images in 4 s, in 12 s, and in 16 s
    assert result['images_per_second'] == pytest.approx(
        {'data': 1, 'step': 1 / 3, 'both': 1 / 4}
    )
    assert result['data_share_of_time'] == pytest.approx(1 / 4)
    assert result['data_bound'] is True
    assert (result['batch_size'], result['num_workers']) == (4, 0)
    # Nothing of what the configuration would have written
    assert [path.name for path in Path().iterdir()] == ['run.yaml']

    clock['image'] = 0.1
    assert main([*args, '--data.batch_size', '6']) == 0
    out = capsys.readouterr().out
    assert 'images per second on cpu, batches of 6' in out
    assert 'Not data-bound: data take 5% of the time.' in out


def test_task_of_the_host_and_workers(capsys: pytest.CaptureFixture[str]) -> None:
    args = configure(SIMCLR, 'resnet18')
    assert main([*args, '--steps', '1', '--json', '--data.num_workers', '1']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['num_workers'] == 1
    assert all(rate > 0 for rate in result['images_per_second'].values())


def test_what_workers_have_prepared_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0]

    class Loader:
        num_workers, prefetch_factor = 2, 2
        taken = 0

        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            while True:
                self.taken += 1
                # Two batches of each worker are there before they are asked for
                now[0] += 0 if self.taken <= 4 else 1
                yield {'image': torch.zeros(6, 1)}

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(data_speed, 'time', clock)
    loader = Loader()
    batches = iter(_MeasuredBatches(loader, torch.device('cpu'), 3))
    next(batches)
    # They count little in twice as many, and are no part of the first ones
    assert loader.taken == 2 + 4 + 8 + 1

    def train() -> None:
        for _ in batches:
            now[0] += 1

    with pytest.raises(_Measured) as measured:
        train()
    (speed,) = measured.value.args
    assert (speed.data, speed.both, speed.step) == (6, 3, 6)


def test_later_configurations_win(
    clock: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    args = configure()
    # Only the first has a model, only the last the right size of a batch
    Path('two.yaml').write_text('data: {init_args: {batch_size: 2}}')
    Path('three.yaml').write_text('data: {init_args: {batch_size: 3}}')
    args = [*args, '-c', 'two.yaml', '--json', '--config=three.yaml']
    assert main([*args, '--steps', '1']) == 0
    assert json.loads(capsys.readouterr().out)['batch_size'] == 3
    assert main([*args, '-c', 'none.yaml']) == 2
    assert 'config none.yaml is not a file' in capsys.readouterr().err


def test_all_batches_of_a_run_that_overfits(
    clock: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    args = configure()
    Path('over.yaml').write_text('trainer: {overfit_batches: 1, barebones: true}')
    assert main([*args, '-c', 'over.yaml', '--json']) == 0
    rates = json.loads(capsys.readouterr().out)['images_per_second']
    assert rates['both'] == pytest.approx(1 / 4)


def test_images_that_are_made_on_the_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(archives, 'SIDES', {10: 24, 20: 12, 60: 4})
    days = {'s2c': {f'{place:07}': ['20200604'] for place in range(4)}}
    pack(write_archive(Path('archive'), days), 'packed')
    args = [*configure(), '--steps', '1', '--json', '--model.in_channels', '13']
    args += ['--model.soft_weight', '0']
    config = yaml.safe_load(Path('run.yaml').read_text())
    config['data'] = {
        'class_path': 'SSL4EOS12MLDataModule',
        'init_args': {'root': 'packed', 'batch_size': 3},
    }
    Path('run.yaml').write_text(yaml.safe_dump(config))
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)['batch_size'] == 3


@pytest.mark.parametrize('several', [True, False])
def test_callbacks_that_change_the_images_stay(
    several: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = set()
    step = SoftConTask.training_step

    def watch(self: SoftConTask, batch: Any, *args: Any) -> Any:
        shapes.add(tuple(batch['image'].shape))
        return step(self, batch, *args)

    monkeypatch.setattr(SoftConTask, 'training_step', watch)
    monkeypatch.setattr(KNNProbe, 'probe', None)
    args = configure()
    resize = {
        'class_path': 'torchgeo_softcon.callbacks.ResizeInput',
        'init_args': {'size': 48},
    }
    # What would write, and what would fail without a logger
    others = ['ModelCheckpoint', 'TQDMProgressBar', 'DeviceStatsMonitor']
    others += ['torchgeo_softcon.KNNProbe']
    callbacks = [resize, *({'class_path': name} for name in others)]
    Path('callbacks.yaml').write_text(
        json.dumps({'trainer': {'callbacks': callbacks if several else resize}})
    )
    assert main([*args, '-c', 'callbacks.yaml', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['batch_size'] == 4
    assert shapes == {(4, 4, 48, 48)}
    assert {path.name for path in Path().iterdir()} == {'run.yaml', 'callbacks.yaml'}


class TestAdvice:
    def test_enough_cores(self) -> None:
        (line,) = SPEED.advice()
        assert line.startswith('--data.num_workers 9: now the training itself reads')
        (line,) = replace(SPEED, num_workers=1).advice()
        assert line == '--data.num_workers 9'

    def test_too_few_cores(self) -> None:
        workers, batch_wise, files = replace(SPEED, num_workers=2).advice()
        assert workers == (
            '--data.num_workers 16 (of 18 that would be needed, on 16 cores)'
        )
        assert '__getitems__' in batch_wise
        assert 'one file' in files
        (files,) = replace(SPEED, num_workers=16, batch_wise=True).advice()
        assert 'one file' in files

    def test_reading_and_training_share_cores(self) -> None:
        (line,) = replace(SPEED, data=1000, num_workers=4).advice()
        assert 'OMP_NUM_THREADS' in line

    def test_copies(self) -> None:
        cuda = replace(SPEED, device='cuda:0', data=1000, num_workers=4)
        assert cuda.advice()[0].startswith('pin_memory=True')
        assert 'pin_memory' not in str(replace(cuda, pin_memory=True).advice())

    def test_none_needed(self) -> None:
        for both in (850, 950):  # measured, so it may seem faster than the step alone
            assert replace(SPEED, both=both).advice() == []
        assert replace(SPEED, both=950).share == 0


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--config', 'none.yaml'], 'config none.yaml is not a file'),
        (['--steps', '0'], 'steps must be at least 1, got 0'),
    ],
)
def test_bad_input(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['bench-data', *args]) == 2
    assert message in capsys.readouterr().err


def test_bad_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = configure(length=0)
    assert main(args) == 2
    assert 'length 0' in capsys.readouterr().err

    monkeypatch.setattr(Patches, '__getitem__', lambda self, index: {'x': 'text'})
    assert main(configure()) == 2
    error = capsys.readouterr().err
    assert "must have the key 'image', or other tensors, got ['x']" in error


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--model', 'SoftConTask'], 'data'),
        (['--config', 'run.yaml', '--data.workers', '8'], 'workers'),
    ],
)
def test_options_of_the_host(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure()
    with pytest.raises(SystemExit, match='2'):
        main(['bench-data', *args])
    assert message in capsys.readouterr().err.partition('error:')[2]
