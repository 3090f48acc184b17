# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Base of the datamodules of this package."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._compat import NonGeoDataModule, NonGeoDataset, Sample
from .._cores import count_cores
from ..datasets.scaling import softcon_range
from ..landcover import LandCoverProduct, find_product
from ..landcover.products import ProductLike
from ..transforms.worldcover import WorldCoverMultiLabel, check_values
from .loading import DrawSampler, ResumableDataLoader, uses_cuda
from .protocol import dataset_bands

#: What a datamodule can give next to the image.
Target = Literal['label', 'mask']

#: More processes than this rarely read faster, and each takes memory.
_MAX_WORKERS = 8


class _LongLabel(nn.Module):
    """Make a multi-hot label whole numbers, as the metrics of the host want it."""

    batched = True

    def forward(self, sample: Sample) -> Sample:
        return {**sample, 'label': sample['label'].long()}


class _OrdinalMask(nn.Module):
    """Number the codes of a mask from 1 on, 0 is no data."""

    def __init__(self, product: LandCoverProduct) -> None:
        super().__init__()
        self.product = product
        ordinals = torch.zeros(256, dtype=torch.long)
        ordinals[list(product.codes)] = 1 + torch.arange(len(product.codes))
        self.register_buffer('ordinals', ordinals, persistent=False)
        self.ordinals: Tensor

    def forward(self, sample: Sample) -> Sample:
        # Ordinals would become other classes, and negative numbers count from the end
        check_values(sample['mask'], self.product)
        return {**sample, 'mask': self.ordinals[sample['mask'].long()]}


def target_transform(
    target: Target,
    min_fraction: float,
    fractions: bool,
    product: ProductLike = 'worldcover',
) -> nn.Module:
    """Turn a mask of codes into what a task expects."""
    product = find_product(product)
    label = WorldCoverMultiLabel(
        min_fraction=min_fraction, fractions=fractions, product=product
    )
    if target == 'mask':
        if fractions:
            raise ValueError("fractions must be left out, or target='label' be set")
        return _OrdinalMask(product)
    return label if fractions else nn.Sequential(label, _LongLabel())


