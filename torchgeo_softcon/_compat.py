# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The only module that knows TorchGeo versions and TorchGeo's private names.

TorchGeo 0.8 (Python 3.11) calls its tasks ``torchgeo.trainers.XTask``, TorchGeo 0.10
(Python 3.12 and newer) ``torchgeo.tasks.X``. Everything else in this package imports
TorchGeo through here.
"""

import shlex
from collections.abc import Iterable
from typing import Any

import torch
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
    from torchgeo.trainers.utils import extract_backbone as _extract_backbone  # type: ignore[no-redef]

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
    'georeference',
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


def georeference(
    crs: Any, query: Any, bounds: tuple[slice, slice, slice], transform: Iterable[float]
) -> Sample:
    """What the host's own raster datasets tell of the place of a sample.

    Args:
        crs: Coordinate reference system of the dataset.
        query: What the sample was asked for with.
        bounds: The same as three complete slices of x, y, and time.
        transform: Affine transform of the sample's grid.

    Returns:
        The keys of a sample besides its data: *crs* and *bounds* (TorchGeo 0.8), or
        *bounds* and *transform* as tensors (TorchGeo 0.10).
    """
    if not hasattr(RasterDataset, '_slice_to_tensor'):  # TorchGeo 0.8
        return {'crs': crs, 'bounds': query}
    x, y, t = bounds
    space = [x.start, x.stop, x.step, y.start, y.stop, y.step]
    time = [t.start.timestamp(), t.stop.timestamp(), t.step]
    return {
        'bounds': torch.tensor([*space, *time]),
        'transform': torch.tensor(list(transform)),
    }


def finetune_command(
    model: str, checkpoint: str, in_channels: int, data: str | None
) -> str:
    """Command that fine-tunes an encoder with the installed host.

    Args:
        model: timm name of the encoder.
        checkpoint: Path of the checkpoint.
        in_channels: Number of bands.
        data: Options that name labelled data and the task on them, if they are known.

    Returns:
        A shell command.
    """
    task = 'Classification' if HAS_TASKS else 'ClassificationTask'
    data = data or '--model.num_classes N --data YOUR_DATAMODULE'
    return (
        f'torchgeo fit --model {task} --model.model {model} '
        f'--model.weights {shlex.quote(checkpoint)} --model.in_channels {in_channels} '
        f'{data}'
    )
