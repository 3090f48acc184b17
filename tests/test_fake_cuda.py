# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Steps on a GPU, on any machine: no tensor of the CPU among them, and nothing is read."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from torchgeo_softcon.modules import packed_blocks
from torchgeo_softcon.ssl4eo.image_records import decode, record_dtype
from torchgeo_softcon.tasks import DINOMCTask, SoftConTask
from torchgeo_softcon.tasks.optimizers import create_optimizer, parameter_groups
from torchgeo_softcon.transforms import ToUnitRange, WorldCoverMultiLabel

from .fake_cuda import fake_cuda, move
from .tasks.helpers import TASKS, make_dino, make_task

BF16 = torch.bfloat16


def run_step(
    task: DINOMCTask | SoftConTask, precision: torch.dtype | None, seasons: int = 1
) -> None:
    """All of a training step but the backward pass."""
    task.__dict__['log_step'] = lambda values, batch_size: None
    task._seed = 0  # read once per run
    with fake_cuda():
        move(task)
        groups = parameter_groups([task], 0.1)
        optimizer = create_optimizer('adamw', groups, 1e-3, True)
        task._trainer = SimpleNamespace(  # type: ignore[assignment]
            global_step=0, current_epoch=0, global_rank=0, optimizers=[optimizer]
        )
        channels = seasons * task.hparams['in_channels']
        batch = {
            'image': torch.empty(4, channels, 40, 40, device='cuda'),
            'label': torch.empty(4, 5, device='cuda'),
        }
        with torch.autocast('cuda', precision, enabled=precision is not None):
            loss = task.training_step(batch, 0)
        assert (loss.device.type, loss.dtype) == ('cuda', torch.float32)
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        if isinstance(task, DINOMCTask):  # the other leaves it to Lightning
            task._frozen_steps = task.hparams['freeze_last_layer']
            task.configure_gradient_clipping(optimizer)
        task.optimizer_step(0, 0, optimizer, lambda: loss)


@pytest.mark.parametrize('precision', [None, torch.float16, BF16])
@pytest.mark.parametrize('model', ['test_vit', 'test_resnet'])
@TASKS
def test_step(make: Any, model: str, precision: torch.dtype | None) -> None:
    run_step(make(model=model), precision)


@pytest.mark.parametrize(
    'options',
    [
        {'mask_mode': 'token', 'symmetric': True},
        {'mask_mode': 'pixel', 'soft_loss': 'cross_entropy'},
        {'mask_ratio': 0, 'soft_loss': 'mse', 'label_similarity': 'jaccard'},
        {'soft_weight': 0, 'drop_path_rate': 0.1},
        {'soft_bias': 'batch', 'soft_reduction': 'rows', 'same_label_weight': 0},
        {'soft_loss': 'correlation', 'soft_weight': 'auto', 'soft_projector': True},
        {'soft_bias': 'learned', 'batch_norm': 'frozen', 'head_warmup_epochs': 1},
    ],
)
def test_options_of_softcon(options: dict[str, Any]) -> None:
    run_step(make_task(**options), BF16)


def test_seasons_of_softcon() -> None:
    run_step(make_task(seasons='different'), BF16, seasons=3)


@pytest.mark.parametrize(
    'options',
    [
        {'in_channels': 3, 'value_range': (0, 1), 'freeze_last_layer': 20},
        {'teacher_statistics': 'student', 'model': 'test_resnet'},
        {'crop_batching': 'packed', 'norm_last_layer': False},
        {'crop_batching': 'by_size'},
        {'clip_grad': None, 'drop_path_rate': 0},
        {'soft_weight': 'auto', 'layer_decay': 0.7},
    ],
)
def test_options_of_dino(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The order of changes of colour is drawn on the host, which a fake tensor cannot tell
    order = SimpleNamespace(tolist=lambda: [2, 0, 3, 1])
    monkeypatch.setattr(torch, 'randperm', lambda n: order)
    run_step(make_dino(**options), BF16)


def test_dino_tp() -> None:
    run_step(make_dino(views='temporal'), BF16, seasons=4)


def test_attention_of_all_crops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per layer of the student, of queries that are all tokens or the first ones."""
    calls, attend = [], packed_blocks.varlen_attn

    def counted(q: Any, k: Any, v: Any, *args: Any) -> Any:
        calls.append((len(q), len(k), q.dtype))
        return attend(q, k, v, *args)

    monkeypatch.setattr(packed_blocks, 'varlen_attn', counted)
    task = make_dino()
    run_step(task, None)
    assert not calls
    task = make_dino()
    run_step(task, BF16)
    assert len(calls) == len(task.student.blocks)  # type: ignore[arg-type]
    # Four images: two crops of 2 x 2 patches and three of 1 x 1, each with a class token
    tokens = 4 * (2 * 5 + 3 * 2)
    assert {k for _, k, _ in calls} == {tokens}
    assert {q for q, *_ in calls} == {tokens, 4 * 5}
    assert {dtype for *_, dtype in calls} == {BF16}


def test_images_and_labels() -> None:
    """What becomes of a batch on the device before a task sees it."""
    records = np.zeros(
        5, record_dtype({'a': ('uint16', (4, 4)), 'b': ('uint16', (8, 8))})
    )
    raw = torch.from_numpy(records.view(np.uint8).reshape(5, -1))
    unit_range = ToUnitRange([0.0, 0.0], [1.0, 1.0])
    label = WorldCoverMultiLabel()
    with fake_cuda():
        raw = torch.empty(raw.shape, dtype=raw.dtype, device='cuda')
        move(unit_range)
        move(label)
        image = unit_range({'image': decode(raw, records.dtype, ['a', 'b'], 8)})[
            'image'
        ]
        mask = torch.empty(5, 8, 8, dtype=torch.uint8, device='cuda')
        target = label({'mask': mask})['label']
    assert (image.device.type, image.shape) == ('cuda', (5, 2, 8, 8))
    assert (target.device.type, target.shape) == ('cuda', (5, 11))


class TestFakeCuda:
    def test_refuses_tensors_of_the_cpu(self) -> None:
        with fake_cuda(), pytest.raises(Exception, match=r'cuda:0(, | and )cpu'):
            torch.empty(3, device='cuda') + torch.ones(3)

    @pytest.mark.parametrize('read', [float, bool, lambda x: x.nonzero()])
    def test_refuses_to_wait(self, read: Any) -> None:
        with fake_cuda(), pytest.raises(Exception, match='aten'):
            read(torch.empty((), device='cuda'))

    def test_leaves_nothing_behind(self) -> None:
        run_step(make_dino(), BF16)
        assert not torch.cuda.is_available()
        loss = make_dino().training_step({'image': torch.rand(4, 4, 32, 32)}, 0)
        assert type(loss) is torch.Tensor
        assert loss.isfinite()