class DrawDataModule(NonGeoDataModule):  # type: ignore[misc]
    """Base of datamodules whose datasets take the number of a draw as index.

    Training batches are always complete and differ from epoch to epoch, and a run that
    goes on from a checkpoint gets the batches that it would have got. Several devices
    share the draws without further settings.

    On CUDA devices, batches are read by as many processes as there are cores for each
    (from 1 to 8), two batches ahead per process, into pinned memory. Without CUDA, the
    training itself reads. The processes of the training stay from epoch to epoch, those of
    the validation do not. The batches do not depend on any of this.
    """

    # Images are in [0, 1] already. The host's tasks read these to plot images.
    mean = torch.tensor(0)
    std = torch.tensor(1)

    #: Whether the draws of an epoch are permuted.
    shuffle = False

    #: What becomes 0 and 1, a pair per band, if the dataset does not know.
    value_range: Sequence[tuple[float, float]] | None = None

    def __init__(
        self,
        dataset_class: type[NonGeoDataset],
        batch_size: int,
        num_workers: int | None,
        val_fraction: float,
        seed: int,
        options: Mapping[str, Any],
    ) -> None:
        """Initialize a new DrawDataModule instance."""
        if batch_size < 1 or (num_workers or 0) < 0:
            raise ValueError(
                'batch_size must be at least 1 and num_workers at least 0, got '
                f'{batch_size} and {num_workers}'
            )
        if seed < 0:
            raise ValueError(f'seed must be at least 0, got {seed}')
        if not 0 <= val_fraction < 0.5:
            raise ValueError(
                f'val_fraction must be in [0, 0.5), got {val_fraction}: as much is kept '
                'for testing'
            )

        # Now, and not when the data are opened
        inspect.signature(dataset_class).bind_partial(**options)

        super().__init__(dataset_class, batch_size, num_workers or 0)
        self._num_workers: int | None = num_workers
        self.val_fraction = val_fraction
        self.seed = seed
        # The default of the host divides by 255 and refuses (B, T, C, H, W)
        self.aug = nn.Identity()
        self._train_loader: ResumableDataLoader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def num_workers(self) -> int:
        """Number of processes that read, per device."""
        if self._num_workers is not None:
            return self._num_workers
        # Not chosen before there is a trainer: it may use the CPU next to a GPU. There,
        # training and reading would share the cores
        if not uses_cuda(self.trainer):
            return 0
        cores = count_cores() // torch.cuda.device_count()
        return max(1, min(cores, _MAX_WORKERS))

    @num_workers.setter
    def num_workers(self, value: int) -> None:
        self._num_workers = value

    @property
    def unit_range(self) -> bool:
        """Whether training images are known to be scaled as :class:`.ToUnitRange` does."""
        dataset: Any = self.train_dataset
        pairs = self.value_range or getattr(dataset, 'value_range', None)
        expected = getattr(dataset, 'softcon_range', None) or softcon_range(
            dataset_bands(dataset), getattr(dataset, 'level', 'L1C')
        )
        if pairs is None or expected is None or np.shape(pairs) != np.shape(expected):
            return False
        return bool(np.allclose(pairs, expected))

    def open_dataset(self) -> Any:
        """Open the data that all splits are divided from."""
        raise NotImplementedError

    @functools.cached_property
    def source(self) -> Any:
        """The data that all splits are divided from, opened once."""
        return self.open_dataset()

    def setup(self, stage: str) -> None:
        """Open the data and divide them."""
        train, val, test = self.source.divide(self.val_fraction)
        if stage == 'fit':
            self.train_dataset = train
        if stage in ('fit', 'validate'):
            self.val_dataset = val
        if stage == 'test':
            self.test_dataset = test
        if stage == 'predict':
            self.predict_dataset = self.source.images()

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return a data loader that can go on in the middle of an epoch."""
        dataset = self._valid_attribute('train_dataset')
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        if len(dataset) < self.batch_size * world_size:
            raise ValueError(
                f'batch_size must be at most {len(dataset) // world_size}, the number of '
                f'training samples per device, got {self.batch_size}'
            )
        loader = ResumableDataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=DrawSampler(dataset, self.shuffle, self.seed, world_size, rank),
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=uses_cuda(self.trainer),
            drop_last=True,
            persistent_workers=self.num_workers > 0,
        )
        loader.pending = self._pending
        if (damage := getattr(dataset, 'damage', None)) is not None:
            loader.ended = damage.tell_epoch
        if self._resume is not None:
            loader.load_state_dict(self._resume)
        elif self._train_loader and self.trainer and self.trainer.global_step > 0:
            # reload_dataloaders_every_n_epochs
            loader.load_state_dict(self._train_loader.state_dict())
        self._resume = None
        self._train_loader = loader
        return loader

    def _dataloader_factory(self, split: str) -> DataLoader[Sample]:
        """Return a data loader for validation, testing or prediction, in order."""
        return DataLoader(
            self._valid_attribute(f'{split}_dataset'),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=uses_cuda(self.trainer),
        )

    def teardown(self, stage: str) -> None:
        """Name the damaged files that were left out."""
        super().teardown(stage)
        # Not opened for this
        if damage := getattr(self.__dict__.get('source'), 'damage', None):
            damage.tell_epoch()
            damage.tell_files()

    def _pending(self) -> int:
        """Return how many batches wait for their step, as when an error interrupts one."""
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(progress.ready - progress.processed)

    # Not left to the loader: Lightning restores loaders only if they are made after
    # the loops, and a task that asks for trainer.estimated_stepping_batches to set up
    # its schedule makes them before.
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the training data loader, if there is one."""
        return self._train_loader.state_dict() if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, with what :meth:`state_dict` gave."""
        self._resume = dict(state_dict)
        # Some strategies restore checkpoints after the setup of the task
        if self._train_loader is not None:
            self._train_loader.load_state_dict(state_dict)
