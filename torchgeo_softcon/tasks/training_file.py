# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Going on from a training file of the authors of DINO-MC, or of DINO."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require
from ..models import load_encoder
from ..models.checkpoints import dino_mc_encoder, read_checkpoint, require_shapes
from ..models.convert import is_torchvision_swin, swin_to_timm
from ..models.input_layer import input_layer

#: What training files hold.
_PARTS = ('student', 'teacher', 'optimizer', 'epoch', 'dino_loss')

#: Buffers among the names of a state dict.
_BUFFER = re.compile(r'\.(running_mean|running_var|num_batches_tracked|\w+_index)$')


def _read(path: Any) -> Mapping[str, Any]:
    """Read a training file, and raise a ValueError if it is another file."""
    content = read_checkpoint(path) if isinstance(path, str) else {}
    missing = ', '.join(part for part in _PARTS if part not in content)
    require(
        not missing,
        'continue_training needs weights = the path of a training file of DINO-MC with '
        f'{", ".join(_PARTS)}, but {path} has no {missing}. Leave continue_training out to '
        'start from the encoder alone',
    )
    return content


def _encoder(content: Mapping[str, Any], branch: Any) -> dict[str, Tensor]:
    """Return the encoder of a branch in timm's layout."""
    state = dino_mc_encoder(content, branch)
    return swin_to_timm(state) if is_torchvision_swin(state) else state


def _own_name(name: str) -> str:
    """Return what a task calls a parameter of a training file's student."""
    name = name.removeprefix('module.')
    if name.startswith('backbone.features.'):
        (name,) = swin_to_timm({name.removeprefix('backbone.'): torch.empty(0)})
        return f'student.{name}'
    name = re.sub(r'^backbone\.', 'student.', name)
    return re.sub(r'^head\.mlp\.', 'head.layers.', name)


def _head(content: Mapping[str, Any], branch: str) -> dict[str, Tensor]:
    """Return the head of a branch in our layout."""
    named = {_own_name(key): value for key, value in content[branch].items()}
    return {k[5:]: v for k, v in named.items() if k.startswith('head.')}


def load_networks(task: Any, path: Any) -> None:
    """Load the encoders and heads of both branches, and the centre, into a DINOMCTask.

    Raises:
        ValueError: If the file is another, encoders have other bands, or heads other sizes.
    """
    content = _read(path)
    pairs: list[tuple[str, nn.Module, nn.Module]] = [
        ('student', task.student, task.head),
        ('teacher', task.model, task.teacher_head),
    ]
    for branch, encoder, head in pairs:
        state = _encoder(content, branch)
        name, layer = input_layer(encoder)
        channels = state[f'{name}.weight'].shape[1] if f'{name}.weight' in state else 0
        require(
            channels in (0, layer.in_channels),
            f'in_channels must be {channels}, that of the training file, to go on with it, '
            f'got {layer.in_channels}. Leave continue_training out to start from the '
            'encoder alone',
        )
        load_encoder(encoder, state)
        found = _head(content, branch)
        require_shapes(
            found,
            head.state_dict(),
            f'the head of the {branch} in the training file is another',
            'Set hidden_dim, bottleneck_dim and output_dim to those of the file',
        )
        head.load_state_dict(found)
    task.criterion.center.copy_(content['dino_loss']['center'])


def go_on(task: Any, path: Any, optimizers: Mapping[str, Any]) -> None:
    """Go on with the optimizer, the epoch and the schedules of a training file."""
    content = _read(path)
    _load_optimizer(content, task, optimizers['optimizer'])
    scheduler = optimizers['lr_scheduler']['scheduler']
    _skip_epochs(task.trainer, scheduler, int(content['epoch']), task.epoch_steps)


def _load_optimizer(
    content: Mapping[str, Any], task: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load the state of the optimizer, such as the moments of AdamW.

    The file numbers parameters: first all that are decayed, then all others, each in the
    order of the student.
    """
    saved = content['optimizer']
    own = dict(task.named_parameters())
    order: tuple[list[str], list[str]] = ([], [])
    for key, value in content['student'].items():
        name = _own_name(key) if not _BUFFER.search(key) else ''
        if name in own and own[name].requires_grad:
            order[value.ndim <= 1 or key.endswith('.bias')].append(name)
    numbers = [n for group in saved['param_groups'] for n in group['params']]
    names = [*order[0], *order[1]]
    kinds = sorted({key for state in saved['state'].values() for key in state})
    adam = isinstance(optimizer, torch.optim.AdamW)
    require(
        len(names) == len(numbers) and adam == ('exp_avg' in kinds),
        f'the optimizer of the training file has {kinds} of {len(numbers)} parameters, and '
        f'this task has {len(names)} and optimizer = {type(optimizer).__name__}. Set '
        'optimizer and norm_last_layer as in the file',
    )
    number_of = {own[n]: number for n, number in zip(names, numbers, strict=True)}
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    found = {i: saved['state'].get(number_of.get(p)) for i, p in enumerate(parameters)}
    state = optimizer.state_dict()
    state['state'] = {i: dict(values) for i, values in found.items() if values}
    optimizer.load_state_dict(state)


def _skip_epochs(trainer: Any, scheduler: Any, epochs: int, epoch_steps: int) -> None:
    """Let a run start after some epochs of it, with its schedules."""
    require(
        trainer.max_epochs in (None, -1) or trainer.max_epochs > epochs,
        f'trainer.max_epochs must be more than the {epochs} epochs that the training file '
        f'has behind it, got {trainer.max_epochs}',
    )
    steps = epochs * epoch_steps
    loop = trainer.fit_loop
    for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
        progress.ready = progress.started = progress.processed = epochs
        progress.completed = epochs
    step = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    step.ready = step.completed = loop.epoch_loop._batches_that_stepped = steps
    scheduler.last_epoch, scheduler._step_count = steps - 1, 2
    scheduler.step()
