# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Tell what training would read of some files: ``torchgeo-softcon inspect``."""

import argparse
from collections.abc import Sequence
from typing import Any

from .parsers import CommandParser, add_land_cover, list_of

_DESCRIPTION = """\
Print what training would read of images: which files and bands make a scene, level, offset,
scale and no data of their numbers, a sample before and after scaling, and the land cover
below. PATH is a file, a folder or a pattern of georeferenced images, or a folder with the
folders images and masks. The exit status is 1 if --check finds damaged files."""

_EXAMPLES = """\
torchgeo-softcon inspect S2A_MSIL2A_20230601T101031_N0509_R022_T32UNE_20230601T120000.SAFE
  torchgeo-softcon inspect images --worldcover worldcover --plot windows.png --check"""


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
    add = parser.add_argument_group(
        'reading, as the options of the same names of the datamodules'
    ).add_argument
    add('--bands', type=list_of(str), help='to use: [B4,B3,B2]')
    add('--all-bands', type=list_of(str), help='in file order')
    add('--level', choices=('L1C', 'L2A'), help='of Sentinel-2')
    add('--offset', type=float, help='what is added to all numbers')
    add(
        '--value-range',
        type=_value_range,
        metavar='RANGE',
        help='what becomes 0 and 1: softcon, [0,10000], or a pair for each band',
    )
    add('--nodata', type=float, help='value of pixels without data')
    add('--patch-size', type=int, metavar='N', help='of a window')
    add_land_cover(parser, 'land cover')
    add = parser.add_argument_group('output').add_argument
    add('--plot', metavar='FILE', default=None, help='picture of windows to write')
    add('--windows', type=int, default=8, metavar='N', help='windows of it, default: 8')
    add(
        '--check',
        action='store_true',
        default=False,
        help='read every file wholly, and list the damaged ones',
    )
    return parser


def _value_range(text: str) -> Any:
    """Read softcon, a pair of numbers, or a list of pairs."""
    return text if text == 'softcon' else list_of(lambda value: value)(text)


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = vars(parser().parse_args(args))
    # Not before: help must not wait for it
    from .inspection import inspect

    return inspect(**options)
