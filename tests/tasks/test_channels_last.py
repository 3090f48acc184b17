# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.tasks import DINOMCTask, SoftConTask
from torchgeo_softcon.tasks.memory import is_convolutional

from .helpers import (
    Corners,
    make_batch,
    make_dino,
    make_loader,
    make_task,
    make_trainer,
)

MAKERS = [
    (make_task, {'mask_mode': 'pixel'}),
    (make_dino, {'augmentations': Corners()}),
]


@pytest.mark.parametrize(
    ('model', 'expected'),
    [
        ('test_vit', False),
        ('swin_tiny_patch4_window7_224', False),
        ('resnet18', True),
        ('test_convnext', True),
    ],
)
def test_rule(model: str, expected: bool) -> None:
    assert is_convolutional(create_encoder(model, 4)) is expected


def is_last(task: SoftConTask | DINOMCTask) -> list[bool]:
    """Whether channels are last in a layer of the student and one of the teacher."""
    (student, teacher), *_ = task.ema_pairs()
    name = 'layer1.0.conv1.weight'
    return [
        module.get_parameter(name).is_contiguous(memory_format=torch.channels_last)
        for module in (student, teacher)
    ]


@pytest.mark.parametrize(('make', 'kwargs'), MAKERS)
def test_same_results(make: Any, kwargs: dict[str, Any]) -> None:
    losses, gradients, buffers = [], [], []
    for channels_last in (False, None):
        task = make(model='resnet18', **kwargs, channels_last=channels_last)
        assert is_last(task) == [channels_last is None] * 2
        seen: list[bool] = []
        (student, _), *_ = task.ema_pairs()
        student.layer2.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(
                out.is_contiguous(memory_format=torch.channels_last)
            )
        )
        loss = task.training_step(make_batch(8), 0)
        loss.backward()
        assert all(seen) is (channels_last is None)
        losses.append(loss)
        named = task.named_parameters()
        gradients.append({n: p.grad for n, p in named if p.grad is not None})
        buffers.append(dict(student.named_buffers()))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*buffers, rtol=1e-4, atol=1e-5)
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).norm()
        assert error < 1e-2 * expected.norm() + 1e-5, name


@pytest.mark.parametrize(('make', 'kwargs'), MAKERS)
def test_checkpoints_do_not_show_it(
    make: Any, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    task = make(model='test_resnet', **kwargs)
    saved = ModelCheckpoint(tmp_path)
    trainer = make_trainer(
        tmp_path, max_epochs=1, callbacks=[saved], enable_checkpointing=True
    )
    trainer.fit(task, make_loader())
    path = saved.best_model_path
    state = torch.load(path, weights_only=True)['state_dict']
    assert all(value.is_contiguous() for value in state.values())
    save_file({k: v for k, v in state.items() if '.layer1.' in k}, tmp_path / 'file')

    loaded = type(task).load_from_checkpoint(path, augmentations=task.augmentations)
    assert is_last(loaded) == [True, True]
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state.get(name, value))


@pytest.mark.parametrize('formats', [(False, True), (True, False)])
def test_resumes_in_another_format(formats: tuple[bool, bool], tmp_path: Path) -> None:
    """The optimizer's state is in the format of the run that was interrupted."""
    weights = []
    for second in formats:
        path = None
        for steps, channels_last in ((2, formats[0]), (4, second)):
            task = make_task(
                model='test_resnet', mask_ratio=0, channels_last=channels_last, lr=1e-3
            )
            trainer = make_trainer(tmp_path, max_steps=steps, max_epochs=2)
            trainer.fit(task, make_loader(length=8), ckpt_path=path)
            path = str(tmp_path / 'run.ckpt')
            trainer.save_checkpoint(path)
        for parameter, state in trainer.optimizers[0].state.items():
            assert state['exp_avg'].stride() == parameter.stride()
        weights.append(task.get_parameter('model.layer1.0.conv2.weight').detach())
    assert weights[0].stride() != weights[1].stride()
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_convolutions_of_other_dimensions() -> None:
    """Only tensors of images have channels last, and timm has others, too."""
    task = make_task(model='lambda_resnet26t', size=64)
    layers = [m for m in task.model.modules() if isinstance(m, torch.nn.Conv3d)]
    assert layers
    weight = next(
        m.weight for m in task.model.modules() if isinstance(m, torch.nn.Conv2d)
    )
    assert weight.is_contiguous(memory_format=torch.channels_last)
