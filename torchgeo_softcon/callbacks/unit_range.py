# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Scaling of images to the values that SoftCon's encoders are trained on."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .._checks import check_types
from ..bands import Level
from ..datamodules.normalization import use_unit_range
from ..datamodules.protocol import trainer_datamodule


class UnitRange(Callback):
    """Let a datamodule of TorchGeo give images in [0, 1], as SoftCon's authors do.

    TorchGeo's datamodules scale images each in its own way, such as EuroSAT's to zero
    mean. A frozen encoder needs the values that it was trained on. For datasets in digital
    numbers (Sentinel-2) or dB (Sentinel-1), normalized in one step.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: torchgeo_softcon.callbacks.UnitRange
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
        if (mean is None) != (std is None) or (mean is not None and level is not None):
            raise ValueError(
                'mean and std must be given together, without level, got '
                f'mean = {mean}, std = {std} and level = {level}'
            )
        self.level = level
        self.statistics = None if mean is None or std is None else (mean, std)
        self.bands = None if bands is None else tuple(bands)

    def state_dict(self) -> dict[str, Any]:
        """Leave a note in checkpoints: which values the encoder was trained on."""
        return {'bands': None if self.bands is None else list(self.bands)}

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
