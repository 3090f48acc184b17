# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""How many operations a training step is on a GPU, and that none waits for the host.

A GPU that is fast enough is limited by the number of operations, not by their size. The
numbers are those of the real models: what has no values costs nothing.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchgeo_softcon.tasks import DINOMCTask, SoftConTask
from torchgeo_softcon.tasks.optimizers import create_optimizer, parameter_groups

from .operations import Operations, like_a_gpu

BATCH, BANDS = 8, 13


class Steps:
    """Training steps of a task as Lightning does them, without Lightning."""

    def __init__(self, task: DINOMCTask | SoftConTask) -> None:
        self.task: Any = task.to('meta')
        self.task._seed = 0  # read once per run
        self.task.__dict__['log_step'] = lambda values, batch_size: None
        self.batch = {
            'image': torch.empty(BATCH, BANDS, 264, 264, device='meta'),
            'label': torch.empty(BATCH, 11, device='meta'),
        }

    def run(self, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        loss = self.task.training_step(self.batch, 0)
        loss.backward()
        if isinstance(self.task, DINOMCTask):  # the other leaves it to Lightning
            self.task.configure_gradient_clipping(optimizer)
        self.task.optimizer_step(0, 0, optimizer, lambda: loss)

    def count(self) -> Operations:
        """Operations of one step of many."""
        with like_a_gpu():
            groups = parameter_groups([self.task], 0.1)
            optimizer = create_optimizer('adamw', groups, 1e-3, True)
            self.task._trainer = SimpleNamespace(
                global_step=0, current_epoch=0, global_rank=0, optimizers=[optimizer]
            )
            for _ in range(2):  # the first allocates, and uploads what is kept
                with Operations() as operations:
                    self.run(optimizer)
        return operations


class Given(nn.Module):
    """Views that cost nothing."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, image: Tensor) -> Any:
        views = [image.new_empty(*image.shape[:2], s, s) for s in self.sizes]
        return views if len(views) > 1 else views[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Models without values, and without the time that these take."""
    for name in ('trunc_normal_', 'kaiming_uniform_', 'xavier_uniform_', 'normal_'):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


def dino(**kwargs: Any) -> Steps:
    return Steps(DINOMCTask('vit_small_patch16_224', in_channels=BANDS, **kwargs))


def softcon(**kwargs: Any) -> Steps:
    return Steps(SoftConTask('vit_small_patch16_224', in_channels=BANDS, **kwargs))


def test_dino_mc() -> None:
    steps = dino(augmentations=Given(224, 224, 184, 164, 144, 124, 104, 84))
    operations = steps.count()
    assert operations.device.total() <= 1000
    assert +operations.host == {}


@pytest.mark.parametrize('mask_ratio', [0, 0.5])
def test_softcon(mask_ratio: float) -> None:
    steps = softcon(mask_ratio=mask_ratio, augmentations=Given(224))
    operations = steps.count()
    assert operations.device.total() <= 1000
    assert +operations.host == {}


@pytest.mark.parametrize(('make', 'most'), [(dino, 600), (softcon, 150)])
def test_views(make: Any, most: int) -> None:
    steps = make()
    with like_a_gpu():
        for _ in range(2):  # the first uploads what is kept
            with Operations() as operations:
                steps.task.augmentations(steps.batch['image'])
    assert operations.device.total() <= most
    assert +operations.host == {}


class TestOperations:
    def test_counts(self) -> None:
        x = torch.empty(4, 4, device='meta')
        with Operations() as operations:
            y = (x + 1).T[0].unflatten(0, (2, 2))
            torch._foreach_add_([y, x], 1)
            torch.empty_like(x)
            torch.ones(3) + 1
        assert operations.device == {'add': 1, '_foreach_add_': 1}
        assert +operations.host == {}

    def test_notices_a_host_that_waits(self) -> None:
        x = torch.empty(4, device='meta')
        waits: dict[str, Callable[[], Any]] = {
            '_local_scalar_dense': lambda: float(x[0]),
            '_to_copy': lambda: x.to('cpu'),
            'copy_': lambda: x.copy_(torch.ones(4)),
        }
        for name, wait in waits.items():
            with Operations() as operations:
                wait()
            assert +operations.host == {name: 1}
        with Operations() as operations:
            torch.ones(4).to('meta')
        assert +operations.host == {'_to_copy': 1}
        with Operations() as operations:
            x.to('cpu', non_blocking=True)
            x.copy_(torch.ones(4), non_blocking=True)
        assert +operations.host == {}
        with Operations() as operations, pytest.raises(NotImplementedError):
            x[x > 0]
        assert operations.host.total() == 1
