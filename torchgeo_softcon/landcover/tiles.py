# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The grid that the official tiles of a land-cover product are cut by."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .._checks import require
from ..geo.grid import Bounds

#: A box that reaches less far than this into a tile, in tiles, only touches it: rounding
#: of projected coordinates is far below (0.3 mm on the ground).
_TOUCH = 1e-9


@dataclass(frozen=True)
class TileGrid:
    """Square tiles in longitude and latitude (EPSG:4326).

    They are named after their south-west corner, like N51E003.

    Attributes:
        degrees: Width and height of a tile in degrees, a divisor of 180.
        pixels: Width and height of a tile in pixels.
        south: Latitude where the southernmost tiles begin, a multiple of *degrees*.
        north: Latitude where the northernmost tiles end, a multiple of *degrees*.
    """

    degrees: int
    pixels: int
    south: int = -90
    north: int = 90

    def __post_init__(self) -> None:
        """Refuse a grid that does not close around the Earth."""
        for key, value in vars(self).items():
            require(
                type(value) is int, f'tiles.{key} must be a whole number, got {value!r}'
            )
        degrees, south, north = self.degrees, self.south, self.north
        require(
            degrees > 0 and 180 % degrees == 0,
            f'tiles.degrees must be a divisor of 180, got {degrees}',
        )
        require(self.pixels > 0, f'tiles.pixels must be > 0, got {self.pixels}')
        require(
            -90 <= south < north <= 90 and south % degrees == north % degrees == 0,
            'tiles.south and tiles.north must be multiples of tiles.degrees from -90 to '
            f'90, south below north, got {south} and {north}',
        )

    @functools.cached_property
    def corners(self) -> dict[str, tuple[int, int]]:
        """Longitude and latitude of the south-west corner of every tile, by its name."""
        return {
            f'{"NS"[lat < 0]}{abs(lat):02}{"EW"[lon < 0]}{abs(lon):03}': (lon, lat)
            for lat in range(self.south, self.north, self.degrees)
            for lon in range(-180, 180, self.degrees)
        }

    def bounds(self, name: str) -> Bounds:
        """Return left, bottom, right and top of a tile in degrees.

        Raises:
            ValueError: If no tile has this name.
        """
        first, *_, last = self.corners
        require(
            name in self.corners,
            f'names must be those of official tiles, every {self.degrees} degrees from '
            f'{first} to {last}, got {name!r}',
        )
        lon, lat = self.corners[name]
        return lon, lat, lon + self.degrees, lat + self.degrees

    def names_under(self, bounds: Bounds | Iterable[Sequence[float]]) -> list[str]:
        """Return the names of the tiles under boxes.

        Args:
            bounds: Left, bottom, right and top in degrees of longitude and latitude, one
                box or many, of shape (N, 4). A box across the antimeridian has its left
                edge east of its right edge, or one edge outside of [-180, 180]. Tiles
                that a box only touches with its edge are not under it.

        Returns:
            Sorted names without duplicates, also of tiles that do not exist because
            only sea is there. Ground outside of the grid has no names.

        Raises:
            ValueError: If *bounds* are not boxes.
        """
        if not hasattr(bounds, '__len__'):
            bounds = list(bounds)
        boxes = np.asarray(bounds, np.float64)
        if not boxes.size:
            return []
        boxes = np.atleast_2d(boxes)
        require(
            boxes.ndim == 2 and boxes.shape[1] == 4,
            f'bounds must be of shape (N, 4), got {boxes.shape}',
        )
        left, bottom, right, top = boxes.T
        bad = ~((bottom >= -90) & (bottom <= top) & (top <= 90))
        bad |= ~(np.maximum(abs(left), abs(right)) <= 540)
        index = int(bad.argmax())
        require(
            not bad.any(),
            'bounds must be (left, bottom, right, top) in degrees of longitude and '
            f'latitude, got {tuple(boxes[index].tolist())} at {index}',
        )

        # Rows and columns of tiles from the south-west corner of the grid. A point or a
        # line is under the tile to the north-east of it.
        rows, cols = (self.north - self.south) // self.degrees, 360 // self.degrees
        right = np.where(right < left, right + 360, right)
        west, east = ((lon + 180) / self.degrees for lon in (left, right))
        south, north = ((lat - self.south) / self.degrees for lat in (bottom, top))
        west, south = (np.floor(low + _TOUCH).astype(int) for low in (west, south))
        east, north = (np.ceil(high - _TOUCH).astype(int) for high in (east, north))
        col, width = west % cols, np.clip(east - west, 1, cols)
        row, stop = south.clip(0, rows), np.maximum(north, south + 1).clip(0, rows)

        covered = np.zeros((rows, cols), bool)
        ranges = (one.tolist() for one in (row, stop, col, col + width))
        # Most boxes are under the same few tiles
        for first, last, start, end in {*zip(*ranges, strict=True)}:
            covered[first:last, np.arange(start, end) % cols] = True
        names = list(self.corners)
        return sorted(names[number] for number in np.flatnonzero(covered))
