# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Training with a part of the labels."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Dataset, Subset


def choose_subset(count: int, fraction: float, seed: int = 42) -> list[int]:
    """Choose some of a number of samples, always the same.

    Without replacement, unlike in the code of SSL4EO-S12 and DINO-MC, whose 10 % have
    duplicates.

    Args:
        count: Number of samples.
        fraction: Share of them to choose, in (0, 1].
        seed: Seed of the choice.

    Returns:
        Their indices, sorted.

    Raises:
        ValueError: If *fraction* is out of range, or leaves nothing.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f'fraction must be in (0, 1], got {fraction}')
    chosen = round(count * fraction)
    if not chosen:
        raise ValueError(
            f'fraction = {fraction} of {count} samples is nothing. Choose a larger one'
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)[:chosen]
    return order.sort().values.tolist()


class TrainSubset(Callback):
    """Trains with a part of the training samples, in all epochs the same.

    Papers evaluate on 10 % of BigEarthNet. (Lightning's ``limit_train_batches`` takes
    others in each epoch.) Validation and testing are on all samples. For datamodules of
    samples that can be counted, not for those with samplers.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: torchgeo_softcon.callbacks.TrainSubset
              init_args:
                fraction: 0.1

    .. versionadded:: 0.1
    """

    def __init__(self, fraction: float, seed: int = 42) -> None:
        """Initialize a new TrainSubset instance.

        Args:
            fraction: Share of the training samples, in (0, 1].
            seed: Seed of the choice.

        Raises:
            ValueError: If *fraction* is out of range.
        """
        choose_subset(1000000, fraction, seed)
        self.fraction = fraction
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the training set of the datamodule.

        Args:
            trainer: The trainer.
            pl_module: The task.
            stage: What the trainer is about to do.

        Raises:
            ValueError: If the datamodule has no training set of its own, or a sampler.
        """
        if stage != 'fit':
            return
        datamodule: Any = getattr(trainer, 'datamodule', None)
        dataset: Dataset[Any] | None = getattr(datamodule, 'train_dataset', None)
        samplers = ('train_sampler', 'train_batch_sampler', 'sampler', 'batch_sampler')
        if dataset is None or any(getattr(datamodule, s, None) for s in samplers):
            raise ValueError(
                f'TrainSubset needs a datamodule with a train_dataset and no sampler, got '
                f'{type(datamodule).__name__}'
            )
        count = len(dataset)  # type: ignore[arg-type]
        subset = choose_subset(count, self.fraction, self.seed)
        datamodule.train_dataset = Subset(dataset, subset)
