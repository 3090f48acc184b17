# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Configurations for ``torchgeo fit``: ``torchgeo-softcon recipe``."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .._checks import check_choice
from .parsers import CommandParser, print_table

_OPTIONS = {
    '--out FILE': 'file to write, NAME.yaml by default',
    '--overwrite': 'replace the file if it exists',
}


def recipes() -> dict[str, str]:
    """Return the texts of all recipes by their names."""
    paths = (files('torchgeo_softcon') / 'recipes').iterdir()
    found = {p.name.removesuffix('.yaml'): p for p in paths if p.name.endswith('.yaml')}
    return {name: found[name].read_text(encoding='utf-8') for name in sorted(found)}


def section(class_path: str, **init_args: Any) -> dict[str, Any]:
    """Return a part of a configuration that stands for an instance of a class."""
    return {'class_path': class_path, 'init_args': init_args}


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        'recipe',
        'List the recipes, or write one of them: a configuration for `torchgeo fit`\n'
        'whose comments say what it does, on which data, and what to expect.',
        'torchgeo-softcon recipe own_area',
    )
    parser.add_argument('name', nargs='?', help='recipe to write')
    parser.add_options(_OPTIONS)
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = parser().parse_args(args)
    texts = recipes()
    if options.name is None:
        titles = {name: text.partition('\n')[0] for name, text in texts.items()}
        print_table([(k, title.removeprefix('# ')) for k, title in titles.items()])
        return 0
    check_choice('name', options.name, [*texts])
    out = Path(options.out or f'{options.name}.yaml')
    if out.exists() and not options.overwrite:
        raise ValueError(f'{out} exists. Give another --out, or --overwrite')
    out.write_text(
        texts[options.name].replace(f'examples/{options.name}.yaml', str(out)),
        encoding='utf-8',
    )
    print(
        f'{out} is written. Change what you need, then:\n  torchgeo fit --config {out}'
    )
    return 0
