# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from typing import Any

import pytest
import shapely
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking.knn import knn_predict
from torch import Tensor
from torch.utils.data import Subset

from torchgeo_softcon.callbacks import knn_scores
from torchgeo_softcon.evaluation.footprints import assign_folds, sample_places
from torchgeo_softcon.evaluation.probes import evaluate, linear_scores, score_spread


def clusters(count: int, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around the centre of their class, with overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 32, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(count, 32, generator=generator)
    return centres[labels] + 1.5 * noise, labels


class TestKNNScores:
    @pytest.mark.parametrize('count', [200, 60])
    @pytest.mark.parametrize('k', [5, 10, 20])
    def test_same_top_1_as_lightly(self, k: int, count: int) -> None:
        bank, labels = clusters(500)
        queries, answers = clusters(count, seed=1)
        expected = knn_predict(
            F.normalize(queries), F.normalize(bank).T, labels, 10, k, 0.07
        )[:, 0]
        actual = knn_scores(queries, bank, F.one_hot(labels), k, 0.07).argmax(1)
        assert torch.equal(actual, expected)
        # Neither trivial nor hopeless
        assert 0.3 < (actual == answers).float().mean() < 1

    def test_multi_labels_by_hand(self) -> None:
        bank = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
        labels = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]])
        scores = knn_scores(torch.tensor([[2.0, 0]]), bank, labels, 2, 0.5)
        near, far = torch.tensor([1 / 0.5, 0]).softmax(0)
        torch.testing.assert_close(scores, torch.tensor([[near, far, 1.0]]))

    def test_many_queries_come_in_pieces(self) -> None:
        bank, labels = clusters(50)
        queries, _ = clusters(1100)
        scores = knn_scores(queries, bank, F.one_hot(labels), 5)
        assert scores.shape == (1100, 10)
        part = knn_scores(queries[1050:], bank, F.one_hot(labels), 5)
        torch.testing.assert_close(scores[1050:], part)

    def test_a_low_temperature_does_not_overflow(self) -> None:
        bank, labels = clusters(50)
        scores = knn_scores(bank, bank, F.one_hot(labels), 5, 0.001)
        assert torch.equal(scores.argmax(1), labels)
        torch.testing.assert_close(scores.sum(1), torch.ones(50))

    @pytest.mark.parametrize('k', [0, 51])
    def test_bad_k(self, k: int) -> None:
        bank, labels = clusters(50)
        with pytest.raises(ValueError, match=f'k must be from 1 to .* 50, got {k}'):
            knn_scores(bank, bank, F.one_hot(labels), k)


class TestLinearScores:
    def test_finds_a_linear_rule(self) -> None:
        features = torch.randn(300, 20, generator=torch.Generator().manual_seed(0))
        labels = (features[:, :3] > 0).long()
        scores = linear_scores(features[100:], features[:100], labels[:100])
        assert evaluate(scores, labels[100:]) > 0.9

    @pytest.mark.parametrize('samples', [12, 60])
    def test_penalty_is_that_of_the_smallest_error_left_out(self, samples: int) -> None:
        bank, labels = clusters(samples, 3)
        bank, target = bank.double(), F.one_hot(labels, 3).double()
        queries = clusters(5, seed=2)[0].double()
        errors, candidates = [], []
        mean, std = bank.mean(0), bank.std(0, correction=0)
        standard = (bank - mean) / std
        for exponent in range(-4, 5):
            penalty = 10.0**exponent * samples

            def fit(
                x: Tensor, y: Tensor, at: Tensor, penalty: float = penalty
            ) -> Tensor:
                offset, centre = y.mean(0), x.mean(0)
                gram = (x - centre).T @ (x - centre) + penalty * torch.eye(32)
                weight = torch.linalg.solve(gram, (x - centre).T @ (y - offset))
                return (at - centre) @ weight + offset

            left_out = 0.0
            for i in range(samples):
                rest = torch.arange(samples) != i
                prediction = fit(standard[rest], target[rest], standard[i : i + 1])
                left_out += float((prediction - target[i]).square().sum())
            errors.append(left_out)
            candidates.append(fit(standard, target, (queries - mean) / std))
        expected = candidates[errors.index(min(errors))]
        actual = linear_scores(queries, bank, target)
        torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)

    def test_constant_features_give_the_frequencies(self) -> None:
        labels = torch.tensor([[1, 0], [0, 0], [1, 1], [1, 0]])
        scores = linear_scores(torch.ones(2, 3), torch.ones(4, 3), labels)
        torch.testing.assert_close(scores, torch.tensor([[0.75, 0.25]] * 2))


