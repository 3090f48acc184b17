# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Looking at the encoder of a task from time to time, without a trace in its training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ..evaluation.features import find_encoder
from .terminal import Terminal


class EncoderWatch(Callback):
    """Looks at the encoder of a task every few optimizer steps, and logs what it sees."""

    #: Optimizer steps between two looks, None for none.
    every_n_steps: int | None = None

    #: Name of the encoder in the task, None for the one that is exported.
    encoder: str | None = None

    def look(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any
    ) -> Mapping[str, float] | None:
        """Look at the encoder and return metrics by name, None for no metrics."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the encoder."""
        self._encoder = find_encoder(pl_module, self.encoder)
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        *args: Any,
    ) -> None:
        """Look at the encoder if it is time, counted in optimizer steps."""
        step = trainer.global_step
        # Batches whose gradients are accumulated belong to one step
        if not self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        if step % self.every_n_steps == 0:
            values = self.look(trainer, pl_module, batch)
            if values is not None:
                log_now(trainer, values)
                # For ModelCheckpoint and EarlyStopping, which read no loggers
                pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)


def log_now(trainer: Any, values: Mapping[str, float]) -> None:
    """Write to all loggers, whatever log_every_n_steps is."""
    for callback in trainer.callbacks:
        if isinstance(callback, Terminal):
            callback.note(values)
    for logger in trainer.loggers:
        metrics = {**values, 'epoch': trainer.current_epoch}
        logger.log_metrics(metrics, trainer.global_step)


@contextmanager
def quietly(trainer: Trainer, task: LightningModule) -> Iterator[None]:
    """Evaluate a task in the middle of its training, in the precision of the training.

    No batch statistics move, and there are no gradients. Afterwards, the modes of all
    modules and all random number generators are as before.
    """
    modes = [(module, module.training) for module in task.modules()]
    task.eval()
    try:
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        # Not module.train(mode), which would overrule the modes of its children
        for module, mode in modes:
            module.training = mode


def gather(trainer: Trainer, values: Tensor) -> Tensor:
    """Collect values (N, ...) of each of R ranks: (R, N, ...) in the order of ranks."""
    if trainer.world_size == 1:
        return values[None]
    return trainer.strategy.all_gather(values)
