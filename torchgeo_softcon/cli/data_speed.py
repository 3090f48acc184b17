# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""How many images per second a run reads and trains on, and what to change."""

import itertools
import json
import math
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from torch import Tensor

from .._compat import Sample, host_main
from .._cores import count_cores
from ..callbacks.knn import KNNProbe
from ..callbacks.terminal import Terminal
from ..datamodules.protocol import loader_batch_size
from .data import load_classes
from .recipe import section

#: Share of the time from which a run is called data-bound.
_BOUND = 0.1

#: What the trainer of `torchgeo fit` is told on top of the configuration: to train on one
#: device and to do nothing else, and not to end before the measurement does. Not to switch
#: anything off by *enable_...*: that would be an error where callbacks for it are given.
_OVERRIDES = (
    *('barebones=false', 'enable_checkpointing=true', 'enable_progress_bar=true'),
    *('num_sanity_val_steps=0', 'limit_train_batches=null', 'limit_val_batches=0'),
    *('fast_dev_run=false', 'overfit_batches=0.0', 'max_epochs=1000', 'max_steps=-1'),
    *('max_time=null', 'devices=1', 'num_nodes=1', 'strategy=auto'),
)

#: Callbacks that write, watch, or end a run, and change nothing of its steps.
_LEFT_OUT = (
    *(callbacks.BatchSizeFinder, callbacks.Checkpoint, callbacks.LearningRateFinder),
    *(callbacks.ModelSummary, callbacks.ProgressBar, callbacks.Timer),
    *(KNNProbe, Terminal),
)


@dataclass(frozen=True)
class Speed:
    """Images per second of a run and of its parts, on one device."""

    device: str
    data: float  # the data loader alone
    step: float  # the training alone, with views and EMA, on a batch kept on the device
    both: float  # the training with its data
    batch_size: int
    num_workers: int
    pin_memory: bool
    batch_wise: bool  # whether the dataset reads all samples of a batch in one call
    cores: int

    @property
    def share(self) -> float:
        """Share of the time that would be saved if the data cost nothing."""
        return max(0.0, 1 - self.both / self.step)

    def advice(self) -> list[str]:
        """Return what to change, in order of effort, empty if not data-bound."""
        if self.share <= _BOUND:
            return []
        # One process reads where there are no workers, too
        needed = math.ceil(max(1, self.num_workers) * self.step / self.data)
        more = min(needed, self.cores)
        workers = f'--data.num_workers {more}'
        if more < needed:
            workers += f' (of {needed} that would be needed, on {self.cores} cores)'
        if self.num_workers == 0:
            workers += ': now the training itself reads, and waits meanwhile'
        short = needed > self.cores
        lines = {
            'pin_memory=True in the loader: copies overlap with steps': (
                self.device.startswith('cuda') and not self.pin_memory
            ),
            workers: more > self.num_workers,
            'a dataset with __getitems__: a batch in one call': (
                short and not self.batch_wise
            ),
            'fewer and larger files: opening one per band takes longer than reading it. '
            'All bands of a patch in one file, without compression, or all patches in one '
            'array on disk': short,
        }
        advice = [line for line, helps in lines.items() if helps]
        threads = (
            'fewer threads for the model (OMP_NUM_THREADS) or fewer workers: reading '
            f'alone is fast enough, but shares {self.cores} cores with the training'
        )
        return advice or [threads]

    def as_dict(self) -> dict[str, Any]:
        """Return everything that is known, as plain values."""
        values = asdict(self)
        rates = {name: values.pop(name) for name in ('data', 'step', 'both')}
        return {
            'images_per_second': rates,
            'data_share_of_time': self.share,
            'data_bound': self.share > _BOUND,
            'advice': self.advice(),
            **values,
        }

    def __str__(self) -> str:
        """Return the same in a few lines."""
        bound = self.share > _BOUND
        title = 'Data-bound' if bound else 'Not data-bound'
        workers = f'{self.num_workers or "no"} workers'
        lines = [
            f'images per second on {self.device}, batches of {self.batch_size}',
            f'  data loader alone  {self.data:10.1f}  {workers}',
            f'  training alone     {self.step:10.1f}  on one batch kept on the device',
            f'  both together      {self.both:10.1f}',
            f'{title}: data take {self.share:.0%} of the time.{" What may help:" * bound}',
            *(f'  - {line}' for line in self.advice()),
        ]
        return '\n'.join(lines)


class _Measured(Exception):
    """Ends a run whose speed is known, which is the argument."""


