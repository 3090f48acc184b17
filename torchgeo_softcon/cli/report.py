# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What ``torchgeo-softcon report`` does."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from ..models.checkpoints import read_checkpoint
from ..models.encoders import open_encoder
from ..report.curves import curve_sections, find_logs, read_logs
from ..report.page import Section, write_page
from ..report.sections import picture_sections
from .data import data_parser, parse_data, parse_options


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon report``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status.

    Raises:
        OSError: If there is no such run, checkpoint or configuration.
        ValueError: If there is nothing to report of.
    """
    parser = data_parser(
        'torchgeo-softcon report',
        'Write a page of pictures of a run: of its logs, and of what its last checkpoint '
        'makes of the images of its data. Without RUN_DIR, of a checkpoint or of weights '
        'and data.',
    )
    parser.add_argument(
        'run_dir', type=str | None, nargs='?', metavar='RUN_DIR', help='folder of a run'
    )
    parser.add_argument(
        '--out', type=str | None, help='folder to write to, RUN_DIR/report by default'
    )
    parser.add_argument(
        '--split',
        type=str | None,
        help='val, predict, test or train, the first there is',
    )
    parser.add_argument('--samples', type=int, default=200, help='number of images')
    run_dir = parse_options(parser, args).run_dir
    logs = None if run_dir is None else find_logs(Path(run_dir))
    run = None if logs is None else logs[0].parent
    options, datamodule = parse_data(parser, args, run)
    checkpoint, weights = options.checkpoint, options.weights
    given = checkpoint is not None or weights is not None
    if run is None and not given:
        raise ValueError(
            'a report needs the folder of a run, or --checkpoint or --weights, and --data'
        )
    if run is not None and not given:
        checkpoint = _last_checkpoint(run)

    facts: dict[str, str] = {}
    sections: list[Section] = []
    if logs is not None:
        log = read_logs(logs)
        facts |= {'run': str(run), **_last_values(log)}
        sections += curve_sections(log)
    encoder, text = None, ''
    if checkpoint is None and weights is None:
        text = f'{run} has no checkpoint: give --checkpoint for pictures of images.'
    elif datamodule is None:
        text = 'The data are not known: give --data or --config for pictures of images.'
    else:
        try:
            encoder = open_encoder(
                checkpoint, weights, options.model, options.bands, options.unit_range
            )
        except ValueError as error:
            if given:
                raise
            # Of a checkpoint that nobody has asked for
            text = f'{error}.'
    if encoder is None or datamodule is None:
        sections.append(Section('pictures', 'Pictures', text))
    else:
        facts |= {
            'encoder': f'{encoder.name}, {encoder.in_channels} bands',
            'weights': str(checkpoint or weights),
        }
        sections += picture_sections(
            encoder, datamodule, checkpoint, options.split, options.samples
        )
    out = options.out or (run or Path()) / 'report'
    page = write_page(Path(out), _title(run, checkpoint, options), facts, sections)
    print(f'The report is in {page}')
    return 0


def _title(run: Path | None, checkpoint: str | None, options: Any) -> str:
    return f'Report of {run or checkpoint or options.weights}'


def _last_checkpoint(run: Path) -> str | None:
    """The newest checkpoint of the training, not an export beside it."""
    paths = sorted(run.rglob('*.ckpt'), key=lambda path: path.stat().st_mtime)
    for path in map(str, reversed(paths)):
        with suppress(ValueError):  # damaged, or of something else
            if 'global_step' in read_checkpoint(path):
                return path
    return None


def _last_values(log: pd.DataFrame) -> dict[str, str]:
    """The last value of each metric, and of probes also the first."""
    facts = {'optimizer steps': f'{int(log["step"].max())}'}
    for column in log.columns.drop(['step', 'epoch'], errors='ignore'):
        values = log[column].dropna()
        facts[column] = f'{values.iloc[-1]:.4g}'
        if 'knn_' in column or 'linear_' in column:
            facts[column] += f' (first {values.iloc[0]:.4g})'
    return facts
