# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from torchgeo_softcon.losses import (
    PRESETS,
    SoftContrastiveLoss,
    SoftLabelLoss,
    soft_contrastive_terms,
    soft_label_loss,
)

from .test_soft_contrastive import make_batch


def label_agreement(query: Tensor, key: Tensor, label: Tensor, **options: Any) -> Any:
    return SoftLabelLoss(**options).agreement(query, key, label)


def similarities(
    query: Tensor, key: Tensor, label: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, label similarities, and whether both labels are known, all (N, N)."""
    cosine = F.cosine_similarity(query[:, None], key[None], dim=-1)
    target = F.cosine_similarity(label[:, None], label[None], dim=-1)
    known = label.any(1)
    return cosine, target, known[:, None] & known[None]


def gradient_of_cosines(**options: Any) -> Tensor:
    """Gradient of the soft term with respect to each cosine, by queries at will.

    Keys are the unit vectors, so that the cosines are the queries themselves.
    """
    _, _, label = make_batch(n=8)
    # The last dimension makes up the norm, so the others are free
    cosine = torch.rand(8, 8, dtype=torch.float64) * 0.4 - 0.2
    rest = (1 - cosine.square().sum(1, keepdim=True)).sqrt()
    query = torch.cat([cosine, rest], 1).requires_grad_()
    key = torch.eye(8, 9, dtype=torch.float64)
    soft_label_loss(query, key, label, **options).backward()
    assert query.grad is not None
    # Without the part along the query, which the normalisation takes out
    along = query.grad[:, 8:] / rest
    return query.grad[:, :8] - along * cosine


class TestForms:
    @pytest.mark.parametrize('loss', ['bce', 'mse'])
    def test_batch_bias_leaves_no_gradient_that_knows_no_labels(
        self, loss: Any
    ) -> None:
        options = {'soft_loss': loss, 'temperature': 0.1}
        torch.manual_seed(0)
        assert gradient_of_cosines(**options).sum().abs() > 0.01
        torch.manual_seed(0)
        centred = gradient_of_cosines(**options, soft_bias='batch')
        assert centred.sum().abs() < 1e-9
        assert centred.abs().max() > 1e-3

    @pytest.mark.parametrize('temperature', [0.02, 0.2, 5])
    def test_batch_bias_is_that_of_least_loss(self, temperature: float) -> None:
        query, key, label = make_batch()
        cosine, target, known = similarities(query, key, label)
        z, s = (cosine / temperature)[known].numpy(), target[known].numpy()
        low, high = -99.0, 99.0
        for _ in range(60):
            bias = (low + high) / 2
            if np.mean(1 / (1 + np.exp(-z - bias))) > s.mean():
                high = bias
            else:
                low = bias
        expected = np.mean(np.logaddexp(0, z + bias) - s * (z + bias))
        found = soft_label_loss(
            query, key, label, temperature=temperature, soft_bias='batch'
        )
        assert found.item() == pytest.approx(expected, abs=1e-9)

    def test_mse_with_batch_bias_compares_deviations_from_means(self) -> None:
        query, key, label = make_batch()
        cosine, target, known = similarities(query, key, label)
        gap = (cosine - target)[known]
        actual = soft_label_loss(query, key, label, soft_loss='mse', soft_bias='batch')
        torch.testing.assert_close(actual, gap.var(correction=0), rtol=0, atol=1e-12)

    def test_correlation_of_different_images(self) -> None:
        query, key, label = make_batch()
        cosine, target, known = similarities(query, key, label)
        others = known & ~torch.eye(len(label), dtype=torch.bool)
        expected = 1 - np.corrcoef(cosine[others], target[others])[0, 1]
        actual = soft_label_loss(query, key, label, soft_loss='correlation')
        assert actual.item() == pytest.approx(expected, abs=1e-12)

    def test_rows_are_sums_over_keys(self) -> None:
        query, key, label = make_batch()
        rows, pairs = [
            soft_label_loss(query, key, label, soft_reduction=name)
            for name in ('rows', 'pairs')
        ]
        torch.testing.assert_close(rows, pairs * label.any(1).sum(), rtol=0, atol=1e-12)

    def test_rows_do_not_depend_on_the_batch_size(self) -> None:
        def length(n: int, **options: Any) -> float:
            query, key, label = make_batch(n=n, d=64)
            query.requires_grad_()
            soft_label_loss(query, key, label, **options).backward()
            assert query.grad is not None
            return n * query.grad.norm(dim=1).mean().item()

        assert length(128) < 0.5 * length(16)
        rows = {'soft_reduction': 'rows'}
        assert length(128, **rows) > 2 * length(16, **rows)

    def test_target_temperature_sharpens(self) -> None:
        query, key, label = make_batch()
        cosine, target, _ = similarities(query, key, label)
        rows = label.any(1)
        cosine, target = cosine[rows][:, rows], target[rows][:, rows]
        shares = (target / 0.05).softmax(1)
        expected = -(shares * (cosine / 0.2).log_softmax(1)).sum(1).mean()
        actual = soft_label_loss(
            query, key, label, soft_loss='cross_entropy', target_temperature=0.05
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)

    def test_learned_scale_and_bias(self) -> None:
        query, key, label = make_batch(dtype=torch.float32)
        loss = SoftLabelLoss(0.5, soft_bias='learned')
        start = loss(query, key, label)
        torch.testing.assert_close(
            start, soft_label_loss(query, key, label, temperature=0.5)
        )
        start.backward()
        assert [p.grad is not None for p in loss.parameters()] == [True, True]
        optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=50)

        def step() -> Tensor:
            optimizer.zero_grad()
            value: Tensor = loss(query, key, label)
            value.backward()
            return value

        optimizer.step(step)  # type: ignore[arg-type]
        # Nothing label-free is left: the mean probability is the mean target
        assert loss.bias.grad is not None
        assert loss.bias.grad.abs() < 1e-4
        assert loss.agreement(query, key, label).explained >= -1e-5


class TestContrast:
    @pytest.mark.parametrize('weight', [0, 0.25, 1])
    def test_same_labels_weigh_less(self, weight: float) -> None:
        query, key, _ = make_batch(n=6)
        label = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 0], [0, 0], [2, 0]]).double()
        weights = torch.ones(6, 6, dtype=torch.float64)
        for i, j in [(0, 1), (1, 0), (0, 5), (5, 0), (1, 5), (5, 1)]:
            weights[i, j] = weight
        share = weights * (similarities(query, key, label)[0] / 0.2).exp()
        expected = -(share.diag() / share.sum(1)).log().mean()
        actual = soft_contrastive_terms(query, key, label, same_label_weight=weight)
        torch.testing.assert_close(actual.contrast, expected, rtol=0, atol=1e-12)

    def test_labels_weigh_negatives_without_a_soft_term(self) -> None:
        query, key, label = make_batch()
        label[:2] = label[2]
        loss = SoftContrastiveLoss(soft_weight=0, same_label_weight=0)
        assert loss(query, key, label) < loss(query, key, None)

    def test_preset_of_a_third_party(self) -> None:
        query, key, label = make_batch()
        label[[3, 14], 1] = 1
        cosine, target, _ = similarities(query, key, label)
        contrast = F.cross_entropy(cosine / 0.1, torch.arange(16))
        soft = F.binary_cross_entropy(cosine.sigmoid(), target.clamp(max=1))
        loss = SoftContrastiveLoss(**PRESETS['ws_mulsupcon'])
        torch.testing.assert_close(
            loss(query, key, label), contrast + 0.1 * soft, rtol=0, atol=1e-12
        )
        assert SoftContrastiveLoss(**PRESETS['softcon']).soft_weight == 30


class TestAgreement:
    def test_rank_correlation_of_known_pairs_with_ties(self) -> None:
        query, key, label = make_batch()
        cosine, target, known = similarities(query, key, label)
        others = known & ~torch.eye(len(label), dtype=torch.bool)
        target = target.round(decimals=4)
        expected = spearman_corrcoef(cosine[others], target[others]).item()
        found = label_agreement(query, key, label).correlation
        assert found.item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(
        ('options', 'chance', 'floor'),
        [
            ({}, lambda s: -s.mean() * s.mean().log() - (1 - s.mean()) * (1 - s.mean()).log(), None),
            ({'soft_loss': 'mse'}, lambda s: s.var(correction=0), 0),
            ({'soft_loss': 'cross_entropy'}, lambda s: math.log(14), None),
            ({'soft_loss': 'correlation'}, lambda s: 1, 0),
        ],
    )  # fmt: skip
    def test_explained_share(self, options: Any, chance: Any, floor: Any) -> None:
        query, key, label = make_batch()
        _, target, known = similarities(query, key, label)
        found = label_agreement(query, key, label, **options)
        assert float(found.chance) == pytest.approx(float(chance(target[known])))
        if floor is not None:
            assert found.floor == floor
        loss = soft_label_loss(query, key, label, **options)
        share = (found.chance - loss) / (found.chance - found.floor)
        torch.testing.assert_close(found.explained, share, rtol=0, atol=1e-9)
        assert found.floor < loss

    @pytest.mark.parametrize('reduction', ['pairs', 'rows'])
    @pytest.mark.parametrize('loss', ['bce', 'cross_entropy'])
    def test_labels_themselves_reach_the_floor(self, loss: Any, reduction: Any) -> None:
        # One label each: similarities of 0 and 1, which long embeddings can be
        label = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2, 3]]
        label = torch.cat([label, torch.zeros(1, 4, dtype=torch.float64)])
        options = {'temperature': 0.01, 'soft_loss': loss, 'soft_reduction': reduction}
        query = label - 0.25
        found = label_agreement(query, query, label, **options)
        assert found.explained.item() == pytest.approx(1, abs=0.05)
        assert found.correlation.item() == pytest.approx(1)

    def test_all_alike_explains_nothing(self) -> None:
        _, _, label = make_batch()
        query = torch.ones(16, 8, dtype=torch.float64)
        for options in ({'soft_bias': 'batch'}, {'soft_loss': 'correlation'}):
            found = label_agreement(query, query, label, **options)
            assert found.explained.abs() < 1e-6
            assert found.correlation == 0

    @pytest.mark.parametrize('value', [0.0, 1.0])
    def test_labels_that_do_not_differ(self, value: float) -> None:
        query, key, label = make_batch()
        found = label_agreement(query, key, torch.full_like(label, value))
        assert all(number.isfinite() for number in found)
        assert found.explained == found.correlation == 0
