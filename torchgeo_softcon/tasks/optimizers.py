# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Optimizers, and schedules per step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from lightly.utils.lars import LARS
from timm.models import group_parameters
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .._checks import check_choice, check_counts, check_not_negative

OptimizerName = Literal['adamw', 'sgd', 'lars']


def layer_scales(encoder: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    r"""Return the factor of the learning rate of each parameter of a timm model.

    Layer-wise decay of BEiT (https://arxiv.org/abs/2106.08254): of layers 0 to L, as timm
    counts them from the input, layer l has :math:`d^{L - l}`.
    """
    model: Any = encoder
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    named = encoder.named_parameters()
    return {p: layer_decay ** (last - layers[name]) for name, p in named}


def parameter_groups(
    modules: Iterable[nn.Module],
    weight_decay: float,
    scales: Mapping[nn.Parameter, float] | None = None,
) -> list[dict[str, Any]]:
    """Sort trainable parameters into one group with and one without weight decay.

    With *scales*, factors of the learning rate, there are two of each factor, the largest
    first, noted as *lr_scale*. All groups with an even index are decayed.

    Biases and one-dimensional parameters (norms, LayerScale) are not decayed, position
    embeddings and class tokens are, as in DINO. (lightly's
    ``get_weight_decay_parameters`` decays LayerScale.)
    https://github.com/facebookresearch/dino/blob/main/utils.py
    """
    scales = scales or {}
    groups: dict[float, tuple[list[nn.Parameter], list[nn.Parameter]]] = {1.0: ([], [])}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim <= 1 or name.endswith('.bias')
                scale = scales.get(parameter, 1.0)
                groups.setdefault(scale, ([], []))[plain].append(parameter)
    return [
        {'params': parameters, 'weight_decay': decay, 'lr_scale': scale}
        for scale, kinds in sorted(groups.items(), reverse=True)
        for parameters, decay in zip(kinds, (weight_decay, 0.0), strict=True)
    ]


def create_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], lr: float, fused: bool
) -> Optimizer:
    """Create an optimizer: *fused* AdamW with betas 0.9 and 0.999, others momentum 0.9."""
    check_choice('optimizer', name, get_args(OptimizerName))
    # The schedule starts from the learning rate of each group
    for group in groups:
        group['lr'] = lr * group.pop('lr_scale', 1.0)
    if name == 'adamw':
        return AdamW(groups, lr=lr, fused=fused)
    return {'sgd': SGD, 'lars': LARS}[name](groups, lr=lr, momentum=0.9)


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Clip the norm of each gradient by itself, in place.

    Not PyTorch's ``clip_grad_norm_``, which scales all gradients by one factor. Does not
    wait for the device.
    https://github.com/facebookresearch/dino/blob/main/utils.py
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    if factors.device.type == 'cpu' and bool((factors == 1).all()):
        return
    torch._foreach_mul_(gradients, list(factors.unbind()))


def cosine_warmup(
    step: int, total: int, base: float, final: float, warmup: int = 0, start: float = 0
) -> float:
    r"""Linear warm-up followed by half a cosine.

    .. math::

        v_i = v_\text{final} + \tfrac{1}{2} (v_\text{base} - v_\text{final})
        \left(1 + \cos \frac{\pi i}{n}\right), \quad i = 0 \dots n - 1

    This is the schedule of DINO, which DINO-MC inherits: the warm-up holds *start* at
    its first and *base* at its last step, and *final* is what step *total* would get.
    lightly's :func:`cosine_schedule` divides by :math:`n - 1` instead, so its last step
    reaches the final value.
    """
    check_counts(total=total)
    check_not_negative(warmup=warmup)
    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    if step >= total:
        return final
    progress = (step - warmup) / (total - warmup)
    return final + (base - final) * (1 + math.cos(math.pi * progress)) / 2


def with_schedule(
    optimizer: Optimizer, total: int, final: float = 0, warmup: int = 0
) -> dict[str, Any]:
    """Return what Lightning wants: a warm-up and a cosine to *final*, a factor, per step."""
    scheduler = LambdaLR(
        optimizer, lambda step: cosine_warmup(step, total, 1, final, warmup)
    )
    return {
        'optimizer': optimizer,
        'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'},
    }
