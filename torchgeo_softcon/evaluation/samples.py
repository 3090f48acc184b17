# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The samples of a split of a datamodule, in their order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._compat import Sample
from ..datamodules.protocol import eval_transform, find_split, is_endless, offer_of

#: Smallest share of an image that a class must cover to count, where labels are shares.
#: As in WorldCoverMultiLabel.
_MIN_FRACTION = 0.05

#: Samples that a sampler without end is asked for.
_MAX_DRAWS = 1_000_000

#: Splits of a datamodule, in the order of preference, and the stage that prepares each.
STAGES = {'predict': 'predict', 'test': 'test', 'val': 'validate', 'train': 'fit'}


def set_up(datamodule: LightningDataModule, split: str | None = None) -> str:
    """Prepare a split of a datamodule.

    Args:
        datamodule: The datamodule.
        split: One of :data:`STAGES`. By default, the first that the datamodule has.

    Returns:
        The split.

    Raises:
        ValueError: If the datamodule has no such split.
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
    """Return the dataset of a split that is set up, and what to ask it for, in order.

    Raises:
        ValueError: If the datamodule has no such split.
    """
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
    return shuffled(count, seed)[:chosen].sort().values.tolist()


@dataclass(eq=False)
class LabelledSamples:
    """A fixed choice of the samples of one split.

    Attributes:
        dataset: Gives *image* and *label*.
        indices: What the dataset is asked for.
        name: What messages call the samples.
        batch_size: Number of samples that are read at a time.
        num_workers: Number of processes that read.
        transform: What the datamodule does to a batch on the device.
        shares_ground: Whether other splits have other samples of the same ground.

    Raises:
        ValueError: If there are no samples.
    """

    dataset: Dataset[Sample]
    indices: Sequence[Any]
    name: str
    batch_size: int = 64
    num_workers: int = 0
    transform: Callable[[Sample], Sample] | None = None
    shares_ground: bool = False

    def __post_init__(self) -> None:
        """Refuse to have no samples."""
        if not len(self.indices):
            raise ValueError(f'the {self.name} has no samples. Give labelled data')

    @classmethod
    def of_split(
        cls, datamodule: LightningDataModule, split: str, name: str
    ) -> 'LabelledSamples':
        """Take all samples of a split of a datamodule that is set up.

        Raises:
            ValueError: If the datamodule has no such split.
        """
        offer = offer_of(datamodule)
        return cls(
            *split_samples(datamodule, split),
            name,
            offer.batch_size,
            offer.num_workers,
            # Images are not augmented, only normalized
            eval_transform(datamodule),
            offer.shares_ground,
        )

    def limit(self, count: int) -> None:
        """Choose at most *count* samples at random, always the same."""
        if count > len(self.indices) and is_endless(self.dataset):
            self.indices = range(count)
        self.indices = self._pick(shuffled(len(self.indices))[:count])

    def is_same(self, other: 'LabelledSamples') -> bool:
        """Tell whether another split, not limited, has the same samples.

        Datamodules that keep nothing for validation or testing use all samples for all
        splits.
        """
        same = other.dataset is self.dataset
        return same and list(other.indices) == list(self.indices)

    def limit_apart(self, other: 'LabelledSamples', count: int, others: int) -> None:
        """Choose samples at random, and different ones for a split of the same samples.

        Where there are too few, these get three quarters.

        Args:
            other: A split of the same samples, see :meth:`is_same`.
            count: Largest number of samples.
            others: Largest number of samples of *other*.
        """
        if is_endless(self.dataset):
            self.indices = range(count + others)
        count = min(count, len(self.indices) * 3 // 4)
        order = shuffled(len(self.indices))
        other.indices = self._pick(order[count : count + others])
        self.indices = self._pick(order[:count])

    def _pick(self, positions: Tensor) -> list[Any]:
        """Return what the dataset is asked for at some positions, in their order."""
        return [self.indices[i] for i in positions.sort().values]

    def check(self) -> None:
        """Raise a ValueError if the first sample has no usable label."""
        self._collate([self.dataset[self.indices[0]]])

    def batches(self, rank: int = 0, world_size: int = 1) -> DataLoader[Sample]:
        """Load *image* and *label* of the samples of one rank.

        All ranks get the same number of samples: the first ones come again where the
        number does not divide.
        """
        count = -(-len(self.indices) // world_size) * world_size
        share = [
            self.indices[i % len(self.indices)] for i in range(rank, count, world_size)
        ]
        return DataLoader(
            self.dataset,
            self.batch_size,
            sampler=share,
            num_workers=self.num_workers,
            collate_fn=self._collate,
        )

    def _collate(self, samples: Sequence[Sample]) -> Sample:
        """Stack what a probe needs: footprints and other metadata are no tensors."""
        for key in ('image', 'label'):
            if key not in samples[0]:
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


def check_label(label: Tensor, name: str) -> Tensor:
    """Bring labels to class indices or to multi-hot labels.

    Args:
        label: Class indices of shape (B,) or (B, 1), or multi-hot labels or class
            fractions of shape (B, K) or, for several seasons, (B, T, K).
        name: What messages call the data.

    Returns:
        Class indices of shape (B,), or multi-hot labels of shape (B, K), as int64.

    Raises:
        ValueError: If it is neither.
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
