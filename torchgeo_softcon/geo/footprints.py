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

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from pyproj import CRS
from pyproj.exceptions import ProjError

from .antimeridian import Floats, center, join_halves
from .grid import LONLAT, parse_crs, project_polygon, projection
from .warp import project

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

#: Most pieces of one of four edges: wrong coordinates may be arbitrarily far away.
_MOST_PIECES = 128


def make_footprints(
    ids: Iterable[str],
    crs: Iterable[str | None],
    transforms: Sequence[Sequence[float]] | Floats | None = None,
    shapes: Sequence[tuple[int, int]] | npt.NDArray[np.int32] | None = None,
    polygons: Iterable[bytes] | None = None,
) -> pa.Table:
    """Make a table of N footprints.

    They are pixel grids (*transforms* of shape (N, 6), and *shapes*, heights and widths,
    of shape (N, 2)) or *polygons*, outlines as WKB.
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
    columns = [
        names,
        pa.array(crs, pa.string()).dictionary_encode(),
        pa.FixedSizeListArray.from_arrays(pa.array(flat), 6),
        *map(pa.array, sizes.T),
        outlines,
    ]
    return pa.table(columns, schema=SCHEMA)


def transforms_of(table: pa.Table) -> Floats:
    """Return the transforms of a table of footprints, of shape (N, 6)."""
    column = table['transform'].combine_chunks()
    return np.asarray(column.flatten().to_numpy()).reshape(-1, 6)


def by_crs(table: pa.Table) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Yield each CRS of a table of footprints with the rows that have it."""
    column = table['crs'].unify_dictionaries().combine_chunks()
    numbers = column.indices.to_numpy()
    for number, crs in enumerate(column.dictionary.to_pylist()):
        rows = np.flatnonzero(numbers == number)
        if len(rows):
            yield crs, rows


def outlines(table: pa.Table) -> npt.NDArray[Any]:
    """Return polygons around footprints in degrees of longitude and latitude, (N,).

    None where a footprint is not on Earth. They leave [-180, 180] where they cross it.
    """
    out = np.full(len(table), None, object)
    shapes = np.stack([table[name].to_numpy() for name in ('height', 'width')], 1)
    transforms = transforms_of(table)
    lonlat = parse_crs(LONLAT)
    for crs, rows in by_crs(table):
        try:
            source = parse_crs(crs)
            to_degrees = projection(source, lonlat)
        except (ProjError, ValueError):
            continue
        grid = shapes[rows, 0] > 0
        bent = not source.is_geographic
        # Edges in degrees stay straight
        pieces = np.where(bent, _count_pieces(transforms[rows], shapes[rows]), 1)
        for number in np.unique(pieces[grid]):
            chosen = rows[grid & (pieces == number)]
            ring_cols, ring_rows = _rings(shapes[chosen], int(number))
            x, y = project(
                source, lonlat, transforms[chosen].T[:, :, None], ring_cols, ring_rows
            )
            sound = np.isfinite(x).all(1) & np.isfinite(y).all(1)
            rings = np.stack([x, y], -1)[sound]  # (N, 4 * number + 1, 2)
            out[chosen[sound]] = shapely.polygons(rings)
        for row in rows[~grid]:
            polygon = shapely.from_wkb(table['polygon'][row].as_py())
            if bent and np.isfinite(polygon.length):
                longest = max(EDGE_UNITS, polygon.length / (4 * _MOST_PIECES))
                polygon = shapely.segmentize(polygon, longest)
            moved = project_polygon(polygon, to_degrees, join_halves)
            if np.isfinite(shapely.get_coordinates(moved)).all():
                out[row] = moved
    return out


def _count_pieces(transforms: Floats, shapes: npt.NDArray[np.int32]) -> Floats:
    """Return into how many pieces the edges of pixel grids are cut, of shape (N,)."""
    a, b, _, d, e, _ = transforms.T
    height, width = shapes.T
    edges = np.maximum(np.hypot(a, d) * width, np.hypot(b, e) * height)
    return np.asarray(np.nan_to_num(np.ceil(edges / EDGE_UNITS)).clip(1, _MOST_PIECES))


def _rings(shapes: npt.NDArray[np.int32], pieces: int) -> tuple[Floats, Floats]:
    """Return columns and rows around pixel grids, of shape (N, 4 * *pieces* + 1)."""
    height, width = shapes[:, :1].astype(np.float64), shapes[:, 1:].astype(np.float64)
    along = np.arange(4 * pieces + 1) / pieces
    cols = np.interp(along, range(5), [0, 0, 1, 1, 0]) * width
    rows = np.interp(along, range(5), [0, 1, 1, 0, 0]) * height
    return cols, rows


def to_crs(polygon: shapely.Geometry, source: CRS, target: CRS) -> shapely.Geometry:
    """Project an outline, with the bends of its long edges.

    In degrees, its halves on both sides of the antimeridian are together, and its middle
    is in [-180, 180].
    """
    transformer = projection(source, target)
    if transformer is not None:
        longest = EDGE_DEGREES if source.is_geographic else EDGE_UNITS
        polygon = shapely.segmentize(polygon, longest)
    return project_polygon(
        polygon, transformer, center if target.is_geographic else None
    )
