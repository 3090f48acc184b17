# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Checks of options. None, which stands for a default, passes, NaN never does."""

import math
from collections.abc import Callable, Sequence


def require(condition: object, message: str) -> None:
    """Raise a ValueError with a message unless a condition holds."""
    if not condition:
        raise ValueError(message)


def _check_of(valid: Callable[[float], bool], expected: str) -> Callable[..., None]:
    """Return a function that raises a ValueError for the first invalid option."""

    def check(**values: float | None) -> None:
        for name, value in values.items():
            require(
                value is None or valid(value), f'{name} must be {expected}, got {value}'
            )

    return check


check_counts = _check_of(lambda value: value >= 1, 'at least 1')
check_positive = _check_of(lambda value: value > 0, '> 0')
check_not_negative = _check_of(lambda value: value >= 0, '>= 0')
check_fractions = _check_of(lambda value: 0 <= value <= 1, 'in [0, 1]')


def check_choice(
    name: str, value: object, choices: Sequence[str], alternative: str = ''
) -> None:
    """Check that an option is one of several names."""
    if value not in choices:
        quoted = [*map(repr, choices), *([alternative] if alternative else [])]
        raise ValueError(
            f'{name} must be {", ".join(quoted[:-1])} or {quoted[-1]}, got {value!r}'
        )


def check_range(name: str, limits: Sequence[float], top: float = math.inf) -> None:
    """Check that an option is an ordered range of positive numbers."""
    if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= top:
        raise ValueError(
            f'{name} must be a range (low, high) in (0, {top:g}], got {limits}'
        )


def check_limits(name: str, limits: Sequence[float] | None) -> None:
    """Check that an option is None or two ascending numbers."""
    if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
        raise ValueError(f'{name} must be (low, high) with low < high, got {limits}')
