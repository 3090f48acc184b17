# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import dataclasses
import importlib
import sys
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchgeo_softcon.evaluation import protocols
from torchgeo_softcon.evaluation.protocols import (
    Protocol,
    choose_strength,
    evaluate_protocol,
    logistic_scores,
    majority_scores,
)
from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.models.encoders import Encoder
from torchgeo_softcon.transforms import ToUnitRange

from ..callbacks.helpers import PatchesDataModule

CLASSES = 4


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features around one point per class, and class indices."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 1.5 * torch.randn(count, 12, generator=generator), labels


def test_votes_of_five_neighbours() -> None:
    bank, labels = clusters(80, 0)
    queries, _ = clusters(30, 1)
    hot = nn.functional.one_hot(labels)
    scores = majority_scores(queries, bank, hot)
    for query, score in zip(queries.numpy(), scores.numpy(), strict=True):
        nearest = np.argsort(((bank.numpy() - query) ** 2).sum(1))[:5]
        expected = np.bincount(labels.numpy()[nearest], minlength=CLASSES) / 5
        np.testing.assert_allclose(score, expected, atol=1e-6)


@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('strength', [1e-3, 1.0])
def test_logistic_regression_is_at_its_optimum(multi: bool, strength: float) -> None:
    """The gradient of scikit-learn's objective, sum of losses + |W|^2 / (2 C), is 0."""
    bank, classes = clusters(60, 0)
    hot = nn.functional.one_hot(classes)
    labels = (
        (hot + hot.roll(1, 1) * (torch.arange(60) % 2)[:, None]) if multi else classes
    )
    # Scores of unit vectors and of 0 tell weight and offset, but for the softmax
    probabilities = logistic_scores(bank, bank, labels, strength).double()
    residual = probabilities - (labels if multi else hot)
    assert residual.mean(0).abs().max() < 5e-4  # of the offset
    gradient = residual.T @ bank.double()  # which W / C cancels
    weight = -strength * gradient
    logits = bank.double() @ weight.T
    if multi:
        offset = (probabilities.logit() - logits).mean(0)
        again = (logits + offset).sigmoid()
    else:
        offset = (
            probabilities.log() - logits - (probabilities.log() - logits).mean(1, True)
        ).mean(0)
        again = (logits + offset).softmax(1)
    torch.testing.assert_close(again, probabilities, rtol=0, atol=0.06)


def test_strength_is_that_of_the_best_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocols, '_STRENGTHS', np.logspace(-4, 2, 4))
    train, val = clusters(60, 0), clusters(60, 1)
    chosen = choose_strength(*train, *val)
    rates = [
        (logistic_scores(val[0], *train, float(c)).argmax(1) == val[1]).float().mean()
        for c in protocols._STRENGTHS
    ]
    assert chosen == protocols._STRENGTHS[int(np.argmax(rates))]


@pytest.mark.parametrize('multi', [False, True])
def test_scores_of_torchgeo_bench(multi: bool) -> None:
    """With torchgeo-bench itself, which needs Python 3.12 and a lot that we do not."""
    reason = "install 'torchgeo-bench==0.4.*' beside torchgeo-softcon"
    bench = pytest.importorskip('torchgeo_bench.main', reason=reason)
    splits = [clusters(count, seed) for seed, count in enumerate((200, 80, 300))]
    hot = [nn.functional.one_hot(labels) for _, labels in splits]
    if multi:  # every other sample has a second label
        second = [one.roll(1, 1) * (torch.arange(len(one)) % 2)[:, None] for one in hot]
        hot = [one + two for one, two in zip(hot, second, strict=True)]
        splits = [(x, labels) for (x, _), labels in zip(splits, hot, strict=True)]
    (bank, labels), val, (queries, answers) = splits

    arrays = [value.numpy() for split in splits for value in split]
    train, test = arrays[:2], arrays[-2:]
    knn, *_ = bench.evaluate_knn(*train, *test, 0, 20)
    strengths = protocols._STRENGTHS
    linear, _, _, strength, *_ = bench.evaluate_logistic(
        *arrays, strengths, 0, 20, merge_val=True, device='cpu', temp_scale=False
    )

    scores = majority_scores(queries, bank, hot[0])
    (ours, *_) = protocols._rate('knn5', scores, answers, 0).values()
    assert ours == pytest.approx(knn, abs=1e-3)
    chosen = choose_strength(bank, labels, *val)
    assert chosen == pytest.approx(strength)
    both = torch.cat([bank, val[0]]), torch.cat([labels, val[1]])
    scores = logistic_scores(queries, *both, chosen, 4000)
    (ours, *_) = protocols._rate('linear', scores, answers, 0).values()
    assert ours == pytest.approx(linear, abs=1e-3)


