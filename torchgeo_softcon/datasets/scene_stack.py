# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Scenes on the same pixels: the dates of a place."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from pyproj import CRS

from ..geo.grid import Bounds, Grid, group_by_grid
from ..geo.rasters import Scene
from .worldcover import ESAWorldCover

#: Files that an error message lists.
_MAX_NAMED = 3


@dataclass(frozen=True)
class SceneStack:
    """Scenes on the same pixels, one per date: a place."""

    grid: Grid
    scenes: tuple[Scene, ...]

    @property
    def name(self) -> str:
        """Name of the first scene."""
        return self.scenes[0].name

    @property
    def box(self) -> tuple[CRS, Bounds]:
        """Coordinate reference system, and left, bottom, right and top."""
        return self.grid.crs, self.grid.bounds

    @property
    def names(self) -> str:
        """Names of the first scenes."""
        return list_names([scene.name for scene in self.scenes])


def list_names(names: Sequence[str]) -> str:
    """List the first names, and tell how many more there are."""
    more = len(names) - _MAX_NAMED
    return ', '.join(names[:_MAX_NAMED]) + (f' and {more} more' if more > 0 else '')


def warn_single_bands(places: Sequence[SceneStack]) -> None:
    """Warn of bands that look like dates: not the last part of a file name."""
    for place in places:
        first = place.scenes[0]
        if len(place.scenes) > 1 and first.count == 1 and first.bands is None:
            warnings.warn(
                f'{len(place.scenes)} files of one band on one grid are taken for dates '
                f'of one place: {place.names}. If they are bands of one scene, let the '
                'names end with the band (_B04.tif), otherwise name it with all_bands',
                UserWarning,
                stacklevel=3,
            )
            return


def stack_scenes(scenes: Sequence[Scene]) -> tuple[SceneStack, ...]:
    """Put scenes on one grid together."""
    groups = group_by_grid(scene.grid for scene in scenes)
    return tuple(
        SceneStack(scenes[group[0]].grid, tuple(scenes[i] for i in group))
        for group in groups
    )


def choose_maps(
    places: Sequence[SceneStack], maps: Mapping[int | None, ESAWorldCover]
) -> dict[str, ESAWorldCover]:
    """Choose the map of each scene, by its name: of the nearest year with a tile there.

    Of *maps* by year, the first is for scenes of unknown year.
    """
    last = next(iter(maps))
    chosen, unknown = {}, []
    for place in places:
        there = [year for year in maps if maps[year].covers(*place.box)] or [last]
        for scene in place.scenes:
            if scene.year is None:
                unknown.append(scene.name)
            gaps = {y: abs((y or 0) - (scene.year or last or 0)) for y in there}
            chosen[scene.name] = maps[min(gaps, key=gaps.__getitem__)]
    counts = Counter(str(one.year) for one in chosen.values())
    parts = [f'{number} of {year}' for year, number in sorted(counts.items())]
    example = f', as {unknown[0]}' if unknown else ''
    rank_zero_info(
        f'Scenes have the map of the nearest year: {", ".join(parts)} '
        f'({len(unknown)} do not tell their year{example})'
    )
    return chosen
