# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The samples of a split of a datamodule, in their order."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._compat import Sample
from ..datamodules.protocol import find_split, is_endless, offer_of
from .footprints import number_places, sample_places
from .loop import Transform, batch_transform

#: Smallest share of an image that a class must cover to count, where labels are shares.
#: As in WorldCoverMultiLabel.
_MIN_FRACTION = 0.05

#: Samples that a sampler without end is asked for.
_MAX_DRAWS = 1_000_000

#: Splits of a datamodule, in the order of preference, and the stage that prepares each.
STAGES = {'predict': 'predict', 'test': 'test', 'val': 'validate', 'train': 'fit'}


def set_up(datamodule: LightningDataModule, split: str | None = None) -> str:
    """Prepare a split of a datamodule, by default the first one it has of :data:`STAGES`.

    Returns:
        The split.
    """
    datamodule.prepare_data()
    for name in STAGES if split is None else (split,):
        datamodule.setup(STAGES[name])
        if getattr(offer_of(datamodule), f'{name}_dataset') is not None:
            return name
    # Datamodules of one dataset for all splits
    split_samples(datamodule, split or 'predict')
    return split or 'predict'


def split_samples(
    datamodule: LightningDataModule, split: str
) -> tuple[Dataset[Sample], list[Any]]:
    """Return the dataset of a split that is set up, and what to ask it for, in order."""
    dataset, sampler, batches = find_split(datamodule, split)
    if dataset is None:
        raise ValueError(
            f'{type(datamodule).__name__} has no {split}_dataset. Choose another split, '
            'or other data'
        )
    if batches is not None:
        return dataset, [i for batch in islice(batches, _MAX_DRAWS) for i in batch]
    if sampler is not None:
        return dataset, list(islice(sampler, _MAX_DRAWS))
    return dataset, list(range(len(dataset)))  # type: ignore[arg-type]


def shuffled(count: int, seed: int = 0) -> Tensor:
    """Return the numbers from 0 to *count* - 1 in an order that *seed* determines."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def choose_subset(count: int, fraction: float, seed: int = 42) -> list[int]:
    """Return the sorted indices of a share of *count* samples, always the same.

    Without replacement, unlike in the code of SSL4EO-S12 and DINO-MC, whose 10 % have
    duplicates.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f'fraction must be in (0, 1], got {fraction}')
    chosen = round(count * fraction)
    if not chosen:
        raise ValueError(
            f'fraction = {fraction} of {count} samples is nothing. Choose a larger one'
        )
    return shuffled(count, seed)[:chosen].sort().values.tolist()


