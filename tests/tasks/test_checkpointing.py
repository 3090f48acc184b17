# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchgeo_softcon.tasks import DINOMCTask, SoftConTask

from .helpers import TASKS, make_batch, make_dino, make_loader, make_task, make_trainer


class SavedBytes:
    """Counts the bytes of what a forward pass keeps for the backward pass."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        self.kept.append(tensor)  # or its address would be used again
        return tensor

    def count(self, task: SoftConTask | DINOMCTask, batch: dict[str, Tensor]) -> Tensor:
        with saved_tensors_hooks(self.pack, lambda tensor: tensor):
            return task.training_step(batch, 0)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


MAKERS = [
    (make_task, {'model': 'test_vit', 'mask_ratio': 0}),
    (make_task, {'model': 'test_vit', 'mask_mode': 'drop', 'drop_path_rate': 0.3}),
    (make_task, {'model': 'test_vit', 'mask_mode': 'token'}),
    (make_task, {'model': 'test_resnet'}),
    (make_dino, {'model': 'test_vit', 'drop_path_rate': 0.3}),
    (make_dino, {'model': 'test_resnet'}),
]


@pytest.mark.parametrize(('make', 'kwargs'), MAKERS)
def test_same_gradients_from_less_memory(make: Any, kwargs: dict[str, Any]) -> None:
    losses, gradients, totals = [], [], []
    for checkpointing in (False, True):
        task = make(**kwargs, grad_checkpointing=checkpointing)
        task._seed = 0
        saved = SavedBytes()
        loss = saved.count(task, make_batch())
        task.backward(loss)
        losses.append(loss)
        gradients.append([p.grad for p in task.parameters() if p.grad is not None])
        totals.append(saved.total)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    # Heads and inputs are kept in any case, and these models are small
    assert totals[1] < 0.8 * totals[0]


@TASKS
def test_batch_norm_sees_each_batch_once(make: Any, tmp_path: Path) -> None:
    buffers = []
    for checkpointing in (False, True):
        task = make(model='test_resnet', grad_checkpointing=checkpointing)
        trainer = make_trainer(tmp_path, max_steps=1, max_epochs=1)
        trainer.fit(task, make_loader(length=4))
        (student, _), *_ = task.ema_pairs()
        assert student.bn1.momentum == 0.1
        buffers.append(dict(student.named_buffers()))
    for name, value in buffers[0].items():
        torch.testing.assert_close(buffers[1][name], value)


@pytest.mark.parametrize('momentum', [0.1, None])
def test_batch_norm_after_an_interruption(momentum: float | None) -> None:
    task = make_task(model='test_resnet', grad_checkpointing=True)
    task.model.bn1.momentum = momentum
    before = int(task.model.bn1.num_batches_tracked)
    loss = task.training_step(make_batch(), 0)

    def interrupt(grad: Tensor) -> None:
        raise KeyboardInterrupt

    task.model.conv1[0].weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        task.backward(loss)
    assert task.model.bn1.momentum == momentum
    assert int(task.model.bn1.num_batches_tracked) == before + 1


@TASKS
def test_only_the_student(make: Any) -> None:
    task = make(grad_checkpointing=True)
    (student, teacher), *_ = task.ema_pairs()
    assert student.grad_checkpointing
    assert not teacher.grad_checkpointing


@pytest.mark.parametrize(
    ('make', 'kwargs'), [(make_task, {}), (make_dino, {'local_sizes': (32,)})]
)
def test_models_without(make: Any, kwargs: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="for which timm has it, got 'hrnet_w18_small'"
    ):
        make(model='hrnet_w18_small', **kwargs, grad_checkpointing=True)
