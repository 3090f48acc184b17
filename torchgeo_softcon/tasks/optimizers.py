# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Optimizers of the tasks."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightly.utils.lars import LARS
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

OptimizerName = Literal['adamw', 'sgd', 'lars']


def parameter_groups(
    modules: Iterable[nn.Module], weight_decay: float
) -> list[dict[str, Any]]:
    """Sort trainable parameters into one group with and one without weight decay.

    Biases and one-dimensional parameters (norms, LayerScale) are not decayed, position
    embeddings and class tokens are, as in DINO. (lightly's
    ``get_weight_decay_parameters`` decays LayerScale.)
    https://github.com/facebookresearch/dino/blob/main/utils.py

    Args:
        modules: Modules to optimize.
        weight_decay: Weight decay of the first group.

    Returns:
        The group with and the group without weight decay.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim <= 1 or name.endswith('.bias')
                (no_decay if plain else decay).append(parameter)
    return [
        {'params': decay, 'weight_decay': weight_decay},
        {'params': no_decay, 'weight_decay': 0.0},
    ]


def create_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], lr: float, fused: bool
) -> Optimizer:
    """Create an optimizer.

    Args:
        name: ``'adamw'`` (betas 0.9 and 0.999), ``'sgd'`` or ``'lars'`` (momentum 0.9).
        groups: Parameter groups.
        lr: Peak learning rate.
        fused: Whether to use PyTorch's fused AdamW, one kernel for all parameters.

    Returns:
        The optimizer.

    Raises:
        ValueError: If *name* is unknown.
    """
    if name == 'adamw':
        return AdamW(groups, lr=lr, fused=fused)
    if name == 'sgd':
        return SGD(groups, lr=lr, momentum=0.9)
    if name == 'lars':
        return LARS(groups, lr=lr, momentum=0.9)
    raise ValueError(f"optimizer must be 'adamw', 'sgd' or 'lars', got {name!r}")


def images_per_step(trainer: Trainer) -> int | None:
    """Number of images per optimizer step, which learning rates are scaled by.

    Args:
        trainer: The trainer.

    Returns:
        The number over all ranks and accumulated batches, None if the loader does not
        tell.
    """
    loader = trainer.train_dataloader
    size = getattr(loader, 'batch_size', None)
    if size is None:  # so it is with a batch sampler
        size = getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)
    if size is None:
        return None
    return int(size * trainer.world_size * trainer.accumulate_grad_batches)


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Clip the norm of each gradient by itself, in place.

    Not PyTorch's ``clip_grad_norm_``, which scales all gradients by one factor. Does not
    wait for the device.
    https://github.com/facebookresearch/dino/blob/main/utils.py

    Args:
        parameters: Parameters. Those without gradient are left out.
        max_norm: Largest norm of a gradient.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    if factors.device.type == 'cpu' and bool((factors == 1).all()):
        return
    torch._foreach_mul_(gradients, list(factors.unbind()))
