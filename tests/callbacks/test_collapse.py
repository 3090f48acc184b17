# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightly.loss import DINOLoss
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from torchgeo_softcon.callbacks import (
    CollapseMonitor,
    collapse,
    effective_rank,
    uniformity,
)
from torchgeo_softcon.callbacks.collapse import count_prototypes
from torchgeo_softcon.tasks import dino_mc, guard

from ..tasks.helpers import make_task
from .helpers import run
from .test_knn import column


class TestEffectiveRank:
    def test_equal_directions_all_count(self) -> None:
        torch.testing.assert_close(effective_rank(torch.eye(6, 9)), torch.tensor(6.0))

    def test_one_direction(self) -> None:
        features = torch.outer(torch.arange(1.0, 9), torch.arange(5.0))
        torch.testing.assert_close(effective_rank(features), torch.tensor(1.0))

    def test_two_directions_of_unequal_weight(self) -> None:
        features = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
        entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
        torch.testing.assert_close(
            effective_rank(features), torch.tensor(math.exp(entropy))
        )

    def test_scale_and_rotation_do_not_matter(self) -> None:
        features = torch.randn(20, 8)
        rotation = torch.linalg.qr(torch.randn(8, 8)).Q
        torch.testing.assert_close(
            effective_rank(features), effective_rank(7 * features @ rotation)
        )

    def test_zero(self) -> None:
        assert effective_rank(torch.zeros(4, 3)) == 0

    def test_half_precision(self) -> None:
        rank = effective_rank(torch.eye(4, dtype=torch.bfloat16))
        assert rank.dtype == torch.float32
        torch.testing.assert_close(rank, torch.tensor(4.0))


class TestUniformity:
    def test_equal_features(self) -> None:
        torch.testing.assert_close(uniformity(torch.ones(5, 3)), torch.tensor(0.0))

    def test_opposite_features(self) -> None:
        features = torch.tensor([[1.0, 0], [-5, 0]])
        torch.testing.assert_close(uniformity(features, t=2), torch.tensor(-8.0))

    def test_orthogonal_features(self) -> None:
        torch.testing.assert_close(uniformity(torch.eye(7)), torch.tensor(-4.0))


class Collapsed(nn.Module):
    """Gives the same features for all images, nearly."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.ones(8) + 1e-4 * image.mean((1, 2, 3))[:, None]


class Prototypes(LightningModule):
    """A task whose loss is that of outputs without content."""

    def __init__(self, loss: float = math.log(64)) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )
        self.criterion = SimpleNamespace(centre=torch.zeros(1, 64))
        self.value = loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = 0 * self.model(batch['image']).sum() + self.value
        self.log('train_loss', loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestCollapseMonitor:
    def test_healthy_run(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings('error', message='The features of different')
            trainer = run(tmp_path, [CollapseMonitor(every_n_steps=4)], make_task())
        for name in ('feature_std', 'effective_rank', 'uniformity'):
            values = column(tmp_path, f'collapse/{name}')
            assert list(values) == [4, 8, 12]
            assert all(map(math.isfinite, values.values()))
            assert float(trainer.callback_metrics[f'collapse/{name}']) == pytest.approx(
                values[12]
            )
        assert 1 < column(tmp_path, 'collapse/effective_rank')[4] <= 4

    def test_warns_once_and_says_what_it_saw(self, tmp_path: Path) -> None:
        task = make_task(model='resnet18')
        task.collapsed = Collapsed()
        monitor = CollapseMonitor(1, patience=3, encoder='collapsed')
        with pytest.warns(UserWarning, match='features of different') as record:
            run(tmp_path, [monitor], task)
        messages = [str(w.message) for w in record if 'features of' in str(w.message)]
        assert len(messages) == 1
        assert (
            'use 1.0 of 4 dimensions (3 looks in a row, 1 steps apart)' in messages[0]
        )
        assert 'lower lr' in messages[0]

    def test_patience_starts_anew(self) -> None:
        monitor = CollapseMonitor(patience=2)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            for std in (0, 1, 0, 1):
                monitor._judge_features(std, 9, 64, 64)
        monitor._judge_features(0, 9, 64, 64)
        with pytest.warns(UserWarning, match='nearly the same'):
            monitor._judge_features(0, 9, 64, 64)

    def test_state_is_in_the_checkpoint(self, tmp_path: Path) -> None:
        task = make_task(model='resnet18')
        task.collapsed = Collapsed()
        monitor = CollapseMonitor(1, patience=6, encoder='collapsed')
        trainer = run(tmp_path / 'a', [monitor], task, max_epochs=1)
        trainer.save_checkpoint(tmp_path / 'one.ckpt')
        assert monitor.state_dict()['seen'] == 4
        # Plain values: it opens safely
        torch.load(tmp_path / 'one.ckpt', weights_only=True)

        fresh = CollapseMonitor(1, patience=6, encoder='collapsed')
        fit = {'ckpt_path': tmp_path / 'one.ckpt'}
        with pytest.warns(UserWarning, match='6 looks in a row'):
            run(tmp_path / 'b', [fresh], task, fit, max_epochs=2)
        again = CollapseMonitor()
        again.load_state_dict(fresh.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            again._judge_features(0, 1, 4, 8)

    def test_plateau_of_a_loss_over_prototypes(self, tmp_path: Path) -> None:
        monitor = CollapseMonitor(2, plateau_steps=6, encoder='model')
        with pytest.warns(UserWarning, match=r'stayed at 4.159 for 6 steps.*log\(64\)'):
            run(tmp_path, [monitor], Prototypes())

    @pytest.mark.parametrize(('loss', 'steps'), [(4.0, 6), (math.log(64), 13)])
    def test_no_plateau(self, loss: float, steps: int, tmp_path: Path) -> None:
        monitor = CollapseMonitor(1, plateau_steps=steps, encoder='model')
        with warnings.catch_warnings():
            warnings.filterwarnings('error', message='train_loss has stayed')
            run(tmp_path, [monitor], Prototypes(loss))

    def test_accumulated_batches_are_one_step(self, tmp_path: Path) -> None:
        run(tmp_path, [CollapseMonitor(2)], max_epochs=2, accumulate_grad_batches=2)
        assert list(column(tmp_path, 'collapse/uniformity')) == [2, 4]

    @pytest.mark.parametrize(
        'kwargs', [{'every_n_steps': 0}, {'patience': 0}, {'min_std': -1.0}]
    )
    def test_bad_arguments(self, kwargs: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            CollapseMonitor(**kwargs)


def test_count_prototypes() -> None:
    task = Prototypes()
    assert count_prototypes(task) == 64
    task.criterion = DINOLoss(32)
    assert count_prototypes(task) == 32
    assert count_prototypes(make_task()) is None


@pytest.mark.parametrize('name', ['is_chance', 'plateau_message'])
def test_one_plateau(name: str) -> None:
    """The task and the callback both see it, within different limits."""
    for module in (collapse, dino_mc):
        assert getattr(module, name) is getattr(guard, name)
