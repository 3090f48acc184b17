# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Activation checkpointing: less memory for a second forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def checkpoint_activations(encoder: nn.Module, name: str) -> None:
    """Let an encoder forget its activations, and compute them again when needed.

    Args:
        encoder: A timm model.
        name: Its name.

    Raises:
        ValueError: If timm has no checkpoints for it.
    """
    try:
        cast(Any, encoder).set_grad_checkpointing()
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f'grad_checkpointing needs a model for which timm has it, got {name!r}. Set it '
            'to False, or choose another model'
        ) from error


@contextmanager
def paused_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep batch norm from taking note of a batch a second time.

    What is computed again in the backward pass has been seen before.

    Args:
        modules: All modules as they are now: Lightning may have replaced batch norms
            since they were made.

    Yields:
        Nothing. Afterwards, also after an error, all is as before.
    """
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
