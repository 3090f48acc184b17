# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The table of the commands, and the one rule for their errors and exit statuses.

==== ===============================================================================
0    Done.
1    Done in part: what failed is listed.
2    Not done: wrong options, missing files, or data that do not fit. A line on standard
     error says what to change; a fault of this package shows its traceback instead.
130  Interrupted.
==== ===============================================================================
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from importlib import import_module

from .. import __version__
from .parsers import CommandError

#: Commands, which are the modules of this package with these names, and what they do.
COMMANDS = {
    'bench-data': 'tell whether a run waits for its data',
    'embed': 'write the embeddings of a dataset to a (Geo)Parquet file',
    'evaluate': 'k-NN and linear evaluation of frozen features',
    'export': 'write the encoder of a checkpoint for TorchGeo, timm or smp',
    'inspect': 'tell what training would read of some files',
    'labels': 'label an archive of patches with their land cover',
    'list': 'show what the package declares, and whether it loads',
    'pack': 'write SSL4EO-S12 in large files that are fast to read',
    'pretrain': 'pretrain an encoder on whatever a folder holds',
    'recipe': 'list the configurations for `torchgeo fit`, or write one',
    'report': 'show a run or an encoder on a page of pictures',
    'unpack': 'write the GeoTIFFs of a packed SSL4EO-S12',
}

#: Commands that keep what they have done when they are interrupted.
_RESUMABLE = ('embed', 'labels', 'pack', 'pretrain', 'unpack')


def main(args: Sequence[str] | None = None) -> int:
    """Run a command of torchgeo-softcon."""
    parser = argparse.ArgumentParser(
        prog='torchgeo-softcon',
        description='SoftCon and DINO-MC pretraining for TorchGeo. '
        'To train by hand, use the `torchgeo` command.',
        epilog='exit status: 0 done, 1 done in part with what failed listed, 2 not done '
        'because of options, files or data, 130 interrupted',
    )
    parser.add_argument(
        '--version', action='version', version=f'%(prog)s {__version__}'
    )
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)

    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] not in COMMANDS:
        parser.parse_args(args)  # prints the help or the version, or exits
        return 2
    return _run(args[0], args[1:])


def _run(command: str, args: list[str]) -> int:
    """Run a command by the rule above."""
    try:
        module = import_module(f'{__package__}.{command.replace("-", "_")}')
        return int(module.main(args))
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning exits when it is interrupted
        if not isinstance(stop.__context__ or stop, KeyboardInterrupt):
            raise
        resumable = command in _RESUMABLE
        print(f'interrupted{", start again to go on" * resumable}', file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f'torchgeo-softcon {command}: {message}', file=sys.stderr)
        return 2


def _message(error: Exception) -> str | None:
    """Say what a user can change, None for a fault of this package."""
    if isinstance(error, BrokenExecutor):
        return (
            'a process was killed, perhaps because memory ran out. Use fewer --workers, '
            'and start again to go on'
        )
    if isinstance(error, CommandError | OSError | ValueError | argparse.ArgumentError):
        return str(error)
    if 'lightning' not in sys.modules:  # slow to import, and raises nothing yet
        return None
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from .._compat import MisconfigurationException as OfHost

    return str(error) if isinstance(error, MisconfigurationException | OfHost) else None
