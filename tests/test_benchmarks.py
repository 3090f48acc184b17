# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""That the benchmarks run, and compare equals. How fast they are is for them to say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchgeo_softcon.losses.dino import multi_crop_cross_entropy
from torchgeo_softcon.modules.ema import make_teacher, update_ema
from torchgeo_softcon.modules.packing import encode_crops
from torchgeo_softcon.transforms import RandomView

from .benchmarks import harness, slow
from .benchmarks.__main__ import ROWS, Bench, Forms, main
from .benchmarks.harness import compare, counted
from .tasks.helpers import Corners, make_batch, make_dino

METHODS = {k: v for k, v in vars(Bench).items() if callable(v)}


@pytest.mark.filterwarnings('ignore:Crops of')
def test_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / 'table.json'
    main(['--toy', '--json', str(path)])
    table = json.loads(path.read_text())
    assert list(dict.fromkeys(row['row'] for row in table['rows'])) == list(ROWS)
    # And none is forgotten
    returns = {k: v.__annotations__.get('return') for k, v in METHODS.items()}
    assert {name for name, kind in returns.items() if kind == Forms} == set(ROWS)
    assert torch.__version__.startswith(table['torch'])
    firsts = {row['row']: row for row in reversed(table['rows'])}
    assert all(row['ratio'] == 1 for row in firsts.values())
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(table['rows'])
    for row in ('masking', 'softcon', 'two_views', 'dino_mc'):
        assert min(firsts[row]['memory'], firsts[row]['flops']) > 0
    assert table['loss difference'] < 1e-5


def test_counts() -> None:
    weight = torch.rand(8, 8, requires_grad=True)
    image = torch.rand(4, 8)
    # The image is kept for the weight's gradient, and exp keeps what it gives
    counts = counted(lambda: (image @ weight).exp().sum().backward())
    assert counts == (2 * (2 * 4 * 8 * 8), 2 * 4 * image.numel())


def test_memory_of_a_form_is_not_that_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, peak = 1000, 0

    def form(keeps: int, needs: int) -> Callable[[], None]:
        first = iter([keeps])

        def run() -> None:
            nonlocal now, peak
            now += next(first, 0)
            peak = max(peak, now + needs)

        return run

    def reset() -> None:
        nonlocal peak
        peak = now

    def timed(run: Callable[[], None]) -> float:
        run()
        return 1.0

    monkeypatch.setattr(harness, 'DEVICE', 'cuda')
    monkeypatch.setattr(harness, 'timed', timed)
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', reset)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda: now)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: peak)
    timings = compare('row', {'a': form(500, 7), 'b': form(0, 9)}, 2)
    assert [timing.memory for timing in timings] == [7, 9]


def test_slow_views_have_the_distribution_of_ours() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 48)
    image = torch.stack([ramp.expand(48, 48), ramp[:, None].expand(48, 48).square()])
    images = (image + 0.1 * torch.rand(2, 48, 48)).expand(512, -1, -1, -1)
    scale, flip, blur = (0.08, 1.0), 0.5, 1.0
    ours = RandomView(24, scale, vertical_flip=flip, blur_probability=blur)(images)
    theirs = slow.views_one_by_one(images, 24, scale, flip, blur)
    statistics: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.mean((-2, -1)),
        lambda x: x.std((-2, -1)),
        lambda x: x.diff(dim=-1).abs().mean((-2, -1)),  # blurred alike
        lambda x: x[..., 0] - x[..., -1],  # mirrored alike
    ]
    for statistic in statistics:
        one, other = statistic(ours).flatten(1), statistic(theirs).flatten(1)
        error = (one.var(0) + other.var(0)).div(len(one)).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() < 4 * error).all()
        torch.testing.assert_close(one.std(0), other.std(0), rtol=0.15, atol=0)


def test_slow_forms_are_equal() -> None:
    task = make_dino(drop_path_rate=0, augmentations=Corners())
    crops = task.augmentations(make_batch()['image'])
    torch.testing.assert_close(
        slow.encode(task.student, crops, 2), encode_crops(task.student, crops)
    )
    features = torch.randn(5, 4, task.feature_size)
    torch.testing.assert_close(
        slow.assign(task.head, features), task.assign(task.head, features)
    )
    logits, target = torch.randn(5, 4, 24), torch.rand(2, 4, 24).softmax(-1)
    torch.testing.assert_close(
        slow.cross_entropy(logits, target), multi_crop_cross_entropy(logits, target)
    )

    teachers = [make_teacher(task.model) for _ in range(2)]
    for update, teacher in zip((slow.ema, update_ema), teachers, strict=True):
        for parameter in teacher.parameters():
            parameter.zero_()
        update(task.student, teacher, 0.9)
    for one, other in zip(*(t.parameters() for t in teachers), strict=True):
        torch.testing.assert_close(one, other)

    step = slow.DINOMCStep(task)
    expected = float(task.training_step(make_batch(), 0))
    assert step(make_batch()['image']) == pytest.approx(expected, rel=1e-5)
    # They would count as memory of others
    assert all(parameter.grad is None for parameter in step.parameters)
