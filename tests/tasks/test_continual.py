# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from torchgeo_softcon.export.files import export
from torchgeo_softcon.models.checkpoints import read_checkpoint
from torchgeo_softcon.models.input_layer import input_layer
from torchgeo_softcon.tasks import PretrainingTask
from torchgeo_softcon.tasks.loading import start_task
from torchgeo_softcon.tasks.optimizers import layer_scales

from .helpers import (
    TASKS,
    assert_resumes,
    make_fixed,
    make_loader,
    make_task,
    make_trainer,
)


@pytest.fixture
def start(tmp_path: Path) -> Callable[[int], str]:
    """Weights for a number of bands, with statistics that are not those of a new model."""

    def save(channels: int) -> str:
        torch.manual_seed(5)
        model: Any = timm.create_model('test_resnet', in_chans=channels, num_classes=0)
        for name, value in model.state_dict().items():
            if 'running_mean' in name:
                value.uniform_(-0.1, 0.1)
            elif 'running_var' in name:
                value.uniform_(0.5, 1.5)
        torch.save(model.state_dict(), tmp_path / f'{channels}.pth')
        return str(tmp_path / f'{channels}.pth')

    return save


def encoders(task: PretrainingTask) -> list[nn.Module]:
    return [getattr(task, name) for name in task.branches.values()]


def statistics(encoder: nn.Module) -> list[Tensor]:
    return [b.clone() for name, b in encoder.named_buffers() if 'running' in name]


@TASKS
def test_defaults(make: Any, start: Callable[[int], str]) -> None:
    resnet: dict[str, Any] = {'model': 'test_resnet'}
    given: dict[str, Any] = {**resnet, 'weights': start(4)}
    assert make(**resnet).hparams['batch_norm'] == 'train'
    assert make(**given).hparams['batch_norm'] == 'frozen'
    assert make(**given, batch_norm='train').hparams['batch_norm'] == 'train'
    assert make(**resnet, batch_norm='frozen').hparams['batch_norm'] == 'frozen'


def test_encoder_without_batch_norm(tmp_path: Path) -> None:
    torch.save(make_task().model.state_dict(), tmp_path / 'vit.pth')
    task = make_task(weights=str(tmp_path / 'vit.pth'))
    assert task.hparams['batch_norm'] == 'train'


