# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.fake_cuda import fake_cuda
from torchgeo_softcon.tasks.guard import NonFiniteGuard

from .helpers import TASKS, Scenes, make_trainer

RNG = np.random.default_rng(0)
DIGITAL = torch.from_numpy(RNG.gamma(2, 700, (4, 13, 8, 8)))
STANDARD = (DIGITAL - DIGITAL.mean()) / DIGITAL.std()
RADAR = torch.stack([-11 + 3 * STANDARD[:, 0], -18 + 3 * STANDARD[:, 1]], 1)
FLAT = torch.rand(4, 13, 1, 1).expand(4, 13, 8, 8)
SPARSE = torch.where(torch.from_numpy(RNG.random((4, 13, 8, 8))) < 0.8, 0, 0.4)


def told(
    image: Tensor, value_range: tuple[float, float] | None = None, batches: int = 20
) -> list[str]:
    """Return the warnings about the images of a run."""
    guard = NonFiniteGuard()
    guard.value_range = value_range
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for step in range(batches):
            guard.watch(step, torch.tensor(1.0), image)
        guard.check()
        guard.check()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize('batches', [1, 8, 20])
@pytest.mark.parametrize(
    ('image', 'expected'),
    [
        (
            DIGITAL,
            'far outside of the expected range.* not to be scaled: .*value_range',
        ),
        (RADAR, r'far outside .*10 \* log10'),
        ((DIGITAL / 10).to(torch.uint8), 'far outside'),
        (DIGITAL.clamp(0, 1), r'exactly 0 or 1\. .* to 1: .*level of the datasets'),
        (SPARSE, r'8\d% .*clipped, to exactly 0 or 1\. .* from 0 to 0\.4'),
        ((DIGITAL - 1e5).clamp(0, 1), '100% .*exactly 0 or 1.* from 0 to 0: scale'),
        (FLAT, '100% of the pixels .*constant.* bands.*inspect PATH'),
        (DIGITAL[:, :, None].expand(4, 13, 3, 8, 8), 'far outside'),
    ],
)
def test_odd_images(image: Tensor, expected: str, batches: int) -> None:
    (message,) = told(image, batches=batches)
    assert re.search(expected, message), message


@pytest.mark.parametrize(
    ('image', 'value_range'),
    [
        (DIGITAL / 5000, None),
        (STANDARD, None),
        (STANDARD, (0, 1)),
        # Snow, standardised by the statistics of land
        (STANDARD / 3 + 5, None),
        # No data in a part of every image, a band of padding, bright clouds
        (torch.cat([torch.zeros(4, 13, 8, 7), DIGITAL / 5000], -1), None),
        (torch.cat([torch.zeros(4, 1, 8, 8), DIGITAL / 5000], 1), None),
        ((DIGITAL / 2000).clamp(0, 1), None),
        # Ranges that are declared
        (DIGITAL, (0, 10_000)),
        (RADAR, (-30, 5)),
        (DIGITAL / 10, (0, 255)),
        (DIGITAL[0, 0], None),
    ],
)
def test_images_that_are_meant(
    image: Tensor, value_range: tuple[float, float] | None
) -> None:
    assert not told(image, value_range)


def test_declared_ranges_are_clipped_to() -> None:
    (message,) = told((1000 * DIGITAL).clamp(0, 255), (0, 255))
    assert 'exactly 0 or 255' in message


@TASKS
def test_both_tasks(make: Any, tmp_path: Path) -> None:
    class Unscaled(Scenes):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            sample = super().__getitem__(index)
            return {**sample, 'image': 10_000 * sample['image']}

    trainer = make_trainer(tmp_path, max_epochs=2)
    with pytest.warns(UserWarning, match='far outside of the expected range') as caught:
        trainer.fit(make(), DataLoader(Unscaled(), batch_size=4))
    assert sum('far outside' in str(one.message) for one in caught) == 1


def test_nothing_is_read_on_a_gpu() -> None:
    guard = NonFiniteGuard()
    with fake_cuda():
        for step in range(20):
            image = torch.empty(4, 13, 8, 8, device='cuda')
            guard.watch(step, torch.empty((), device='cuda'), image)
    # The first batches are looked at, of the others the range is
    assert [len(host) for _, host, _ in guard._pending] == [8] * 8 + [5] * 12


def test_values_that_arrive_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: they are read when they are there."""

    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            return False

        def synchronize(self) -> None: ...

    monkeypatch.setattr('torchgeo_softcon.tasks.guard._ASYNCHRONOUS', ('cpu',))
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    (message,) = told(DIGITAL)
    assert 'far outside' in message
