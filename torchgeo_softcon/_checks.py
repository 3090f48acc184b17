# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Checks of options. None, which stands for a default, passes, NaN never does."""

import math
from collections.abc import Callable, Mapping, Sequence


def _check(
    valid: Callable[[float], bool], expected: str, values: Mapping[str, float | None]
) -> None:
    """Raise a ValueError for the first option that is not *valid*."""
    for name, value in values.items():
        if value is not None and not valid(value):
            raise ValueError(f'{name} must be {expected}, got {value}')


def require(condition: object, message: str) -> None:
    """Raise a ValueError with a message unless a condition holds."""
    if not condition:
        raise ValueError(message)


def check_counts(**values: int | None) -> None:
    """Check that options are at least 1, else raise a ValueError that names one."""
    _check(lambda value: value >= 1, 'at least 1', values)


def check_positive(**values: float | None) -> None:
    """Check that options are above 0, else raise a ValueError that names one."""
    _check(lambda value: value > 0, '> 0', values)


def check_not_negative(**values: float | None) -> None:
    """Check that options are 0 or above, else raise a ValueError that names one."""
    _check(lambda value: value >= 0, '>= 0', values)


def check_fractions(**values: float | None) -> None:
    """Check that options are in [0, 1], else raise a ValueError that names one."""
    _check(lambda value: 0 <= value <= 1, 'in [0, 1]', values)


def check_choice(
    name: str, value: object, choices: Sequence[str], alternative: str = ''
) -> None:
    """Check that an option is one of several names.

    Args:
        name: Name of the option.
        value: Value of the option.
        choices: Names that it can have, two or more.
        alternative: What else it may be, named in the message.

    Raises:
        ValueError: If it is another one.
    """
    if value not in choices:
        quoted = [*map(repr, choices), *([alternative] if alternative else [])]
        raise ValueError(
            f'{name} must be {", ".join(quoted[:-1])} or {quoted[-1]}, got {value!r}'
        )


def check_range(name: str, limits: Sequence[float], top: float = math.inf) -> None:
    """Check that an option is an ordered range of positive numbers.

    Args:
        name: Name of the option.
        limits: Smallest and largest value.
        top: Largest value allowed.

    Raises:
        ValueError: If it is not.
    """
    if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= top:
        raise ValueError(
            f'{name} must be a range (low, high) in (0, {top:g}], got {limits}'
        )


def check_limits(name: str, limits: Sequence[float] | None) -> None:
    """Check that an option is None or two ascending numbers.

    Args:
        name: Name of the option.
        limits: Smallest and largest value.

    Raises:
        ValueError: If it is not.
    """
    if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
        raise ValueError(f'{name} must be (low, high) with low < high, got {limits}')
