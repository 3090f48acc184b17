# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchgeo_softcon.losses import (
    SoftContrastiveLoss,
    cosine_similarity,
    jaccard_similarity,
    soft_contrastive_loss,
    soft_contrastive_terms,
)

SoftLoss = Literal['bce', 'cross_entropy', 'mse', 'correlation']
SOFT_LOSSES: tuple[SoftLoss, ...] = ('bce', 'cross_entropy', 'mse', 'correlation')

#: Options of the soft term with which ranks have to agree.
FORMS: tuple[dict[str, Any], ...] = (
    *({'soft_loss': name} for name in SOFT_LOSSES),
    {'soft_bias': 'batch'},
    {'soft_loss': 'mse', 'soft_bias': 'batch'},
    {'soft_reduction': 'rows', 'same_label_weight': 0.3},
    {'soft_loss': 'cross_entropy', 'target_temperature': 0.1},
)


def make_batch(
    n: int = 16, d: int = 8, k: int = 9, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, n, d, generator=generator, dtype=dtype)
    label = (torch.rand(n, k, generator=generator) > 0.6).to(dtype)
    label[[3, n - 2]] = 0
    label[0, 0] = 1
    return query, key, label


def slow_similarity(a: list[float], b: list[float], kind: str) -> float:
    if kind == 'cosine':
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    low = sum(min(x, y) for x, y in zip(a, b, strict=True))
    return low / sum(max(x, y) for x, y in zip(a, b, strict=True))


def slow_terms(
    query: Tensor,
    key: Tensor,
    label: Tensor,
    key_label: Tensor,
    soft_loss: str,
    kind: str,
    tau: float,
    tau_soft: float,
) -> tuple[float, float]:
    """Both terms with nothing but loops over Python floats."""
    q, k = query.tolist(), key.tolist()
    y, z = label.tolist(), key_label.tolist()
    n = len(q)

    def cos(a: list[float], b: list[float]) -> float:
        dot = sum(s * t for s, t in zip(a, b, strict=True))
        return dot / math.sqrt(sum(s * s for s in a) * sum(t * t for t in b))

    contrast = 0.0
    for i in range(n):
        total = sum(math.exp(cos(q[i], k[j]) / tau) for j in range(n))
        contrast -= math.log(math.exp(cos(q[i], k[i]) / tau) / total) / n

    losses: list[float] = []
    for i in range(n):
        known = [j for j in range(n) if any(y[i]) and any(z[j])]
        if not known:
            continue
        target = {j: slow_similarity(y[i], z[j], kind) for j in known}
        if soft_loss == 'cross_entropy':
            total = sum(math.exp(cos(q[i], k[j]) / tau_soft) for j in known)
            mass = sum(target.values())
            losses.append(
                -sum(
                    target[j]
                    / mass
                    * math.log(math.exp(cos(q[i], k[j]) / tau_soft) / total)
                    for j in known
                )
            )
            continue
        for j in known:
            if soft_loss == 'bce':
                p = 1 / (1 + math.exp(-cos(q[i], k[j]) / tau_soft))
                t = target[j]
                losses.append(-t * math.log(p) - (1 - t) * math.log(1 - p))
            else:
                losses.append((cos(q[i], k[j]) - target[j]) ** 2)
    return contrast, sum(losses) / len(losses)


