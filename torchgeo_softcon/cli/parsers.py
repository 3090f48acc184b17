# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Parsers whose help shows at once, and tables. Nothing here imports torch or TorchGeo."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

_T = TypeVar('_T')


class CommandError(Exception):
    """An error whose message tells the user of a command what to change."""


def optional(convert: Callable[[str], _T]) -> Callable[[str], _T | None]:
    """Return a type of options that can be null, as in YAML."""

    def read(text: str) -> _T | None:
        return None if text == 'null' else convert(text)

    read.__name__ = convert.__name__  # which argparse shows
    return read


def boolean(text: str) -> bool:
    """Read true or false."""
    value = yaml.safe_load(text)
    if not isinstance(value, bool):
        raise ValueError(f'{text} must be true or false')  # noqa: TRY004
    return value


def list_of(convert: Callable[[Any], _T]) -> Callable[[str], list[_T]]:
    """Return a type of options that are lists in brackets, as in YAML: [5, 10]."""

    def read(text: str) -> list[_T]:
        values = yaml.safe_load(text)
        if not isinstance(values, list):
            raise argparse.ArgumentTypeError(f'must be a list: [A,B], got {text}')
        return [convert(value) for value in values]

    read.__name__ = f'list of {convert.__name__}'
    return read


def value_range(text: str) -> Any:
    """Read softcon, a pair of numbers, or a list of pairs."""
    return text if text == 'softcon' else list_of(lambda value: value)(text)


def year(text: str) -> int | str:
    """Read a year, or the word that stands for that of each patch."""
    if text == 'nearest' or text.isdecimal():
        return int(text) if text.isdecimal() else text
    raise argparse.ArgumentTypeError(f'must be a year or nearest, got {text!r}')


#: Types of the values of options, by how help names them: texts, if none is here.
_TYPES: dict[str, Callable[[str], Any]] = {
    'N': int,
    'X': float,
    'DIR': Path,
    'BOOL': boolean,
    'NAMES': list_of(str),
    'NUMBERS': list_of(int),
    'RANGE': value_range,
    'YEAR': year,
}

#: Options that choose a land-cover map.
LAND_COVER = {
    '--worldcover, --map PATH...': 'folders or files of tiles, or of another map',
    '--product, --legend NAME': 'land-cover product or .yaml file',
    '--year N': 'of the map, default: its last one',
}


class CommandParser(argparse.ArgumentParser):
    """The parser of a command, with one form for errors, help and options."""

    def __init__(
        self, command: str, description: str, example: str, **options: Any
    ) -> None:
        """Initialize a new CommandParser instance."""
        super().__init__(
            prog=f'torchgeo-softcon {command}',
            description=description,
            epilog=f'example:\n  {example}',
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def add_options(
        self,
        options: Mapping[str, str],
        title: str | None = None,
        required: Sequence[str] = (),
    ) -> None:
        """Add options, whose help is given by what they look like there, as a group.

        ``--a`` is a switch, ``--a N`` takes a value, ``--a N...`` one or more, ``--a {b,c}``
        one of these, and ``--a, --b N`` has two names. For types see :data:`_TYPES`.
        """
        group = self if title is None else self.add_argument_group(title)
        for declared, text in options.items():
            head, _, value = declared.rpartition(' ')
            names = (head or declared).split(', ')
            more: dict[str, Any] = {'required': names[0] in required}
            if not head:
                more = {'action': 'store_true', 'default': False}
            elif value.startswith('{'):
                more['choices'] = value[1:-1].split(',')
            else:
                more['metavar'] = value.removesuffix('...')
                more['type'] = optional(_TYPES.get(more['metavar'], str))
                if value.endswith('...'):
                    more['nargs'] = '+'
            group.add_argument(*names, help=text, **more)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 because of wrong options."""
        self.exit(2, f'{self.prog}: error: {message}. See {self.prog} --help\n')


def print_table(rows: Sequence[Sequence[str]], indent: int = 0) -> None:
    """Print rows of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f'{" " * indent}{"  ".join(cells)}'.rstrip())
