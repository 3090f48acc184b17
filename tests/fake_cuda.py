# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A GPU that computes nothing, where there is none.

PyTorch's fake tensors have a shape, a dtype and a device, but no values. Code that runs
on them takes the branches of a GPU, and is refused what a GPU refuses or pays for: tensors
of the CPU among those of the GPU, kernels that do not exist for a dtype, values that the
host would have to wait for, and shapes that depend on them. Backward passes are not
possible, as PyTorch's engine wants a driver: gradients that code asks for are made up.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .operations import Event

#: What code asks a driver for, and what one of compute capability 9.0 would answer.
ANSWERS = {
    'torch.cuda.is_available': True,
    'torch.cuda.current_device': 0,
    'torch.cuda.get_device_capability': (9, 0),
    'torch.cuda.is_bf16_supported': True,
    'torch.backends.cudnn.version': 92600,
}


def _forget() -> None:
    """Empty caches of the package, which would hand out fake tensors later."""
    for name, module in list(sys.modules.items()):
        if name.startswith('torchgeo_softcon'):
            for value in vars(module).values():
                if hasattr(value, 'cache_clear'):
                    value.cache_clear()


def _gradients(outputs: Tensor, inputs: Tensor, **kwargs: Any) -> tuple[Tensor]:
    """Make up the gradient of one tensor."""
    return (torch.empty_like(inputs, requires_grad=False),)


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Make tensors of the device ``'cuda'``, and those of the CPU, fake ones."""
    with ExitStack() as stack:
        stack.callback(_forget)
        # First, because it asks for a driver, and must not find one
        stack.enter_context(FakeTensorMode())
        for name, value in ANSWERS.items():
            stack.enter_context(mock.patch(name, return_value=value))
        stack.enter_context(mock.patch('torch.cuda.Event', Event))
        stack.enter_context(mock.patch('torch.autograd.grad', _gradients))
        _forget()
        yield


def empty(tensor: Tensor) -> Tensor:
    """A fake tensor on the GPU, like another one."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device='cuda'
    )


def move(module: nn.Module) -> None:
    """Give a module fake parameters and buffers on the GPU, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                trained = parameter.requires_grad
                part._parameters[name] = nn.Parameter(empty(parameter), trained)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = empty(buffer)


def is_fake_cuda(value: Any) -> bool:
    """Whether a value is a tensor on the GPU."""
    return isinstance(value, Tensor) and value.device.type == 'cuda'
