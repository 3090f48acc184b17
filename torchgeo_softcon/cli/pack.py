# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SSL4EO-S12 in large files: ``torchgeo-softcon pack``."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .parsers import LAND_COVER, CommandError, CommandParser

#: Failures that are printed.
_NAMED = 10

_SPLIT = {
    '--split NAME...': 's1, s2c, s2a, or S1GRD, S2L1C, S2L2A, S2RGB, S1RTC of v1.1 and '
    'TerraMesh; default: all that the archive has'
}
_PACKING = {
    '--labels FILE': 'to put into the index, or lulc for the layer of v1.1',
    '--workers N': 'processes (default: 1)',
    '--scheduler ADDRESS': 'of Dask, like tcp://10.0.0.1:8786, instead of processes',
    '--shard-size N': 'images per file (default: 256)',
    '--verify': 'read all again and compare checksums',
}


def archive_parser(command: str, description: str, root: str) -> CommandParser:
    """Return a parser with the options of ``pack`` and ``unpack``.

    Options that are not given are left to the defaults of the function behind.
    """
    parser = CommandParser(
        command,
        f'{description}\nAn interrupted run goes on when started again.',
        f'torchgeo-softcon {command} DIR OUT --split s2c',
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument('root', help=root)
    parser.add_argument('out', help='folder to write')
    parser.add_options(_SPLIT)
    return parser


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = archive_parser(
        'pack',
        'Write the images of SSL4EO-S12 in few large files, which are read a hundred times\n'
        'faster. Nothing is lost: `torchgeo-softcon unpack` gives the GeoTIFFs back.\n'
        'SSL4EO-S12 v1.1 (shards or Zarr chunk files) and TerraMesh are packed as well, and\n'
        'scenes of your own, with the land cover under them.',
        'folder with s1, s2c or s2a, or with the modalities of v1.1, or with scenes',
    )
    parser.add_options(_PACKING)
    parser.add_options(LAND_COVER, 'land cover of your own scenes')
    return parser


def print_failures(failures: Sequence[Any], what: str) -> int:
    """Print the first failures with their reasons, and return the exit status."""
    for *names, reason in failures[:_NAMED]:
        print(f'{"/".join(names)}: {reason}', file=sys.stderr)
    if failures:
        print(f'{len(failures)} {what}', file=sys.stderr)
    return int(bool(failures))


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = vars(parser().parse_args(args))
    check = options.pop('verify')
    # Not before: help must not wait for it
    from ..ssl4eo.pack import pack, verify
    from ..ssl4eo.shards import find_splits

    if not find_splits(options['root']):
        return _pack_scenes(options, check)
    if strange := {'worldcover', 'product', 'year'} & {*options}:
        raise CommandError(
            f'{", ".join(sorted(strange))} must be left out for SSL4EO-S12, whose land '
            'cover is given by --labels'
        )
    status = print_failures(
        pack(**options, progress=True),
        'images could not be read. They are in failures.csv beside the index, and are '
        'tried again by the next run',
    )
    if check:
        damaged = verify(options['out'], options.get('split'), progress=True)
        status |= print_failures(damaged, 'records have changed')
    return status


def _pack_scenes(options: dict[str, Any], check: bool) -> int:
    """Pack scenes, and return the exit status."""
    if strange := {'split', 'labels', 'shard_size'} & {*options}:
        raise CommandError(
            f'{", ".join(sorted(strange))} must be left out, or root be a folder of '
            f'SSL4EO-S12, found none of its folders in {options["root"]}'
        )
    from ..datasets.scene_pack import pack_scenes, verify_scenes

    options['images'] = options.pop('root')
    failures = pack_scenes(**options, progress=True)
    status = print_failures(failures, 'files could not be read, run it again')
    if check:
        damaged = verify_scenes(options['out'])
        status |= print_failures(damaged, 'files have changed')
    return status