@dataclass(eq=False)
class LabelledSamples:
    """A fixed choice of the samples of one split."""

    dataset: Dataset[Sample]
    indices: Sequence[Any]  # queries of the dataset
    name: str  # in messages
    batch_size: int = 64
    num_workers: int = 0
    transform: Transform | None = None
    shares_ground: bool = False
    #: Number of the place of each sample, None if every sample is a place of its own.
    places: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse to have no samples."""
        if not len(self.indices):
            raise ValueError(f'the {self.name} has no samples. Give labelled data')

    @classmethod
    def of_split(
        cls, datamodule: LightningDataModule, split: str, name: str
    ) -> 'LabelledSamples':
        """Take all samples of a split that is set up, without augmentations."""
        offer = offer_of(datamodule)
        return cls(
            *split_samples(datamodule, split),
            name,
            offer.batch_size,
            offer.num_workers,
            batch_transform(datamodule),
            offer.shares_ground,
        )

    def limit(self, count: int) -> None:
        """Choose at most *count* samples at random, always the same."""
        if count > len(self.indices) and is_endless(self.dataset):
            self.indices = range(count)
        chosen = shuffled(len(self.indices))[:count].sort().values
        self.indices = [self.indices[i] for i in chosen]

    def is_same(self, other: 'LabelledSamples') -> bool:
        """Tell whether another split, not limited, has the same samples.

        Datamodules that keep nothing for validation or testing use all samples for all
        splits.
        """
        same = other.dataset is self.dataset
        return same and list(other.indices) == list(self.indices)

    def check(self) -> None:
        """Raise a ValueError if the first sample has no usable label."""
        self._collate([self.dataset[self.indices[0]]])

    def batches(self, rank: int = 0, world_size: int = 1) -> DataLoader[Sample]:
        """Load *image* and *label* of the samples of one rank.

        All ranks get the same number of samples: the first ones come again where the
        number does not divide.
        """
        total = len(self.indices)
        count = -(-total // world_size) * world_size
        return DataLoader(
            self.dataset,
            self.batch_size,
            sampler=[self.indices[i % total] for i in range(rank, count, world_size)],
            num_workers=self.num_workers,
            collate_fn=self._collate,
        )

    def _collate(self, samples: Sequence[Sample]) -> Sample:
        """Stack what a probe needs: footprints and other metadata are no tensors."""
        if not {'image', 'label'} <= samples[0].keys():
            raise ValueError(
                f'the {self.name} must have samples with image and label, got '
                f'{sorted(samples[0])}. A mask of land cover becomes a label by '
                'transforms=torchgeo_softcon.WorldCoverMultiLabel() of the dataset'
            )
        labels = torch.stack([torch.as_tensor(sample['label']) for sample in samples])
        return {
            'image': torch.stack([sample['image'] for sample in samples]),
            'label': check_label(labels, self.name),
        }


def find_places(bank: LabelledSamples, queries: LabelledSamples | None = None) -> None:
    """Find the places of chosen samples, and tell if queries are of places of the bank.

    Without *queries*, the bank is about to be divided by place.
    """
    parts = [bank] if queries is None else [bank, queries]
    names = [sample_places(part.dataset, part.indices) for part in parts]
    known = [part for part in names if part is not None]
    if len(known) < len(parts):
        rank_zero_info(
            f'The data do not tell the places of the samples of the {bank.name}: if '
            'images overlap or are neighbours, its scores are too high. Images of a '
            'folder tell theirs by places, a pattern of their names'
        )
        return
    both = set.intersection(*map(set, known))
    if queries is None and len(both) < 2:
        rank_zero_warn(
            f'All samples of the {bank.name} are of one place ({", ".join(both)}), which '
            'neighbours find whatever the encoder has learnt: the scores are too high'
        )
        return
    numbers = number_places([name for part in known for name in part])
    for part, values in zip(parts, numbers.split([*map(len, known)]), strict=True):
        part.places = values
    if queries is not None and both:
        count = sum(name in both for name in known[1])
        rank_zero_warn(
            f'{count} of {len(known[1])} samples of the {queries.name} are of places that '
            f'the {bank.name} has, too, such as {min(both)}: neighbours find them whatever '
            'the encoder has learnt, and the scores are too high. Keep places apart, such '
            'as by val_fraction'
        )


def check_label(label: Tensor, name: str) -> Tensor:
    """Return class indices (B,) or multi-hot labels (B, K) as int64.

    From class indices (B,) or (B, 1), or from multi-hot labels or class fractions (B, K)
    or, for several seasons, (B, T, K).
    """
    if label.ndim == 3:
        label = label.amax(1)
    whole = not label.is_floating_point()
    if label.ndim == 2 and label.shape[1] == 1 and whole:
        label = label[:, 0]
    if label.ndim == 1 and (whole or bool((label % 1 == 0).all())):
        if bool((label < 0).any()):
            raise ValueError(
                f'the {name} has a negative class index {int(label.min())}'
            )
        return label.long()
    if label.ndim != 2 or not bool(((label >= 0) & (label <= 1)).all()):
        raise ValueError(
            f'the {name} must have class indices of shape (B,), or multi-labels of shape '
            f'(B, K) with values in [0, 1], got the shape {tuple(label.shape)} and '
            f'values from {float(label.amin()):g} to {float(label.amax()):g}'
        )
    return (label >= _MIN_FRACTION).long()
