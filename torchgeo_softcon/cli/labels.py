# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The land cover of an archive's patches: ``torchgeo-softcon labels``."""

import argparse
import sys
from collections.abc import Sequence

from .parsers import CommandError, CommandParser

_DESCRIPTION = """\
Label every patch of an archive with its land cover, by default that of ESA WorldCover.
The file has one row per patch: id, product, CRS, outline, pixels, share of valid pixels,
and pixels and fraction of each class. An interrupted run goes on when started again, and
a second run does only what is missing. Patches that fail are in *.failed.csv beside it."""

_EXAMPLES = """\
torchgeo-softcon labels --images 'DIR/**/*.tif' --worldcover DIR --out labels.parquet
  torchgeo-softcon labels --footprints patches.gpkg --worldcover DIR --out labels.parquet
  torchgeo-softcon labels --layout ssl4eo-s12 ROOT --worldcover DIR --out labels.json
  torchgeo-softcon labels --images DIR --map own.tif --legend own.yaml --out own.parquet"""

_LAND_COVER = {
    '--worldcover, --map PATH...': 'folders of tiles, or tiles. /vsicurl/https://... of a tile '
    'or of a bucket reads them where they are',
    '--download': 'download the tiles that are missing',
    '--base-url URL': "default: ESA's bucket at Amazon",
    '--year YEAR': 'of the product, by default its last one. nearest takes for each patch the '
    'year it was taken in, as names of files or a column date tell, or the nearest',
    '--classes NAME': 'a legend that the product has a mapping to: dynamicworld for the 9 '
    'classes of Dynamic World made of the 11 of worldcover (default)',
    '--product, --legend NAME': 'another land-cover product (esri, lcm10, cgls, corine, '
    'dynamicworld), or the .yaml file with the legend of your own map: name and classes with '
    'code and name',
}
_OUTPUT = {
    '--out FILE': 'default: labels.parquet',
    '--format {parquet,json}': 'json also writes {location: {season: [class, ...]}} as '
    'SSL4EO-S12-ML has it; by default if FILE ends in .json',
    '--min-fraction X': 'smallest share of a class in the JSON file, default: 0.05. Counts '
    'have none',
    '--min-valid X': 'smallest share of pixels with data in the JSON file, default: 0.5',
    '--overwrite': 'replace the file',
}
_RUN = {
    '--workers N': 'processes, default: one per core',
    '--scheduler ADDRESS': 'of Dask, like tcp://10.0.0.1:8786, whose workers have this package '
    'and the same paths',
    '--quiet': 'no progress bar',
}


def parser() -> CommandParser:
    """Return the parser of the command.

    Options that are not given are left to the defaults of :func:`.label_archive`.
    """
    parser = CommandParser(
        'labels',
        _DESCRIPTION,
        _EXAMPLES,
        usage='%(prog)s ARCHIVE --worldcover PATH [PATH ...] [OPTIONS]',
        argument_default=argparse.SUPPRESS,
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
        help='known folders: ssl4eo-s12 (s2c, s2a, s1 / location / date / band), also packed '
        'or as v1.1',
    )

    parser.add_options(_LAND_COVER, 'land cover', required=['--worldcover'])
    parser.add_options(_OUTPUT, 'output')
    parser.add_options(_RUN, 'run')
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = vars(parser().parse_args(args))
    if 'layout' in options:
        options['layout'] = tuple(options['layout'])
    options['progress'] = not options.pop('quiet')
    # Not before: help must not wait for it
    from ..labels.archive import label_archive

    try:
        labelled = label_archive(**options)
    except (ImportError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    before = labelled.rows - labelled.new
    text = f', {before} from before' if before else ''
    print(f'{labelled.path} has {labelled.rows} labels{text}')
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
