# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Whether a run has learned something, in plain words."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Values of each metric in the order in which they were logged.
Series = Mapping[str, Sequence[float]]

#: Share of the even spread 1 / sqrt(F) below which features are nearly the same, as by
#: :class:`.CollapseMonitor`, and below which they are less spread than most random starts.
_COLLAPSED, _NARROW = 0.02, 0.1

#: Share of the chance value by which a loss must have fallen to count as learning.
_FALLEN = 0.03

#: Metrics of :class:`.KNNProbe`.
_PROBE = re.compile(
    r'(?:^|_)(?:knn|linear)_(?:accuracy|map)(?!.*_(?:chance|spread|std))'
)

#: Part of a series whose median stands for its end: single batches differ.
_TAIL = 0.1


@dataclass(frozen=True)
class Finding:
    """An answer to a question about a run: good, bad, or not known (None)."""

    question: str
    good: bool | None
    reason: str

    def __str__(self) -> str:
        """Return a line of text."""
        mark = {True: 'yes', False: 'NO', None: 'not known'}[self.good]
        return f'{self.question} {mark}: {self.reason}'


def judge(series: Series, width: int | None) -> list[Finding]:
    """Answer the questions that a pretraining run raises.

    Args:
        series: What was logged. The value of a metric for an encoder that tells nothing
            apart has the same name with ``_chance`` at its end.
        width: Number of features F of the encoder, if it is known.
    """
    finite = {k: [v for v in s if math.isfinite(v)] for k, s in series.items()}
    finite = {name: values for name, values in finite.items() if values}
    return [
        _spread(finite, width),
        _loss(finite),
        *(_probe(finite, name) for name in sorted(finite) if _PROBE.search(name)),
    ]


def summarize(findings: Sequence[Finding]) -> str:
    """Sum up findings in a sentence."""
    if bad := [f for f in findings if f.good is False]:
        return f'Do not use this encoder yet. {bad[0].question} No: {bad[0].reason}.'
    probed = any(_PROBE.search(f.reason) and f.good for f in findings)
    if probed:
        return (
            'The encoder has learned features that tell labels better than its start.'
        )
    if any(f.good for f in findings):
        return (
            'The training works as it should; whether the features are of use, a probe on '
            'labelled images of other ground would tell.'
        )
    return 'The logs do not tell whether the encoder has learned.'


def _end(values: Sequence[float]) -> float:
    tail = sorted(values[-max(1, round(_TAIL * len(values))) :])
    return tail[len(tail) // 2]


def _spread(series: Series, width: int | None) -> Finding:
    """Tell whether the features of different images differ."""
    question = 'Do features of different images differ?'
    for name in ('collapse/feature_std', 'train_feature_std'):
        if name in series:
            break
    else:
        return Finding(question, None, 'no spread of the features was logged')
    value = _end(series[name])
    if width is None:
        return Finding(question, None, f'{name} is {value:.3g}')
    share = value * math.sqrt(width)
    reason = f'{name} is {value:.3g}, {share:.0%} of an even spread'
    if share < _COLLAPSED:
        return Finding(question, False, f'the features have collapsed, {reason}')
    return Finding(question, True if share >= _NARROW else None, reason)


def _loss(series: Series) -> Finding:
    """Tell whether the loss is below that of guessing."""
    question = 'Does the loss fall?'
    names = [
        n for n in series if n.startswith('train_loss') and f'{n}_chance' in series
    ]
    name = min([n for n in names if 'soft' not in n] or ['train_loss'])
    if len(series.get(name, ())) < 2:
        return Finding(question, None, 'no loss was logged more than once')
    first, last = series[name][0], _end(series[name])
    reason = f'{name} went from {first:.3g} to {last:.3g}'
    if name not in names:
        return Finding(question, last < first, reason)
    guess = series[f'{name}_chance'][-1]
    return Finding(
        question, last < (1 - _FALLEN) * guess, f'{reason}; guessing gives {guess:.3g}'
    )


def _probe(series: Series, name: str) -> Finding:
    """Tell whether a probe is above chance and above its start."""
    question = 'Do the features tell labels better than at the start?'
    first, last = series[name][0], series[name][-1]
    reason = f'{name} went from {first:.3g} to {last:.3g}'
    metric = 'accuracy' if 'accuracy' in name else 'map'
    guess = series.get(
        f'{name.partition(metric)[0]}{metric}_chance'.replace('linear', 'knn')
    )
    if guess:
        reason += f', chance is {guess[-1]:.3g}'
        if last <= guess[-1]:
            return Finding(question, False, f'{reason}: no better than chance')
    if len(series[name]) < 2:
        return Finding(question, None, f'{name} is {last:.3g}, measured only once')
    return Finding(question, last > first, reason)
