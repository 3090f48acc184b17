# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The only module that knows TorchGeo versions and TorchGeo's private names.

TorchGeo 0.8 (Python 3.11) calls its tasks ``torchgeo.trainers.XTask``, TorchGeo 0.10
(Python 3.12 and newer) ``torchgeo.tasks.X``. Everything else in this package imports
TorchGeo through here.

Names are loaded on first use: our weights are registered while ``torchgeo.models`` is
imported, which must not pull in datasets, tasks, and Lightning.
"""

# ruff: noqa: F401, as other modules import the names from here

import functools
import shlex
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Union, get_args

import torch
from torchvision.models._api import Weights, WeightsEnum

#: Whether the host calls its tasks ``Classification``, not ``ClassificationTask``.
HAS_TASKS = find_spec('torchgeo.tasks') is not None

#: A sample or a mini-batch. TorchGeo 0.10 has a name for it, TorchGeo 0.8 has not.
Sample = dict[str, Any]

# TorchGeo 0.10 still has `torchgeo.trainers`, but subclassing its classes warns
_TASKS = 'torchgeo.tasks' if HAS_TASKS else 'torchgeo.trainers'

_LAZY = {
    'BaseDataModule': 'torchgeo.datamodules',
    'BaseTask': _TASKS,
    'BigEarthNetV2': 'torchgeo.datasets',
    'ClassificationTask': _TASKS,
    'DatasetNotFoundError': 'torchgeo.datasets',
    'MisconfigurationException': 'torchgeo.datamodules.utils',
    'NonGeoDataModule': 'torchgeo.datamodules',
    'NonGeoDataset': 'torchgeo.datasets',
    'RGBBandsMissingError': 'torchgeo.datasets',
    'RasterDataset': 'torchgeo.datasets',
    'get_weight': 'torchgeo.models',
}

if TYPE_CHECKING:
    from torchgeo.datamodules import BaseDataModule, NonGeoDataModule
    from torchgeo.datamodules.utils import MisconfigurationException
    from torchgeo.datasets import (
        BigEarthNetV2,
        DatasetNotFoundError,
        NonGeoDataset,
        RasterDataset,
        RGBBandsMissingError,
    )
    from torchgeo.models import get_weight
    from torchgeo.trainers import BaseTask, ClassificationTask


def __getattr__(name: str) -> Any:
    """Load a class of the host."""
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    host = 'Classification' if name == 'ClassificationTask' and HAS_TASKS else name
    value = getattr(import_module(_LAZY[name]), host)
    globals()[name] = value
    return value


def host_main(args: list[str]) -> None:
    """Run ``torchgeo`` with some arguments."""
    argv, sys.argv = sys.argv, sys.argv[:1]  # Lightning warns of arguments in both
    try:
        import_module('torchgeo.main').main(args)
    finally:
        sys.argv = argv


def host_weights(enum: str, member: str) -> Weights:
    """Return weights that TorchGeo hosts."""
    weights: Weights = getattr(import_module('torchgeo.models'), enum)[member].value
    return weights


def full_slices(dataset: Any, query: Any) -> tuple[slice, slice, slice]:
    """Return x, y, and time of a query, with what it leaves out from the host's dataset."""
    x, y, t = dataset._disambiguate_slice(query)
    return x, y, t


def georeference(dataset: Any, query: Any, transform: Iterable[float]) -> Sample:
    """Return the keys by which the host's raster datasets locate a sample.

    These are *crs* and *bounds* in TorchGeo 0.8, *bounds* and *transform*, which are
    tensors, in TorchGeo 0.10.
    """
    if not hasattr(dataset, '_slice_to_tensor'):  # TorchGeo 0.8
        return {'crs': dataset.crs, 'bounds': query}
    bounds = dataset._slice_to_tensor(query)
    return {'bounds': bounds, 'transform': torch.tensor(list(transform))}


def extend_host_tasks(explain: Callable[[Any], str | None]) -> None:
    """Have TorchGeo's tasks take ``--model.weights true``, and *explain* what fails.

    On the command line, they take ``true`` for the name of weights, because text stands
    before it among the types of their argument.

    Args:
        explain: Tells of a task whose weights could not be loaded what to do, None if
            they are not ours.
    """

    def explained(configure: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(configure)
        def configure_models(task: Any) -> None:
            try:
                configure(task)
            except (AttributeError, KeyError, RuntimeError) as error:
                if (message := explain(task)) is None:
                    raise
                raise ValueError(message) from error

        return configure_models

    for task in vars(import_module(_TASKS)).values():
        types = getattr(getattr(task, '__init__', None), '__annotations__', {})
        kinds = get_args(types.get('weights'))
        if {str, bool} <= {*kinds}:
            types['weights'] = Union[*(kind for kind in kinds if kind is not str), str]
            # Subclasses may share these types, and have the models of their parent
            if 'configure_models' in vars(task):
                task.configure_models = explained(task.configure_models)


def finetune_command(
    model: str, checkpoint: str, in_channels: int, data: str | None
) -> str:
    """Write the command that fine-tunes an encoder with the installed host."""
    task = 'Classification' if HAS_TASKS else 'ClassificationTask'
    data = data or '--model.num_classes N --data YOUR_DATAMODULE'
    return (
        f'torchgeo fit --model {task} --model.model {model} '
        f'--model.weights {shlex.quote(checkpoint)} --model.in_channels {in_channels} '
        f'{data}'
    )
