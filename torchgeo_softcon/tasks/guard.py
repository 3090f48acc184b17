# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Watches losses and images of a run, without making the host wait for the device."""

import math
from collections import deque
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

#: Devices that compute while the host goes on, and whose events tell how far they are.
_ASYNCHRONOUS = ('cuda',)


def read_at_once(values: Tensor) -> bool:
    """Whether values are read in their own step: not where that waits for the device."""
    return values.device.type not in _ASYNCHRONOUS


#: Batches at the start of a run whose pixels are looked at.
_FIRST = 8

#: Farther from 0 than this, in units of the expected range, most pixels are not if they
#: were scaled to [0, 1] or standardised: by Chebyshev's inequality, a share of at most
#: 1 / 36 is beyond 6 standard deviations, and snow is less than 6 from the mean of land.
_FAR = 6

#: What is wrong if it is so in most pixels of the first batches, and what helps.
_SCALE = (
    'scale them to [0, 1] by what they are: value_range or level of the datasets of this '
    'package, ToUnitRange or UnitRange for others, 10 * log10 for radar'
)
_LOOK = (
    'the encoder cannot tell them apart: look at what is read from the files '
    '(`torchgeo-softcon inspect PATH`), and give value_range'
)
_ODD = (
    ('clipped, to exactly {low:g} or {high:g}', _SCALE),
    ('constant in their bands', _LOOK),
    ('far outside of the expected range', f'they seem not to be scaled: {_SCALE}'),
)


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
    """Watches the losses of a run, and the images of its first batches.

    A loss that is not finite raises at once, before it reaches the parameters. On a CUDA
    device, reading it would make the host wait for the device, so the values travel to the
    host asynchronously and are read when they have arrived, at the latest by :meth:`check`
    before a checkpoint is written.

    If most pixels of the first batches are constant, clipped, or far outside of the
    expected range, as unscaled numbers are, there is one warning.

    Attributes:
        value_range: Range that images are expected in, None for about [0, 1], or 0 and
            some standard deviations around it.
    """

    def __init__(self) -> None:
        """Initialize a new NonFiniteGuard instance."""
        self.value_range: tuple[float, float] | None = None
        self._looks = _FIRST
        self._seen: list[list[float]] = []
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
            if self._looks:
                self._note(self._look(image).tolist())
            if not loss.isfinite():
                finite = image[image.isfinite()]
                seen = finite if len(finite) else loss.new_zeros(1)
                low, high = float(seen.min()), float(seen.max())
                bad = image.numel() - finite.numel()
                raise NonFiniteLossError(_describe(step, float(loss), low, high, bad))
            return

        label = loss.new_zeros(1) if label is None else label
        limits = torch.stack([loss.float(), *label.float().aminmax()])
        values = torch.cat([limits, self._look(image)])
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
        self._judge()

    def _pop(self) -> None:
        """Check the oldest loss."""
        step, host, _ = self._pending.popleft()
        loss, label_low, label_high, low, high, *shares = host.tolist()
        if not (label_low >= 0 and label_high < math.inf):
            self._pending.clear()
            raise ValueError(label_message(label_low, label_high))
        if not math.isfinite(loss):
            self._pending.clear()
            raise NonFiniteLossError(_describe(step, loss, low, high, None))
        self._note([low, high, *shares])

    def _look(self, image: Tensor) -> Tensor:
        """Return the range of images, and at first the shares of odd pixels."""
        image = image.detach().float()
        if not self._looks or image.ndim < 3:
            return torch.stack(image.aminmax())
        self._looks -= 1
        low, high = self.value_range or (0, 1)
        least, most = image.flatten(-2).aminmax(dim=-1)
        shares = (
            (image == low) | (image == high),
            least == most,
            (image - low).abs() > _FAR * (high - low),
        )
        means = [share.float().mean() for share in shares]
        return torch.stack([least.min(), most.max(), *means])

    def _note(self, ranges: list[float]) -> None:
        """Keep what is told of one of the first batches, and judge them after the last."""
        if len(ranges) > 2:
            self._seen.append(ranges)
            if len(self._seen) == _FIRST:
                self._judge()

    def _judge(self) -> None:
        """Warn if most pixels of the first batches are odd."""
        if not self._seen:
            return
        lows, highs, *shares = zip(*self._seen, strict=True)
        self._looks, self._seen = 0, []
        low, high = self.value_range or (0, 1)
        for (what, remedy), share in zip(_ODD, shares, strict=True):
            mean = sum(share) / len(share)
            if mean > 0.5:
                rank_zero_warn(
                    f'{mean:.0%} of the pixels of the first images are '
                    f'{what.format(low=low, high=high)}. Their values are from '
                    f'{min(lows):g} to {max(highs):g}: {remedy}. If that is meant, '
                    'declare the range as value_range of the augmentations'
                )
                return
