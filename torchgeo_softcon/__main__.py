# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Command-line interface."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from torchgeo_softcon import __version__, plugin

#: Commands in modules of their own.
_IN_MODULES = {
    'bench-data': 'tell whether a run waits for its data',
    'embed': 'write the embeddings of a dataset to a (Geo)Parquet file',
    'evaluate': 'k-NN and linear evaluation of frozen features',
    'labels': 'label an archive of patches with their land cover',
    'pack': 'write SSL4EO-S12 in large files that are fast to read',
    'report': 'show a run or an encoder on a page of pictures',
    'unpack': 'write the GeoTIFFs of a packed SSL4EO-S12',
}


def main(args: Sequence[str] | None = None) -> int:
    """Command-line interface to torchgeo-softcon.

    Args:
        args: Command-line arguments, by default those of the process.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(
        prog='torchgeo-softcon',
        description='SoftCon and DINO-MC pretraining for TorchGeo. '
        'To train, use the `torchgeo` command.',
    )
    parser.add_argument(
        '--version', action='version', version=f'%(prog)s {__version__}'
    )
    commands = parser.add_subparsers(metavar='COMMAND', required=True)

    command = commands.add_parser(
        'list',
        help='show what the package declares, and whether it loads',
        description='Show what the package declares to torch and TorchGeo, and whether '
        'it loads. The exit status is 1 if something does not.',
    )
    command.set_defaults(run=list_declared)

    command = commands.add_parser(
        'export',
        help='write the encoder of a checkpoint for TorchGeo, timm or smp',
        description='Write the encoder of a checkpoint, with a model card. TorchGeo opens '
        'the checkpoints themselves as well; an export is smaller, can have another patch '
        'size, and is for other tools, too.',
    )
    command.add_argument('checkpoint', help='of SoftConTask or DINOMCTask')
    command.add_argument(
        '--format', required=True, choices=('torchgeo', 'timm', 'safetensors', 'smp')
    )
    command.add_argument(
        '--branch',
        choices=('student', 'teacher'),
        help='default: the student of SoftCon, the teacher of DINO-MC',
    )
    command.add_argument('--patch-size', type=int, metavar='P')
    command.add_argument(
        '--img-size',
        type=int,
        metavar='N',
        help='that a Vision Transformer is built for',
    )
    command.add_argument(
        '--output', metavar='FILE', help='default: beside the checkpoint'
    )
    command.set_defaults(run=export_encoder)

    # They have a parser of their own
    rest = list(sys.argv[1:] if args is None else args)
    for name, text in _IN_MODULES.items():
        commands.add_parser(name, help=text, add_help=False)
    if rest and rest[0] in _IN_MODULES:
        run = import_module(f'torchgeo_softcon.{rest[0].replace("-", "_")}').main
        return _status(run, rest[1:], rest[0])

    namespace = parser.parse_args(rest)
    return _status(namespace.run, namespace, rest[0])


def _status(run: Callable[[Any], int], arguments: Any, command: str) -> int:
    """Exit status of a command: 1 with a line for what a user can change."""
    try:
        return run(arguments)
    except Exception as error:
        if not _is_of_user(error):
            raise
        print(f'torchgeo-softcon {command}: {error}', file=sys.stderr)
        return 1


def _is_of_user(error: Exception) -> bool:
    if isinstance(error, OSError | ValueError):
        return True
    # Not needed before something fails, and slow to import
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from ._compat import MisconfigurationException as OfHost

    return isinstance(error, MisconfigurationException | OfHost)


def export_encoder(namespace: argparse.Namespace) -> int:
    """Write the encoder of a checkpoint.

    Args:
        namespace: Parsed arguments.

    Returns:
        0.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If something does not fit.
    """
    from torchgeo_softcon.export import export

    options = {
        k: v for k, v in vars(namespace).items() if k not in ('run', 'checkpoint')
    }
    for path in export(namespace.checkpoint, **options):
        print(path)
    return 0


def list_declared(namespace: argparse.Namespace) -> int:
    """Print the entry points of the package as a table.

    Args:
        namespace: Parsed arguments, none.

    Returns:
        0 if everything loads, else 1.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        host = version('torchgeo')
    except PackageNotFoundError:
        host = 'not installed'

    reason = plugin.why_inactive()
    print(f'torchgeo-softcon  {__version__}')
    print(f'torchgeo          {host}')
    print('activation        ' + ('on' if reason is None else f'off, {reason}'))

    with warnings.catch_warnings():
        # The activation meets the same errors, which are about to be shown
        warnings.filterwarnings('ignore', 'torchgeo-softcon could not', RuntimeWarning)
        declared = plugin.declared()
    if not declared:
        print('\nNothing is declared: the package is not installed')
        return 1

    rows = [('GROUP', 'NAME', 'OBJECT', 'STATUS')]
    rows += [(e.group, e.name, e.value, error or 'ok') for e, error in declared]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print()
    for *cells, status in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        # The message of an exception may have several lines
        print(*padded, status.partition('\n')[0], sep='  ')
    return int(any(error for _, error in declared))


if __name__ == '__main__':
    sys.exit(main())
