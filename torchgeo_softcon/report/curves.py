# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Curves of what a run has logged."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from .page import Line, Panel, Section


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

#: Names of metrics that are lines of reference, and how they are drawn.
_REFERENCE = re.compile('_(chance|floor|even)$')
_DASHES = {'chance': '6 4', 'floor': '2 3', 'even': '6 4'}

#: Spreads of features that are even: on a sphere of F dimensions, see :func:`uniformity`.
_EVEN: dict[str, Callable[[int], float]] = {
    'train_feature_std': lambda width: width**-0.5,
    'collapse/feature_std': lambda width: width**-0.5,
    'collapse/uniformity': lambda width: -4.0,
}

#: Colours of curves in the style of the page, by turns.
_COLOURS = 6

#: Edges of the plot in a panel: left, right, top and bottom.
_PLOT = (56.0, 334.0, 14.0, 172.0)

#: Points of a curve, more than a panel has pixels for are left out.
_POINTS = 300


def curve_sections(logs: Mapping[str, pd.DataFrame]) -> list[Section]:
    """Plot all that runs have logged, by optimizer step.

    Args:
        logs: What :func:`read_logs` gives, by the name of the run.
    """
    named = dict.fromkeys(name for log in logs.values() for name in log.columns)
    metrics = [name for name in named if name not in ('step', 'epoch')]
    unknown = 'train_unknown_share'  # of interest only where labels are missing
    if not any(log[unknown].any() for log in logs.values() if unknown in log):
        metrics = [name for name in metrics if name != unknown]
    sections = []
    for pattern, section in _CURVES.items():
        chosen = [m for m in metrics if re.search(pattern, m)]
        metrics = [m for m in metrics if m not in chosen]
        if chosen:
            panels: dict[str, list[str]] = {}
            for metric in chosen:
                plain = _REFERENCE.sub('', metric)
                panels.setdefault(_probed(metric) or plain, []).append(metric)
            drawn = [_panel(logs, *panel) for panel in panels.items()]
            sections.append(replace(section, panels=drawn))
    return sections


def add_even_spread(log: pd.DataFrame, width: int) -> None:
    """Add what features of *width* numbers that are spread evenly would have logged."""
    for name, value in _EVEN.items():
        if name in log:
            log[f'{name}_even'] = value(width)


def _probed(metric: str) -> str:
    """Return what a probe measures, '' for other metrics."""
    found = re.search(_PROBE, metric)
    return found.group(1) if found else ''


def _label(metric: str, name: str) -> str:
    """Return how a curve is called in a panel of that name."""
    if reference := _REFERENCE.search(metric):
        return {'even': 'even spread'}.get(reference[1], reference[1])
    if _probed(metric):
        return re.sub(rf'_?{_probed(metric)}', '', metric).replace('_', ', ')
    return metric if name == metric else metric.replace('_', ' ')


def _panel(
    logs: Mapping[str, pd.DataFrame], name: str, metrics: Sequence[str]
) -> Panel:
    """Draw the metrics of one panel, lines of reference last."""
    group, _, title = name.rpartition('/')
    title = _TITLES.get(name, title.replace('_', ' ') if group else title)
    curves: list[tuple[str, str, pd.Series]] = []
    for metric in sorted(metrics, key=lambda m: (bool(_REFERENCE.search(m)), m)):
        for run, log in logs.items():
            if metric in log:
                label = _label(metric, name)
                label = f'{label}, {run}' if len(logs) > 1 else label
                curves.append((metric, label, log.set_index('step')[metric].dropna()))
    finite = pd.concat([v[np.isfinite(v)] for _, _, v in curves])
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    limits = [f for pattern, f in _LIMITS.items() if re.search(pattern, metrics[0])]
    if limits:
        low, high = limits[0](low, high)
    elif low == high:
        low, high = min(0, 1.2 * low), max(0, 1.2 * low) or 1
    end = max(1, *(log['step'].max() for log in logs.values()))
    left, right, top, bottom = _PLOT

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * step / end
        y = bottom - (bottom - top) * (value - low) / (high - low)
        return round(float(x), 1), round(float(y), 1)

    lines: list[Line] = []
    for metric, label, values in curves:
        shown = values[np.isfinite(values)]
        shown = shown.iloc[:: max(1, len(shown) // _POINTS)]
        reference = _REFERENCE.search(metric)
        plain = [line for line in lines if not line.dash]
        colour = 'var(--soft)' if reference else f'var(--c{len(plain) % _COLOURS})'
        points = [place(step, value) for step, value in shown.items()]
        dash = _DASHES[reference[1]] if reference else ''
        lines.append(Line(label, points, colour, dash))
    strange = sum(int((~np.isfinite(values)).sum()) for _, _, values in curves)
    return Panel(
        title,
        lines,
        [(place(0, v)[1], f'{v:.4g}') for v in _ticks(low, high, 4)],
        [(place(v, low)[0], f'{v:.0f}') for v in _ticks(0, end, 4, integer=True)],
        f'{title}: {"; ".join(_words(label, values) for _, label, values in curves)}',
        f'{strange} values are not finite' if strange else '',
    )


def _ticks(low: float, high: float, count: int, integer: bool = False) -> list[float]:
    """Return round numbers in a range."""
    values = MaxNLocator(count, integer=integer).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high]


def _words(label: str, values: pd.Series) -> str:
    """Say in words what a curve shows."""
    if values.empty:
        return f'{label} has no values'
    first, last = values.iloc[0], values.iloc[-1]
    if len(values) == 1:
        return f'{label} {first:.3g}'
    steps = f'step {values.index[0]} to {values.index[-1]}'
    return f'{label} from {first:.3g} to {last:.3g}, {steps}'
