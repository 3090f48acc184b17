# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import Subset

from torchgeo_softcon import SyntheticScenesDataModule
from torchgeo_softcon.callbacks import TrainSubset
from torchgeo_softcon.callbacks.datamodule import choose_subset
from torchgeo_softcon.datasets import SyntheticScenes

from .helpers import PatchesDataModule


def set_up(datamodule: Any, stage: str = 'fit', **options: Any) -> Any:
    trainer: Any = SimpleNamespace(datamodule=datamodule)
    TrainSubset(**options).setup(trainer, None, stage)  # type: ignore[arg-type]
    return datamodule.train_dataset


def patches() -> Any:
    datamodule = PatchesDataModule(length=40)
    datamodule.setup('fit')
    return datamodule


def test_choice() -> None:
    chosen = choose_subset(1000, 0.1)
    assert len(set(chosen)) == 100
    assert chosen == sorted(chosen) == choose_subset(1000, 0.1)
    assert chosen != choose_subset(1000, 0.1, seed=1)
    assert choose_subset(5, 1) == [0, 1, 2, 3, 4]


def test_only_training_samples() -> None:
    datamodule = patches()
    whole = datamodule.train_dataset
    subset = set_up(datamodule, fraction=0.1)
    assert isinstance(subset, Subset)
    assert subset.dataset is whole
    assert subset.indices == choose_subset(40, 0.1)
    assert len(datamodule.train_dataloader()) == 1
    assert len(datamodule.val_dataset) == 40
    assert not isinstance(set_up(patches(), 'test', fraction=0.1), Subset)


@pytest.mark.parametrize('fraction', [0, -1, 1.1])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=r'fraction must be in \(0, 1\]'):
        TrainSubset(fraction)


def test_bad_data() -> None:
    with pytest.raises(ValueError, match=r'0\.001 of 40 samples is nothing'):
        set_up(patches(), fraction=0.001)
    sampled = patches()
    sampled.train_sampler = object()
    with pytest.raises(ValueError, match='and no sampler, got PatchesDataModule'):
        set_up(sampled, fraction=0.1)


def test_draws_without_an_end(scenes: SyntheticScenes) -> None:
    """Their second epoch would ask a subset for more than it has."""
    datamodule = SyntheticScenesDataModule(str(scenes.root), patch_size=48)
    with pytest.raises(ValueError, match='SyntheticScenesDataModule are draws without'):
        set_up(datamodule, fraction=0.5)
