# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Where and when samples are from, and keeping those of one place together."""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import shapely
import torch
from pyproj import CRS
from torch import Tensor
from torch.utils.data import Subset

from ..datamodules.protocol import LocatedDataset, PlacedDataset
from ..geo.footprints import to_crs
from ..geo.grid import LONLAT, parse_crs

#: Samples whose centres lie in one square of so many degrees are of one place.
_CELL = 0.1


@dataclass(frozen=True)
class Footprint:
    """Place and time of one sample."""

    outline: shapely.Geometry  # in longitude and latitude (WGS 84), may leave ±180
    crs: str  # of the sample, as an authority code or WKT
    start: datetime.datetime | None = None  # in UTC
    stop: datetime.datetime | None = None


def footprints(
    batch: Any, indices: Sequence[Any] | None, dataset: Any
) -> list[Footprint] | None:
    """Find out where the samples of a batch are from.

    Known are, in this order: datasets with a method ``footprint(index)`` that gives an
    outline, its CRS and a date (such as :class:`.SceneGrid`); samplers that ask a dataset
    with a *crs* for slices of x, y and time; and batches with *bounds*, slices or, as in
    TorchGeo 0.10, tensors of nine numbers, and a *crs* in the batch or of the dataset.

    Returns:
        One footprint per sample, or None if data do not tell.
    """
    if indices and isinstance(dataset, LocatedDataset):
        return [_of_dataset(*dataset.footprint(index)) for index in indices]
    crs = getattr(dataset, 'crs', None)
    bounds: Any = indices
    query = bounds[0] if bounds else None
    slices = isinstance(query, tuple) and all(isinstance(s, slice) for s in query)
    if crs is None or not slices:
        values = batch if isinstance(batch, dict) else {}
        bounds, crs = values.get('bounds'), values.get('crs', crs)
    if bounds is None or crs is None:
        return None
    systems = crs if isinstance(crs, list | tuple) else [crs] * len(bounds)
    return [_of_bounds(b, c, dataset) for b, c in zip(bounds, systems, strict=True)]


def _of_dataset(
    outline: shapely.Polygon, crs: Any, day: datetime.date | None
) -> Footprint:
    """Return the footprint of an outline in *crs*, on one day."""
    if day is None:
        return _to_degrees(outline, crs)
    ends = (datetime.time.min, datetime.time.max)
    span = (datetime.datetime.combine(day, end, datetime.UTC) for end in ends)
    return _to_degrees(outline, crs, *span)


def _of_bounds(bounds: Any, crs: Any, dataset: Any) -> Footprint:
    """Return the footprint of three slices, or of nine numbers in the same order."""
    if isinstance(bounds, Tensor):
        left, right, _, bottom, top, _, *times, _ = bounds.tolist()
        span = [datetime.datetime.fromtimestamp(t, datetime.UTC) for t in times]
    else:
        complete = getattr(dataset, '_disambiguate_slice', lambda slices: slices)
        x, y, t = complete(bounds)
        left, right, bottom, top = x.start, x.stop, y.start, y.stop
        span = [t.start, t.stop]
    outline = shapely.box(left, bottom, right, top)
    return _to_degrees(outline, crs, *map(_moment, span))


def _moment(time: Any) -> datetime.datetime | None:
    """Return a time in UTC. Those of datasets for all times stand for no time."""
    stamp = pd.Timestamp(time)
    if not 1800 < stamp.year < 2200:
        return None
    stamp = stamp.tz_localize('UTC') if stamp.tz is None else stamp.tz_convert('UTC')
    return stamp.floor('us').to_pydatetime()


def _to_degrees(
    outline: shapely.Polygon,
    crs: Any,
    start: datetime.datetime | None = None,
    stop: datetime.datetime | None = None,
) -> Footprint:
    """Return the footprint of an outline in *crs*."""
    name = CRS.from_user_input(crs).to_string()
    degrees = to_crs(outline, parse_crs(name), parse_crs(LONLAT))
    return Footprint(degrees, name, start, stop)


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
    centres = sample_centres(dataset, indices)
    if centres is None:
        return None
    return [f'{math.floor(y / _CELL)} {math.floor(x / _CELL)}' for x, y in centres]


def sample_centres(
    dataset: Any, indices: Sequence[Any]
) -> list[tuple[float, float]] | None:
    """Return longitude and latitude of each sample, None if a dataset does not tell."""
    while isinstance(dataset, Subset):
        dataset, indices = dataset.dataset, [dataset.indices[i] for i in indices]
    found = footprints({}, indices, dataset)
    if found is None:
        return None
    centres = [footprint.outline.centroid for footprint in found]
    return [(centre.x, centre.y) for centre in centres]


def number_places(places: Sequence[str]) -> Tensor:
    """Give each of the places (N,) a number, equal ones the same."""
    return torch.from_numpy(np.unique(np.asarray(places), return_inverse=True)[1])


def assign_folds(places: Tensor, folds: int) -> Tensor:
    """Divide samples into *folds* of about one size that have no place in common.

    From the number of the place of each sample, (N,), to that of its part, (N,): the same
    for the same places. There may be as many parts as places at most.
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
