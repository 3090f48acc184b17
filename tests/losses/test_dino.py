# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from pathlib import Path

import pytest
import torch
from lightly.loss import DINOLoss as LightlyDINOLoss
from torch import Tensor

from torchgeo_softcon.losses import DINOLoss, multi_crop_cross_entropy


class PairLoop:
    """The loss pair by pair, with a centre that moves after every use."""

    def __init__(self, output_dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.center = torch.zeros(1, output_dim, dtype=dtype)

    def __call__(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        total, pairs = torch.zeros((), dtype=student.dtype), 0
        for t, teacher_view in enumerate(teacher):
            q = torch.softmax((teacher_view - self.center) / temperature, dim=-1)
            for s, student_view in enumerate(student):
                if s == t:
                    continue
                log_p = torch.log_softmax(student_view / 0.1, dim=-1)
                total = total + torch.sum(-q * log_p, dim=-1).mean()
                pairs += 1
        rows = teacher.flatten(0, 1)
        self.center = self.center * 0.9 + rows.mean(0, keepdim=True) * 0.1
        return total / pairs


def make_logits(
    step: int,
    views: tuple[int, int] = (8, 2),
    batch: int = 8,
    output_dim: int = 512,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines with prototypes, spread as those of 64 random dimensions."""
    generator = torch.Generator().manual_seed(step)
    student, teacher = (
        torch.randn(v, batch, output_dim, generator=generator, dtype=dtype) / 8
        for v in views
    )
    return student.requires_grad_(), teacher + 0.1 * step


@pytest.mark.parametrize('output_dim', [512, 65536])
@pytest.mark.parametrize('views', [(8, 2), (9, 3), (2, 2), (2, 1)])
def test_equals_the_pair_loop(views: tuple[int, int], output_dim: int) -> None:
    ours, slow = DINOLoss(output_dim), PairLoop(output_dim)
    exact = PairLoop(output_dim, torch.float64)
    temperatures = [0.04, 0.04, 0.05, 0.055, 0.07, 0.07]
    for step, temperature in enumerate(temperatures[: 6 if output_dim == 512 else 2]):
        batch = 8 if output_dim == 512 else 2
        student, teacher = make_logits(step, views, batch, output_dim)
        loss = ours(student, teacher, temperature)
        ours.update_center()
        (grad,) = torch.autograd.grad(3 * loss, student)
        expected = slow(student, teacher, temperature)
        (expected_grad,) = torch.autograd.grad(3 * expected, student)

        # The loop's own sums over 65536 prototypes are off by up to 6e-6 in float32
        truth = exact(student.double(), teacher.double(), temperature)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
        rtol = 3e-6 if output_dim == 512 else 1e-5
        torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
        error = (grad - expected_grad).norm() / expected_grad.norm()
        assert error < 1e-6
        torch.testing.assert_close(ours.center, slow.center, rtol=1e-6, atol=1e-7)


def test_equals_lightly() -> None:
    student, teacher = make_logits(1)
    theirs = LightlyDINOLoss(output_dim=512)
    torch.testing.assert_close(
        DINOLoss(512)(student, teacher),
        theirs(list(teacher), list(student)),
        rtol=1e-6,
        atol=0,
    )


def test_gradient_is_exact() -> None:
    student, teacher = make_logits(0, (4, 2), 3, 7, torch.float64)
    target = (teacher / 0.04).softmax(-1)
    assert torch.autograd.gradcheck(
        lambda x: multi_crop_cross_entropy(x, target, 0.1), (student,)
    )


def test_rows_are_independent_of_how_they_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = make_logits(0)
    whole = DINOLoss(512)(student, teacher)
    (grad,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr('torchgeo_softcon.losses.dino._CACHED', 3 * 8 * 512)
    cut = DINOLoss(512)(student, teacher)
    (cut_grad,) = torch.autograd.grad(cut, student)
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(cut_grad, grad)


def test_keeps_one_tensor_for_the_backward_pass() -> None:
    saved: list[Tensor] = []
    student, teacher = make_logits(0)
    target = teacher.softmax(-1)

    def keep(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        multi_crop_cross_entropy(student, target)
    assert sum(x.numel() for x in saved) == student.numel()


def test_backward_twice() -> None:
    """What is kept is also handed out, and stays as it is."""
    student, teacher = make_logits(0)
    loss = multi_crop_cross_entropy(student, teacher.softmax(-1))
    for _ in range(2):
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    (grad,) = torch.autograd.grad(loss, student)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, 2 * grad)


def test_autocast_changes_nothing() -> None:
    student, teacher = make_logits(0)
    loss = DINOLoss(512)(student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        cast = DINOLoss(512)(student, teacher)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, loss)

    # Half precision logits: only their own rounding, the gradient in their dtype
    half = student.detach().bfloat16().requires_grad_()
    rounded = DINOLoss(512)(half, teacher.bfloat16())
    assert rounded.dtype == torch.float32
    rounded.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, loss, rtol=1e-3, atol=0)


def test_known_values() -> None:
    # A student without opinion pays log K, whatever the teacher says
    _, teacher = make_logits(0)
    loss = DINOLoss(512)(torch.zeros(8, 8, 512), teacher)
    assert loss.item() == pytest.approx(math.log(512), rel=1e-6)
    # One that is right and sure pays nothing
    logits = torch.zeros(2, 1, 4)
    logits[..., 2] = 10
    assert DINOLoss(4)(logits, logits).item() == pytest.approx(0, abs=1e-6)


def test_centre_moves_once_per_update() -> None:
    loss = DINOLoss(512, center_momentum=0.8)
    student, teacher = make_logits(0)
    halves = [(student[:, i::2], teacher[:, i::2]) for i in range(2)]
    for pair in halves:
        loss(*pair)
    assert not loss.center.any()
    loss.update_center()
    torch.testing.assert_close(loss.center, 0.2 * teacher.mean((0, 1))[None])
    assert not loss.pending.any()

    before = loss.center.clone()
    loss.eval()
    loss(student, teacher)
    assert not loss.pending.any()
    # Nothing to move towards
    loss.update_center()
    assert torch.equal(loss.center, before)


def test_state() -> None:
    loss = DINOLoss(512)
    loss(*make_logits(0))
    loss.update_center()
    assert list(loss.state_dict()) == ['center']
    other = DINOLoss(512)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(*make_logits(1)), loss(*make_logits(1)))


def test_teacher_gets_no_gradient() -> None:
    student, teacher = make_logits(0)
    teacher.requires_grad_()
    DINOLoss(512)(student, teacher).backward()
    assert teacher.grad is None


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2
    )
    loss, part = DINOLoss(512), slice(4 * rank, 4 * rank + 4)
    results = []
    for step in range(3):
        student, teacher = make_logits(step)
        value = loss(student[:, part], teacher[:, part])
        loss.update_center()
        (grad,) = torch.autograd.grad(value, student)
        torch.distributed.all_reduce(grad)
        results.append((value.detach(), grad / 2, loss.center.clone()))
    torch.save(results, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _rank, (str(tmp_path),), nprocs=2, start_method='fork'
    )
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    loss = DINOLoss(512)
    for step in range(3):
        student, teacher = make_logits(step)
        value = loss(student, teacher)
        loss.update_center()
        (grad,) = torch.autograd.grad(value, student)
        values, grads, centers = zip(*(r[step] for r in ranks), strict=True)
        torch.testing.assert_close(sum(values) / 2, value, rtol=1e-6, atol=0)
        for rank in range(2):
            torch.testing.assert_close(grads[rank], grad, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(centers[rank], loss.center)


@pytest.mark.parametrize(
    ('kwargs', 'name'),
    [
        ({'output_dim': 1}, 'output_dim'),
        ({'student_temperature': 0}, 'student_temperature'),
        (
            {'student_temperature': math.nan},
            'student_temperature must be finite, got nan',
        ),
        ({'center_momentum': 1}, 'center_momentum'),
    ],
)
def test_bad_arguments(kwargs: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        DINOLoss(**kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        ((8, 4, 3), (2, 4, 3)),
        ((8, 4, 5), (2, 3, 5)),
        ((1, 4, 5), (1, 4, 5)),
        ((8, 5), (2, 5)),
    ],
)
def test_bad_shapes(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'\(S, B, K\)'):
        DINOLoss(5)(torch.zeros(student), torch.zeros(teacher))


def test_half_precision_keeps_small_gradients() -> None:
    """A scaled loss of many images, whose gradients float16 could not hold unscaled."""
    student, teacher = make_logits(0, batch=64, output_dim=2048)
    target = (teacher / 0.04).softmax(-1)
    scale = 2.0**16
    (exact,) = torch.autograd.grad(
        multi_crop_cross_entropy(student, target) * scale, student
    )
    half = student.detach().half().requires_grad_()
    loss = multi_crop_cross_entropy(half, target)
    (gradient,) = torch.autograd.grad(loss * scale, half)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.float16
    error = (gradient.float() - exact).norm() / exact.norm()
    assert error < 1e-3
    assert (gradient == 0).float().mean() < 1e-3


def test_no_images() -> None:
    loss = multi_crop_cross_entropy(torch.zeros(3, 0, 8), torch.zeros(2, 0, 8))
    assert float(loss) == 0
