# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from torchgeo_softcon import ViTSmall16_Weights, plugin
from torchgeo_softcon._compat import HAS_TASKS, BaseTask
from torchgeo_softcon.callbacks import ResizeForWeights, ResizeInput, Terminal, resize

TASKS = import_module(BaseTask.__module__.rpartition('.')[0])
Classification = TASKS.Classification if HAS_TASKS else TASKS.ClassificationTask


class Seen(nn.Module):
    """A classifier that remembers the images."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 3)
        self.images: list[Tensor] = []
        if size is not None:
            self.patch_embed = nn.Identity()
            self.patch_embed.strict_img_size = True  # type: ignore[assignment]
            self.patch_embed.img_size = (size, size)  # type: ignore[assignment]

    def forward(self, image: Tensor) -> Tensor:
        self.images.append(image)
        return self.fc(image.mean((-1, -2)))


def make_task(size: int | None = None, weights: Any = None) -> Any:
    task = Classification(model='resnet18', in_channels=2, num_classes=3)
    task.model = Seen(size)
    task.weights = weights
    return task


def make_loader(**extra: Tensor) -> Any:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2, 20, 16, generator=generator)
    keys = {'image': image, 'label': torch.tensor([0, 2]), **extra}
    return DataLoader([{k: v[i] for k, v in keys.items()} for i in range(2)], 2)  # type: ignore[arg-type]


def make_trainer(*callbacks: Any) -> Trainer:
    return Trainer(
        accelerator='cpu',
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )


def test_every_stage_sees_the_size() -> None:
    task, loader = make_task(), make_loader()
    trainer = make_trainer(ResizeInput(32))
    trainer.fit(task, loader, loader)
    trainer.test(task, loader, verbose=False)
    trainer.predict(task, loader)
    # Sanity check, training, validation, test, prediction
    assert [tuple(i.shape) for i in task.model.images] == [(2, 2, 32, 32)] * 5
    expected = TF.resize(next(iter(loader))['image'], [32, 32])
    torch.testing.assert_close(task.model.images[-1], expected)


def test_default_is_the_size_of_the_model() -> None:
    task = make_task(8)
    make_trainer(ResizeInput()).predict(task, make_loader())
    assert task.model.images[0].shape == (2, 2, 8, 8)


def test_dtype_and_seasons_remain() -> None:
    callback = ResizeInput(6)
    callback.setup(make_trainer(), make_task(), 'fit')
    batch = {'image': torch.ones(2, 3, 4, 12, 12, dtype=torch.float16)}
    callback.on_train_batch_start(make_trainer(), make_task(), batch, 0)
    assert batch['image'].shape == (2, 3, 4, 6, 6)
    assert batch['image'].dtype == torch.float16


@pytest.mark.parametrize(
    ('size', 'model', 'message'),
    [
        (None, None, 'size must be given to ResizeInput'),
        (32, 8, r'size must be \(8, 8\), the size that the model is built for'),
    ],
)
def test_sizes_that_do_not_fit(
    size: int | None, model: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(ResizeInput(size)).predict(make_task(model), make_loader())


def test_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match='size must be a number of pixels, got 0'):
        ResizeInput(0)


@pytest.mark.parametrize(
    'key', ['mask', 'masks', 'bbox', 'bbox_xyxy', 'boxes', 'keypoints']
)
def test_positions_are_refused(key: str) -> None:
    loader = make_loader(**{key: torch.zeros(2, 20, 16)})
    with pytest.raises(ValueError, match=rf"batch\['{key}'\] would keep its size"):
        make_trainer(ResizeInput(32)).predict(make_task(), loader)


class TestAutomatic:
    @pytest.mark.parametrize(
        'weights',
        [
            ViTSmall16_Weights.SENTINEL2_SOFTCON,
            'ViTSmall16_Weights.SENTINEL2_SOFTCON',
            __file__,  # any checkpoint
        ],
    )
    def test_our_weights(self, weights: Any, monkeypatch: Any) -> None:
        said: list[str] = []
        monkeypatch.setattr(resize, 'rank_zero_info', said.append)
        task = make_task(8, weights)
        make_trainer().fit(task, make_loader(), make_loader())
        assert task.model.images[0].shape == (2, 2, 8, 8)
        assert len(said) == 1
        assert 'resizes the images of (20, 16) pixels to (8, 8)' in said[0]

    @pytest.mark.parametrize(
        ('size', 'weights'),
        [
            (None, ViTSmall16_Weights.SENTINEL2_SOFTCON),  # takes any size
            (8, None),
            (8, 'run.ckpt'),
            (8, 'ResNet18_Weights.SENTINEL2_ALL_MOCO'),
        ],
    )
    def test_leaves_others_alone(self, size: int | None, weights: Any) -> None:
        task = make_task(size, weights)
        make_trainer().predict(task, make_loader())
        assert task.model.images[0].shape == (2, 2, 20, 16)

    def test_only_with_tasks_of_the_host(self, monkeypatch: Any) -> None:
        assert [type(c) for c in plugin.callbacks()] == [ResizeForWeights, Terminal]
        monkeypatch.setenv(plugin.AUTOLOAD_VARIABLE, '0')
        assert plugin.callbacks() == []
        monkeypatch.delenv(plugin.AUTOLOAD_VARIABLE)
        for name in ('torchgeo.tasks', 'torchgeo.trainers'):
            monkeypatch.delitem(plugin.sys.modules, name, raising=False)
        assert plugin.callbacks() == []

    def test_never_fails(self, monkeypatch: Any) -> None:
        def broken(name: str) -> Any:
            raise ImportError(name)

        monkeypatch.setattr(plugin, 'import_module', broken)
        monkeypatch.setattr(plugin, '_reported', False)
        with pytest.warns(RuntimeWarning, match='could not be activated'):
            assert plugin.callbacks() == []


def test_the_task_that_failed(tmp_path: Path) -> None:
    """What the automatic one is there for: timm refuses the images of this task."""
    task = Classification(model='vit_tiny_patch16_224', in_channels=2, num_classes=3)
    assert isinstance(task, LightningModule)
    with pytest.raises(AssertionError, match="doesn't match model"):
        make_trainer().predict(task, make_loader())
    task.weights = ViTSmall16_Weights.SENTINEL2_SOFTCON
    prediction: Any = make_trainer().predict(task, make_loader())
    assert prediction[0].shape == (2, 3)
