# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Command-line interface."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from torchgeo_softcon import __version__

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
    command.set_defaults(run='list')

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
    command.set_defaults(run='export')

    # They have a parser of their own
    rest = list(sys.argv[1:] if args is None else args)
    for name, text in _IN_MODULES.items():
        commands.add_parser(name, help=text, add_help=False)
    if rest and rest[0] in _IN_MODULES:
        module = f'torchgeo_softcon.cli.{rest[0].replace("-", "_")}'
        run = import_module(module).main
        return _status(run, rest[1:], rest[0])

    namespace = parser.parse_args(rest)
    run = import_module(f'torchgeo_softcon.cli.{namespace.run}').run
    return _status(run, namespace, rest[0])


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


if __name__ == '__main__':
    sys.exit(main())
