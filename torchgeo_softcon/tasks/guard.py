# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Stops a run whose loss is not finite, without making the host wait for the device."""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

#: Devices that compute while the host goes on, and whose events tell how far they are.
_ASYNCHRONOUS = ('cuda',)


def read_at_once(values: Tensor) -> bool:
    """Whether values are read in their own step: not where that waits for the device."""
    return values.device.type not in _ASYNCHRONOUS


class NonFiniteLossError(RuntimeError):
    """Raised if a loss is NaN or infinite."""


def label_message(low: float, high: float) -> str:
    """Return the error about the values of labels: what is wrong and what to do."""
    return (
        f"batch['label'] must be finite and >= 0, got values from {low:g} to {high:g}. "
        'An unknown label is all zeros'
    )


def is_chance(loss: Any, prototypes: int, width: float) -> Any:
    """Tell whether a loss over prototypes is that of no opinion, within a share *width*.

    Where each is as likely as any other, the cross-entropy is log(*prototypes*). A tensor
    gives a tensor, without making the host wait for the device.
    """
    chance = math.log(prototypes)
    return abs(loss - chance) < width * chance


def plateau_message(value: str, prototypes: int, steps: int) -> str:
    """Word the warning of a loss over prototypes that has stayed where it starts."""
    return (
        f'train_loss has stayed at {value} for {steps} steps, which is '
        f'log({prototypes}): every prototype is as likely as any other, whatever the '
        'image. Usually one of these helps: a lower teacher_temperature, a lower '
        'momentum of the centre, fewer prototypes (output_dim) or a larger batch_size, a '
        'lower lr or a longer warm-up, images that differ after normalization.'
    )


def _describe(step: int, loss: float, low: float, high: float, bad: int | None) -> str:
    """Return the message of the error."""
    pixels = ''
    if bad is None:
        pixels = ' (NaN: the image has NaN pixels)' if math.isnan(low) else ''
    elif bad:
        pixels = f' in the finite pixels, {bad} pixels are NaN or infinite'
    return (
        f'train_loss is {loss} at optimizer step {step}. The image ranges from {low:g} '
        f'to {high:g}{pixels}. Fill no-data pixels with finite values, scale the images '
        'to about [0, 1], or lower lr. The last checkpoint on disk is not affected'
    )


class NonFiniteGuard:
    """Watches the losses of a run.

    A loss that is not finite raises at once, before it reaches the parameters. On a CUDA
    device, reading it would make the host wait for the device, so the values travel to the
    host asynchronously and are read when they have arrived, at the latest by :meth:`check`
    before a checkpoint is written.
    """

    def __init__(self) -> None:
        """Initialize a new NonFiniteGuard instance."""
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()

    def watch(
        self, step: int, loss: Tensor, image: Tensor, label: Tensor | None = None
    ) -> None:
        """Take note of the loss of an optimizer step, of its images and labels.

        Labels are only read on a CUDA device: on others, they are checked before they are
        used.

        Raises:
            NonFiniteLossError: If this or, on a CUDA device, an earlier loss is not
                finite.
            ValueError: If an earlier label was negative, NaN or infinite.
        """
        loss = loss.detach()
        if read_at_once(loss):
            if not loss.isfinite():
                finite = image[image.isfinite()]
                seen = finite if len(finite) else loss.new_zeros(1)
                low, high = float(seen.min()), float(seen.max())
                bad = image.numel() - finite.numel()
                raise NonFiniteLossError(_describe(step, float(loss), low, high, bad))
            return

        label = loss.new_zeros(1) if label is None else label
        ranges = [*image.float().aminmax(), *label.float().aminmax()]
        values = torch.stack([loss.float(), *ranges])
        host = values.to('cpu', non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, host, event))
        while self._pending and self._pending[0][2].query():
            self._pop()

    def check(self) -> None:
        """Wait for all losses and check them."""
        while self._pending:
            self._pending[0][2].synchronize()
            self._pop()

    def _pop(self) -> None:
        """Check the oldest loss."""
        step, host, _ = self._pending.popleft()
        loss, low, high, label_low, label_high = host.tolist()
        if not (label_low >= 0 and label_high < math.inf):
            self._pending.clear()
            raise ValueError(label_message(label_low, label_high))
        if not math.isfinite(loss):
            self._pending.clear()
            raise NonFiniteLossError(_describe(step, loss, low, high, None))
