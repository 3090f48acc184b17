# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Curves of what a run has logged."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .page import Section


def find_logs(run: Path) -> list[Path]:
    """Find the logs of a run, or of the last one in a folder of runs.

    CSV files with a column *step*, or if there are none, files of TensorBoard.
    """
    if not run.is_dir():
        raise FileNotFoundError(f'the run {run} does not exist, or is not a folder')
    files = [f for f in run.rglob('*.csv') if 'step' in _first_line(f).split(',')]
    files = files or list(run.rglob('*.tfevents.*'))
    if not files:
        raise FileNotFoundError(
            f'{run} has no logs: no CSV file with a column step, and none of TensorBoard. '
            'Train with --trainer.logger CSVLogger, or give a checkpoint and data instead '
            'of a run'
        )
    if files[0].suffix != '.csv' and find_spec('tensorboard') is None:
        raise FileNotFoundError(
            f'{run} has logs of TensorBoard only. Install tensorboard to read them, or train '
            'with --trainer.logger CSVLogger'
        )
    newest = max(files, key=lambda f: f.stat().st_mtime).parent
    return sorted(f for f in files if f.parent == newest)


def _first_line(path: Path) -> str:
    with open(path, errors='replace') as file:
        return file.readline().strip()


def read_logs(files: Sequence[Path]) -> pd.DataFrame:
    """Read logs as numbers by *step*, with gaps where a metric was not logged."""
    read = pd.read_csv if files[0].suffix == '.csv' else _read_events
    log = pd.concat(map(read, files)).select_dtypes('number')
    log = log.groupby('step', as_index=False).last().dropna(axis='columns', how='all')
    if log.columns.difference(['step', 'epoch']).empty:
        raise ValueError(
            f'{files[0]} has no metrics yet. Lower trainer.log_every_n_steps, or train '
            'for longer'
        )
    return log


def _read_events(path: Path) -> pd.DataFrame:
    """Read the numbers in a file of TensorBoard."""
    accumulator = import_module(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    # All values, not a sample of 10,000
    events = accumulator.EventAccumulator(str(path), size_guidance={'scalars': 0})
    events.Reload()
    scalars = [
        pd.DataFrame(events.Scalars(name))
        .drop(columns='wall_time')
        .rename(columns={'value': name})
        for name in events.Tags()['scalars']
    ]
    return pd.concat([pd.DataFrame({'step': []}), *scalars])


#: Metrics of :class:`.KNNProbe`.
_PROBE = r'(?:^|_)(?:knn|linear)_(accuracy|map)'

#: Sections of the page by what the names of their metrics match. The first one counts.
_CURVES = {
    'loss': Section(
        'losses',
        'Losses',
        'Each metric on its own scale. A falling loss alone does not show that the '
        'features are of use. Dashed: what guessing gives (the log of the number of '
        'candidates; one similarity for all pairs). Dotted: the floor.',
    ),
    _PROBE: Section(
        'knn',
        'Probes of the frozen encoder',
        'How well the labels of held-out images are found from the features. Step 0 is '
        'before the training; chance knows the frequencies of the classes only.',
    ),
    '^label_control/|label_correlation|soft_explained|unknown_share': Section(
        'labels',
        'What the labels do',
        'The rank correlation of embedding and label similarities of different images, '
        'and the share of the soft term that is explained: 0 for similarities that are '
        'all alike, 1 for those of the labels. Permuted labels (LabelControl) show what '
        'the frequencies of classes alone explain.',
    ),
    '^collapse/|feature_std': Section(
        'spread',
        'Spread of the features',
        'Feature standard deviation near 0, effective rank near 1 or uniformity near 0 '
        'mean that all images look alike to the encoder (collapse). Evenly spread '
        'features have 1 / sqrt(number of features) and about -4. The rank is at most '
        'the number of images in a batch.',
    ),
    '^schedule/|^lr(-|$)|momentum': Section(
        'schedules', 'Schedules', 'Per optimizer step.'
    ),
    '': Section('others', 'Other metrics', 'Whatever else was logged.'),
}

#: Titles of panels, where the name of a metric does not say it all.
_TITLES = {
    'map': 'mean average precision',
    'schedule/lr': 'learning rate',
    'schedule/momentum': 'momentum of the teacher',
    'train_feature_std': 'feature std in the step',
    'train_label_correlation': 'rank correlation with labels',
    'train_soft_explained': 'share of the soft term explained',
    'train_unknown_share': 'share of unknown labels',
}

#: Limits of the vertical axis, from the smallest and the largest value of a metric.
_LIMITS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    _PROBE: lambda low, high: (0, 1),
    'rank|std|schedule/lr': lambda low, high: (0, 1.1 * high or 1),
    'uniformity$': lambda low, high: (1.1 * low or -1, 0),
    'share$': lambda low, high: (-0.02, 1.02),
    'correlation$|explained$': lambda low, high: (min(low, -0.1), 1.02),
}

