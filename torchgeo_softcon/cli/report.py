# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The page of a run: ``torchgeo-softcon report``."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .data import data_parser, open_data, open_named_encoder, parse_options
from .parsers import CommandParser

if TYPE_CHECKING:
    import pandas as pd

_PAGE = {
    '--out DIR': 'folder to write to, RUN_DIR/report by default',
    '--split NAME': 'val, predict, test or train, by default the first that the data have',
    '--samples N': 'number of images, default: 200',
}


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = data_parser(
        'report',
        'Write a page about a run: a verdict, its curves, and what its last checkpoint\n'
        'makes of the images of its data. Without RUN_DIR, of a checkpoint or of weights\n'
        'and data.',
        'logs/version_0 --samples 100',
    )
    parser.usage = '%(prog)s [RUN_DIR ...] [OPTIONS]'
    parser.add_argument(
        'run_dir',
        nargs='*',
        metavar='RUN_DIR',
        help='folder of a run. Curves of several runs are laid side by side',
    )
    parser.add_options(_PAGE, 'page')
    parser.set_defaults(samples=200)
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = parse_options(parser(), args)
    # Not before: help must not wait for them
    from ..evaluation.verdict import Finding, judge, summarize
    from ..report.curves import add_even_spread, curve_sections, find_logs, read_logs
    from ..report.page import Section, write_page
    from ..report.samples import collect
    from ..report.sections import judge_features, picture_sections
    from ..tasks.loading import start_task

    files = {run: find_logs(Path(run)) for run in options.run_dir}
    logs = {run: read_logs(found) for run, found in files.items()}
    folders = [found[0].parent for found in files.values()]
    run = folders[0] if len(folders) == 1 else None
    given = options.checkpoint or options.weights
    if not folders and not given:
        raise ValueError(
            'a report needs the folder of a run, or --checkpoint or --weights, and --data'
        )
    if run is not None and not given:
        options.checkpoint = last_checkpoint(run)
    source = options.checkpoint or options.weights

    facts: dict[str, list[str]] = {}
    for number, (folder, log) in enumerate(zip(folders, logs.values(), strict=True)):
        for name, value in {'run': str(folder), **_last_values(log)}.items():
            facts.setdefault(name, [''] * len(folders))[number] = value
    width = None
    sections: list[Section] = []
    judged: list[Finding] = []
    if len(folders) < 2:
        datamodule, _ = open_data(options, run)
        reason = ''
        if source is None:
            reason = (
                f'{run} has no checkpoint: give --checkpoint for pictures of images.'
            )
        elif datamodule is None:
            reason = 'The data are not known: give --data or --config for pictures of images.'
        else:
            try:
                encoder = open_named_encoder(options)
            except ValueError as error:
                if given:
                    raise
                # Of a checkpoint that nobody has asked for
                reason = f'{error}.'
            else:
                facts['encoder'] = [f'{encoder.name}, {encoder.in_channels} bands']
                facts['weights'] = [source]
                gallery = collect(encoder, datamodule, options.split, options.samples)
                width = gallery.features.shape[1]
                judged = judge_features(gallery)
                begun = start_task(encoder.checkpoint)
                start = None
                if begun is not None:
                    weights = begun.model.state_dict()
                    untrained = replace(encoder, state_dict=weights)
                    start = collect(
                        untrained, datamodule, gallery.split, options.samples
                    )
                sections += picture_sections(
                    gallery, encoder, options.checkpoint, start
                )
        if reason:
            sections.append(Section('pictures', 'Pictures', reason))
    findings = {
        name: judge({k: log[k].dropna().tolist() for k in log}, width) + judged
        for name, log in logs.items()
    }
    findings = findings or {source: judged}
    if width:
        for log in logs.values():
            add_even_spread(log, width)
    facts['made'] = [f'{datetime.now(UTC):%Y-%m-%d %H:%M} UTC']
    names = ('torchgeo-softcon', 'torchgeo', 'torch', 'lightning', 'timm')
    facts['versions'] = [', '.join(f'{name} {version(name)}' for name in names)]
    page = write_page(
        Path(options.out or (run or Path()) / 'report'),
        f'Report of {" and ".join(options.run_dir) or source}',
        facts,
        [*(curve_sections(logs) if logs else ()), *sections],
        findings,
        {
            str(folder): (folder / 'config.yaml').read_text(encoding='utf-8')
            for folder in folders
            if (folder / 'config.yaml').is_file()
        },
    )
    for name, found in findings.items():
        print(f'{name}: {summarize(found)}', *(f'  {f}' for f in found), sep='\n')
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
