# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pixel grids, and the coordinate reference systems they are in."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from affine import Affine
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError
from shapely.affinity import translate

from .antimeridian import TURNS, Floats, join_halves

#: Left, bottom, right and top.
Bounds = tuple[float, float, float, float]

#: Longitude and latitude.
LONLAT = 'OGC:CRS84'

#: Grids whose corners are closer than this, in pixels, are one: files of one place differ
#: in the last digits, and no image is registered better than to a tenth of a pixel.
_SAME = 0.01

#: Share of the smaller of two grids from which on they overlap, above what the bends of
#: neighbours' edges in degrees have in common.
_SHARED = 1e-4


@functools.lru_cache(maxsize=1024)
def parse_crs(text: str) -> CRS:
    """Parse an authority code, WKT, or what else pyproj understands, once."""
    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise ValueError(f'unknown coordinate reference system {text!r}') from error


@functools.lru_cache(maxsize=256)
def projection(source: CRS, target: CRS) -> Transformer | None:
    """Return a transformer with the order x, y, or None if both CRSs are one."""
    if source == target:
        return None
    return Transformer.from_crs(source, target, always_xy=True)


def apply(transform: Affine, cols: Any, rows: Any) -> tuple[Any, Any]:
    """Transform numbers or arrays, for which affine has `*` up to version 2, then `@`."""
    a, b, c, d, e, f = transform[:6]
    return a * cols + b * rows + c, d * cols + e * rows + f


@dataclass(frozen=True)
class Grid:
    """The pixels of a raster or of a window, a transform leads to their coordinates."""

    crs: CRS
    transform: Affine
    height: int
    width: int

    @classmethod
    def of(cls, source: Any) -> 'Grid':
        """Return the grid of an open raster that has a CRS."""
        crs = parse_crs(source.crs.to_wkt())
        return Grid(crs, source.transform, source.height, source.width)

    @property
    def bounds(self) -> Bounds:
        """Left, bottom, right and top, also of a rotated raster."""
        corners = itertools.product((0, self.width), (0, self.height))
        x, y = zip(*(apply(self.transform, *corner) for corner in corners), strict=True)
        return min(x), min(y), max(x), max(y)

    @property
    def pixel_area(self) -> float:
        """Area of a pixel in squared units of the CRS."""
        return abs(self.transform.determinant)

    def window(self, top: int, left: int, height: int, width: int) -> 'Grid':
        """Return the grid of a window that starts at a row and a column."""
        a, b, _, d, e, _ = self.transform[:6]
        x, y = apply(self.transform, left, top)
        return Grid(self.crs, Affine(a, b, x, d, e, y), height, width)

    def matches(self, other: 'Grid') -> bool:
        """Tell whether both have the same pixels, but for a small part of one."""
        if self is other:
            return True
        if (self.height, self.width) != (other.height, other.width):
            return False
        apart = _corners(self, self) - _corners(other, self)
        return bool((abs(apart) <= _SAME).all()) and self.crs == other.crs


def _corners(grid: Grid, unit: Grid) -> Floats:
    """Return three corners in pixels of another grid, not from its origin, (6,)."""
    a, b, _, d, e, _ = unit.transform[:6]
    determinant = a * e - b * d
    x, y = apply(
        grid.transform, np.array([0, grid.width, 0]), np.array([0, 0, grid.height])
    )
    cols, rows = (e * x - b * y) / determinant, (a * y - d * x) / determinant
    return np.stack([cols, rows], 1).ravel()


def group_by_grid(grids: Iterable[Grid]) -> list[list[int]]:
    """Find grids that match."""
    groups: list[list[int]] = []
    # First grids of groups by size and whole position, with the positions next to it
    known: dict[tuple[int, ...], list[tuple[Grid, list[int]]]] = {}
    for number, grid in enumerate(grids):
        size, origin = (grid.height, grid.width), _corners(grid, grid)[:2]
        key = (*size, *map(math.floor, origin))
        for first, group in known.get(key, ()):
            if first.matches(grid):
                group.append(number)
                break
        else:
            group = [number]
            groups.append(group)
            ends = np.floor([origin - _SAME, origin + _SAME]).astype(int).T.tolist()
            for position in itertools.product(*map(set, ends)):
                known.setdefault((*size, *position), []).append((grid, group))
    return groups


def outline(source: CRS, target: CRS, bounds: Sequence[float]) -> shapely.Polygon:
    """Return the outline of a box in another CRS, with the bends of its edges.

    In degrees, the outline leaves [-180, 180] where it crosses that line.
    """
    left, bottom, right, top = bounds
    size = max(right - left, top - bottom)
    ring = shapely.segmentize(shapely.box(left, bottom, right, top), size / 32)
    arrange = join_halves if target.is_geographic else None
    return project_polygon(ring, projection(source, target), arrange)


def project_polygon(
    polygon: shapely.Geometry,
    transformer: Transformer | None,
    arrange: Callable[[Floats], Floats] | None,
) -> shapely.Geometry:
    """Project a polygon, and arrange its longitudes."""

    def move(points: Floats) -> Floats:
        x, y = points.T
        if transformer is not None:
            x, y = transformer.transform(x, y)
        return np.column_stack([x if arrange is None else arrange(x), y])

    return shapely.transform(polygon, move)


def overlapping(grids: Sequence[Grid]) -> list[tuple[int, int]]:
    """Find grids that share ground, not only what the bends of their edges do."""
    lonlat = parse_crs(LONLAT)
    outlines = [outline(grid.crs, lonlat, grid.bounds) for grid in grids]
    # From every turn around the Earth, one of two at the antimeridian is near the other
    turned = [translate(shape, 360.0 * turns) for turns in TURNS for shape in outlines]
    found, where = shapely.STRtree(turned).query(outlines, predicate='intersects')
    pairs = {
        (i, j % len(outlines))
        for i, j in zip(found.tolist(), where.tolist(), strict=True)
        if i < j % len(outlines)
        and outlines[i].intersection(turned[j]).area
        > _SHARED * min(outlines[i].area, turned[j].area)
    }
    return sorted(pairs)
