# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Whether a run waits for its data: ``torchgeo-softcon bench-data``."""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import exceptions, move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    LearningRateFinder,
    ModelSummary,
    ProgressBar,
    Timer,
)
from torch import Tensor

from .. import datamodules, tasks  # noqa: F401, for the short names of their classes
from .._compat import MisconfigurationException, Sample, host_main
from ..callbacks import KNNProbe
from ..datamodules.loading import count_cores

#: Share of the time from which a run is called data-bound.
_BOUND = 0.1

#: What `torchgeo fit` is told on top of the configuration: to train on one device and to
#: do nothing else, and not to end before the measurement does.
_OVERRIDES = {
    # Added: others may change what is trained on, such as ResizeInput
    'trainer.callbacks+': 'torchgeo_softcon.cli.bench_data.Stopwatch',
    # Not off: that would be an error where callbacks for the same are given
    'trainer.barebones': 'false',
    'trainer.enable_checkpointing': 'true',
    'trainer.enable_progress_bar': 'true',
    'trainer.num_sanity_val_steps': '0',
    'trainer.limit_train_batches': 'null',
    'trainer.limit_val_batches': '0',
    'trainer.fast_dev_run': 'false',
    'trainer.overfit_batches': '0.0',
    'trainer.max_epochs': '1000',
    'trainer.max_steps': '-1',
    'trainer.max_time': 'null',
    'trainer.devices': '1',
    'trainer.num_nodes': '1',
    'trainer.strategy': 'auto',
    'ckpt_path': 'null',
}

#: Callbacks that write, watch, or end a run, and change nothing of its steps.
_LEFT_OUT = (
    BatchSizeFinder,
    Checkpoint,
    KNNProbe,
    LearningRateFinder,
    ModelSummary,
    ProgressBar,
    Timer,
)

_LOGGER = 'lightning.pytorch.loggers.CSVLogger'

#: What a user can do something about.
_ERRORS = (
    OSError,
    ValueError,
    MisconfigurationException,
    exceptions.MisconfigurationException,
)


@dataclass(frozen=True)
class Speed:
    """Rates of a run and of its parts, on one device.

    Attributes:
        device: Where the model is.
        data: Images per second of the data loader alone.
        step: Images per second of the training alone, on one batch that stays on the
            device, views, optimizer and EMA included.
        both: Images per second of the training with its data.
        batch_size: Number of images of a batch.
        num_workers: Number of processes that read.
        pin_memory: Whether the data loader copies batches to pinned memory.
        batch_wise: Whether the dataset reads all samples of a batch in one call
            (``__getitems__``).
        cores: Number of processor cores that this process may use.
    """

    device: str
    data: float
    step: float
    both: float
    batch_size: int
    num_workers: int
    pin_memory: bool
    batch_wise: bool
    cores: int

    @property
    def share(self) -> float:
        """Share of the time that would be saved if the data cost nothing."""
        return max(0.0, 1 - self.both / self.step)

    @property
    def bound(self) -> bool:
        """Whether the run is data-bound."""
        return self.share > _BOUND

    def advice(self) -> list[str]:
        """What to change, in order of effort, empty if the run is not data-bound."""
        if not self.bound:
            return []
        advice = []
        if self.device.startswith('cuda') and not self.pin_memory:
            advice.append(
                'pin_memory=True in the data loader: copies overlap with steps'
            )
        # One process reads where there are no workers, too
        workers = max(1, self.num_workers)
        needed = math.ceil(workers * self.step / self.data)
        more = min(needed, self.cores)
        if more > self.num_workers:
            advice.append(
                f'--data.num_workers {more}'
                + (
                    f' (of {needed} that would be needed, on {self.cores} cores)'
                    if more < needed
                    else ''
                )
                + (
                    ': now the training itself reads, and waits meanwhile'
                    if self.num_workers == 0
                    else ''
                )
            )
        if needed > self.cores:
            if not self.batch_wise:
                advice.append(
                    'a dataset with __getitems__, which reads a batch in one call'
                )
            advice.append(
                'fewer and larger files: opening one per band takes longer than reading '
                'it. All bands of a patch in one file, without compression, or all '
                'patches in one array on disk'
            )
        if not advice:
            advice.append(
                f'fewer threads for the model (OMP_NUM_THREADS) or fewer workers: reading '
                f'alone is fast enough, but shares {self.cores} cores with the training'
            )
        return advice

    def as_dict(self) -> dict[str, Any]:
        """Everything that is known, with plain values."""
        rates = {key: getattr(self, key) for key in ('data', 'step', 'both')}
        others = {k: v for k, v in asdict(self).items() if k not in rates}
        return {
            'images_per_second': rates,
            'data_share_of_time': self.share,
            'data_bound': self.bound,
            'advice': self.advice(),
            **others,
        }

    def __str__(self) -> str:
        """The same in a few lines."""
        reader = f'{self.num_workers} workers' if self.num_workers else 'no workers'
        lines = [
            f'images per second on {self.device}, batches of {self.batch_size}',
            f'  data loader alone  {self.data:10.1f}  {reader}',
            f'  training alone     {self.step:10.1f}  on one batch kept on the device',
            f'  both together      {self.both:10.1f}',
        ]
        if not self.bound:
            lines.append(f'Not data-bound: data take {self.share:.0%} of the time.')
        else:
            lines.append(
                f'Data-bound: data take {self.share:.0%} of the time. What may help:'
            )
            lines += [f'  - {line}' for line in self.advice()]
        return '\n'.join(lines)


class _Measured(Exception):
    """Ends a run whose speed is known."""

    def __init__(self, speed: Speed) -> None:
        super().__init__(speed)
        self.speed = speed


