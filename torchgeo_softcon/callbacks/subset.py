# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Training with a part of the samples."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Subset

from .._checks import check_types
from ..datamodules.base import DrawDataModule
from ..datamodules.protocol import find_split, offer_of, trainer_datamodule
from ..evaluation.samples import choose_subset


class TrainSubset(Callback):
    """Train with a part of the training samples, in all epochs the same.

    Papers evaluate on 10 % of BigEarthNet. (Lightning's ``limit_train_batches`` takes
    others in each epoch.) Validation and testing are on all samples. For datamodules of
    samples that can be counted: not for those with samplers, and not for this package's,
    whose samples are draws that differ from epoch to epoch.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: torchgeo_softcon.callbacks.TrainSubset
              init_args:
                fraction: 0.1
    """

    def __init__(self, fraction: float, seed: int = 42) -> None:
        """Initialize a new TrainSubset instance.

        Args:
            fraction: Share of the training samples, in (0, 1].
            seed: Seed of the choice.

        Raises:
            ValueError: If *fraction* is out of range.
        """
        check_types(TrainSubset.__init__, locals())
        choose_subset(1000000, fraction, seed)
        self.fraction = fraction
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the training set of the datamodule.

        Raises:
            ValueError: If its samples cannot be counted, or it has none.
        """
        if stage != 'fit':
            return
        datamodule: Any = trainer_datamodule(trainer)
        if isinstance(datamodule, DrawDataModule):
            raise ValueError(  # noqa: TRY004
                f'TrainSubset is for data of fixed samples, but those of '
                f'{type(datamodule).__name__} are draws without an end. Give it fewer '
                'images instead'
            )
        dataset = offer_of(datamodule).train_dataset
        if dataset is None or find_split(datamodule, 'train')[1:] != (None, None):
            raise ValueError(
                f'TrainSubset needs a datamodule with a train_dataset and no sampler, got '
                f'{type(datamodule).__name__}'
            )
        chosen = choose_subset(len(dataset), self.fraction, self.seed)  # type: ignore[arg-type]
        datamodule.train_dataset = Subset(dataset, chosen)
