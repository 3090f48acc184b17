# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""List what the package declares, and whether it loads: ``torchgeo-softcon list``."""

import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .. import __version__, plugin
from .parsers import CommandParser, print_table


def parser() -> CommandParser:
    """Return the parser of the command."""
    return CommandParser(
        'list',
        'Show what the package declares to torch and TorchGeo, and whether it loads. The\n'
        'exit status is 1 if something does not.',
        'torchgeo-softcon list',
    )


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    parser().parse_args(args)
    try:
        host = version('torchgeo')
    except PackageNotFoundError:
        host = 'not installed'
    reason = plugin.why_inactive()
    print(f'torchgeo-softcon  {__version__}')
    print(f'torchgeo          {host}')
    print('activation        ' + ('on' if reason is None else f'off, {reason}'))

    print('Loading everything that is declared ...', file=sys.stderr, flush=True)
    with warnings.catch_warnings():
        # The activation meets the same errors, which are about to be shown
        warnings.filterwarnings('ignore', 'torchgeo-softcon could not', RuntimeWarning)
        declared = plugin.declared()
    if not declared:
        print('\nNothing is declared: the package is not installed')
        return 1

    rows = [('GROUP', 'NAME', 'OBJECT', 'STATUS')]
    for entry, error in declared:
        # The message of an exception may have several lines
        status = (error or 'ok').partition('\n')[0]
        rows.append((entry.group, entry.name, entry.value, status))
    print()
    print_table(rows)
    return int(any(error for _, error in declared))
