# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The page of a run: ``torchgeo-softcon report``."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .data import data_parser, open_data, open_named_encoder, parse_options
from .parsers import CommandParser

if TYPE_CHECKING:
    import pandas as pd


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = data_parser(
        'report',
        'Write a page of pictures of a run: of its logs, and of what its last checkpoint\n'
        'makes of the images of its data. Without RUN_DIR, of a checkpoint or of weights\n'
        'and data.',
        'logs/version_0 --samples 100',
    )
    parser.usage = '%(prog)s [RUN_DIR] [OPTIONS]'
    parser.add_argument('run_dir', nargs='?', metavar='RUN_DIR', help='folder of a run')
    group = parser.add_argument_group('page')
    group.add_argument('--out', help='folder to write to, RUN_DIR/report by default')
    group.add_argument(
        '--split',
        help='val, predict, test or train, by default the first that the data have',
    )
    group.add_argument(
        '--samples', type=int, default=200, help='number of images, default: 200'
    )
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = parse_options(parser(), args)
    # Not before: help must not wait for them
    from ..report.curves import curve_sections, find_logs, read_logs
    from ..report.page import Section, write_page
    from ..report.sections import picture_sections

    logs = None if options.run_dir is None else find_logs(Path(options.run_dir))
    run = None if logs is None else logs[0].parent
    datamodule, _ = open_data(options, run)
    given = options.checkpoint or options.weights
    if run is None and not given:
        raise ValueError(
            'a report needs the folder of a run, or --checkpoint or --weights, and --data'
        )
    if run is not None and not given:
        options.checkpoint = last_checkpoint(run)
    source = options.checkpoint or options.weights

    facts: dict[str, str] = {}
    sections: list[Section] = []
    if logs is not None:
        log = read_logs(logs)
        facts |= {'run': str(run), **_last_values(log)}
        sections += curve_sections(log)
    reason = ''
    if source is None:
        reason = f'{run} has no checkpoint: give --checkpoint for pictures of images.'
    elif datamodule is None:
        reason = (
            'The data are not known: give --data or --config for pictures of images.'
        )
    else:
        try:
            encoder = open_named_encoder(options)
        except ValueError as error:
            if given:
                raise
            # Of a checkpoint that nobody has asked for
            reason = f'{error}.'
        else:
            facts['encoder'] = f'{encoder.name}, {encoder.in_channels} bands'
            facts['weights'] = source
            sections += picture_sections(
                encoder, datamodule, options.checkpoint, options.split, options.samples
            )
    if reason:
        sections.append(Section('pictures', 'Pictures', reason))
    out = options.out or (run or Path()) / 'report'
    page = write_page(Path(out), f'Report of {run or source}', facts, sections)
    print(f'The report is in {page}')
    return 0


def last_checkpoint(run: Path) -> str | None:
    """Return the newest checkpoint of the training, not an export beside it."""
    from ..models.checkpoints import read_checkpoint

    paths = sorted(run.rglob('*.ckpt'), key=lambda path: path.stat().st_mtime)
    for path in map(str, reversed(paths)):
        with suppress(ValueError):  # damaged, or of something else
            if 'global_step' in read_checkpoint(path):
                return path
    return None


def _last_values(log: 'pd.DataFrame') -> dict[str, str]:
    """Return the last value of each metric, and of probes also the first."""
    facts = {'optimizer steps': f'{int(log["step"].max())}'}
    for column in log.columns.drop(['step', 'epoch'], errors='ignore'):
        values = log[column].dropna()
        facts[column] = f'{values.iloc[-1]:.4g}'
        if 'knn_' in column or 'linear_' in column:
            facts[column] += f' (first {values.iloc[0]:.4g})'
    return facts
