# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datamodule for SSL4EO-S12 with land-cover labels."""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import default_collate

from .._checks import check_types
from .._compat import Sample
from ..datasets.scaling import ValueRange, resolve_value_range
from ..datasets.ssl4eo_s12_ml import SSL4EOS12ML, RecordBatch, split_range
from ..ssl4eo.tiffs import BANDS, Split, split_names
from ..transforms.unit_range import ToUnitRange
from .base import DrawDataModule


class _Scale(nn.Module):
    """Scale images to [0, 1], where values that are missing (not finite) become 0."""

    def __init__(self, pairs: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.unit_range = ToUnitRange.between(pairs)

    def forward(self, sample: Sample) -> Sample:
        image: Tensor = self.unit_range(sample['image'])
        # By the values that came in: of infinite ones, scaling makes 0 and 1
        missing = ~sample['image'].isfinite()
        return {**sample, 'image': image.masked_fill_(missing, 0)}


class SSL4EOS12MLDataModule(DrawDataModule):
    """Locations of SSL4EO-S12 with multi-labels, from published or from packed files.

    See :class:`.SSL4EOS12ML`. Images move to the device as they are in the files. There,
    the bands of 20 and 60 m come to 10 m, and all bands to [0, 1].

    Images of one location are never in two splits, unless *val_fraction* is 0. Predictions
    are of single images.
    """

    shuffle = True

    def __init__(
        self,
        root: str | os.PathLike[str] = 'data',
        split: Split | Sequence[Split] = 's2c',
        batch_size: int = 64,
        num_workers: int | None = None,
        value_range: ValueRange = None,
        val_fraction: float = 0.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Initialize a new SSL4EOS12MLDataModule instance.

        Args:
            root: Folder with the folders ``s1``, ``s2c`` or ``s2a``, as they are published
                or packed, or with those of v1.1, see :class:`.SSL4EOS12ML`.
            split: One of them, or several to stack the bands of images of one season.
            batch_size: Number of locations in a batch on one device.
            num_workers: Number of processes that read, see :class:`.DrawDataModule` for
                the default.
            value_range: What becomes 0 and 1: a pair ``[low, high]``, or one pair per
                band. By default (``softcon``) the mean of SSL4EO-S12 -2 and +2 standard
                deviations, those of Level-2A for the split ``s2a``.
            val_fraction: Part of the locations for validation only, and as much for
                testing only. With 0, all are for all three.
            seed: Seed of the order, the seasons and the division.
            **kwargs: Other options of :class:`.SSL4EOS12ML`.

        Raises:
            TypeError: If the dataset has no such option.
            ValueError: If an argument is out of range.
        """
        check_types(SSL4EOS12MLDataModule.__init__, locals())
        self._options = kwargs
        super().__init__(
            SSL4EOS12ML, batch_size, num_workers, val_fraction, seed, self._options
        )
        self._root, self._split = root, split
        names = split_names(split)
        count = sum(len(BANDS[name]) for name in names)
        if value_range in (None, 'softcon'):
            self.value_range = split_range(names)
        else:
            self.value_range = resolve_value_range(value_range, None, count, ())
        self.aug = self._scale = _Scale(self.value_range)
        self.collate_fn = collate

    def open_dataset(self) -> SSL4EOS12ML:
        """Find the images and their labels."""
        return SSL4EOS12ML(
            root=self._root,
            split=self._split,
            transforms=None,
            seed=self.seed,
            **self._options,
        )

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Make images of the bytes that were read, on the device.

        Returns:
            Batch with *image* of shape (B, T, C, 264, 264) and *label* of shape (B, T, K),
            without T if it is 1.
        """
        if 'records' in batch:
            batch = dict(batch)
            batch['image'] = self.source.decode(batch.pop('records'))
        for key in ('image', 'label'):
            if key in batch and batch[key].shape[1] == 1:
                batch[key] = batch[key][:, 0]
        self._scale.to(batch['image'].device)  # once
        return super().on_after_batch_transfer(batch, dataloader_idx)


def collate(samples: Sequence[Sample]) -> Sample:
    """Put a batch together."""
    if isinstance(samples, RecordBatch):
        return samples.collate()
    return default_collate(list(samples))
