# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Changes of the datamodule of a run: a part of its samples, and the range of images."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Subset

from .._checks import check_types, require
from ..bands import Level
from ..datamodules.base import DrawDataModule
from ..datamodules.normalization import use_unit_range
from ..datamodules.protocol import find_split, offer_of, trainer_datamodule
from ..evaluation.samples import choose_subset


class TrainSubset(Callback):
    """Train with a part of the training samples, in all epochs the same.

    Papers evaluate on 10 % of BigEarthNet, as ``examples/bigearthnet_linear.yaml`` does.
    (Lightning's ``limit_train_batches`` takes others in each epoch.) Validation and testing
    are on all samples. For datamodules of samples that can be counted: not for those with
    samplers, and not for this package's, whose samples are draws.
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
        name = type(datamodule).__name__
        require(
            not isinstance(datamodule, DrawDataModule),
            f'TrainSubset is for data of fixed samples, but those of {name} are draws '
            'without an end. Give it fewer images instead',
        )
        dataset: Any = offer_of(datamodule).train_dataset
        require(
            dataset is not None and find_split(datamodule, 'train')[1:] == (None, None),
            'TrainSubset needs a datamodule with a train_dataset and no sampler, got '
            f'{name}',
        )
        chosen = choose_subset(len(dataset), self.fraction, self.seed)
        datamodule.train_dataset = Subset(dataset, chosen)


class UnitRange(Callback):
    """Let a datamodule of TorchGeo give images in [0, 1], as SoftCon's authors do.

    TorchGeo's datamodules scale images each in its own way, such as EuroSAT's to zero
    mean. A frozen encoder needs the values that it was trained on, see
    ``examples/eurosat_linear.yaml``. For datasets in digital numbers (Sentinel-2) or dB
    (Sentinel-1), normalized in one step.
    """

    def __init__(
        self,
        bands: Sequence[str] | None = None,
        level: Level | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Initialize a new UnitRange instance.

        Args:
            bands: Names of the bands of Sentinel-2 (in digital numbers) or Sentinel-1
                (in dB) in the order of the channels. Defaults to those that the dataset
                has.
            level: Processing level of Sentinel-2, ``'L1C'`` or ``'L2A'``. By default what
                dataset and bands tell, see
                :func:`~torchgeo_softcon.datamodules.normalization.image_level`.
            mean: Mean of each band, instead of that of SSL4EO-S12.
            std: Standard deviation of each band.

        Raises:
            ValueError: If only one of *mean* and *std* is given, or *level* with them.
        """
        check_types(UnitRange.__init__, locals())
        require(
            (mean is None) == (std is None) and (mean is None or level is None),
            'mean and std must be given together, without level, got '
            f'mean = {mean}, std = {std} and level = {level}',
        )
        self.level = level
        self.statistics = None if mean is None or std is None else (mean, std)
        self.bands = None if bands is None else list(bands)

    def state_dict(self) -> dict[str, Any]:
        """Leave a note in checkpoints: which values the encoder was trained on."""
        return {'bands': self.bands}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the datamodule.

        Raises:
            ValueError: See :func:`.use_unit_range`.
        """
        datamodule = trainer_datamodule(trainer)
        if datamodule is None:
            raise ValueError(
                'UnitRange changes a datamodule, but the trainer has data loaders only. '
                'Train with a datamodule, or scale the images in the dataset'
            )
        use_unit_range(datamodule, self.bands, self.level, self.statistics)
