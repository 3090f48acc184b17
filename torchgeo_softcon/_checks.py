# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Checks of options. None, which stands for a default, passes, NaN never does."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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


def check_types(function: Callable[..., None], values: Mapping[str, Any]) -> None:
    """Check arguments against the type hints of a function, usually an ``__init__``.

    Numbers of NumPy and tensors with one element count as numbers, lists as tuples (YAML
    has none), and numbers must be finite.

    Args:
        function: Function with the type hints.
        values: Its arguments by name, usually ``locals()``. Other names are ignored.

    Raises:
        TypeError: If the type of an argument does not fit.
        ValueError: If an argument is not one of several names, or not finite.
    """
    for name, hint in get_type_hints(function).items():
        if name not in values:
            continue
        value, options = values[name], _options(hint)
        if float in options and isinstance(value, float):
            require(math.isfinite(value), f'{name} must be finite, got {value}')
        if _fits(value, hint):
            continue
        names = [name for option in options for name in _literals(option)]
        if names and (isinstance(value, str) or len(names) == len(options)):
            others = [_describe(x) for x in options if not _literals(x)]
            check_choice(name, value, names, ' or '.join(others))
        expected = ' or '.join(dict.fromkeys(map(_describe, options)))
        raise TypeError(
            f'{name} must be {expected}, got {type(value).__name__}: {value!r}'
        )


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(x for member in get_args(hint) for x in _options(member))
    return (hint,)


def _literals(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or origin in (Union, UnionType):
        return hint is Any or any(_fits(value, option) for option in args)
    if origin is Literal:
        return isinstance(value, str | int) and value in args
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ == 'bool'
    if hint in (int, float):
        number = hasattr(value, '__index__' if hint is int else '__float__')
        return number and not isinstance(value, bool)
    if origin in (tuple, list, Sequence, Iterable):
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            return False
        if origin is Iterable or not isinstance(value, Sized):
            return origin is Iterable
        types = args if origin is tuple else args[:1] * len(value)
        return len(types) == len(value) and all(map(_fits, value, types))
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _describe(hint: Any) -> str:
    """Name a type in an error message."""
    origin, args = get_origin(hint), get_args(hint)
    simple = {int: 'a whole number', float: 'a number', bool: 'true or false'}
    simple |= {str: 'text', NoneType: 'None'}
    if origin is tuple:
        return f'({", ".join(map(_describe, args))})'
    if origin in (list, Sequence, Iterable):
        return f'a list of {_describe(args[0])}'
    if origin is Literal:
        return ', '.join(map(repr, args))
    return simple.get(hint, getattr(origin or hint, '__name__', str(hint)))
