# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""``torchgeo-softcon labels``."""

import argparse
import sys
from collections.abc import Sequence

from ..labels.sources import LAYOUTS
from ..landcover.products import WORLDCOVER

_DESCRIPTION = """\
Label every patch of an archive with the land cover of ESA WorldCover.

  torchgeo-softcon labels --images 'DIR/**/*.tif' --worldcover DIR --out labels.parquet
  torchgeo-softcon labels --footprints patches.gpkg --worldcover DIR --out labels.parquet
  torchgeo-softcon labels --layout ssl4eo-s12 ROOT --worldcover DIR --out labels.json

The file has one row per patch: id, product, CRS, outline, pixels, share of valid pixels,
and pixels and fraction of each class. An interrupted run goes on when started again, and
a second run does only what is missing."""

_EPILOG = """\
exit status:
  0  every patch has a label
  1  some have none: they are in a table beside the file, *.failed.csv, with the reason
  2  nothing was finished; what is done is kept for the next run, as it is when the run
     is interrupted (130)
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog='torchgeo-softcon labels',
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group('archive, one of')
    archive = group.add_mutually_exclusive_group(required=True)
    archive.add_argument(
        '--images',
        metavar='PATTERN',
        help="images such as 'DIR/**/*.tif' (in quotes), or a folder. Every file is a "
        'patch, labelled on its own pixels',
    )
    archive.add_argument(
        '--footprints',
        metavar='FILE',
        help='GeoPackage, Parquet or CSV with id and geometry, or with id, left, bottom, '
        'right, top; with height and width if the patches have pixels, and with crs if '
        'it differs from row to row',
    )
    archive.add_argument(
        '--layout',
        nargs=2,
        metavar=('LAYOUT', 'ROOT'),
        help=f'known folders: {", ".join(LAYOUTS)} (s2c, s2a, s1 / location / date / band)',
    )

    group = parser.add_argument_group('land cover')
    group.add_argument(
        '--worldcover',
        nargs='+',
        required=True,
        metavar='PATH',
        help='folders of tiles, or tiles. /vsicurl/https://... of a tile or of a bucket '
        'reads them where they are',
    )
    group.add_argument(
        '--download',
        action='store_true',
        help='download the tiles under the archive that are not in the folder',
    )
    group.add_argument('--base-url', metavar='URL', help=f'default: {WORLDCOVER.url}')
    group.add_argument(
        '--year', type=int, metavar='YEAR', help='2020 or 2021, default: 2021'
    )
    group.add_argument(
        '--classes',
        metavar='NAME',
        help="worldcover for its 11 classes (default), dynamicworld for Dynamic World's 9 "
        'made of them',
    )
    group.add_argument(
        '--product',
        default='worldcover',
        metavar='NAME',
        help='another land-cover product: its name, or the .yaml file that describes it',
    )

    group = parser.add_argument_group('output')
    group.add_argument(
        '--out',
        default='labels.parquet',
        metavar='FILE',
        help='default: labels.parquet',
    )
    group.add_argument(
        '--format',
        choices=('parquet', 'json'),
        help='json also writes {location: {season: [class, ...]}} as SSL4EO-S12-ML has it; '
        'by default if FILE ends in .json',
    )
    group.add_argument(
        '--min-fraction',
        type=float,
        default=0.05,
        metavar='X',
        help='smallest share of a class in the JSON file, default: 0.05. Counts have none',
    )
    group.add_argument(
        '--min-valid',
        type=float,
        default=0.5,
        metavar='X',
        help='smallest share of pixels with data in the JSON file, default: 0.5',
    )
    group.add_argument('--overwrite', action='store_true', help='replace the file')

    group = parser.add_argument_group('run')
    group.add_argument(
        '--workers', type=int, metavar='N', help='processes, default: one per core'
    )
    group.add_argument(
        '--scheduler',
        metavar='ADDRESS',
        help='of Dask, like tcp://10.0.0.1:8786, instead of processes here. Its workers '
        'need this package and the same paths',
    )
    group.add_argument('--quiet', action='store_true', help='no progress bar')
    return parser


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon labels``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status: 0, 1 if patches failed, 2 if the run did, 130 if interrupted.
    """
    options = vars(parser().parse_args(list(args)))
    options['progress'] = not options.pop('quiet')
    if options['layout'] is not None:
        options['layout'] = tuple(options['layout'])
    try:
        # Not before: help must not wait for it
        from ..labels.archive import label_archive

        labelled = label_archive(**options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f'torchgeo-softcon labels: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted, start again to go on', file=sys.stderr)
        return 130
    before = labelled.rows - labelled.new
    print(
        f'{labelled.path} has {labelled.rows} labels'
        + (f', {before} from before' if before else '')
    )
    if labelled.partial:
        print(
            f'{labelled.partial} of them have land cover for a part of their pixels only, '
            'see the column valid: they may be at a coast, or a tile may be missing'
        )
    if labelled.failures:
        name = labelled.path.with_name(f'{labelled.path.stem}.failed.csv')
        print(
            f'{len(labelled.failures)} patches have none, see {name} for the reasons',
            file=sys.stderr,
        )
        return 1
    return 0
