# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Labelled data in all shapes, and a run that can be compared with another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import Dataset

from torchgeo_softcon._compat import NonGeoDataModule

from ..tasks.helpers import make_loader, make_task, make_trainer


class Patches(Dataset[dict[str, Any]]):
    """Images whose brightness is their label, of one to three classes."""

    def __init__(
        self,
        length: int = 24,
        kind: str = 'multilabel',
        classes: int = 3,
        split: str = 'train',
        channels: int = 4,
        bad: float | None = None,
    ) -> None:
        self.length, self.kind, self.classes, self.bad = length, kind, classes, bad
        self.channels = channels
        self.seed = {'train': 0, 'val': 1, 'test': 2}[split]
        #: What has been read.
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(100 * self.seed + index)
        number = index % self.classes
        image = torch.rand(self.channels, 32, 32, generator=generator) / 4
        image[number] += 0.5
        if self.bad is not None and index == 5:
            image[0, 0, 0] = self.bad
        label: Any = torch.zeros(3)
        label[number] = 1
        label[2] = 1
        sample: dict[str, Any] = {'image': image}
        if self.kind != 'multilabel':  # a place, which no loader can stack
            sample['crs'] = object()
        if self.kind == 'multiclass':
            label = torch.tensor(number)
        elif self.kind == 'column':
            label = torch.tensor([number])
        elif self.kind == 'shares':
            label = label / label.sum() + torch.tensor([0.01, 0.01, 0])
        elif self.kind == 'unknown' and index % 2:
            label = torch.zeros(3)
        elif self.kind == 'wrong':
            label = torch.full((3,), -1.0)
        elif self.kind == 'matrix':
            label = torch.zeros(2, 3, 4)
        if self.kind == 'mask':
            return {**sample, 'mask': torch.zeros(32, 32)}
        return {**sample, 'label': label}


class PatchesDataModule(NonGeoDataModule):  # type: ignore[misc]
    """The same as a datamodule of TorchGeo."""

    def __init__(
        self, batch_size: int = 4, num_workers: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(Patches, batch_size, num_workers, **kwargs)  # type: ignore[arg-type]
        self.aug = torch.nn.Identity()


def run(
    root: Path,
    callbacks: Sequence[Callback],
    task: LightningModule | None = None,
    fit: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Trainer:
    """Train the small task on data that has nothing to do with the labels."""
    trainer = make_trainer(
        root,
        logger=CSVLogger(root, name='', version=''),
        callbacks=list(callbacks),
        **{'log_every_n_steps': 1, **kwargs},
    )
    data = (
        {'train_dataloaders': make_loader()} if 'datamodule' not in (fit or {}) else {}
    )
    trainer.fit(task or make_task(), **{**data, **(fit or {})})
    return trainer


def fingerprint(trainer: Trainer) -> list[Tensor]:
    """Everything that the training has changed, random numbers included."""
    task = trainer.lightning_module
    optimizer = trainer.optimizers[0].state_dict()['state']
    state = [t for values in optimizer.values() for t in values.values()]
    return [*task.state_dict().values(), *state, torch.get_rng_state(), torch.rand(3)]
