# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Parsers whose help shows at once, and tables. Nothing here imports torch or TorchGeo."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import yaml

_T = TypeVar('_T')


class CommandError(Exception):
    """An error whose message tells the user of a command what to change."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command, with one form for errors and for help."""

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

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 because of wrong options."""
        self.exit(2, f'{self.prog}: error: {message}. See {self.prog} --help\n')


def add_land_cover(parser: CommandParser, title: str) -> None:
    """Add a group of options that choose a map."""
    add = parser.add_argument_group(title).add_argument
    tiles = 'folders or files of tiles, or of another map'
    add('--worldcover', '--map', nargs='+', metavar='PATH', help=tiles)
    product = 'land-cover product or .yaml file'
    add('--product', '--legend', metavar='NAME', help=product)
    add('--year', type=int, help='of the map, default: its last one')


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


def print_table(rows: Sequence[Sequence[str]], indent: int = 0) -> None:
    """Print rows of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f'{" " * indent}{"  ".join(cells)}'.rstrip())
