# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The only module that knows TorchGeo versions and TorchGeo's private names.

TorchGeo 0.8 (Python 3.11) calls its tasks ``torchgeo.trainers.XTask``, TorchGeo 0.10
(Python 3.12 and newer) ``torchgeo.tasks.X``. Everything else in this package imports
TorchGeo through here.
"""

from typing import Any

from torch import Tensor
from torchgeo.datamodules import BaseDataModule, NonGeoDataModule
from torchgeo.datasets import DatasetNotFoundError, NonGeoDataset, RasterDataset
from torchgeo.models import get_weight
from torchvision.models._api import WeightsEnum

try:
    # TorchGeo 0.10. `torchgeo.trainers` still exists there, but subclassing its
    # classes warns, so the new name goes first.
    from torchgeo.tasks import BaseTask
    from torchgeo.tasks.utils import extract_backbone as _extract_backbone

    #: Whether the host calls its tasks ``Classification``, not ``ClassificationTask``.
    HAS_TASKS = True
except ImportError:  # TorchGeo 0.8
    from torchgeo.trainers import BaseTask
    from torchgeo.trainers.utils import extract_backbone as _extract_backbone

    HAS_TASKS = False

#: A sample or a mini-batch. TorchGeo 0.10 has a name for it, TorchGeo 0.8 has not.
Sample = dict[str, Any]

__all__ = (
    'HAS_TASKS',
    'BaseDataModule',
    'BaseTask',
    'DatasetNotFoundError',
    'NonGeoDataModule',
    'NonGeoDataset',
    'RasterDataset',
    'Sample',
    'WeightsEnum',
    'extract_backbone',
    'finetune_command',
    'get_weight',
)


def extract_backbone(path: str) -> tuple[str, dict[str, Tensor]]:
    """Read the encoder of a task's checkpoint, as the host's own tasks read it.

    Args:
        path: Path to a Lightning checkpoint.

    Returns:
        The timm name of the encoder and its state dict.
    """
    name, state_dict = _extract_backbone(path)
    return str(name), state_dict


def finetune_command(model: str, checkpoint: str, in_channels: int) -> str:
    """Command that fine-tunes an encoder with the installed host.

    Args:
        model: timm name of the encoder.
        checkpoint: Path of the checkpoint.
        in_channels: Number of bands.

    Returns:
        A shell command.
    """
    task = 'Classification' if HAS_TASKS else 'ClassificationTask'
    return (
        f'torchgeo fit --model {task} --model.model {model} '
        f"--model.weights '{checkpoint}' --model.in_channels {in_channels} "
        '--model.task multilabel --model.num_labels 11 --model.loss bce '
        '--data SyntheticScenesDataModule --trainer.max_epochs 3'
    )
