# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Tell what training would read of some files: ``torchgeo-softcon inspect``."""

import argparse
from collections.abc import Sequence

from .parsers import LAND_COVER, CommandParser

_DESCRIPTION = """\
Print what training would read of images: which files and bands make a scene, level, offset,
scale and no data of their numbers, a sample before and after scaling, and the land cover
below. PATH is a file, a folder or a pattern of georeferenced images, or a folder with the
folders images and masks. The exit status is 1 if --check finds damaged files."""

_EXAMPLES = """\
torchgeo-softcon inspect S2A_MSIL2A_20230601T101031_N0509_R022_T32UNE_20230601T120000.SAFE
  torchgeo-softcon inspect images --worldcover worldcover --plot windows.png --check"""

_READING = {
    '--bands NAMES': 'to use: [B4,B3,B2]',
    '--all-bands NAMES': 'in file order',
    '--level {L1C,L2A}': 'of Sentinel-2',
    '--offset X': 'what is added to all numbers',
    '--value-range RANGE': 'what becomes 0 and 1: softcon, [0,10000], or a pair for each band',
    '--nodata X': 'value of pixels without data',
    '--patch-size N': 'of a window',
}
_OUTPUT = {
    '--plot FILE': 'picture of windows to write',
    '--windows N': 'windows of it, default: 8',
    '--check': 'read every file wholly, and list the damaged ones',
}


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        'inspect',
        _DESCRIPTION,
        _EXAMPLES,
        usage='%(prog)s PATH [PATH ...] [OPTIONS]',
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument('paths', nargs='+', metavar='PATH', help='images')
    parser.add_options(
        _READING, 'reading, as options of the same names of the datamodules'
    )
    parser.add_options(LAND_COVER, 'land cover')
    parser.add_options(_OUTPUT, 'output')
    parser.set_defaults(plot=None, windows=8)
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = vars(parser().parse_args(args))
    # Not before: help must not wait for it
    from .inspection import inspect

    return inspect(**options)