@TASKS
def test_statistics_stay_and_the_rest_trains(
    make: Any,
    start: Callable[[int], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = make(model='test_resnet', weights=start(4))
    before = [statistics(encoder) for encoder in encoders(task)]
    scale = task.model.bn1.weight.clone()
    heads = statistics(task.projector) if make is make_task else []
    with caplog.at_level(logging.INFO):
        make_trainer(tmp_path).fit(task, make_loader(), make_loader())
    assert "batch_norm = 'frozen'" in caplog.text
    for encoder, own in zip(encoders(task), before, strict=True):
        assert all(map(torch.equal, statistics(encoder), own))
    assert not torch.equal(task.model.bn1.weight, scale)
    if make is make_task:
        pairs = zip(statistics(task.projector), heads, strict=True)
        assert not any(torch.equal(*pair) for pair in pairs)


@TASKS
def test_resumes_to_the_bit(
    make: Any, start: Callable[[int], str], tmp_path: Path
) -> None:
    assert_resumes(lambda: make(model='test_resnet', weights=start(4)), tmp_path, 4)


@TASKS
def test_checkpoints_remember(
    make: Any, start: Callable[[int], str], tmp_path: Path
) -> None:
    task = make(model='test_resnet', weights=start(3))
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, make_loader())
    path = tmp_path / 'run' / 'checkpoints' / 'a.ckpt'
    trainer.save_checkpoint(path)
    # Without weights, and a task that finds the choice only when it goes on
    for loaded in (type(task).load_from_checkpoint(path), make(model='test_resnet')):
        make_trainer(tmp_path, max_steps=2).fit(loaded, make_loader(), ckpt_path=path)
        assert loaded.hparams['batch_norm'] == 'frozen'
        assert loaded.model.layer1[0].bn1.training is False
        assert loaded.new_input_layer
    card = export(path, 'timm', output=tmp_path / 'encoder.pth')[-1]
    assert '| batch norm | frozen' in card.read_text()


@TASKS
def test_first_learns_behind_a_new_input_layer(
    make: Any, start: Callable[[int], str], tmp_path: Path
) -> None:
    task = make(model='test_resnet', weights=start(3))
    before = [statistics(encoder) for encoder in encoders(task)]
    make_trainer(tmp_path, max_steps=2).fit(task, make_loader())
    for encoder, own in zip(encoders(task), before, strict=True):
        same = [
            torch.equal(*pair) for pair in zip(statistics(encoder), own, strict=True)
        ]
        assert same == [False, False, *[True] * (len(own) - 2)]


@TASKS
def test_what_is_seen_is_what_the_start_gives(
    make: Any, start: Callable[[int], str]
) -> None:
    task = make(model='test_resnet', weights=start(4))
    image = torch.rand(4, 4, 32, 32)
    with torch.no_grad():
        trained = task.train().model(image)
        torch.testing.assert_close(trained, task.eval().model(image))


class Steps(Callback):
    """Keeps copies of the parameters after each optimizer step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        named = pl_module.named_parameters()
        self.seen.append({k: v.detach().clone() for k, v in named})


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The modules of a task whose parameters differ."""
    return {
        name.partition('.')[0]
        for name, value in before.items()
        if not torch.equal(value, after[name])
    }


class TestLayerDecay:
    def test_factors_of_a_vision_transformer(self) -> None:
        encoder: Any = make_task().model
        scales = layer_scales(encoder, 0.5)
        depth = len(encoder.blocks)
        # The last norm belongs to the last block
        assert scales[encoder.norm.weight] == 1
        for i, block in enumerate(encoder.blocks):
            assert scales[block.attn.qkv.weight] == 0.5 ** (depth - 1 - i)
        for parameter in (encoder.pos_embed, encoder.patch_embed.proj.weight):
            assert scales[parameter] == 0.5**depth
        assert scales.keys() == set(encoder.parameters())

    @TASKS
    @pytest.mark.parametrize('model', ['test_vit', 'test_resnet'])
    def test_learning_rates(self, make: Any, model: str, tmp_path: Path) -> None:
        task = make(model=model, layer_decay=0.5, warmup_epochs=0, weight_decay=0.1)
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(task, make_loader())
        scales = layer_scales(task.trained_encoder, 0.5)
        groups = trainer.optimizers[0].param_groups
        lr = task.hparams['lr'] * 4 / 256
        assert len(set(scales.values())) > 3
        for i, group in enumerate(groups):
            for parameter in group['params']:
                expected = lr * scales.get(parameter, 1)
                assert group['initial_lr'] == pytest.approx(expected)
            assert (group['weight_decay'] == 0) == bool(i % 2)
        # That of the heads
        logged = trainer.callback_metrics['schedule/lr']
        assert logged == pytest.approx(lr / 2, rel=0.02)

    def test_new_input_layer_has_the_full_rate(
        self, start: Callable[[int], str], tmp_path: Path
    ) -> None:
        task = make_task(model='test_resnet', weights=start(3), layer_decay=0.5)
        layer: Any = input_layer(task.model)[1]
        factors = [
            task.lr_scales()[parameter]
            for parameter in (layer.weight, task.model.bn1.weight)
        ]
        assert factors[0] == 1 > factors[1]

    @TASKS
    def test_resumes_to_the_bit(self, make: Any, tmp_path: Path) -> None:
        assert_resumes(lambda: make_fixed(make, layer_decay=0.7), tmp_path, 4)


class TestHeadWarmup:
    @TASKS
    def test_heads_alone_move_first(self, make: Any, tmp_path: Path) -> None:
        task, steps = make(head_warmup_epochs=1, warmup_epochs=0), Steps()
        before = {k: v.detach().clone() for k, v in task.named_parameters()}
        encoder = 'model' if make is make_task else 'student'
        make_trainer(tmp_path, callbacks=[steps]).fit(task, make_loader())
        held = moved(before, steps.seen[3])
        assert held
        assert not held & {encoder, *task.branches.values()}
        assert encoder in moved(steps.seen[3], steps.seen[4])

    def test_new_input_layer_warms_up_with_them(
        self, start: Callable[[int], str], tmp_path: Path
    ) -> None:
        options: dict[str, Any] = {'head_warmup_epochs': 1, 'warmup_epochs': 0}
        task = make_task(model='test_resnet', weights=start(3), **options)
        before = {k: v.detach().clone() for k, v in task.model.named_parameters()}
        steps = Steps()
        make_trainer(tmp_path, callbacks=[steps]).fit(task, make_loader())
        seen = steps.seen[1]
        changed = [
            k for k, v in before.items() if not torch.equal(v, seen[f'model.{k}'])
        ]
        assert changed == [input_layer(task.model)[0] + '.weight']

    @TASKS
    def test_resumes_to_the_bit(self, make: Any, tmp_path: Path) -> None:
        assert_resumes(lambda: make_fixed(make, head_warmup_epochs=1.5), tmp_path, 4)

    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'layer_decay': 0}, 'layer_decay must be > 0, got 0'),
            ({'layer_decay': 1.1}, r'layer_decay must be in \[0, 1\], got 1.1'),
            ({'head_warmup_epochs': -1}, 'head_warmup_epochs must be >= 0, got -1'),
        ],
    )
    def test_bad_argument(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_task(**kwargs)


def test_start_of_a_run(start: Callable[[int], str], tmp_path: Path) -> None:
    """It has the weights that the hyperparameters of a checkpoint name."""
    weights = Path(start(3))
    task = make_task(model='test_resnet', in_channels=3, weights=str(weights))
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, make_loader(channels=3))
    trainer.save_checkpoint(tmp_path / 'run.ckpt')
    content = read_checkpoint(str(tmp_path / 'run.ckpt'))
    begun = start_task(content)
    assert begun is not None
    found = begun.model.state_dict()
    for name, value in torch.load(weights).items():
        if name.startswith('layer'):  # the input layer and its norm are new, and random
            assert torch.equal(found[name], value), name
    trained = task.model.state_dict()
    assert any(not torch.equal(found[name], trained[name]) for name in trained)
    weights.unlink()
    assert start_task(content) is None
    assert start_task({}) is None