#: Width and height of a panel of one metric, and of a panel of all probes, in inches.
_PANEL, _PROBE_PANEL = (3.6, 2.5), (5.4, 3.4)

_COLUMNS = 3


def curve_sections(log: pd.DataFrame) -> list[Section]:
    """Plot all that was logged, by optimizer step."""
    metrics = list(log.columns.drop(['step', 'epoch'], errors='ignore'))
    sections = []
    for pattern, section in _CURVES.items():
        chosen = [m for m in metrics if re.search(pattern, m)]
        metrics = [m for m in metrics if m not in chosen]
        if chosen:
            sections.append(replace(section, figure=_plot(log, chosen)))
    return sections


def _probed(metric: str) -> str:
    """Return what a probe measures, '' for other metrics."""
    found = re.search(_PROBE, metric)
    return found.group(1) if found else ''


def _measured(metric: str) -> str:
    """Return what a line of reference belongs to, other metrics as they are."""
    return re.sub('_(chance|floor)$', '', metric)


def _plot(log: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Plot one panel per metric, which have different units, and one of all probes."""
    panels: dict[str, list[str]] = {}
    for metric in metrics:
        panels.setdefault(_probed(metric) or _measured(metric), []).append(metric)
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    width, height = _PROBE_PANEL if _probed(metrics[0]) else _PANEL
    figure = Figure((width * columns, height * rows), layout='constrained')
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, lines) in zip(axes, panels.items(), strict=False):
        group, _, title = name.rpartition('/')
        title = _TITLES.get(name, title.replace('_', ' ') if group else title)
        axis.set_title(title, fontsize='medium', loc='left')
        # What guessing would give comes last in the legend
        for metric in sorted(lines, key=lambda m: (m != _measured(m), m)):
            _draw(axis, log, metric)
        if len(lines) > 1 or _probed(lines[0]):
            axis.legend(loc='best', fontsize='small')
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.supxlabel('optimizer step', fontsize='medium')
    return figure


def _draw(axis: Axes, log: pd.DataFrame, metric: str) -> None:
    """Draw the curve of a metric."""
    values = log.set_index('step')[metric].dropna()
    label = re.sub(rf'_?{_probed(metric)}', '', metric).replace('_', ', ')
    style: dict[str, Any] = {'label': label.replace('knn, chance', 'chance')}
    if metric != _measured(metric):
        _, _, kind = metric.rpartition('_')
        line = {'chance': '--', 'floor': ':'}[kind]
        style = {'label': kind, 'color': 'grey', 'linestyle': line}
    marker = 'o' if len(values) <= 30 else None
    axis.plot(values, marker=marker, markersize=3, **style)
    end = max(log['step'].max(), 1)
    axis.set_xlim(-0.02 * end, 1.02 * end)
    axis.xaxis.set_major_locator(MaxNLocator('auto', integer=True))
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    finite = values[np.isfinite(values)]
    if len(finite) < len(values):
        text = f'{len(values) - len(finite)} values are not finite'
        axis.text(0.5, 0.5, text, transform=axis.transAxes)
    if finite.empty:
        return
    low, high = finite.min(), finite.max()
    limits = [f for pattern, f in _LIMITS.items() if re.search(pattern, metric)]
    if limits:
        axis.set_ylim(limits[0](low, high))
    elif low == high and metric == _measured(metric):
        axis.set_ylim(0, 1.2 * low or 1)
