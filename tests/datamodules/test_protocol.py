# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from torchgeo_softcon.datamodules import (
    SSL4EOS12MLDataModule,
    SyntheticScenesDataModule,
)
from torchgeo_softcon.datamodules.protocol import (
    SPLITS,
    DataModuleOffer,
    dataset_bands,
    dataset_product,
    eval_transform,
    find_split,
    is_endless,
    loader_batch_size,
    offer_of,
    trainer_datamodule,
    without_transforms,
)
from torchgeo_softcon.landcover.products import WORLDCOVER


@pytest.fixture
def bare() -> Any:
    return LightningDataModule()


@pytest.mark.parametrize('data', [None, LightningDataModule()])
def test_what_is_missing_has_a_default(data: LightningDataModule | None) -> None:
    offer = offer_of(data)
    assert (offer.batch_size, offer.num_workers) == (64, 0)
    assert offer.collate_fn is default_collate
    assert (offer.unit_range, offer.shares_ground) == (False, False)
    assert offer.finetune_options(224) is None
    assert [getattr(offer, f'{split}_dataset') for split in SPLITS] == [None] * 4


def test_none_counts_as_missing(bare: Any) -> None:
    bare.batch_size = None
    assert offer_of(bare).batch_size == 64


def test_unknown_attribute_is_an_error(bare: Any) -> None:
    bare.colour = 'red'
    with pytest.raises(AttributeError, match='colour'):
        offer_of(bare).colour  # type: ignore[attr-defined]  # noqa: B018


def test_attributes_are_read_when_they_are_asked_for(bare: Any) -> None:
    offer = offer_of(bare)
    bare.num_workers = 3
    assert offer.num_workers == 3


@pytest.mark.parametrize('make', [SyntheticScenesDataModule, SSL4EOS12MLDataModule])
def test_own_datamodules_have_what_the_protocol_names(make: Any) -> None:
    data = make(num_workers=0)
    own = {'collate_fn', 'shares_ground', 'finetune_options'}
    host = {name for name in DataModuleOffer.__annotations__ if 'sampler' not in name}
    missing = {name for name in host - own if not hasattr(data, name)}
    assert not missing
    assert offer_of(data).batch_size == data.batch_size


def test_find_split_prefers_what_belongs_to_the_split(bare: Any) -> None:
    bare.dataset, bare.val_dataset = 'all', 'val'
    bare.sampler, bare.val_batch_sampler = 'sampler', 'batches'
    assert tuple(find_split(bare, 'val')) == ('val', 'sampler', 'batches')
    assert tuple(find_split(bare, 'test')) == ('all', 'sampler', None)


def test_eval_transform_is_the_one_of_validation(bare: Any) -> None:
    assert eval_transform(bare) is None
    bare.aug = nn.Identity()
    assert eval_transform(bare) is bare.aug
    bare.val_aug = nn.Identity()
    assert eval_transform(bare) is bare.val_aug


def test_trainer_without_a_datamodule() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator='cpu')
    assert trainer_datamodule(trainer) is None
    assert trainer_datamodule(None) is None


def test_bands_of_wrapped_datasets() -> None:
    dataset: Any = SimpleNamespace(bands=['B4'])
    assert dataset_bands(None) is None
    for wrapped in (dataset, Subset(dataset, [0]), SimpleNamespace(scenes=dataset)):
        assert dataset_bands(wrapped) == ['B4']


def test_product_of_a_dataset_and_of_its_parts() -> None:
    dataset: Any = SimpleNamespace(product=WORLDCOVER)
    for outer in (
        dataset,
        Subset(dataset, [0]),
        SimpleNamespace(scenes=dataset),
        SimpleNamespace(datasets=[SimpleNamespace(), dataset]),
    ):
        assert dataset_product(outer) is WORLDCOVER
    assert dataset_product(SimpleNamespace(product='worldcover')) is None


def test_samples_as_they_are_read() -> None:
    class Masks(Dataset[str]):
        transforms: Any = staticmethod(lambda sample: 'label')

        def __getitem__(self, index: int) -> str:
            return str(self.transforms('mask'))

    dataset = Masks()
    for outer in (dataset, Subset(dataset, [0])):
        assert without_transforms(outer)[0] == 'mask'
        assert outer[0] == 'label'


def test_is_endless() -> None:
    assert is_endless(SimpleNamespace(endless=True))
    assert not is_endless([1, 2])


def test_loader_batch_size() -> None:
    data: Any = range(8)
    assert loader_batch_size(DataLoader(data, 4)) == 4
    sampler: Any = SimpleNamespace(batch_size=3)
    assert loader_batch_size(SimpleNamespace(batch_sampler=sampler)) == 3
    assert loader_batch_size(iter([])) is None
