# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from torchgeo_softcon.evaluation import loop
from torchgeo_softcon.evaluation.loop import (
    LabelledFeatures,
    batch_transform,
    collect_labelled,
    encode_batches,
    score_probes,
)

from ..callbacks.helpers import PatchesDataModule


class Mean(nn.Module):
    """Gives the mean of each band."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3))


@pytest.mark.parametrize(
    ('module', 'name'),
    [
        ('callbacks.knn', 'encode_batches'),
        ('evaluation.embed', 'encode_batches'),
        ('evaluation.evaluate', 'encode_batches'),
        ('report.samples', 'encode_batches'),
        ('callbacks.knn', 'score_probes'),
        ('evaluation.evaluate', 'score_probes'),
    ],
)
def test_one_loop(module: str, name: str) -> None:
    found = getattr(import_module(f'torchgeo_softcon.{module}'), name)
    assert found is getattr(loop, name)


@pytest.mark.parametrize('stacked', [False, True])
def test_features_of_seasons_are_averaged(stacked: bool) -> None:
    image = torch.rand(3, 4, 2, 8, 8)
    batch = {'image': image.flatten(1, 2) if stacked else image}
    (encoded,) = encode_batches(Mean(), [batch], None, 2, None)
    expected = image.mean((1, 3, 4))
    torch.testing.assert_close(encoded.features['pooled'], expected)
    assert encoded.batch is batch


def test_a_transform_sees_images_only() -> None:
    """TorchGeo's augmentations fail at names of reference systems."""
    seen: list[dict[str, Tensor]] = []

    def transform(sample: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(sample)
        return {'image': sample['image'] + 1}

    data: Any = PatchesDataModule()
    data.aug = transform
    batch = {'image': torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 'crs': ['EPSG:4326']}
    (encoded,) = encode_batches(Mean(), [batch], batch_transform(data), 3, 4)
    assert list(seen[0]) == ['image']
    assert torch.equal(encoded.features['pooled'], torch.ones(2, 3))
    assert encoded.image.shape == (2, 3, 8, 8)


class Hooked(PatchesDataModule):
    """Brightens images, and then scales them as the host does."""

    def on_after_batch_transfer(
        self, batch: dict[str, Any], dataloader_idx: int
    ) -> dict[str, Any]:
        assert 'crs' not in batch
        brighter = {**batch, 'image': batch['image'] + 1, 'label': batch['label'] * 2}
        return super().on_after_batch_transfer(brighter, dataloader_idx)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ('stage', 'expected'), [('VALIDATING', 10), ('PREDICTING', 100)]
)
def test_a_hook_is_run_in_its_stage(stage: str, expected: float) -> None:
    data: Any = Hooked()
    data.val_aug = lambda batch: {**batch, 'image': batch['image'] * 10}
    data.predict_aug = lambda batch: {**batch, 'image': batch['image'] * 100}
    batch = {
        'image': torch.zeros(2, 3, 8, 8),
        'label': torch.ones(2, 1),
        'crs': ['EPSG:4326'] * 2,
    }
    transform = batch_transform(data, RunningStage[stage])
    (encoded,) = encode_batches(Mean(), [batch], transform, 3, None)
    assert torch.equal(encoded.features['pooled'], torch.full((2, 3), expected))
    assert encoded.batch['label'].tolist() == [[2], [2]]
    assert encoded.batch['crs'] == batch['crs']
    assert data.trainer.state.stage is None


def test_unknown_labels_are_left_out() -> None:
    images = torch.rand(4, 2, 8, 8)
    images[1] = math.nan  # does not matter
    label = torch.tensor([[1, 0], [0, 0], [0, 1], [1, 1]])
    batches = [{'image': images, 'label': label}] * 2
    encoded = encode_batches(Mean(), batches, None, 2, None)
    places = torch.arange(8) // 2
    features, labels, known = collect_labelled(encoded, 'data', 'cpu', places=places)
    assert torch.equal(labels, label[[0, 2, 3]].repeat(2, 1))
    assert features['pooled'].shape == (6, 2)
    assert known.tolist() == [0, 1, 1, 2, 3, 3]
    encoded = encode_batches(
        Mean(), [{'image': images, 'label': label + 1}], None, 2, None
    )
    with pytest.raises(ValueError, match=r'1 of 4 features of the data \(pooled\) are'):
        collect_labelled(encoded, 'data', 'cpu')


@pytest.mark.parametrize('split', [False, True])
def test_scores_of_a_perfect_encoder(split: bool) -> None:
    labels = torch.arange(12) % 3
    features = {'pooled': torch.eye(3)[labels]}
    known = LabelledFeatures(features, labels, torch.arange(12) // 3)
    scores = {
        (s.method, s.k, s.feature, s.metric): s.value
        for s in score_probes(known, None if split else known, (1, 2), 0.07)
    }
    assert scores == {
        ('chance', None, '', 'accuracy'): pytest.approx(1 / 3),
        ('knn', 1, 'pooled', 'accuracy'): 1,
        ('knn', 2, 'pooled', 'accuracy'): 1,
        ('linear', None, 'pooled', 'accuracy'): 1,
    }
