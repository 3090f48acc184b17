# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Small tasks, small data and a quiet trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torchgeo_softcon.tasks import DINOMCTask, PretrainingTask, SoftConTask


class Scenes(Dataset[dict[str, Tensor]]):
    """Random images with random labels, a function of the index."""

    def __init__(
        self, length: int = 16, channels: int = 4, size: int = 32, seasons: int = 1
    ) -> None:
        self.length, self.seasons = length, seasons
        self.shape = (seasons * channels, size, size)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            'image': torch.rand(self.shape, generator=generator),
            'label': (torch.rand(5, generator=generator) > 0.5).float(),
        }


_SMALL: dict[str, Any] = {
    'model': 'test_vit',
    'in_channels': 4,
    'size': 32,
    'hidden_dim': 16,
    'warmup_epochs': 1,
    'lr': 0.01,
}


def make_task(**kwargs: Any) -> SoftConTask:
    torch.manual_seed(0)
    return SoftConTask(**{**_SMALL, 'output_dim': 8, **kwargs})


def make_dino(**kwargs: Any) -> DINOMCTask:
    torch.manual_seed(0)
    heads = {'output_dim': 24, 'bottleneck_dim': 8}
    return DINOMCTask(**{**_SMALL, **heads, 'local_sizes': (28, 20, 16), **kwargs})


#: For tests of both tasks.
TASKS = pytest.mark.parametrize('make', [make_task, make_dino])


class Whole(nn.Module):
    """A view that is the image."""

    def forward(self, image: Tensor) -> Tensor:
        return image


class Corners(nn.Module):
    """Crops that are a function of the image alone."""

    def __init__(self, sizes: tuple[int, ...] = (32, 32, 28, 20, 16)) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, image: Tensor) -> list[Tensor]:
        # Two equal crops would teach nothing
        return [
            (image if i % 2 else image.flip(-1))[..., :s, :s]
            for i, s in enumerate(self.sizes)
        ]


def make_loader(**kwargs: Any) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Scenes(**kwargs), batch_size=4, drop_last=True)


def make_batch(size: int = 4, **kwargs: Any) -> dict[str, Any]:
    data = Scenes(size, **kwargs)
    samples = [data[i] for i in range(size)]
    return {k: torch.stack([s[k] for s in samples]) for k in samples[0]}


def make_trainer(root: Path, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        'accelerator': 'cpu',
        'devices': 1,
        'default_root_dir': root,
        'max_epochs': 3,
        'logger': False,
        'enable_checkpointing': False,
        'enable_progress_bar': False,
        'enable_model_summary': False,
    }
    return Trainer(**{**defaults, **kwargs})


def make_fixed(make: Any, **kwargs: Any) -> Any:
    """A task without randomness, by :func:`make_task` or :func:`make_dino`."""
    if make is make_dino:
        return make_dino(augmentations=Corners(), drop_path_rate=0, **kwargs)
    return make_task(augmentations=Whole(), mask_ratio=0, **kwargs)


def assert_resumes(make: Callable[[], PretrainingTask], root: Path, step: int) -> None:
    """A run of 12 steps that is stopped and resumed has the numbers of a whole one."""
    save = ModelCheckpoint(root, '{step}', every_n_train_steps=4, save_top_k=-1)
    trainer = make_trainer(root, callbacks=[save], enable_checkpointing=True)
    whole = make()
    trainer.fit(whole, make_loader())

    torch.manual_seed(123)  # a new process has other random numbers
    resumed = make()
    torch.manual_seed(321)
    trainer = make_trainer(root)
    trainer.fit(resumed, make_loader(), ckpt_path=root / f'step={step}.ckpt')
    assert trainer.global_step == 12
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
