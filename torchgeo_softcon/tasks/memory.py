# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""How encoders lie in memory, and what they keep there for the backward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


def is_convolutional(encoder: nn.Module) -> bool:
    """Whether an encoder has more convolutions of images than one that embeds patches."""
    return sum(isinstance(m, nn.Conv2d) for m in encoder.modules()) > 1


def set_memory_format(encoder: nn.Module, channels_last: bool | None) -> None:
    """Lay out the parameters of an encoder, by default by :func:`is_convolutional`.

    PyTorch convolves with channels last if parameters are so, whatever the images are.
    """
    if is_convolutional(encoder) if channels_last is None else channels_last:
        # Not all of four dimensions: others are no images, and five are refused
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def contiguous(state_dict: dict[str, Any]) -> None:
    """Undo it in a state dict, in place, so that files are as those of others."""
    for name, value in state_dict.items():
        if isinstance(value, Tensor):
            state_dict[name] = value.contiguous()


@torch.no_grad()
def follow_parameters(optimizer: Optimizer) -> None:
    """Lay out the state of an optimizer, from a checkpoint, as its parameters are.

    PyTorch's (2.15) fused optimizers pair values as they lie in memory.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                same = torch.empty_like(parameter, dtype=value.dtype)
                state[name] = same.copy_(value)


def checkpoint_activations(encoder: nn.Module, name: str) -> None:
    """Let a timm model forget its activations, and compute them again when needed."""
    try:
        cast(Any, encoder).set_grad_checkpointing()
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f'grad_checkpointing needs a model for which timm has it, got {name!r}. Set it '
            'to False, or choose another model'
        ) from error


@contextmanager
def paused_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep batch norm from taking note of a batch that is computed again."""
    paused = [
        (module, module.momentum, number, number.clone())
        for module in modules
        if isinstance(module, _BatchNorm)
        and (number := module.num_batches_tracked) is not None
    ]
    # Not without statistics, which are among the tensors that are kept
    for module, *_ in paused:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum, number, before in paused:
            module.momentum = momentum
            number.copy_(before)
