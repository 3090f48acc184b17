# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Footprints of patches: where their pixels are, or just their outlines.

A table of footprints has one row per patch:

* *id*, its name,
* *crs*, its coordinate reference system as an authority code or WKT,
* *transform*, six numbers from columns and rows to coordinates (a, b, c, d, e, f), with
  *height* and *width*: a pixel grid, or
* *polygon*, an outline as WKB: no pixels, and *height* and *width* are 0.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from pyproj import CRS
from pyproj.exceptions import CRSError, ProjError

from .mosaic import join_halves, projection

Floats = npt.NDArray[np.float64]

#: Columns of a table of footprints.
SCHEMA = pa.schema(
    {
        'id': pa.string(),
        'crs': pa.dictionary(pa.int32(), pa.string()),
        'transform': pa.list_(pa.float64(), 6),
        'height': pa.int32(),
        'width': pa.int32(),
        'polygon': pa.binary(),
    }
)

#: Edges of outlines that are longer, in degrees and other units, are bent where a
#: straight line in one CRS is not straight in another. Shorter ones, within 0.05 pixels
#: of WorldCover, are not, as in GeoPandas' ``to_crs``.
EDGE_DEGREES, EDGE_UNITS = 0.05, 5000.0

#: Most pieces of one of four edges: wrong coordinates may be as far away as they like.
_PIECES = 128

#: Longitude and latitude.
LONLAT = 'OGC:CRS84'


@functools.lru_cache(maxsize=1024)
def parse_crs(text: str) -> CRS:
    """Coordinate reference system of a text, parsed once.

    Args:
        text: An authority code, WKT, or what else pyproj understands.

    Returns:
        The CRS.

    Raises:
        ValueError: If there is no such CRS.
    """
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise ValueError(f'unknown coordinate reference system {text!r}') from error


def make_footprints(
    ids: Iterable[str],
    crs: Iterable[str],
    transforms: Sequence[Sequence[float]] | Floats | None = None,
    shapes: Sequence[tuple[int, int]] | npt.NDArray[np.int32] | None = None,
    polygons: Iterable[bytes] | None = None,
) -> pa.Table:
    """Make a table of footprints.

    Args:
        ids: Names.
        crs: Coordinate reference systems.
        transforms: Transforms of shape (N, 6), for pixel grids.
        shapes: Heights and widths of shape (N, 2), for pixel grids.
        polygons: Outlines as WKB, if there are no pixel grids.

    Returns:
        The table.
    """
    names = pa.array(ids, pa.string())
    count = len(names)
    if transforms is None:
        transforms, shapes = np.zeros((count, 6)), np.zeros((count, 2), np.int32)
    flat = np.ascontiguousarray(transforms, np.float64).reshape(-1)
    sizes = np.asarray(shapes, np.int32).reshape(count, 2)
    outlines = pa.nulls(count, pa.binary())
    if polygons is not None:
        outlines = pa.array(polygons, pa.binary())
    return pa.table(
        [
            names,
            pa.array(crs, pa.string()).dictionary_encode(),
            pa.FixedSizeListArray.from_arrays(pa.array(flat), 6),
            pa.array(sizes[:, 0]),
            pa.array(sizes[:, 1]),
            outlines,
        ],
        schema=SCHEMA,
    )


def transforms_of(table: pa.Table) -> Floats:
    """Transforms of a table of footprints, of shape (N, 6)."""
    column = table['transform'].combine_chunks()
    return np.asarray(column.flatten().to_numpy()).reshape(-1, 6)