class Stopwatch(Callback):
    """Measure the parts of a run one after the other, then end the run.

    Lightning's profilers do not: workers read and a GPU computes while the main process
    waits for either.
    """

    def __init__(self, steps: int) -> None:
        """Initialize a new Stopwatch instance for a number of batches of each part."""
        self.steps = steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the training data, and remove callbacks that change nothing of a step."""
        run: Any = trainer
        run.callbacks = [x for x in run.callbacks if not isinstance(x, _LEFT_OUT)]
        make = run.datamodule.train_dataloader
        run.datamodule.train_dataloader = lambda: _MeasuredBatches(
            make(), trainer.strategy.root_device, self.steps
        )


class _MeasuredBatches:
    """Batches for a run, whose speed they measure meanwhile.

    First of the data loader alone, then of the training with the data loader, then of
    the training with one batch. Raises :class:`_Measured` in the end.
    """

    def __init__(self, loader: Any, device: torch.device, steps: int) -> None:
        self.loader, self.device, self.steps = loader, device, steps
        #: For the tasks that scale their learning rate by it.
        self.batch_size = loader_batch_size(loader)

    def __len__(self) -> int:
        # One epoch for all: the time between epochs does not count
        return 10**6

    def __iter__(self) -> Iterator[Sample]:
        workers = getattr(self.loader, 'num_workers', 0)
        # What workers have prepared before the start comes faster than they read
        ahead = workers * (getattr(self.loader, 'prefetch_factor', None) or 0)
        warm_up, steps = 2 + ahead, max(self.steps, 2 * ahead)
        batches = self._endless()

        *_, batch = itertools.islice(batches, warm_up)
        begin = self._now()
        images = sum(map(_count, itertools.islice(batches, steps)))
        data = images / (self._now() - begin)

        yield from itertools.islice(batches, warm_up)
        both = yield from self._timed(batches, steps)
        batches.close()

        batch = move_data_to_device(batch, self.device)
        # Copies, as datamodules take out what a task does not read
        copies = ({**batch} for _ in itertools.count())
        yield from itertools.islice(copies, 2)
        step = yield from self._timed(copies, self.steps)

        pinned = getattr(self.loader, 'pin_memory', False)
        at_once = hasattr(getattr(self.loader, 'dataset', None), '__getitems__')
        rates = (str(self.device), data, step, both)
        raise _Measured(
            Speed(*rates, _count(batch), workers, pinned, at_once, count_cores())
        )

    def _timed(
        self, batches: Iterable[Sample], steps: int
    ) -> Generator[Sample, None, float]:
        """Yield some batches, and return the images per second."""
        begin, images = self._now(), 0
        for batch in itertools.islice(batches, steps):
            images += _count(batch)
            yield batch
        return images / (self._now() - begin)

    def _endless(self) -> Generator[Sample, None, None]:
        """Yield the batches of one epoch after the other."""
        batch = None
        while True:
            for batch in self.loader:
                yield batch
            if batch is None:
                raise ValueError(
                    'the training data have no batch: batch_size may be larger than the '
                    'number of samples'
                )

    def _now(self) -> float:
        """Return the time in seconds, when everything before is done."""
        if self.device.type != 'cpu':
            torch.accelerator.synchronize()
        return time.perf_counter()


def _count(batch: Sample) -> int:
    """Count the images of a batch."""
    # A datamodule may make the images of something else on the device
    values = [batch.get('image', batch)] if isinstance(batch, dict) else []
    while values:
        value = values.pop(0)
        if isinstance(value, Tensor):
            return len(value)
        values += value.values() if isinstance(value, dict) else ()
    got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
    raise ValueError(f"batches must have the key 'image', or other tensors, got {got}")


def measure(args: Sequence[str], steps: int) -> Speed:
    """Measure a run of ``torchgeo fit`` with some arguments, *steps* batches of each part."""
    load_classes('datamodules', 'tasks')
    with tempfile.TemporaryDirectory() as folder:
        stopwatch = section(f'{__name__}.Stopwatch', steps=steps)
        logger = section('lightning.pytorch.loggers.CSVLogger', save_dir=folder)
        overrides = (
            *_OVERRIDES,
            # Added: others may change what is trained on, such as ResizeInput
            f'callbacks+={json.dumps(stopwatch)}',
            f'default_root_dir={folder}',  # where the host writes its configuration
            f'logger={json.dumps(logger)}',  # which callbacks may need
        )
        options = [f'--trainer.{override}' for override in overrides]
        try:
            host_main(['fit', *args, *options, '--ckpt_path', 'null'])
        except _Measured as measured:
            speed: Speed = measured.args[0]
            return speed
    raise ValueError('the run ended before it was measured')