class Stopwatch(Callback):
    """Measures the parts of a run one after the other, then ends the run."""

    #: Number of batches of each part.
    steps = 20

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of the training data, and be alone with what changes steps.

        Args:
            trainer: The trainer.
            pl_module: The task.
            stage: The stage.
        """
        run: Any = trainer
        run.callbacks = [x for x in run.callbacks if not isinstance(x, _LEFT_OUT)]
        datamodule = run.datamodule
        make = datamodule.train_dataloader
        datamodule.train_dataloader = lambda: _Phases(
            make(), trainer.strategy.root_device, self.steps
        )


class _Phases:
    """Batches for a run, of which it measures the speed meanwhile.

    First the data loader alone, then the training with the data loader, then the
    training with one batch. Raises :class:`_Measured` in the end.
    """

    def __init__(self, loader: Any, device: torch.device, steps: int) -> None:
        self.loader, self.device, self.steps = loader, device, steps
        #: For the tasks that scale their learning rate by it.
        self.batch_size = getattr(loader, 'batch_size', None)
        self.batch_sampler = getattr(loader, 'batch_sampler', None)

    def __len__(self) -> int:
        # One epoch for all: what happens between epochs is not measured
        return 10**6

    def __iter__(self) -> Iterator[Sample]:
        workers = getattr(self.loader, 'num_workers', 0)
        # What workers have prepared before the start comes faster than they read
        ahead = workers * (getattr(self.loader, 'prefetch_factor', None) or 0)
        warm_up, steps = 2 + ahead, max(self.steps, 2 * ahead)
        batches = self._endless()

        for _ in range(warm_up):
            batch = next(batches)
        begin = self._now()
        images = sum(_images(next(batches)) for _ in range(steps))
        data = images / (self._now() - begin)

        for _ in range(warm_up):
            yield next(batches)
        begin, images = self._now(), 0
        for _ in range(steps):
            following = next(batches)
            images += _images(following)
            yield following
        both = images / (self._now() - begin)

        batches.close()
        batch = move_data_to_device(batch, self.device)
        # Copies, as datamodules take out what a task does not read
        for _ in range(2):
            yield {**batch}
        begin = self._now()
        for _ in range(self.steps):
            yield {**batch}
        step = self.steps * _images(batch) / (self._now() - begin)

        dataset = getattr(self.loader, 'dataset', None)
        raise _Measured(
            Speed(
                device=str(self.device),
                data=data,
                step=step,
                both=both,
                batch_size=_images(batch),
                num_workers=workers,
                pin_memory=getattr(self.loader, 'pin_memory', False),
                batch_wise=hasattr(dataset, '__getitems__'),
                cores=count_cores(),
            )
        )

    def _endless(self) -> Generator[Sample, None, None]:
        """Batches of one epoch after the other."""
        empty = True
        while True:
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise ValueError(
                    'the training data have no batch: batch_size may be larger than the '
                    'number of samples'
                )

    def _now(self) -> float:
        """Seconds, when everything before is done."""
        if self.device.type != 'cpu':
            torch.accelerator.synchronize()
        return time.perf_counter()


def _images(batch: Sample) -> int:
    """Number of images of a batch."""
    if isinstance(batch, dict):
        # A datamodule may make the images of something else on the device
        for tensor in _tensors(batch.get('image', batch)):
            return len(tensor)
    got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
    raise ValueError(f"batches must have the key 'image', or other tensors, got {got}")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors of a batch, also within its values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


def measure(args: Sequence[str], steps: int = 20) -> Speed:
    """Measure a run of ``torchgeo fit`` that is given by its arguments.

    Args:
        args: Arguments of ``torchgeo fit``.
        steps: Number of batches of each part.

    Returns:
        The speed of the run.

    Raises:
        ValueError: If there are no data to measure.
    """
    overrides = [x for k, v in _OVERRIDES.items() for x in (f'--{k}', v)]
    with tempfile.TemporaryDirectory() as folder:
        # The host writes its configuration there. Callbacks may need a logger
        logger = {'class_path': _LOGGER, 'init_args': {'save_dir': folder}}
        overrides += ['--trainer.default_root_dir', folder]
        overrides += ['--trainer.logger', json.dumps(logger)]
        previous, Stopwatch.steps = Stopwatch.steps, steps
        try:
            host_main(['fit', *args, *overrides])
        except _Measured as measured:
            return measured.speed
        finally:
            Stopwatch.steps = previous
    raise ValueError('the run has ended before it was measured')


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon bench-data``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(
        prog='torchgeo-softcon bench-data',
        allow_abbrev=False,
        description='Tell whether a run waits for its data, at how many images per '
        'second, and what to change. Trains on one device for a moment and writes '
        'nothing. All other options are those of `torchgeo fit`: try '
        '--data.num_workers 8.',
    )
    parser.add_argument(
        '-c',
        '--config',
        metavar='FILE',
        action='append',
        default=[],
        help='configuration of `torchgeo fit`. May be repeated: later files win',
    )
    parser.add_argument(
        '--steps', type=int, default=20, help='batches to measure (default: 20)'
    )
    parser.add_argument('--json', action='store_true', help='print JSON')
    options, rest = parser.parse_known_args(args)
    try:
        if options.steps < 1:
            raise ValueError(f'steps must be at least 1, got {options.steps}')
        for config in options.config:
            if not Path(config).is_file():
                raise ValueError(f'config {config} is not a file')
        configs = [x for config in options.config for x in ('--config', config)]
        speed = measure([*configs, *rest], options.steps)
    except _ERRORS as error:
        print(f'torchgeo-softcon bench-data: {error}', file=sys.stderr)
        return 1
    print(json.dumps(speed.as_dict(), indent=2) if options.json else speed)
    return 0