def by_crs(table: pa.Table) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Coordinate reference systems of a table of footprints, and the rows of each."""
    column = table['crs'].unify_dictionaries().combine_chunks()
    numbers = column.indices.to_numpy()
    for number, crs in enumerate(column.dictionary.to_pylist()):
        rows = np.flatnonzero(numbers == number)
        if len(rows):
            yield crs, rows


def outlines(table: pa.Table) -> npt.NDArray[Any]:
    """Outlines of footprints in degrees of longitude and latitude.

    Args:
        table: Footprints.

    Returns:
        Polygons of shape (N,), None where a footprint has no place on Earth. They leave
        [-180, 180] where they cross that line.
    """
    out = np.full(len(table), None, object)
    shapes = np.stack([table[name].to_numpy() for name in ('height', 'width')], 1)
    transforms = transforms_of(table)
    for crs, rows in by_crs(table):
        try:
            source = parse_crs(crs)
            to_degrees = projection(source, parse_crs(LONLAT))
        except (ProjError, ValueError):
            continue
        grid = shapes[rows, 0] > 0
        bent = not source.is_geographic
        pieces = _pieces(transforms[rows], shapes[rows]) if bent else np.ones(len(rows))
        for number in np.unique(pieces[grid]):
            chosen = rows[grid & (pieces == number)]
            x, y = ring(transforms[chosen], shapes[chosen], int(number))
            if to_degrees is not None:
                x, y = to_degrees.transform(x, y)
            x = unwrap(x)
            sound = np.isfinite(x).all(1) & np.isfinite(y).all(1)
            rings = np.stack([x, y], -1)[sound]  # (N, 4 * number + 1, 2)
            out[chosen[sound]] = shapely.polygons(rings)
        for row in rows[~grid]:
            polygon = shapely.from_wkb(table['polygon'][row].as_py())
            if bent and np.isfinite(polygon.length):
                longest = max(EDGE_UNITS, polygon.length / (4 * _PIECES))
                polygon = shapely.segmentize(polygon, longest)
            out[row] = _to_degrees(polygon, to_degrees)
    return out


def _pieces(transforms: Floats, shapes: npt.NDArray[np.int32]) -> Floats:
    """Into how many pieces the edges of pixel grids are cut, of shape (N,)."""
    a, b, _, d, e, _ = transforms.T
    height, width = shapes.T
    edges = np.maximum(np.hypot(a, d) * width, np.hypot(b, e) * height)
    return np.asarray(np.nan_to_num(np.ceil(edges / EDGE_UNITS)).clip(1, _PIECES))


def ring(
    transforms: Floats, shapes: npt.NDArray[np.int32], pieces: int = 1
) -> tuple[Floats, Floats]:
    """Closed rings around pixel grids in their own coordinates.

    Args:
        transforms: Transforms of shape (N, 6).
        shapes: Heights and widths of shape (N, 2).
        pieces: Into how many pieces every edge is cut.

    Returns:
        x and y of shape (N, 4 * *pieces* + 1) each.
    """
    height, width = shapes[:, :1].astype(np.float64), shapes[:, 1:].astype(np.float64)
    along = np.arange(4 * pieces + 1) / pieces
    cols = np.interp(along, range(5), [0, 0, 1, 1, 0]) * width
    rows = np.interp(along, range(5), [0, 1, 1, 0, 0]) * height
    a, b, c, d, e, f = transforms.T[:, :, None]
    return a * cols + b * rows + c, d * cols + e * rows + f


def unwrap(lon: Floats) -> Floats:
    """Bring longitudes within half a turn of the first one in their row.

    Args:
        lon: Degrees of shape (N, M).

    Returns:
        The same places, the first ones in [-180, 180].
    """
    # Multiples of 360 are exact: what is near already stays as it is to the last bit
    with np.errstate(invalid='ignore'):
        first = lon[:, :1] - 360 * np.round(lon[:, :1] / 360)
        return np.asarray(lon + 360 * np.round((first - lon) / 360))


def _to_degrees(polygon: shapely.Geometry, to_degrees: Any) -> shapely.Geometry | None:
    """A polygon in longitude and latitude, None if it has no place."""

    def move(points: Floats) -> Floats:
        x, y = points.T
        if to_degrees is not None:
            x, y = to_degrees.transform(x, y)
        return np.column_stack([join_halves(x), y])

    moved = shapely.transform(polygon, move)
    return moved if np.isfinite(shapely.get_coordinates(moved)).all() else None
