# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The terminal of a pretraining run: what users need to see, and nothing else."""

import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelSummary,
    ProgressBar,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..evaluation.verdict import judge, summarize
from ..tasks import PretrainingTask
from ..tasks.quiet import silence_adverts

#: Bars that Lightning makes by itself.
_BARS = (RichProgressBar, TQDMProgressBar)

#: Lines about the progress of a run without a terminal, at most.
_LINES = 40


class _ShortSummary(ModelSummary):
    """Tells the size of the encoder and of all that is trained, in one line."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        size = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        rank_zero_info(
            f'{getattr(pl_module, "method", type(pl_module).__name__)}: '
            f'{pl_module.hparams["model"]} with {size / 1e6:.1f} M parameters, '
            f'{trained / 1e6:.1f} M are trained with the heads'
        )


class _ProgressLines(ProgressBar):
    """Prints a line every so many steps, where no bar can be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._start = trainer.global_step, time.monotonic()
        total = trainer.estimated_stepping_batches
        self._total = int(total) if total != float('inf') else 0
        self._every = max(trainer.log_every_n_steps, self._total // _LINES, 1)
        self._printed, self._images = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self._images += len(batch['image']) * trainer.world_size
        step = trainer.global_step
        if step % self._every or step == self._printed or not self._enabled:
            return
        self._printed = step
        seconds = time.monotonic() - self._start[1]
        shown = [
            f'{name.removeprefix("train_")} {float(value):.3g}'
            for name, value in trainer.logged_metrics.items()
            if name.startswith(('train_loss', 'train_feature_std', 'train_soft_expl'))
            and not name.endswith(('_chance', '_floor', '_step', '_epoch'))
        ]
        shown.append(f'{self._images / seconds:.0f} images/s')
        of = ''
        if self._total:
            left = (self._total - step) * seconds / (step - self._start[0])
            shown.append(f'{left / 60:.0f} min left')
            of = f'/{self._total}'
        rank_zero_info(f'step {step}{of}: {", ".join(shown)}')


class Terminal(Callback):
    """Says what a run of this package's tasks is, how it goes, and what it has learned.

    The plugin adds it to every trainer; on other tasks than ours, it does nothing.
    """

    def __init__(self) -> None:
        """Initialize a new Terminal instance, when a trainer is made."""
        super().__init__()
        self._series: dict[str, list[float]] = defaultdict(list)
        self._active = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace Lightning's table of layers, and its bar where there is no terminal."""
        self._series.clear()
        self._active = stage == 'fit' and isinstance(pl_module, PretrainingTask)
        if not self._active:
            return
        silence_adverts()  # in a spawned process, which has not made the task
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        for i, callback in enumerate(callbacks):
            if isinstance(callback, ModelSummary) and callback._max_depth == 1:
                callbacks[i] = _ShortSummary()
            elif type(callback) in _BARS and not sys.stderr.isatty():
                callbacks[i] = _ProgressLines()
                callbacks[i].setup(trainer, pl_module, stage)

    def note(self, values: Mapping[str, Any]) -> None:
        """Take note of metrics, for the end."""
        if self._active:
            for name, value in values.items():
                self._series[name].append(float(value))

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, *args: Any
    ) -> None:
        """Take note of what was logged of a step."""
        # Only where loggers read them, too, as that waits for the device
        every = self._active and trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            self.note(trainer.logged_metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the run has learned."""
        if not self._active or not self._series:
            return
        findings = judge(self._series, getattr(pl_module, 'feature_size', None))
        rank_zero_info('\n'.join([summarize(findings), *(f'  {f}' for f in findings)]))
        if trainer.log_dir is not None:
            run = shlex.quote(str(trainer.log_dir))
            rank_zero_info(f'See it with:\n  torchgeo-softcon report {run}')
