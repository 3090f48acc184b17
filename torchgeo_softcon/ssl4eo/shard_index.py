# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The index of SSL4EO-S12 v1.1: what is in a file, and where."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from .._checks import require
from ..geo.grid import LONLAT, parse_crs, projection
from .tiffs import is_image_name
from .zarr_zip import ZarrZip, open_members

#: Dimensions of the pixels, last first, where the file does not name them.
_DIMENSIONS = ('sample', 'time', 'band', 'y', 'x')

#: Size of a pixel in metres.
_PIXEL = 10.0

#: Names of locations, which may be followed by the number of a date.
_SAMPLE = re.compile(r'(\d{7})(?:_\d+)?', re.ASCII)

#: See :meth:`.ZarrZip.places`.
_CHUNKS = pa.struct(
    {
        'layout': pa.string(),
        'offset': pa.list_(pa.int64()),
        'size': pa.list_(pa.int64()),
        'deflated': pa.bool_(),
    }
)

#: Columns of the index, with a row per image: *sample* and *step* are its number and that
#: of its date in the arrays (-1 if it is alone), *told* the offset that their attributes
#: tell. The last two are where its pixels are, and its classes of clouds and shadows.
_SCHEMA = pa.schema(
    {
        'key': pa.string(),
        'location': pa.string(),
        'season': pa.string(),
        'time': pa.int64(),
        'crs': pa.string(),
        'transform': pa.list_(pa.float64(), 6),
        'names': pa.string(),
        'told': pa.float64(),
        'sample': pa.int32(),
        'step': pa.int32(),
        'bands': _CHUNKS,
        'cloud_mask': _CHUNKS,
    }
)


def describe_images(path: str) -> pa.Table:
    """Return the rows of the index for all images in a shard or a chunk file.

    Raises:
        ValueError: If the file is cut off, damaged, or of another kind.
    """
    rows = [
        row for key, group in open_members(path) for row in _describe(group, key, path)
    ]
    return pa.Table.from_pylist(rows, _SCHEMA)


def _describe(group: ZarrZip, key: str, path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the index for the images of a group."""
    layout, attributes = group.layout('bands'), group.attributes('bands')
    default = _DIMENSIONS[-len(layout.shape) :]
    dimensions = tuple(attributes.get('_ARRAY_DIMENSIONS') or default)
    leading = tuple(d for d in dimensions if d in ('sample', 'time'))
    require(
        dimensions in (leading + _DIMENSIONS[2:], leading + _DIMENSIONS[3:]),
        f'bands of {key} in {path} must have the dimensions {", ".join(_DIMENSIONS)} or '
        f'the last of them, got {", ".join(dimensions)}: is it another kind of file?',
    )
    shape = layout.shape[: len(leading)]
    names = group.read('band', []).reshape(-1).tolist()
    times = _spread(_times(group), shape, f'time of {key} in {path}')
    ids = _spread(group.read('file_id', ''), shape, f'file_id of {key} in {path}')
    samples = group.read('sample', key).reshape(-1)
    centers = [
        group.read(f'center_{one}', np.nan).reshape(-1) for one in ('lon', 'lat')
    ]
    systems = group.read('crs', 0).reshape(-1)
    axes = [
        np.atleast_2d(group.read(f'{one}_' if f'{one}_' in group else one, np.nan))
        for one in 'xy'
    ]
    scale, told = (attributes.get(name) for name in ('scale_factor', 'add_offset'))
    masks = group.layout('cloud_mask') if 'cloud_mask' in group else None
    for index in np.ndindex(*shape):
        at = dict(zip(leading, index, strict=True))
        # Without a dimension, one value holds for all samples
        sample, center, system, grid = (
            [values[min(at.get('sample', 0), len(values) - 1)] for values in lists]
            for lists in ([samples], centers, [systems], axes)
        )
        text = _text(sample[0])
        match, name = _SAMPLE.fullmatch(text), _text(ids[index])
        time = pd.Timestamp(int(times[index]))
        crs, transform = _grid(_text(system[0]), center, grid, layout.shape[-2:])
        yield {
            'key': key if 'sample' not in at else text,
            'location': match[1] if match else re.sub(r'\W', '_', key),
            'season': name if is_image_name(name) else f'{time:%Y%m%dT%H%M%S}',
            'time': time.value,
            'crs': crs,
            'transform': transform,
            'names': json.dumps([_text(one) for one in names] or ['0']),
            'told': np.nan if told is None else -float(told) / float(scale or 1),
            'sample': at.get('sample', -1),
            'step': at.get('time', -1),
            'bands': group.places('bands', layout, index),
            'cloud_mask': masks and group.places('cloud_mask', masks, index),
        }


def _spread(
    values: npt.NDArray[Any], shape: tuple[int, ...], what: str
) -> npt.NDArray[Any]:
    """Return one value for each image of a group."""
    if values.size == 1:
        return np.broadcast_to(values.reshape(()), shape)
    require(
        values.size == int(np.prod(shape)),
        f'{what} must have a value for each of {shape} images, got {values.shape}: '
        'download the file again',
    )
    return values.reshape(shape)


def _times(group: ZarrZip) -> npt.NDArray[np.int64]:
    """Read the times of acquisition in ns since 1970, as the attributes of CF tell them."""
    name = 'time_' if 'time_' in group else 'time'
    values = group.read(name, 0)
    if values.dtype.kind == 'M':
        return values.astype('datetime64[ns]').astype(np.int64)
    unit, _, start = str(group.attributes(name).get('units', '')).partition(' since ')
    # From longer units on, the year is one of the calendar
    scale = int(pd.Timedelta(1, unit.rstrip('s') or 'ns').value)
    begin = int(pd.Timestamp(start.replace(' UTC', '') or 0).value)
    return (values * scale).astype(np.int64) + begin


def _grid(
    system: str, center: Sequence[Any], axes: Sequence[Any], size: tuple[int, ...]
) -> tuple[str | None, list[float]]:
    """Return CRS and transform of an image, by the middles of its pixels or of itself."""
    crs = f'EPSG:{system}' if system.isdigit() and int(system) else system
    if system in ('', '0'):
        return None, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    height, width = size
    x, y = (np.asarray(axis, np.float64) for axis in axes)
    if x.shape != (width,) or y.shape != (height,) or min(size) < 2:
        to_crs = projection(parse_crs(LONLAT), parse_crs(crs))
        easting, northing = map(float, center)
        if to_crs is not None:
            easting, northing = to_crs.transform(easting, northing)
        left, top = easting - width / 2 * _PIXEL, northing + height / 2 * _PIXEL
        return crs, [_PIXEL, 0.0, left, 0.0, -_PIXEL, top]
    dx, dy = ((axis[-1] - axis[0]) / (len(axis) - 1) for axis in (x, y))
    return crs, [dx, 0.0, x[0] - dx / 2, 0.0, dy, y[0] - dy / 2]


def _text(value: Any) -> str:
    """Return a text of an array, also where it is bytes or ends in zeros."""
    return (value.decode() if isinstance(value, bytes) else str(value)).rstrip('\0')