def test_bootstrap_interval() -> None:
    labels = torch.arange(400) % 2
    scores = nn.functional.one_hot(
        torch.where(torch.arange(400) < 300, labels, 1 - labels)
    )
    rated = protocols._rate('knn5', scores.float(), labels, 0)
    assert rated['knn5_accuracy'] == 0.75
    # 1.96 standard errors of a share of 3/4
    assert rated['knn5_accuracy_low'] == pytest.approx(0.75 - 0.042, abs=0.012)
    assert rated['knn5_accuracy_high'] == pytest.approx(0.75 + 0.042, abs=0.012)
    assert rated == protocols._rate('knn5', scores.float(), labels, 0)


@pytest.mark.parametrize('protocol', get_args(Protocol))
def test_each_protocol(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, '_STRENGTHS', np.array([0.1, 1.0]))
    monkeypatch.setattr(protocols, '_RESAMPLES', 20)
    data = PatchesDataModule()
    channels = 3
    for name in ('train', 'val', 'test'):
        data.setup({'train': 'fit', 'val': 'validate', 'test': 'test'}[name])
    channels = data.train_dataset[0]['image'].shape[0]  # type: ignore[index]
    state = create_encoder('test_vit', channels).state_dict()
    encoder = Encoder(state, 'test_vit', 32, unit_range=False)
    values = evaluate_protocol(encoder, data, protocol)
    metrics = {name.split('_')[0] for name in values}
    assert ('knn5' in metrics) == protocol.endswith('bench')
    assert ('knn20' in metrics) == (protocol == 'dino')
    assert {'linear', 'image'} <= metrics
    (score,) = (
        v for k, v in values.items() if k in ('linear_accuracy', 'linear_micro_map')
    )
    assert 0 <= score <= 1
    assert values['linear_c'] in (0.1, 1)


def test_torchgeo_bench_resizes_without_antialiasing() -> None:
    image = torch.rand(1, 2, 96, 96)
    view = protocols._PROTOCOLS['torchgeo-bench'].view(image, 32)
    # Every third pixel is the centre of one of 32, where nothing is averaged
    torch.testing.assert_close(view, image[..., 1::3, 1::3])


def test_unknown_protocol() -> None:
    with pytest.raises(ValueError, match=r"protocol must be 'softcon'.*got 'knn'"):
        evaluate_protocol(Encoder({}), PatchesDataModule(), 'knn')  # type: ignore[arg-type]


@dataclasses.dataclass
class BandSpec:
    name: str
    max: float


class BenchModel(nn.Module):
    """The base class of torchgeo-bench, as far as it matters."""

    def __init__(self, bands: Any, normalization: str, **_: object) -> None:
        super().__init__()
        self.normalization = normalization

    def forward(self, images: Tensor) -> Tensor:
        return self._forward_patch_features(images)  # type: ignore[operator]


class TestBenchModel:
    @pytest.fixture
    def bench(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        for name in ('torchgeo_bench', 'torchgeo_bench.models'):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        interface: Any = ModuleType('torchgeo_bench.models.interface')
        interface.BenchModel = BenchModel
        monkeypatch.setitem(sys.modules, interface.__name__, interface)
        name = 'torchgeo_softcon.evaluation.bench_model'
        monkeypatch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        sys.modules.pop(name, None)

    @pytest.mark.parametrize('scale', [1, 10_000])
    def test_checkpoint(self, scale: float, bench: Any, tmp_path: Any) -> None:
        state = create_encoder('test_vit', 3).state_dict()
        path = tmp_path / 'run.ckpt'
        hparams = {'model': 'test_vit', 'bands': ['B4', 'B3', 'B8A']}
        content = {'state_dict': state, 'hyper_parameters': hparams, 'unit_range': True}
        torch.save(content, path)
        bands = [BandSpec(n, 1.2 * scale) for n in ('red', 'green', 'red_edge_4')]
        model = bench.SoftConBenchModel(bands, checkpoint=str(path)).eval()
        assert model.normalization == 'identity'
        images = 0.3 * torch.rand(2, 3, 64, 64)
        unit = ToUnitRange.of(hparams['bands'])({'image': images * 10_000})['image']
        with torch.inference_mode():
            expected = model.backbone(unit)
            torch.testing.assert_close(
                model(images * scale), expected, rtol=1e-4, atol=1e-4
            )

    def test_other_normalization(self, bench: Any, tmp_path: Any) -> None:
        path = tmp_path / 'run.ckpt'
        state = create_encoder('test_vit', 1).state_dict()
        content = {'state_dict': state, 'hyper_parameters': {'model': 'test_vit'}}
        torch.save({**content, 'unit_range': True}, path)
        model = bench.SoftConBenchModel(
            [BandSpec('elevation', 1)], checkpoint=str(path), normalization='minmax'
        )
        assert (model.normalization, model.unit_range) == ('minmax', None)
        with pytest.raises(ValueError, match=r"pooling must be .* got 'max'"):
            bench.SoftConBenchModel(
                [BandSpec('elevation', 1)], checkpoint=str(path), pooling='max'
            )
