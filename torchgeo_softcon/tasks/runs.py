# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The length of a run, how it goes on after an interruption, and what follows it."""

import math
import shlex
from collections.abc import Mapping, Sized
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from .._checks import require
from .._compat import finetune_command
from ..datamodules.protocol import loader_batch_size, offer_of, trainer_datamodule
from ..models import is_vit
from ..models.loading import native_grid


def run_length(trainer: Trainer) -> tuple[int, int]:
    """Return the number of optimizer steps of a run, and of an epoch."""
    if trainer.train_dataloader is None:
        # Lightning does not look at the data if max_steps alone ends the run
        trainer.fit_loop.setup_data()
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise ValueError(
            'the schedules need the length of the run, but trainer.max_epochs = '
            f'{trainer.max_epochs} and trainer.max_steps = {trainer.max_steps}. Set one '
            'of them'
        )

    batches = trainer.num_training_batches
    if batches == math.inf:
        return int(total), int(total)
    return int(total), math.ceil(batches / trainer.accumulate_grad_batches)


def images_per_step(trainer: Trainer) -> int | None:
    """Return the images per optimizer step, None if the loader does not tell.

    Over all ranks and accumulated batches.
    """
    size = loader_batch_size(trainer.train_dataloader)
    if size is None:
        return None
    return size * trainer.world_size * trainer.accumulate_grad_batches


def peak_lr(lr: float, trainer: Trainer) -> float:
    """Return *lr* times the images per optimizer step over 256."""
    images = images_per_step(trainer)
    if images is None:
        rank_zero_warn(
            'The batch size cannot be read from the data loader, so lr is used as it is, '
            'without scaling by the batch size.'
        )
        return lr
    return lr * images / 256


def require_even(trainer: Trainer, sizes: bool) -> None:
    """Raise on all ranks if their data differ in length, or they would hang or abort.

    Data without a length, such as iterable datasets, are not known before they are read.

    Args:
        trainer: Trainer whose loader is set up.
        sizes: Whether batches must also have the same sizes, as ranks exchange features.

    Raises:
        ValueError: If ranks have other numbers of batches, or of images in them.
    """
    if not torch.distributed.is_initialized():
        return
    loader, batches = trainer.train_dataloader, trainer.num_training_batches
    own: dict[str, float] = {'batches': batches}
    size, sampler = loader_batch_size(loader), getattr(loader, 'sampler', None)
    if sizes and size and isinstance(sampler, Sized):
        own |= {'batch_size': size, 'images': min(len(sampler), size * batches)}
    ranks: list[dict[str, float]] = [own] * trainer.world_size
    torch.distributed.all_gather_object(ranks, own)
    for name in own:
        values = [rank.get(name) for rank in ranks]
        require(
            len({*values}) == 1,
            f'all ranks must have as many {name} per epoch, got {values}. Use a sampler '
            'that repeats images, as Lightning does (use_distributed_sampler), or drops '
            'some, as datamodules of this package do; or set drop_last and '
            'limit_train_batches',
        )


def save_once(trainer: Trainer) -> None:
    """Let a run that goes on not save the step again that it goes on from.

    Lightning forgets which step it has saved last, and would save it with the first batch,
    which may be in the middle of an accumulation.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = trainer.global_step


def count_epoch(trainer: Trainer) -> None:
    """Count the epoch in which a run goes on from the last step of the one before.

    Lightning 2.6 does not. A run that goes on from there once more would take the middle of
    the epoch for its end, and make a step too many.
    """
    if trainer.fit_loop.restarted_mid_epoch:
        counts: Any = trainer.fit_loop.epoch_progress
        for progress in (counts.total, counts.current):
            progress.ready = max(progress.ready, progress.processed + 1)
            progress.started = max(progress.started, progress.processed + 1)


def warn_of_lost_gradients(
    checkpoint: Mapping[str, Any], trainer: Trainer | None
) -> None:
    """Warn of a checkpoint that was made between two optimizer steps.

    It has weights, but not the gradients of the batches since the last step.
    """
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


def tell_next_step(task: Any) -> None:
    """Say where the encoder of a run is, and the command that fine-tunes it."""
    callback = task.trainer.checkpoint_callback
    path = getattr(callback, 'best_model_path', '')
    path = path or getattr(callback, 'last_model_path', '')
    if not path:
        return
    rank_zero_info(f'The pretrained encoder is in {path}')
    if not isinstance(list(task.model.children())[-1], nn.Identity):
        # The host's loader knows classifiers of one layer only
        rank_zero_info(
            'TorchGeo does not open checkpoints of this family of models. Export it '
            f'with:\n  torchgeo-softcon export {shlex.quote(path)} --format timm\n'
            'and load the file into a task: '
            'task.model.load_state_dict(torch.load(FILE), strict=False)'
        )
        return
    name, size = task.hparams['model'], None
    if is_vit(task.model):  # which the host builds for one image size
        size = native_grid(name)[0] * task.model.patch_embed.patch_size[0]
    data = offer_of(trainer_datamodule(task.trainer)).finetune_options(size)
    command = finetune_command(name, path, task.hparams['in_channels'], data)
    rank_zero_info(f'Fine-tune from it with:\n  {command}')
