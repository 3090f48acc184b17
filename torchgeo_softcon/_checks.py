# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Checks of options. None, which stands for a default, passes, NaN never does."""

import math
from collections.abc import Sequence


def require(condition: object, message: str) -> None:
    """Raise a ValueError with a message unless a condition holds."""
    if not condition:
        raise ValueError(message)


def check_counts(**values: int | None) -> None:
    """Check that options are at least 1.

    Args:
        **values: Values by the name of the option.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if value is not None and not value >= 1:
            raise ValueError(f'{name} must be at least 1, got {value}')


def check_positive(**values: float | None) -> None:
    """Check that options are above 0.

    Args:
        **values: Values by the name of the option.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f'{name} must be > 0, got {value}')


def check_not_negative(**values: float | None) -> None:
    """Check that options are 0 or above.

    Args:
        **values: Values by the name of the option.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if value is not None and not value >= 0:
            raise ValueError(f'{name} must be >= 0, got {value}')


def check_fractions(**values: float | None) -> None:
    """Check that options are in [0, 1].

    Args:
        **values: Values by the name of the option.

    Raises:
        ValueError: If one is not.
    """
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f'{name} must be in [0, 1], got {value}')


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
