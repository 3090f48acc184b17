# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Runs that go on from a training file of the authors of DINO-MC."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .helpers import make_dino, make_fixed, make_loader, make_trainer

BATCH_NORM = {'model': 'test_resnet', 'channels_last': False}


def authors_name(name: str) -> str:
    return name.replace('head.layers.', 'head.mlp.')


def write_file(
    task: Any, optimizer: torch.optim.Optimizer, path: Path, epoch: int
) -> None:
    """What DINO-MC's main_dino_mc.py saves, of a run of ours."""
    batch_norm = task.hparams['model'] != 'test_vit'

    def branch(encoder: nn.Module, head: nn.Module, prefix: str) -> dict[str, Tensor]:
        parts = (('backbone', encoder), ('head', head))
        return {
            prefix + authors_name(f'{part}.{key}'): value
            for part, module in parts
            for key, value in module.state_dict().items()
        }

    student = nn.ModuleDict({'backbone': task.student, 'head': task.head})
    groups: tuple[list[nn.Parameter], ...] = ([], [])
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups[name.endswith('.bias') or parameter.ndim == 1].append(parameter)
    theirs = torch.optim.AdamW([{'params': group} for group in groups])
    # The prototypes, which are frozen for an epoch, have no moments yet
    for parameter in filter(optimizer.state.get, [*groups[0], *groups[1]]):
        theirs.state[parameter] = {**optimizer.state[parameter]}
        theirs.state[parameter]['step'] = int(optimizer.state[parameter]['step'])
    content = {
        'student': branch(task.student, task.head, 'module.'),
        'teacher': branch(
            task.model, task.teacher_head, 'module.' if batch_norm else ''
        ),
        'optimizer': theirs.state_dict(),
        'epoch': epoch,
        'args': argparse.Namespace(arch='vit_small', epochs=3),
        'dino_loss': {'center': task.criterion.center},
    }
    torch.save(content, path)


@pytest.mark.parametrize('options', [{}, BATCH_NORM, {'norm_last_layer': False}])
def test_run_goes_on_as_if_it_had_not_stopped(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """Encoders, heads, centre, optimizer, epoch, and all schedules."""
    whole = make_fixed(make_dino, **options)

    def save_and_go_on(self: Any = None) -> None:
        if whole.current_epoch == 0:
            (optimizer,) = whole.trainer.optimizers
            write_file(whole, optimizer, tmp_path / 'checkpoint.pth', 1)

    whole.on_train_epoch_end = save_and_go_on
    make_trainer(tmp_path).fit(whole, make_loader())

    options = {**options, 'weights': str(tmp_path / 'checkpoint.pth')}
    task = make_fixed(make_dino, continue_training=True, **options)
    trainer = make_trainer(tmp_path)
    trainer.fit(task, make_loader())
    assert trainer.global_step == 12
    for key, value in whole.state_dict().items():
        if key not in ('rng_seed', 'guard.broken'):
            torch.testing.assert_close(task.state_dict()[key], value, msg=key)
    (ours,), (theirs,) = trainer.optimizers, whole.trainer.optimizers
    assert ours.param_groups[0]['lr'] == theirs.param_groups[0]['lr']


class TestRefused:
    @pytest.fixture(scope='class')
    def path(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp('run')
        task, trainer = make_dino(), make_trainer(folder, max_epochs=1)
        trainer.fit(task, make_loader())
        write_file(task, trainer.optimizers[0], folder / 'checkpoint.pth', 1)
        return folder / 'checkpoint.pth'

    @pytest.mark.parametrize(
        ('options', 'match'),
        [
            ({'output_dim': 16}, 'Set hidden_dim, bottleneck_dim and output_dim'),
            ({'in_channels': 3}, 'in_channels must be 4, that of the training file'),
        ],
    )
    def test_another_task(
        self, options: dict[str, Any], match: str, path: Path
    ) -> None:
        with pytest.raises(ValueError, match=match):
            make_dino(weights=str(path), continue_training=True, **options)

    def test_encoder_alone(self, path: Path) -> None:
        content = torch.load(path, weights_only=False)
        torch.save(
            {k: v for k, v in content.items() if k != 'optimizer'}, path.parent / 'a'
        )
        with pytest.raises(
            ValueError, match=r'has no optimizer\. Leave continue_training'
        ):
            make_dino(weights=str(path.parent / 'a'), continue_training=True)

    @pytest.mark.parametrize(
        ('options', 'match'),
        [
            ({'optimizer': 'sgd'}, 'Set optimizer and norm_last_layer as'),
            ({'norm_last_layer': False}, 'Set optimizer and norm_last_layer as'),
            ({}, 'max_epochs must be more than the 1 epochs'),
            ({'weights': None}, 'needs weights = the path of a training file'),
        ],
    )
    def test_run(self, options: dict[str, Any], match: str, path: Path) -> None:
        options = {'weights': str(path), **options}
        task = make_dino(continue_training=True, **options)
        with pytest.raises(ValueError, match=match):
            make_trainer(path.parent, max_epochs=1).fit(task, make_loader())
