# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""All windows of georeferenced images, side by side."""

import datetime
import itertools
import os
import re

import shapely
from pyproj import CRS
from torch.utils.data import Dataset

from .._compat import Sample
from ..geo.grid import apply
from .scenes import WorldCoverScenes

#: Year, month and day in the name of a file, not in the middle of a number.
_DATE = re.compile(r'(?<!\d)((?:19|20)\d{2})([-_]?)(\d{2})\2(\d{2})(?!\d)')


class SceneGrid(Dataset[Sample]):
    """All windows of some scenes side by side, each date on its own.

    For prediction: the order is place, date, row, column. The last row and column of
    windows are moved inwards to end with the raster.
    """

    def __init__(self, scenes: WorldCoverScenes) -> None:
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
        values = self.scenes._window(scene, top, left)
        return self.scenes._sample(place, top, left, [(scene, values)])

    def footprint(
        self, index: int
    ) -> tuple[shapely.Polygon, CRS, datetime.date | None]:
        """Return where and when one of the *windows* is from."""
        place, scene, top, left = self.windows[index]
        size = self.scenes.patch_size
        window = place.grid.window(top, left, size, size)
        corners = ((0, 0), (size, 0), (size, size), (0, size))
        polygon = shapely.Polygon([apply(window.transform, *end) for end in corners])
        return polygon, window.crs, _date(scene.name)


def _date(name: str) -> datetime.date | None:
    """Return the first date in a file name, such as 20210630 or 2021-06-30."""
    for match in _DATE.finditer(os.path.basename(name)):
        try:
            return datetime.date(*map(int, match.group(1, 3, 4)))
        except ValueError:  # a number that is no date
            continue
    return None


def _starts(first: int, last: int, size: int) -> list[int]:
    return [*range(first, last - size, size), last - size]
