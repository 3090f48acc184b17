# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchgeo_softcon._compat import HAS_TASKS, BaseTask
from torchgeo_softcon.callbacks import LoadBackbone
from torchgeo_softcon.models import create_encoder

from ..tasks.helpers import make_task, make_trainer

TASKS: Any = import_module(BaseTask.__module__.rpartition('.')[0])


def host(name: str, **kwargs: Any) -> Any:
    return getattr(TASKS, name if HAS_TASKS else f'{name}Task')(**kwargs)


class Boxes(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        box = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
        masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
        masks[:, 4:40, 4:40] = 1
        label = torch.tensor([1])
        return {
            'image': torch.rand(4, 64, 64),
            'bbox_xyxy': box,
            'boxes': box,
            'label': label,
            'labels': label,
            'mask': masks,
            'masks': masks,
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {key: [s[key] for s in samples] for key in samples[0]}
    return {**batch, 'image': torch.stack(batch['image'])}


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(3)
    state = create_encoder('resnet18', 4).state_dict()
    torch.save({'state_dict': state, 'hyper_parameters': {}}, tmp_path / 'run.ckpt')
    return tmp_path / 'run.ckpt', state


@pytest.mark.parametrize('model', ['faster-rcnn', 'fcos', 'retinanet'])
def test_object_detection(
    model: str, checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    path, state = checkpoint
    task = host(
        'ObjectDetection',
        model=model,
        backbone='resnet18',
        in_channels=4,
        num_classes=2,
    )
    LoadBackbone(path).setup(make_trainer(tmp_path), task, 'fit')
    loss = task.training_step(collate([Boxes()[0], Boxes()[1]]), 0)
    assert loss.isfinite()
    body = task.model.backbone.body.state_dict()
    weights = {k: v for k, v in body.items() if k.endswith('conv1.weight')}
    assert len(weights) == 9
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def test_instance_segmentation(tmp_path: Path) -> None:
    state = create_encoder('resnet50', 4).state_dict()
    path = tmp_path / 'run.ckpt'
    torch.save({'state_dict': state}, path)
    task = host('InstanceSegmentation', in_channels=4, num_classes=2)
    LoadBackbone(path).setup(make_trainer(tmp_path), task, 'fit')
    body = task.model.backbone.body.state_dict()
    assert all(
        torch.equal(state[key], value)
        for key, value in body.items()
        if not key.endswith('num_batches_tracked')
    )


@pytest.mark.parametrize(
    ('backbone', 'channels', 'match'),
    [
        (
            'resnet18',
            3,
            r'conv1\.weight of shape \(64, 3, 7, 7\) is of \(64, 4, 7, 7\)',
        ),
        ('resnet50', 4, r'do not fit the backbone of ObjectDetection'),
    ],
)
def test_other_backbone(
    backbone: str,
    channels: int,
    match: str,
    checkpoint: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    task = host(
        'ObjectDetection', backbone=backbone, in_channels=channels, num_classes=2
    )
    with pytest.raises(ValueError, match=match):
        LoadBackbone(checkpoint[0]).setup(make_trainer(tmp_path), task, 'fit')


def test_other_task(checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'object detection .* got SoftConTask'):
        LoadBackbone(checkpoint[0]).setup(make_trainer(tmp_path), make_task(), 'fit')
