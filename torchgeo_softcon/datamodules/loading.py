# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Which samples come when, also after a restart in the middle of an epoch."""

from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from torch.utils.data import DataLoader, DistributedSampler

from .._compat import Sample


def uses_cuda(trainer: Trainer | None) -> bool:
    """Tell whether batches go to a CUDA device."""
    if trainer is None:
        return torch.cuda.is_available()
    return isinstance(trainer.accelerator, CUDAAccelerator)


class DrawSampler(DistributedSampler[Any]):
    """An endless stream of draws, cut into epochs.

    For a dataset with *n* samples, the draws from *e n* to *(e + 1) n* come in round
    *e*, permuted or not. A dataset that makes its random choices from the number of the
    draw alone makes new ones in each round. An epoch is about as long as a round, and
    starts where the one before ended. All devices together get the same draws as one
    would, in the same order. Lightning leaves distributed samplers such as this alone.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        """Initialize a new DrawSampler instance."""
        super().__init__(
            cast(Any, dataset),
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=True,
        )
        self.length = len(dataset)
        #: Where in the stream the next epoch starts.
        self.start = 0

    def __len__(self) -> int:
        """Return the number of draws of this device in an epoch."""
        return self.length // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        """Draws of this device in the next epoch."""
        stream = self.start + self.rank + self.num_replicas * np.arange(len(self))
        rounds, positions = np.divmod(stream, self.length)
        if self.shuffle:
            for number in np.unique(rounds):
                rng = np.random.default_rng([self.seed, number])
                order = rng.permutation(self.length)
                chosen = rounds == number
                positions[chosen] = order[positions[chosen]]
        return iter((rounds * self.length + positions).tolist())


class ResumableDataLoader(DataLoader[Sample]):
    """A data loader that goes on where it was stopped, without reading what was read.

    Needs a :class:`DrawSampler`. What counts is what was handed out, not the number of
    the epoch: Lightning takes an epoch for complete that ``max_steps`` has cut short.
    Workers start when the first batch is asked for, because Lightning makes iterators
    that it does not use.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Initialize a new ResumableDataLoader instance."""
        super().__init__(*args, **kwargs)
        #: How many of the batches handed out are not used yet.
        self.pending: Callable[[], int] = int
        #: What to do when all batches of an epoch are read.
        self.ended: Callable[[], object] = int
        self._samples = 0

    @property
    def _draws(self) -> DrawSampler:
        return cast(DrawSampler, self.sampler)

    @property
    def _step(self) -> int:
        """Draws of all devices in one batch."""
        return cast(int, self.batch_size) * self._draws.num_replicas

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        """Batches of the next epoch."""
        self._draws.start = self._samples
        for number, batch in enumerate(super().__iter__(), 1):
            # Counted here and not in the sampler: workers are ahead of the training
            self._samples += self._step
            if number == len(self):
                self.ended()
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many draws of the stream all devices together have used."""
        return {'samples': self._samples - self.pending() * self._step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next epoch at a state, also of another batch size or world size."""
        self._samples = state_dict['samples']
