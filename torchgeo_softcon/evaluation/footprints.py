# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Where and when the samples of a batch are from, as far as data tell."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import shapely
from pyproj import CRS
from torch import Tensor

from ..datamodules.protocol import LocatedDataset
from ..geo.footprints import to_crs
from ..geo.grid import LONLAT, parse_crs


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
    start = pd.Timestamp(day, tz='UTC')
    stop = start + pd.Timedelta(days=1) - pd.Timedelta(microseconds=1)
    return _to_degrees(outline, crs, start.to_pydatetime(), stop.to_pydatetime())


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