class TestSoftContrastiveLoss:
    @pytest.mark.parametrize('soft_loss', SOFT_LOSSES[:3])
    @pytest.mark.parametrize('kind', ['cosine', 'jaccard'])
    @pytest.mark.parametrize('seasons', [False, True])
    def test_matches_a_double_loop(
        self, soft_loss: SoftLoss, kind: Literal['cosine', 'jaccard'], seasons: bool
    ) -> None:
        query, key, label = make_batch()
        key_label = label.roll(1, 1) if seasons else label
        terms = soft_contrastive_terms(
            query,
            key,
            label,
            key_label if seasons else None,
            temperature=0.2,
            soft_temperature=0.3,
            soft_loss=soft_loss,
            label_similarity=kind,
        )
        contrast, soft = slow_terms(
            query, key, label, key_label, soft_loss, kind, 0.2, 0.3
        )
        assert terms.contrast.item() == pytest.approx(contrast, abs=1e-10)
        assert terms.soft.item() == pytest.approx(soft, abs=1e-10)

        loss = soft_contrastive_loss(
            query,
            key,
            label,
            key_label,
            soft_temperature=0.3,
            soft_weight=0.7,
            soft_loss=soft_loss,
            label_similarity=kind,
        )
        assert loss.item() == pytest.approx(contrast + 0.7 * soft, abs=1e-10)

    def test_weight_zero_is_infonce(self) -> None:
        query, key, _ = make_batch()
        logits = F.cosine_similarity(query[:, None], key[None], dim=-1) / 0.2
        expected = F.cross_entropy(logits, torch.arange(16))
        actual = soft_contrastive_loss(query, key, None, soft_weight=0)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)

    def test_identity_labels_make_cross_entropy_infonce(self) -> None:
        query, key, _ = make_batch()
        terms = soft_contrastive_terms(
            query, key, torch.eye(16).double(), soft_loss='cross_entropy'
        )
        torch.testing.assert_close(terms.soft, terms.contrast, rtol=0, atol=1e-12)

    @pytest.mark.parametrize('soft_loss', SOFT_LOSSES)
    def test_order_of_the_batch_does_not_matter(self, soft_loss: SoftLoss) -> None:
        query, key, label = make_batch()
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        loss = SoftContrastiveLoss(soft_loss=soft_loss)
        torch.testing.assert_close(
            loss(query[order], key[order], label[order]),
            loss(query, key, label),
            rtol=0,
            atol=1e-12,
        )

    @pytest.mark.parametrize('soft_loss', SOFT_LOSSES)
    def test_gradient(self, soft_loss: SoftLoss) -> None:
        query, key, label = make_batch(n=5, d=3)
        query.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda q: soft_contrastive_loss(q, key, label, soft_loss=soft_loss), query
        )

    def test_no_gradient_to_keys_and_labels(self) -> None:
        query, key, label = make_batch()
        query.requires_grad_()
        soft_contrastive_loss(query, key.detach(), label).backward()
        assert query.grad is not None
        assert key.grad is None
        assert label.grad is None

    @pytest.mark.parametrize('soft_loss', SOFT_LOSSES)
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    def test_all_unknown_is_finite(
        self, soft_loss: SoftLoss, dtype: torch.dtype
    ) -> None:
        query, key, label = make_batch(dtype=dtype)
        query.requires_grad_()
        terms = soft_contrastive_terms(query, key, label * 0, soft_loss=soft_loss)
        assert terms.soft == 0
        (terms.contrast + terms.soft).backward()
        assert query.grad is not None
        assert query.grad.isfinite().all()

    def test_unknown_labels_change_nothing_among_the_known(self) -> None:
        query, key, label = make_batch()
        known = label.any(1)
        for soft_loss in SOFT_LOSSES:
            torch.testing.assert_close(
                soft_contrastive_terms(query, key, label, soft_loss=soft_loss).soft,
                soft_contrastive_terms(
                    query[known], key[known], label[known], soft_loss=soft_loss
                ).soft,
            )

    def test_float32_under_autocast(self) -> None:
        query, key, label = make_batch(dtype=torch.float32)
        expected = soft_contrastive_loss(query, key, label)
        with torch.autocast('cpu', torch.bfloat16):
            actual = soft_contrastive_loss(query, key, label)
        assert actual.dtype == torch.float32
        assert actual == expected
        low = soft_contrastive_loss(query.bfloat16(), key.bfloat16(), label)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, expected, rtol=1e-2, atol=0)

    def test_sharing_labels_is_cheaper_than_being_apart(self) -> None:
        label = torch.tensor([[1.0, 1.0], [1, 1], [0, 1], [0, 1]])
        near, far = torch.eye(4)[[0, 0, 1, 1]], torch.eye(4)[[0, 1, 0, 1]]
        for soft_loss in SOFT_LOSSES:
            assert (
                soft_contrastive_terms(near, near, label, soft_loss=soft_loss).soft
                < soft_contrastive_terms(far, far, label, soft_loss=soft_loss).soft
            )

    def test_similarity_function(self) -> None:
        query, key, label = make_batch()

        def count(first: Tensor, second: Tensor) -> Tensor:
            return first @ second.T / 9

        actual = soft_contrastive_terms(
            query, key, label, soft_loss='mse', label_similarity=count
        ).soft
        known = label.any(1)
        cosine = F.cosine_similarity(query[:, None], key[None], dim=-1)
        expected = (cosine - label @ label.T / 9)[known][:, known].square().mean()
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'temperature': 0}, 'temperature must be > 0, got 0'),
            ({'temperature': math.nan}, 'temperature must be finite, got nan'),
            ({'soft_temperature': -1}, 'soft_temperature must be > 0, got -1'),
            ({'soft_weight': -1}, 'soft_weight must be >= 0, got -1'),
            ({'soft_weight': math.nan}, 'soft_weight must be finite, got nan'),
            ({'soft_loss': 'kl'}, "soft_loss must be .* got 'kl'"),
            ({'label_similarity': 'dice'}, "label_similarity must be .* got 'dice'"),
            ({'soft_bias': 'x'}, "soft_bias must be .* got 'x'"),
            ({'soft_reduction': 'sum'}, "soft_reduction must be .* got 'sum'"),
            ({'same_label_weight': 2}, r'same_label_weight must be in \[0, 1\], got 2'),
            ({'target_temperature': 0}, 'target_temperature must be > 0, got 0'),
            ({'target_temperature': 0.1}, "for soft_loss = 'cross_entropy', got 'bce'"),
            (
                {'soft_bias': 'learned', 'soft_loss': 'mse'},
                "soft_bias = 'learned' is for soft_loss = .*'bce'.*, got 'mse'",
            ),
        ],
    )
    def test_bad_option(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            SoftContrastiveLoss(**kwargs)

    def test_bad_shapes(self) -> None:
        query, key, label = make_batch()
        loss = SoftContrastiveLoss()
        with pytest.raises(
            ValueError, match=r'query and key .* \(16, 8\) and \(15, 8\)'
        ):
            loss(query, key[1:], label)
        with pytest.raises(ValueError, match=r'label .* B = 16, got \(15, 9\)'):
            loss(query, key, label[1:])
        with pytest.raises(ValueError, match=r'got \(16, 9\) and \(16, 8\)'):
            loss(query, key, label, label[:, 1:])
        with pytest.raises(ValueError, match='label must be given if soft_weight > 0'):
            loss(query, key)
        bad: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a
        with pytest.raises(ValueError, match=r'return the shape \(16, 16\), got'):
            SoftContrastiveLoss(label_similarity=bad)(query, key, label)
        with pytest.raises(ValueError, match='soft_loss'):
            soft_contrastive_loss(query, key, label, soft_loss='kl')  # type: ignore[arg-type]
        with pytest.raises(ValueError, match='label_similarity'):
            soft_contrastive_loss(query, key, label, label_similarity='dice')  # type: ignore[arg-type]


def test_similarities_of_known_pairs() -> None:
    first = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    second = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(
        cosine_similarity(first, second), torch.tensor([[0.5, 0, 1, 0], [0, 0, 0, 0]])
    )
    torch.testing.assert_close(
        jaccard_similarity(first, second),
        torch.tensor([[1 / 3, 0, 1, 0], [0, 0, 0, 0]]),
    )


def _rank(rank: int, folder: str) -> None:
    """One of two ranks: its loss and gradient of a linear map, for each form."""
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2
    )
    query, key, label = make_batch(n=8)
    label[4:7] = 0  # the second rank knows little, the first knows all but one
    part = slice(4 * rank, 4 * rank + 4)
    results = {}
    for i, form in enumerate(FORMS):
        for keys_learn in (False, True):
            weight = torch.eye(8, dtype=torch.float64).requires_grad_()
            moved = key @ weight if keys_learn else key
            loss = soft_contrastive_loss(
                query[part] @ weight,
                moved[part],
                label[part],
                gather_distributed=True,
                **form,
            )
            loss.backward()
            assert weight.grad is not None
            # What DistributedDataParallel does
            torch.distributed.all_reduce(weight.grad)
            results[i, keys_learn] = (loss.item(), weight.grad / 2)
    torch.save(results, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _rank, (str(tmp_path),), nprocs=2, start_method='fork'
    )
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    query, key, label = make_batch(n=8)
    label[4:7] = 0
    for i, form in enumerate(FORMS):
        for keys_learn in (False, True):
            weight = torch.eye(8, dtype=torch.float64).requires_grad_()
            moved = key @ weight if keys_learn else key
            loss = soft_contrastive_loss(query @ weight, moved, label, **form)
            loss.backward()
            results = [r[i, keys_learn] for r in ranks]
            assert sum(r[0] for r in results) / 2 == pytest.approx(loss.item())
            for _, grad in results:
                torch.testing.assert_close(grad, weight.grad)
