# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From a checkpoint back to the task that wrote it."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..models.checkpoints import SAFE_GLOBALS
from ..models.encoders import PRETRAINING
from .base import PretrainingTask, class_path
from .dino_mc import DINOMCTask
from .softcon import SoftConTask

#: Hyperparameters that tell the task of a checkpoint without a note of it.
_MARKS: dict[str, type[PretrainingTask]] = {
    'soft_weight': SoftConTask,
    'local_sizes': DINOMCTask,
}


def find_task(checkpoint: Mapping[str, Any]) -> type[PretrainingTask] | None:
    """Find the class of the task that wrote a checkpoint.

    Only among the subclasses of :class:`.PretrainingTask` that are there: nothing is
    imported because a file says so.

    Args:
        checkpoint: All of a file, from :func:`.read_checkpoint`.

    Returns:
        The class, None if the file is of something else or its class is not imported.
    """
    note = checkpoint.get(PRETRAINING)
    if isinstance(note, Mapping):
        noted = note.get('task')
        base: Any = PretrainingTask
        classes = [c for c in _subclasses(base) if class_path(c) == noted]
        return classes[-1] if classes else None
    hparams = checkpoint.get('hyper_parameters')
    if not isinstance(hparams, Mapping):
        return None
    if '_class_path' not in hparams:  # not made by the command line
        return next((task for key, task in _MARKS.items() if key in hparams), None)
    package, _, name = str(hparams['_class_path']).partition('.')
    known = {task.__name__: task for task in _MARKS.values()}
    ours = package == 'torchgeo_softcon'
    return known.get(name.rpartition('.')[2]) if ours else None


def _subclasses(task: type[PretrainingTask]) -> Iterator[type[PretrainingTask]]:
    for subclass in task.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def load_task(
    path: str | os.PathLike[str], checkpoint: Mapping[str, Any], **options: Any
) -> PretrainingTask | None:
    """Rebuild the task that wrote a checkpoint.

    Args:
        path: Path of the checkpoint.
        checkpoint: What is in it, from :func:`.read_checkpoint`.
        **options: Arguments that checkpoints do not hold, such as *augmentations*.

    Returns:
        The task in training mode, on the CPU. None where :func:`find_task` finds none.
    """
    task = find_task(checkpoint)
    if task is None:
        return None
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return task.load_from_checkpoint(
            str(path), map_location='cpu', weights_only=True, **options
        )
