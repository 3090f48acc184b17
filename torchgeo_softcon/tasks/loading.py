# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From a checkpoint back to the task that wrote it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from ..models.checkpoints import SAFE_GLOBALS
from ..models.encoders import PRETRAINING
from .base import PretrainingTask
from .dino_mc import DINOMCTask
from .softcon import SoftConTask

#: Hyperparameters that tell the task of a checkpoint without a note of it.
_MARKS: dict[str, type[PretrainingTask]] = {
    'local_sizes': DINOMCTask,
    'soft_weight': SoftConTask,
}


def find_task(checkpoint: Mapping[str, Any]) -> type[PretrainingTask] | None:
    """Find the class of the task that wrote a checkpoint.

    Only among the subclasses of :class:`.PretrainingTask` that are there: nothing is
    imported because a file says so. None if the file is of something else.
    """
    note = checkpoint.get(PRETRAINING)
    if isinstance(note, Mapping):
        noted = note.get('task')
        found = [c for c in _subclasses(PretrainingTask) if c.class_path() == noted]
        return found[-1] if found else None
    hparams = checkpoint.get('hyper_parameters')
    if not isinstance(hparams, Mapping):
        return None
    if '_class_path' not in hparams:  # not made by the command line
        return next((task for key, task in _MARKS.items() if key in hparams), None)
    path = str(hparams['_class_path']).split('.')
    known = {task.__name__: task for task in _MARKS.values()}
    return known.get(path[-1]) if path[0] == 'torchgeo_softcon' else None


def _subclasses(task: Any) -> Iterator[type[PretrainingTask]]:
    for subclass in task.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def load_task(
    path: str | os.PathLike[str], checkpoint: Mapping[str, Any], **options: Any
) -> PretrainingTask | None:
    """Rebuild the task that wrote a checkpoint, in training mode on the CPU.

    *options* are arguments that checkpoints do not hold, such as *augmentations*. None
    where :func:`find_task` finds none.
    """
    task = find_task(checkpoint)
    if task is None:
        return None
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return task.load_from_checkpoint(
            str(path), map_location='cpu', weights_only=True, **options
        )


def start_task(checkpoint: Mapping[str, Any]) -> PretrainingTask | None:
    """Make the task of a checkpoint anew, with the weights that it began with.

    What was random at its start (all, if it had no weights) is random again.
    None where :func:`find_task` finds none, and where these weights are not found.
    """
    task = find_task(checkpoint)
    hparams = checkpoint.get('hyper_parameters')
    if task is None or not isinstance(hparams, Mapping):
        return None
    with suppress(OSError, ValueError):
        return task(**{k: v for k, v in hparams.items() if not k.startswith('_')})
    return None
