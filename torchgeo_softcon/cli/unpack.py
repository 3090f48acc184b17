# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The GeoTIFFs of a packed SSL4EO-S12: ``torchgeo-softcon unpack``."""

from collections.abc import Sequence

from .pack import archive_parser, print_failures
from .parsers import CommandParser


def parser() -> CommandParser:
    """Return the parser of the command."""
    return archive_parser(
        'unpack',
        'Write the GeoTIFFs of an archive that `torchgeo-softcon pack` wrote, with the\n'
        'same pixels and georeference.',
        'folder that is packed',
    )


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = vars(parser().parse_args(args))
    # Not before: help must not wait for it
    from ..ssl4eo.pack import unpack

    done = unpack(**options, progress=True)
    status = print_failures(done.failures, 'records are damaged')
    print(f'{done.written} images written, {done.there} were there')
    return status
