# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math

import numpy as np
import pytest
from lightly.utils.scheduler import cosine_schedule

from torchgeo_softcon.tasks.optimizers import cosine_warmup


def test_matches_the_formula_of_dino() -> None:
    total, warmup, base, final = 70, 14, 5e-4, 1e-6
    steps = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))
    expected = np.concatenate([np.linspace(0, base, warmup), cosine])
    actual = [cosine_warmup(i, total, base, final, warmup) for i in range(total)]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_ends() -> None:
    assert cosine_warmup(0, 10, 0.99, 1) == 0.99
    assert 0.99 < cosine_warmup(9, 10, 0.99, 1) < 1
    assert cosine_warmup(10, 10, 0.99, 1) == cosine_warmup(99, 10, 0.99, 1) == 1
    assert cosine_warmup(0, 10, 1, 0, warmup=1, start=0.5) == 0.5
    assert cosine_warmup(3, 4, 1, 0, warmup=4) == 1


def test_lightly_reaches_the_end_a_step_earlier() -> None:
    ours = [cosine_warmup(i, 70, 0.996, 1) for i in range(70)]
    theirs = [cosine_schedule(i, 70, 0.996, 1) for i in range(70)]
    assert theirs[-1] == 1
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) == pytest.approx(
        5e-5, rel=0.2
    )
    assert math.isclose(ours[0], theirs[0])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match='total must be at least 1, got 0'):
        cosine_warmup(0, 0, 1, 0)
    with pytest.raises(ValueError, match='warmup must be >= 0, got -1'):
        cosine_warmup(0, 1, 1, 0, -1)
