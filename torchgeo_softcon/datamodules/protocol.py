# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The attributes of datamodules and datasets that tasks, callbacks and commands use."""

import copy
import datetime
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast, runtime_checkable

import shapely
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from .._compat import Sample
from ..landcover import LandCoverProduct

#: Splits of a datamodule, as its attributes are called.
SPLITS = ('train', 'val', 'test', 'predict')

#: Attributes of datasets that give samples of another one.
_WRAPPERS = ('dataset', 'scenes')

_Transform = Callable[[Sample], Sample] | None
_Samples = Dataset[Sample] | None
_Queries = Iterable[Any] | None


class DataModuleOffer(Protocol):
    """All that a datamodule may offer beyond Lightning's hooks, with the defaults.

    Read it through :func:`offer_of`: few datamodules have all of these attributes.
    """

    #: Samples in a batch on one device.
    batch_size: int = 64

    #: Processes that read, per device. May depend on the trainer.
    num_workers: int = 0

    #: Puts a batch together.
    collate_fn: Callable[[Any], Any] = staticmethod(default_collate)

    #: One dataset for all splits, and the dataset of each split after its ``setup``.
    dataset: _Samples = None
    train_dataset: _Samples = None
    val_dataset: _Samples = None
    test_dataset: _Samples = None
    predict_dataset: _Samples = None

    #: Samplers of TorchGeo's geospatial datamodules, which query a dataset by place, and
    #: of lists of queries. Splits may have their own, such as *train_sampler*.
    sampler: _Queries = None
    batch_sampler: _Queries = None

    #: Transform of a batch on the device, and the one of a split that replaces it.
    aug: _Transform = None
    train_aug: _Transform = None
    val_aug: _Transform = None
    test_aug: _Transform = None
    predict_aug: _Transform = None

    #: What *aug* subtracts from images and divides them by. TorchGeo's tasks undo it to
    #: plot images. 0 and 1 for images that are in [0, 1] already.
    mean: Tensor | None = None
    std: Tensor | None = None

    #: Whether training images are known to be scaled as :class:`.ToUnitRange` does, which
    #: checkpoints note.
    unit_range: bool = False

    #: Whether all splits are of the same ground, where neighbours are found whatever an
    #: encoder has learnt.
    shares_ground: bool = False

    #: Options of ``torchgeo fit --model Classification`` that fine-tune on the same data,
    #: for the image size in pixels that a model needs (None for any).
    finetune_options: Callable[[int | None], str | None] = staticmethod(
        lambda size: None
    )


@runtime_checkable
class LocatedDataset(Protocol):
    """A dataset that knows where and when its samples were taken."""

    def footprint(
        self, index: Any
    ) -> tuple[shapely.Polygon, str | None, datetime.date | None]:
        """Return outline, coordinate reference system and day of a sample."""


@runtime_checkable
class PlacedDataset(Protocol):
    """A dataset that knows which of its samples show the same ground."""

    def place(self, index: Any) -> str | None:
        """Return the name of the place of a sample, None if it is not known."""


class _Completed:
    """A datamodule with the defaults of :class:`DataModuleOffer`."""

    def __init__(self, datamodule: LightningDataModule | None) -> None:
        self._datamodule = datamodule

    def __getattr__(self, name: str) -> Any:
        # An attribute that the protocol lacks is an error, whoever has it
        default = getattr(DataModuleOffer, name)
        value = getattr(self._datamodule, name, None)
        return default if value is None else value


def offer_of(datamodule: LightningDataModule | None) -> DataModuleOffer:
    """Return what a datamodule offers when it is read, with defaults for what it lacks."""
    return cast(DataModuleOffer, _Completed(datamodule))


def trainer_datamodule(trainer: Trainer | None) -> LightningDataModule | None:
    """Return the datamodule of a trainer, None if it has data loaders only."""
    # Lightning sets the attribute when a datamodule is given, and not before
    return getattr(trainer, 'datamodule', None)


def find_split(
    datamodule: LightningDataModule, split: str
) -> tuple[_Samples, _Queries, _Queries]:
    """Return dataset, sampler and batch sampler of a split, or those that all share."""
    offer = offer_of(datamodule)

    def find(kind: str) -> Any:
        own = getattr(datamodule, f'{split}_{kind}', None)
        return getattr(offer, kind) if own is None else own

    return find('dataset'), find('sampler'), find('batch_sampler')


def eval_transform(datamodule: LightningDataModule) -> _Transform:
    """Return the transform of validation batches: only normalized, not augmented."""
    offer = offer_of(datamodule)
    return offer.aug if offer.val_aug is None else offer.val_aug


def is_endless(dataset: Any) -> bool:
    """Tell whether a dataset takes any index from 0 on, and draws a sample for each."""
    return bool(getattr(dataset, 'endless', False))


def dataset_bands(dataset: Any) -> Any:
    """Return the attribute *bands* of a dataset, or of the one that it wraps, or None."""
    for wrapper in _WRAPPERS:
        dataset = getattr(dataset, wrapper, dataset)
    return getattr(dataset, 'bands', None)


def dataset_product(dataset: Any) -> LandCoverProduct | None:
    """Return the land-cover product of a dataset, or of one that it is made of."""
    product = getattr(dataset, 'product', None)
    if isinstance(product, LandCoverProduct):
        return product
    inner = [getattr(dataset, wrapper, None) for wrapper in _WRAPPERS]
    for one in (*inner, *getattr(dataset, 'datasets', ())):
        product = None if one is None else dataset_product(one)
        if product is not None:
            return product
    return None


def without_transforms(dataset: Any) -> Any:
    """Return a copy of a dataset that gives its samples as they are read."""
    plain = copy.copy(dataset)
    if hasattr(plain, 'transforms'):
        plain.transforms = nn.Identity()
    for wrapper in _WRAPPERS:
        inner = getattr(plain, wrapper, None)
        if isinstance(inner, Dataset):
            setattr(plain, wrapper, without_transforms(inner))
    return plain


def loader_batch_size(loader: Any) -> int | None:
    """Return the number of samples in a batch, None if a loader does not tell."""
    size = getattr(loader, 'batch_size', None)
    if size is None:
        size = getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)
    return size
