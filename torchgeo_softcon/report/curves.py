# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Curves of what a run has logged."""

import math
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: Columns of each figure, the first pattern that matches counts.
_GROUPS = {
    'losses': r'loss',
    'knn': r'(^|_)(knn|linear)_(accuracy|map)',
    'spread': r'^collapse/|feature_std',
    'schedules': r'^schedule/|^lr(-|$)|momentum',
    'others': r'',
}

#: Axis labels of columns whose name does not say it all.
_LABELS = {
    'schedule/lr': 'learning rate',
    'schedule/momentum': 'momentum of the teacher',
    'schedule/teacher_temperature': 'temperature of the teacher',
    'schedule/weight_decay': 'weight decay',
    'train_feature_std': 'feature std in the step',
    'collapse/feature_std': 'feature std',
    'collapse/effective_rank': 'effective rank',
    'collapse/uniformity': 'uniformity',
    'train_unknown_share': 'share of unknown labels',
}

_WIDTH, _HEIGHT, _COLUMNS = 3.6, 2.5, 3


def find_logs(run: Path) -> list[Path]:
    """Files of the loggers of a run.

    Args:
        run: Folder of the run, or one with folders of runs, of which the last is taken.

    Returns:
        CSV files with a column *step*, ``metrics.csv`` first, or if there are none, files
        of TensorBoard.

    Raises:
        FileNotFoundError: If there are none, or some of TensorBoard, which is not installed.
    """
    if not run.is_dir():
        raise FileNotFoundError(f'the run {run} does not exist, or is not a folder')
    files = [f for f in run.rglob('*.csv') if _has_steps(f)]
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


def _has_steps(path: Path) -> bool:
    with open(path, errors='replace') as file:
        return 'step' in file.readline().strip().split(',')


def read_logs(files: Sequence[Path]) -> pd.DataFrame:
    """Read the logs of a run.

    Args:
        files: From :func:`find_logs`.

    Returns:
        Numbers by *step*, with gaps where a metric was not logged.

    Raises:
        ValueError: If nothing was logged.
    """
    frames = [
        pd.read_csv(file) if file.suffix == '.csv' else _read_events(file)
        for file in files
    ]
    log = (
        pd.concat(frames).select_dtypes('number').groupby('step', as_index=False).last()
    )
    log = log.dropna(axis='columns', how='all')
    if log.columns.difference(['step', 'epoch']).empty:
        raise ValueError(
            f'{files[0]} has no metrics yet. Lower trainer.log_every_n_steps, or train '
            'for longer'
        )
    return log


def _read_events(path: Path) -> pd.DataFrame:
    """Numbers in a file of TensorBoard."""
    accumulator = import_module(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    # All values, not a sample of 10,000
    events = accumulator.EventAccumulator(str(path), size_guidance={'scalars': 0})
    events.Reload()
    columns = [
        pd.DataFrame(
            {'step': [e.step for e in scalars], name: [e.value for e in scalars]}
        )
        for name in events.Tags()['scalars']
        for scalars in [events.Scalars(name)]
    ]
    return pd.concat(columns) if columns else pd.DataFrame({'step': []})


def plot_curves(log: pd.DataFrame) -> dict[str, Figure]:
    """Plot all that was logged, by optimizer step.

    Args:
        log: From :func:`read_logs`.

    Returns:
        Figures by name: *losses*, *knn*, *spread*, *schedules* and *others*, those that
        there is something for.
    """
    groups: dict[str, list[str]] = {name: [] for name in _GROUPS}
    for column in log.columns.drop(['step', 'epoch'], errors='ignore'):
        name = next(n for n, pattern in _GROUPS.items() if re.search(pattern, column))
        groups[name].append(column)
    figures = {}
    for name, columns in groups.items():
        if columns:
            plot = _plot_probes if name == 'knn' else _plot_panels
            figures[name] = plot(log, columns)
    return figures


def _plot_panels(log: pd.DataFrame, columns: Sequence[str]) -> Figure:
    """One panel per metric: they have different units."""
    width = min(len(columns), _COLUMNS)
    rows = math.ceil(len(columns) / width)
    figure = Figure((_WIDTH * width, _HEIGHT * rows), layout='constrained')
    axes = list(figure.subplots(rows, width, squeeze=False).flat)
    for axis, column in zip(axes, columns, strict=False):
        _draw(axis, log, column)
        axis.set_title(_LABELS.get(column, column), fontsize='medium', loc='left')
        values = log[column][np.isfinite(log[column])]
        if values.empty:
            continue
        if re.search('rank|std|schedule/lr', column):
            axis.set_ylim(0, 1.1 * values.max() or 1)  # 0 has a meaning
        elif column.endswith('uniformity'):
            axis.set_ylim(1.1 * values.min() or -1, 0)
        elif column.endswith('share'):
            axis.set_ylim(-0.02, 1.02)
        elif np.ptp(values) == 0:
            axis.set_ylim(0, 1.2 * values.iloc[0] or 1)
    for axis in axes[len(columns) :]:
        axis.remove()
    figure.supxlabel('optimizer step', fontsize='medium')
    return figure


def _plot_probes(log: pd.DataFrame, columns: Sequence[str]) -> Figure:
    """Probes of one kind in one panel, with what guessing would give."""
    metrics = sorted({_metric(column) for column in columns})
    figure = Figure((5.4 * len(metrics), 3.4), layout='constrained')
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        # Chance comes last in the legend
        for column in sorted(columns, key=lambda c: (c.endswith('_chance'), c)):
            if _metric(column) == metric:
                chance = column.endswith('_chance')
                style = {'color': 'grey', 'linestyle': '--'} if chance else {}
                name = re.sub(rf'_?{metric}', '', column).replace('_', ', ')
                name = name.replace('knn, chance', 'chance')
                _draw(axis, log, column, label=name, **style)
        axis.set_ylim(0, 1)
        axis.set_title(
            'mean average precision' if metric == 'map' else 'accuracy',
            fontsize='medium',
            loc='left',
        )
        axis.legend(loc='best', fontsize='small')
    figure.supxlabel('optimizer step', fontsize='medium')
    return figure


def _metric(column: str) -> str:
    found = re.search(r'(knn|linear)_(accuracy|map)', column)
    return found.group(2) if found else ''


def _draw(axis: Axes, log: pd.DataFrame, column: str, **style: Any) -> None:
    values = log[['step', column]].dropna()
    marker = 'o' if len(values) <= 30 else None
    axis.plot(values['step'], values[column], marker=marker, markersize=3, **style)
    end = max(log['step'].max(), 1)
    axis.set_xlim(-0.02 * end, 1.02 * end)
    axis.xaxis.set_major_locator(MaxNLocator('auto', integer=True))
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    bad = int((~np.isfinite(values[column])).sum())
    if bad:
        axis.text(0.5, 0.5, f'{bad} values are not finite', transform=axis.transAxes)
