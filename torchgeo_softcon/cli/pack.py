# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""``torchgeo-softcon pack``."""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from ..ssl4eo.pack import SHARD_SIZE, pack, verify
from ..ssl4eo.tiffs import BANDS

#: Failures that are printed.
_NAMED = 10


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon pack``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status: 1 if images could not be read or are not what they were, 2 if the
        run could not go on, 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog='torchgeo-softcon pack',
        description='Write the images of SSL4EO-S12 in few large files, which are read '
        'a hundred times faster. Nothing is lost: `torchgeo-softcon unpack` gives the '
        'GeoTIFFs back. An interrupted run goes on when started again.',
    )
    parser.add_argument('root', help='folder with s1, s2c or s2a')
    parser.add_argument('out', help='folder to write')
    parser.add_argument(
        '--split', nargs='+', choices=BANDS, help='default: all there are'
    )
    parser.add_argument('--labels', metavar='FILE', help='to put into the index')
    parser.add_argument(
        '--workers', type=int, default=1, metavar='N', help='processes (default: 1)'
    )
    parser.add_argument(
        '--shard-size',
        type=int,
        default=SHARD_SIZE,
        metavar='N',
        help=f'images per file (default: {SHARD_SIZE})',
    )
    parser.add_argument(
        '--verify', action='store_true', help='read all again and compare checksums'
    )
    options = parser.parse_args(args)
    try:
        failures = pack(
            options.root,
            options.out,
            options.split,
            options.labels,
            options.workers,
            options.shard_size,
            progress=True,
        )
        damaged = (
            verify(options.out, options.split, progress=True) if options.verify else []
        )
    except (OSError, ValueError) as error:
        print(f'torchgeo-softcon pack: {error}', file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            'torchgeo-softcon pack: a process was killed, perhaps for want of memory. Use '
            'fewer --workers, and start again to go on',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print('torchgeo-softcon pack: stopped, start again to go on', file=sys.stderr)
        return 130
    for failure in [*failures[:_NAMED], *damaged[:_NAMED]]:
        print(f'{failure.id}/{failure.season}: {failure.reason}', file=sys.stderr)
    if failures:
        print(
            f'{len(failures)} images could not be read. They are in failures.csv beside '
            'the index, and are tried again by the next run',
            file=sys.stderr,
        )
    if damaged:
        print(f'{len(damaged)} records are not what they were', file=sys.stderr)
    return int(bool(failures or damaged))
