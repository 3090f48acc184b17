# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Where and when the samples of a batch are from, as far as data tell."""

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import shapely
from pyproj import CRS, Transformer
from torch import Tensor


@dataclass(frozen=True)
class Footprint:
    """Place and time of one sample.

    Attributes:
        outline: Outline in longitude and latitude (WGS 84).
        crs: Coordinate reference system that the sample is in, as an authority code or
            WKT.
        start: Start of the time span, in UTC, or None.
        stop: End of the time span, in UTC, or None.
    """

    outline: shapely.Polygon
    crs: str
    start: datetime.datetime | None = None
    stop: datetime.datetime | None = None


def footprints(
    batch: Any, indices: Sequence[Any] | None, dataset: Any
) -> list[Footprint] | None:
    """Find out where the samples of a batch are from.

    Known are, in this order: datasets with a method ``footprint(index)`` that gives an
    outline, its CRS and a date (such as :class:`.SceneGrid`); samplers that ask a dataset
    with a *crs* for slices of x, y and time; and batches with *bounds*, slices or, as in
    TorchGeo 0.10, tensors of nine numbers, and a *crs* in the batch or of the dataset.

    Args:
        batch: The batch.
        indices: What the dataset was asked for, if it is known.
        dataset: The dataset.

    Returns:
        One footprint per sample, or None if data do not tell.
    """
    if indices and hasattr(dataset, 'footprint'):
        return [_of_dataset(*dataset.footprint(index)) for index in indices]

    crs = getattr(dataset, 'crs', None)
    bounds: Any = indices
    if not (indices and crs is not None and _is_slices(indices[0])):
        values = batch if isinstance(batch, dict) else {}
        bounds, crs = values.get('bounds'), values.get('crs', crs)
    if bounds is None or crs is None:
        return None
    systems = crs if isinstance(crs, list | tuple) else [crs] * len(bounds)
    return [_of_bounds(b, c, dataset) for b, c in zip(bounds, systems, strict=True)]


def _is_slices(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, slice) for v in value)


def _of_dataset(
    outline: shapely.Polygon, crs: Any, day: datetime.date | None
) -> Footprint:
    start = stop = None
    if day is not None:
        start = datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC)
        stop = start + datetime.timedelta(days=1, microseconds=-1)
    return Footprint(_to_degrees(outline, crs), _name(crs), start, stop)


def _of_bounds(bounds: Any, crs: Any, dataset: Any) -> Footprint:
    """From three slices, or nine numbers in the same order."""
    if isinstance(bounds, Tensor):
        left, right, _, bottom, top, _, start, stop, _ = bounds.tolist()
        times = [
            datetime.datetime.fromtimestamp(t, datetime.UTC) for t in (start, stop)
        ]
    else:
        complete = getattr(dataset, '_disambiguate_slice', lambda slices: slices)
        x, y, t = complete(bounds)
        left, right, bottom, top = x.start, x.stop, y.start, y.stop
        times = [t.start, t.stop]
    outline = shapely.box(left, bottom, right, top)
    start, stop = (_moment(time) for time in times)
    return Footprint(_to_degrees(outline, crs), _name(crs), start, stop)


def _moment(time: Any) -> datetime.datetime | None:
    """A time in UTC. Those of datasets for all times stand for no time."""
    stamp = pd.Timestamp(time)
    if not 1800 < stamp.year < 2200:
        return None
    stamp = stamp.tz_localize('UTC') if stamp.tz is None else stamp.tz_convert('UTC')
    return stamp.floor('us').to_pydatetime()


@functools.lru_cache(maxsize=1024)
def _transformer(crs: str) -> Transformer:
    return Transformer.from_crs(crs, 'OGC:CRS84', always_xy=True)


def _name(crs: Any) -> str:
    return CRS.from_user_input(crs).to_string()


def _to_degrees(outline: shapely.Polygon, crs: Any) -> shapely.Polygon:
    transform = _transformer(_name(crs)).transform
    return shapely.transform(
        outline, lambda points: np.stack(transform(*points.T), axis=1)
    )
