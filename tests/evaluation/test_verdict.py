# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math

import pytest

from torchgeo_softcon.evaluation.verdict import judge, summarize

GOOD = {
    'train_loss_contrast': [4.1, 3.0, 1.2],
    'train_loss_contrast_chance': [math.log(64)],
    'train_loss': [9.0, 8.0],
    'collapse/feature_std': [0.03, 0.05],
    'knn_map': [0.5, 0.6],
    'knn_map_chance': [0.3, 0.3],
}


def test_a_good_run() -> None:
    findings = judge(GOOD, 384)
    assert [f.good for f in findings] == [True, True, True]
    assert 'guessing gives 4.16' in findings[1].reason
    assert 'from 0.5 to 0.6, chance is 0.3' in str(findings[2])
    assert 'better than its start' in summarize(findings)


@pytest.mark.parametrize(
    ('change', 'position', 'good', 'reason'),
    [
        ({'collapse/feature_std': [0.05, 1e-4]}, 0, False, 'have collapsed'),
        ({'collapse/feature_std': [0.004]}, 0, None, '8% of an even spread'),
        ({'collapse/feature_std': [math.nan]}, 0, None, 'no spread'),
        ({'train_loss_contrast': [4.16, 4.15]}, 1, False, 'guessing'),
        ({'train_loss_contrast': [9.0, 2.0]}, 1, True, 'from 9 to 2'),
        ({'knn_map': [0.2, 0.25]}, 2, False, 'no better than chance'),
        ({'knn_map': [0.6, 0.5]}, 2, False, 'from 0.6 to 0.5'),
        ({'knn_map': [0.6]}, 2, None, 'measured only once'),
        ({'knn_map_chance': []}, 2, True, 'from 0.5 to 0.6'),
    ],
)
def test_findings(
    change: dict[str, list[float]], position: int, good: bool | None, reason: str
) -> None:
    finding = judge(GOOD | change, 384)[position]
    assert finding.good is good
    assert reason in finding.reason
    assert (reason in summarize([finding])) is (good is False)


def test_what_is_not_known() -> None:
    findings = judge({}, None)
    assert [f.good for f in findings] == [None, None]
    assert summarize(findings).startswith('The logs do not tell')
    (_, loss) = judge({'train_loss': [2.0, 1.0]}, None)
    assert loss.good
    assert 'a probe on labelled images' in summarize([loss])
