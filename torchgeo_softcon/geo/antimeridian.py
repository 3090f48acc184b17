# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Longitudes around the Earth: the only place that knows of a turn of 360 degrees."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Turns by which a box may be apart from another one that is on the same ground.
TURNS = (0, -1, 1)


def near(lon: Floats, middle: Floats | float) -> Floats:
    """Bring longitudes within half a turn of others. Those that are stay to the bit."""
    with np.errstate(invalid='ignore'):
        return np.asarray(lon + 360 * np.round((middle - lon) / 360))


def unwrap(lon: Floats) -> Floats:
    """Bring longitudes of shape (..., M) near the first of each row, in [-180, 180]."""
    return near(lon, near(lon[..., :1], 0))


def join_halves(lon: Floats) -> Floats:
    """Bring the corners of an outline in [-180, 180] together, beyond 180 if need be."""
    return np.where(lon < 0, lon + 360, lon) if np.ptp(lon) > 180 else lon


def center(lon: Floats) -> Floats:
    """Bring the corners of an outline together, and their middle into [-180, 180]."""
    lon = join_halves(lon)
    return lon - 360 * np.round((lon.min() + lon.max()) / 720)


def turned_boxes(boxes: Floats, turns: npt.ArrayLike) -> Floats:
    """Move boxes of shape (N, 4), each by a number of turns to the east."""
    moves = 360.0 * np.asarray(turns)[:, None] * np.array([1, 0, 1, 0])
    return np.asarray(boxes + moves)
