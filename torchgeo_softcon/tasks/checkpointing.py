# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Activation checkpointing: less memory for a second forward pass."""

from collections.abc import Iterable
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


class PausedStatistics:
    """Keeps batch norm from taking note of a batch a second time.

    What is computed again in the backward pass has been seen before.
    """

    def __init__(self) -> None:
        """Initialize a new PausedStatistics instance."""
        self._momenta: list[tuple[_BatchNorm, float | None]] = []

    def pause(self, modules: Iterable[nn.Module]) -> None:
        """Keep running statistics as they are.

        Args:
            modules: All modules as they are now: Lightning may have replaced batch norms
                since they were made.
        """
        self.resume()
        for module in modules:
            if isinstance(module, _BatchNorm):
                self._momenta.append((module, module.momentum))
                # Not without statistics, which are among the tensors that are kept
                module.momentum = 0.0

    def resume(self) -> None:
        """Let running statistics move again."""
        for module, momentum in self._momenta:
            module.momentum = momentum
        self._momenta.clear()