class TestEvaluate:
    def test_accuracy(self) -> None:
        scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
        assert evaluate(scores, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)

    def test_average_precision_by_hand(self) -> None:
        # Negative scores and scores above 1 keep their order
        scores = torch.tensor([[3.0, 0], [2, 0], [-5, 0], [-9, 0]])
        labels = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]])
        # Ranks 1 and 3 are right: (1 / 1 + 2 / 3) / 2. The other one is a guess.
        assert evaluate(scores, labels) == pytest.approx((5 / 6 + 1 / 4) / 2)

    def test_micro_average_by_hand(self) -> None:
        scores = torch.tensor([[0.9, 0.8], [0.4, 0.7]])
        labels = torch.tensor([[1, 0], [0, 1]])
        # Of all four pairs, ranks 1 and 3 are right: (1 / 1 + 2 / 3) / 2
        assert evaluate(scores, labels, 'micro') == pytest.approx(5 / 6)
        # A class that nothing has counts, too: it comes in between
        scores = torch.tensor([[0.9, 0.8, 0.85], [0.4, 0.7, 0.1]])
        labels = torch.tensor([[1, 0, 0], [0, 1, 0]])
        assert evaluate(scores, labels, 'micro') == pytest.approx((1 + 2 / 4) / 2)

    def test_classes_that_tell_nothing_apart_do_not_count(self) -> None:
        scores = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.9]])
        labels = torch.tensor([[1, 1, 0], [0, 1, 0]])
        assert evaluate(scores, labels) == 1


def test_queries_of_one_kind() -> None:
    labels = torch.tensor([[1, 0], [1, 0]])
    with pytest.raises(ValueError, match='2 queries with the same classes'):
        evaluate(torch.rand(2, 2), labels)


class TestPlaces:
    def test_folds_share_no_place_and_are_of_one_size(self) -> None:
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(30, (1000,), generator=generator) ** 2
        folds = assign_folds(places, 4)
        assert torch.equal(folds, assign_folds(places, 4))
        for place in places.unique():
            assert len(folds[places == place].unique()) == 1
        assert all(abs(count - 250) < 40 for count in torch.bincount(folds).tolist())

    def test_places_by_georeference(self) -> None:
        class Located:
            def footprint(self, index: int) -> Any:
                left = 500_000 + 8_000 * index
                return shapely.box(left, 5e6, left + 640, 5e6 + 640), 'EPSG:32633', None

        dataset: Any = Located()
        names = sample_places(dataset, range(4))
        assert names == ['451 150', '451 151', '451 152', '451 153']
        assert sample_places(Subset(dataset, [2, 0]), [1, 0]) == [names[0], names[2]]
        assert sample_places([1, 2], [0, 1]) is None


class TestSpread:
    @pytest.mark.parametrize('multi', [False, True])
    def test_is_that_of_new_places(self, multi: bool) -> None:
        """The estimate from one draw, and the deviation between many draws."""

        def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
            generator = torch.Generator().manual_seed(seed)
            # Every place is as hard for all of its ten images
            places = torch.arange(60).repeat_interleave(10)
            noise = torch.rand(60, 1, generator=generator)[places] * 4
            labels = torch.randint(3, (600,), generator=generator)
            hot = F.one_hot(labels).float()
            scores = hot + noise * torch.randn(600, 3, generator=generator)
            return scores, hot.long() if multi else labels, places

        seen = [evaluate(*draw(seed)[:2]) for seed in range(100)]
        guess = [score_spread(*draw(seed)) for seed in range(20)]
        expected = float(torch.tensor(seen).std())
        assert sum(guess) / 20 == pytest.approx(expected, rel=0.25)

    def test_of_one_place_is_not_known(self) -> None:
        scores, labels = torch.rand(6, 2), torch.randint(2, (6, 2))
        assert math.isnan(
            score_spread(scores, labels, torch.zeros(6, dtype=torch.long))
        )
