# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Checkpoints of runs that accumulate gradients.

A checkpoint has weights, not gradients: one that is made between two optimizer steps loses
those of the batches since the last.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def save_once(trainer: Trainer) -> None:
    """Let a run that goes on not save the step again that it goes on from.

    Lightning forgets which step it has saved last, and would save it with the first batch,
    which may be in the middle of an accumulation.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = trainer.global_step


def warn_of_lost_gradients(
    checkpoint: Mapping[str, Any], trainer: Trainer | None
) -> None:
    """Warn of a checkpoint that was made between two optimizer steps."""
    loops = checkpoint.get('loops', {}).get('fit_loop', {})
    progress = loops.get('epoch_loop.batch_progress')
    if trainer is None or progress is None or progress.get('is_last_batch'):
        return
    lost = progress['current']['ready'] % trainer.accumulate_grad_batches
    if lost:
        rank_zero_warn(
            f'The checkpoint was made in the middle of an accumulation: the gradients of '
            f'{lost} of {trainer.accumulate_grad_batches} batches are lost, and numbers will '
            'differ from those of a run without interruption. Checkpoints of '
            'every_n_train_steps and every_n_epochs are made at optimizer steps.'
        )
