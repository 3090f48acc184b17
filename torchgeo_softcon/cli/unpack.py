# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""``torchgeo-softcon unpack``."""

import argparse
import sys
from collections.abc import Sequence

from ..ssl4eo.tiffs import BANDS
from ..ssl4eo.unpack import unpack

#: Failures that are printed.
_NAMED = 10


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon unpack``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status: 1 if records are not what they were, 2 if the run could not go on,
        130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog='torchgeo-softcon unpack',
        description='Write the GeoTIFFs of an archive that `torchgeo-softcon pack` wrote, '
        'with the same pixels and georeference. An interrupted run goes on when started '
        'again.',
    )
    parser.add_argument('root', help='folder that is packed')
    parser.add_argument('out', help='folder to write')
    parser.add_argument(
        '--split', nargs='+', choices=BANDS, help='default: all there are'
    )
    options = parser.parse_args(args)
    try:
        done = unpack(options.root, options.out, options.split, progress=True)
    except (OSError, ValueError) as error:
        print(f'torchgeo-softcon unpack: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('torchgeo-softcon unpack: stopped, start again to go on', file=sys.stderr)
        return 130
    for failure in done.failures[:_NAMED]:
        print(f'{failure.id}/{failure.season}: {failure.reason}', file=sys.stderr)
    if done.failures:
        print(f'{len(done.failures)} records are damaged', file=sys.stderr)
    print(f'{done.written} images written, {done.there} were there')
    return int(bool(done.failures))
