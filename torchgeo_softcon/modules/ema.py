# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Exponential moving averages of networks (EMA teachers)."""

import copy

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """Copy a network into its own EMA teacher.

    The teacher equals the student at step 0, also if the student holds pretrained
    weights: copy after loading. Its parameters need no gradient. Dropout and stochastic
    depth are taken out for good, not by ``eval()``, because Lightning puts all modules
    of a task into training mode. Batch norm stays as it is: in training mode the teacher
    normalises with the statistics of its own batch, as in MoCo and DINO.
    """
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif hasattr(module, 'drop_prob'):  # timm's DropPath
            module.drop_prob = 0.0  # type: ignore[assignment]
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_ema(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    r"""Move a teacher towards its student, in place.

    .. math::

        \theta_t \leftarrow m \, \theta_t + (1 - m) \, \theta_s

    Parameters only, as in MoCo and DINO: the running statistics of a teacher's batch
    norm are averages over its own batches already.

    Args:
        student: The trainable network.
        teacher: A copy made by :func:`make_teacher`.
        momentum: Share :math:`m` of the old teacher in the new one, in [0, 1].
    """
    # One pass over the memory, where lightly's update_momentum needs two
    torch._foreach_lerp_(
        list(teacher.parameters()), list(student.parameters()), 1 - momentum
    )


@torch.no_grad()
def copy_buffers(student: nn.Module, teacher: nn.Module) -> None:
    """Give a teacher the running statistics of its student, in place.

    Args:
        student: The trainable network.
        teacher: A copy made by :func:`make_teacher`.
    """
    for own, trained in zip(teacher.buffers(), student.buffers(), strict=True):
        own.copy_(trained)
