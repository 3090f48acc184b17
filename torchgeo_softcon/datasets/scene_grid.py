# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""All windows of georeferenced images, side by side."""

import datetime
import itertools
import os
from typing import TYPE_CHECKING

import shapely
from pyproj import CRS
from torch.utils.data import Dataset

from .._compat import Sample
from ..geo.dates import find_date
from ..geo.grid import apply

if TYPE_CHECKING:
    from .scenes import WorldCoverScenes


class SceneGrid(Dataset[Sample]):
    """All windows of some scenes side by side, by place, date, row and column.

    The last row and column of windows are moved inwards to end with the raster.
    """

    def __init__(self, scenes: 'WorldCoverScenes') -> None:
        """Initialize a new SceneGrid instance."""
        self.scenes = scenes
        size = scenes.patch_size
        self.windows = [
            (place, scene, top, left)
            for place, rows in zip(scenes.places, scenes._rows, strict=True)
            for scene, top, left in itertools.product(
                place.scenes, _starts(*rows, size), _starts(0, place.grid.width, size)
            )
        ]

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def __getitem__(self, index: int) -> Sample:
        """Read a window, an image of shape (C, H, W)."""
        place, scene, top, left = self.windows[index]
        values = self.scenes._read(scene, top, left)
        return self.scenes._sample(place, top, left, [(scene, values)])

    def footprint(
        self, index: int
    ) -> tuple[shapely.Polygon, CRS, datetime.date | None]:
        """Return outline, CRS and day of one of the *windows*."""
        place, scene, top, left = self.windows[index]
        size = self.scenes.patch_size
        window = place.grid.window(top, left, size, size)
        corners = ((0, 0), (size, 0), (size, size), (0, size))
        polygon = shapely.Polygon([apply(window.transform, *end) for end in corners])
        return polygon, window.crs, find_date(os.path.basename(scene.name))


def _starts(first: int, last: int, size: int) -> list[int]:
    return [*range(first, last - size, size), last - size]
