# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Where the pixels of one grid are in another: exact nearest neighbour, and fast."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.polynomial import chebyshev
from pyproj import CRS

from .antimeridian import Floats, near, unwrap
from .grid import Bounds, Grid, apply, projection

Pixels = npt.NDArray[np.int32]

#: Nodes per axis. 8 keep the error of a 100 km window between UTM and latitude/longitude
#: below 1e-6 pixels.
_NODES = 8

#: Largest error of the polynomial, in pixels. Above, every pixel is projected.
_TOLERANCE = 1e-3

#: Pixel centres this close to an edge, in pixels, belong to the next pixel: without it,
#: rounding would decide, differently from pixel to pixel.
EDGE = 1e-6

#: Farther than any raster reaches, in pixels, and little enough for 32 bits.
_FAR = 2**30


@functools.lru_cache(maxsize=512)
def vandermonde(size: int, nodes: int) -> Floats:
    """Return Chebyshev polynomials at the pixel centres of an axis, (size, nodes)."""
    centres = (np.arange(size) + 0.5) * 2 / size - 1
    return np.asarray(chebyshev.chebvander(centres, nodes - 1), np.float64)


@functools.cache
def to_coefficients(nodes: int) -> Floats:
    """Return the matrix from values at the nodes to coefficients of the polynomials."""
    to_values = chebyshev.chebvander(chebyshev.chebpts1(nodes), nodes - 1)
    return np.asarray(np.linalg.inv(to_values), np.float64)


@functools.cache
def node_positions(nodes: int) -> Floats:
    """Return the nodes in [0, 1]."""
    return np.asarray((chebyshev.chebpts1(nodes) + 1) / 2, np.float64)


def project(
    source: CRS, target: CRS, transforms: Iterable[Any], cols: Floats, rows: Floats
) -> tuple[Floats, Floats]:
    """Project columns and rows of shape (..., M) to coordinates of another CRS.

    *transforms* are the six numbers of a transform, for N grids of shape (N, 1) each.
    Longitudes of a grid are near that of its first position, which is in [-180, 180].
    """
    a, b, c, d, e, f = transforms
    x, y = a * cols + b * rows + c, d * cols + e * rows + f
    to_target = projection(source, target)
    if to_target is not None:
        x, y = to_target.transform(x, y)
    return (unwrap(x) if target.is_geographic else x), y


def _interpolate(values: Floats, height: int, width: int) -> Floats:
    """Turn values at the nodes of a window into values at its pixel centres, (H, W)."""
    coefficients = to_coefficients(_NODES) @ values @ to_coefficients(_NODES).T
    rows = vandermonde(height, _NODES) @ coefficients  # (H, nodes)

    # Over a few hundred pixels, a projection bends so little that two or three terms
    # are left. Their sum is faster than a product of matrices, which on a busy machine
    # also waits for the threads of its library.
    cols = vandermonde(width, _NODES).T
    out = np.repeat(rows[:, :1], width, 1)
    term = np.empty_like(out)
    for k in range(1, _NODES):
        if not np.abs(rows[:, k]).max() < 0.01 * _TOLERANCE:
            out += np.multiply(rows[:, k, None], cols[k], out=term)
    return out


class Warp:
    """The pixel centres of a grid in another CRS.

    A map projection is nearly a polynomial over a window, so only its values at Chebyshev
    nodes are projected, and pixel centres follow from matrices.
    """

    def __init__(self, grid: Grid, crs: CRS) -> None:
        """Project the nodes of a grid."""
        self.grid, self.crs = grid, crs
        self._around = crs.is_geographic
        height, width = grid.height, grid.width
        nodes = node_positions(_NODES)
        rows, cols = np.meshgrid(nodes * height, nodes * width, indexing='ij')

        # Real pixel centres, the outermost among them, to see how good the nodes are
        near_rows, near_cols = (
            np.unique(np.linspace(0, size - 1, 6).round().astype(int))
            for size in (height, width)
        )
        self._checked = np.ix_(near_rows, near_cols)
        check = np.meshgrid(near_rows + 0.5, near_cols + 0.5, indexing='ij')
        self._x, self._y = self._project(
            np.concatenate([rows.ravel(), check[0].ravel()]),
            np.concatenate([cols.ravel(), check[1].ravel()]),
        )

    def _project(self, rows: Floats, cols: Floats) -> tuple[Floats, Floats]:
        grid = self.grid
        return project(grid.crs, self.crs, grid.transform[:6], cols, rows)

    @property
    def bounds(self) -> Bounds:
        """Box that holds the centres of all pixels, a little too large."""
        (left, right), (bottom, top) = (
            (low - 0.05 * (high - low), high + 0.05 * (high - low))
            for low, high in ((v.min(), v.max()) for v in (self._x, self._y))
        )
        return left, bottom, right, top

    def pixels(self, raster: Grid) -> tuple[Pixels, Pixels]:
        """Find the rows and columns in a raster, or outside of it, of all pixels, (H, W)."""
        inverse = ~raster.transform
        size = _NODES**2
        positions, errors, reach = [], [], []
        for values in apply(inverse, self._x, self._y):
            at_nodes, expected = values[:size], values[size:]
            position = _interpolate(
                at_nodes.reshape(_NODES, _NODES), self.grid.height, self.grid.width
            )
            positions.append(position)
            errors.append(np.abs(position[self._checked].ravel() - expected).max())
            reach.append(np.abs(expected).max())
        # Not a number and infinity (no such place in the CRS) come here, too
        if not (np.max(errors) <= _TOLERANCE and np.max(reach) < _FAR):
            rows, cols = np.indices((self.grid.height, self.grid.width)) + 0.5
            x, y = self._project(rows, cols)
            bad = ~(np.isfinite(x) & np.isfinite(y))
            if self._around:
                left, _, right, _ = raster.bounds
                x = near(x, (left + right) / 2)
            positions = [
                np.where(bad, -1, axis).clip(-1, _FAR) for axis in apply(inverse, x, y)
            ]

        for position in positions:
            position += EDGE
            np.floor(position, out=position)
        col, row = (position.astype(np.int32) for position in positions)
        return row, col
