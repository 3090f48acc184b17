# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Schedules as pure functions of the optimizer step."""

import math


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

    Args:
        step: Index of the optimizer step, from 0.
        total: Number of optimizer steps of the run.
        base: Value at the end of the warm-up.
        final: Value the cosine ends in.
        warmup: Number of warm-up steps.
        start: Value of the first warm-up step.

    Returns:
        The value at *step*. Steps beyond *total* get *final*.

    Raises:
        ValueError: If *total* is not positive or *warmup* is negative.
    """
    if total < 1:
        raise ValueError(f'total must be at least one step, got {total}')
    if warmup < 0:
        raise ValueError(f'warmup must not be negative, got {warmup}')

    if step < warmup:
        return start + (base - start) * step / max(warmup - 1, 1)
    if step >= total:
        return final
    progress = (step - warmup) / (total - warmup)
    return final + (base - final) * (1 + math.cos(math.pi * progress)) / 2
