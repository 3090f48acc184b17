# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Convolutional encoders with the channels of a pixel side by side in memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def is_convolutional(encoder: nn.Module) -> bool:
    """Whether an encoder is faster with channels last.

    Args:
        encoder: An encoder.

    Returns:
        True if it has more convolutions of images than the one that embeds patches: ResNets,
        ConvNeXt, but not Vision Transformers and Swin.
    """
    return sum(isinstance(m, nn.Conv2d) for m in encoder.modules()) > 1


def set_memory_format(encoder: nn.Module, channels_last: bool | None) -> None:
    """Lay out the weights of an encoder, which its activations follow.

    PyTorch convolves with channels last if the weights are so, whatever the images are.

    Args:
        encoder: An encoder.
        channels_last: Whether channels come last. None decides by
            :func:`is_convolutional`.
    """
    if is_convolutional(encoder) if channels_last is None else channels_last:
        # Not all of four dimensions: others are no images, and five are refused
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def contiguous(state_dict: dict[str, Any]) -> None:
    """Undo it in a state dict, so that files are as those of others.

    Args:
        state_dict: Tensors by name, replaced in place.
    """
    for name, value in state_dict.items():
        if isinstance(value, Tensor):
            state_dict[name] = value.contiguous()


@torch.no_grad()
def follow_parameters(optimizer: Optimizer) -> None:
    """Lay out the state of an optimizer as its parameters are.

    A checkpoint may hold it in another layout, and PyTorch's (2.15) fused optimizers pair
    values as they lie in memory.

    Args:
        optimizer: An optimizer.
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
