# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Keeping samples of one place together when some test what others teach."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..datamodules.protocol import PlacedDataset
from .footprints import footprints

#: Samples whose centres lie in one square of so many degrees are of one place.
_CELL = 0.1


def sample_places(dataset: Any, indices: Sequence[Any]) -> list[str] | None:
    """Return the name of the place of each sample, None if a dataset does not tell.

    Known are datasets with a method ``place(index)``, such as :class:`.ImageMaskFolder`,
    and those with georeference, see :func:`.footprints`, whose places are squares of 0.1
    degrees.
    """
    while isinstance(dataset, Subset):
        dataset, indices = dataset.dataset, [dataset.indices[i] for i in indices]
    if isinstance(dataset, PlacedDataset):
        names = [dataset.place(index) for index in indices]
        return None if None in names else [str(name) for name in names]
    found = footprints({}, indices, dataset)
    if found is None:
        return None
    centres = [footprint.outline.centroid for footprint in found]
    return [f'{math.floor(c.y / _CELL)} {math.floor(c.x / _CELL)}' for c in centres]


def number_places(places: Sequence[str]) -> Tensor:
    """Give each of the places (N,) a number, equal ones the same."""
    return torch.from_numpy(np.unique(np.asarray(places), return_inverse=True)[1])


def assign_folds(places: Tensor, folds: int) -> Tensor:
    """Divide samples into *folds* of about one size that have no place in common.

    Args:
        places: Number of the place of each sample, shape (N,).
        folds: Number of parts, at most the number of places.

    Returns:
        Number of the part of each sample, shape (N,), the same for the same places.
    """
    _, places = places.unique(return_inverse=True)
    sizes = torch.bincount(places.cpu())
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(sizes), generator=generator)
    # Large places first, each into what is the smallest part so far
    order = order[sizes[order].argsort(descending=True, stable=True)]
    part, filled = torch.zeros_like(sizes), torch.zeros(folds, dtype=torch.long)
    for place in order.tolist():
        part[place] = filled.argmin()
        filled[part[place]] += sizes[place]
    return part.to(places.device)[places]
