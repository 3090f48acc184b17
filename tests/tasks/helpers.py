# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Small tasks, small data and a quiet trainer."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torchgeo_softcon.tasks import DINOMCTask, SoftConTask


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


def make_task(**kwargs: Any) -> SoftConTask:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        'model': 'test_vit',
        'in_channels': 4,
        'size': 32,
        'hidden_dim': 16,
        'output_dim': 8,
        'warmup_epochs': 1,
        'lr': 0.01,
    }
    return SoftConTask(**{**defaults, **kwargs})


def make_dino(**kwargs: Any) -> DINOMCTask:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        'model': 'test_vit',
        'in_channels': 4,
        'size': 32,
        'local_sizes': (28, 20, 16),
        'output_dim': 24,
        'hidden_dim': 16,
        'bottleneck_dim': 8,
        'warmup_epochs': 1,
        'lr': 0.01,
    }
    return DINOMCTask(**{**defaults, **kwargs})


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
