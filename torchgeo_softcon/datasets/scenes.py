# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Windows of georeferenced images, with ESA WorldCover as the mask."""

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Self, cast

import numpy as np
import torch

from .._checks import check_counts, check_fractions, check_types
from .._compat import Sample
from ..bands import Level
from ..geo.discovery import find_rasters, find_scenes
from ..geo.mapped import open_mapped
from ..geo.rasters import RasterReader, Scene, Values
from ..landcover.products import ProductLike, find_product
from ..transforms.worldcover import WorldCoverMultiLabel
from .base import DrawnImages, check_seed
from .damage import Damage, OnError
from .packed_scenes import PackedCover, is_packed
from .scaling import SceneScaler, ValueRange, read_middle, with_level
from .scene_grid import SceneGrid
from .scene_stack import (
    SceneStack,
    choose_maps,
    list_names,
    stack_scenes,
    warn_single_bands,
)
from .worldcover import ESAWorldCover, open_years

#: One or more folders or files.
# On the command line, the first type that fits is taken: a list is no path
Paths = str | Sequence[str | os.PathLike[str]] | os.PathLike[str]

#: Windows to try before one with too little data is taken after all. If half of a raster
#: is empty, one window in a thousand gets here.
_MAX_TRIES = 10


class WorldCoverScenes(DrawnImages):
    """Random windows of Sentinel-2-like rasters and their WorldCover mask.

    Rasters may lie in any mix of coordinate reference systems. A window is cut on the
    raster's own pixels, only the mask is brought to it (nearest neighbour), so images
    are never resampled; files of one band of a coarser resolution are interpolated to
    the finest one. Images and land cover are joined by location alone.

    A scene is one file with all bands, or several files in one folder whose names
    differ in the band only (``B02.tif``, ``T32UNE_20200101T101031_B8A_20m.jp2``,
    ``S1A_..._VV.tif``). Bands of one file are named by its band descriptions, by its
    colours, or by their number: 13 are Sentinel-2 Level-1C in the order B1 to B8, B8A,
    B9 to B12, 12 are Level-2A (without B10), 2 of type float are VV and VH. If that is
    not so, name them with *all_bands*. Bands of Landsat, which are others of the same
    names, stay without. An alpha band tells where the others have data.

    Scenes on exactly the same grid are dates of one place. Places are drawn by area,
    and a sample has *seasons* different dates in random order.

    Windows are a pure function of *seed* and the index. Indices beyond the length are
    valid and give new windows, so a sampler can give every epoch its own.

    Dataset features:

    * *image*: float32 in [0, 1] of shape (C, H, W), or (T, C, H, W) for T > 1 seasons.
      Pixels without data (see *nodata*, NaN, infinity, transparent) are 0
    * *mask*: WorldCover codes, long of shape (H, W), 0 is no data, also where one of
      the dates has none in all of its bands. The default
      *transforms* replace it by a multi-hot *label* of shape (K,)
    """

    #: Whether there are samples beyond the length.
    endless = True

    def __init__(
        self,
        images: Paths,
        worldcover: Paths | ESAWorldCover | PackedCover | None = None,
        year: int | Literal['nearest'] | None = None,
        bands: Sequence[str] | None = None,
        patch_size: int = 264,
        length: int | None = None,
        seasons: int = 1,
        min_valid: float = 0.5,
        value_range: ValueRange = None,
        all_bands: Sequence[str] | None = None,
        nodata: float | None = None,
        rows: tuple[float, float] = (0.0, 1.0),
        transforms: Callable[[Sample], Sample] | None = None,
        seed: int = 0,
        allow_unlabelled: bool = False,
        offset: float | None = None,
        product: ProductLike = 'worldcover',
        level: Level | None = None,
        radar_quantiles: bool = False,
        on_error: OnError = 'raise',
    ) -> None:
        """Initialize a new WorldCoverScenes instance.

        Args:
            images: Folders, searched recursively for .tif, .tiff and .jp2, or files. Or a
                folder of ``torchgeo-softcon pack``, which has the land cover as well.
            worldcover: Folders or files of WorldCover tiles (or of rasters of *product*),
                or a dataset of them. None for what is packed, or for no labels at all,
                together with *allow_unlabelled*.
            year: Year of the map, 2020 (v100) or by default 2021 (v200). With
                ``'nearest'``, a window has the map of the year that its first image was
                taken in, or of the nearest one that has a tile there. Tags, a STAC item
                and names of files and folders tell the year of an image. Where nothing
                does, it is the last one.
            bands: Names of the bands to use, None for all bands of the files.
            patch_size: Height and width of a window in pixels. SSL4EO-S12, which
                SoftCon was trained on, has patches of 264.
            length: Number of samples per epoch. By default as many as cover the area
                of all places once.
            seasons: Number of different dates per sample.
            min_valid: Share of pixels that must have data. Windows below are redrawn up
                to 10 times, then the fullest of them is taken, with a warning.
            value_range: What becomes 0 and 1: ``'softcon'``, a pair, or one pair per band.
                By default 0 and 255 for uint8, and the mean of SSL4EO-S12 -2 and +2
                standard deviations for known bands in digital numbers or dB.
            all_bands: Names of all bands in file order, if a file does not tell or
                tells wrong.
            nodata: Value of pixels without data, None for what each file says. Products of
                Sentinel-2 have 0 there but do not say so, and so do radar and floats around
                the swath: that is the default for digital numbers (uint16) of Sentinel-2
                bands, and for known bands in floats. A 0 counts only where all bands have
                it, because single ones do have 0, such as B10. Give another number if 0 is
                data.
            rows: Part of each raster's rows to take windows from, as fractions from
                the top.
            transforms: Function of a sample, by default
                :class:`.WorldCoverMultiLabel`.
            seed: Seed of the windows, from 0 to 2**32 - 1.
            allow_unlabelled: Accept images without a tile, their mask is 0 everywhere.
            offset: What is added to the numbers as they are stored, before *value_range*.
                None for what files tell: their own scale and offset, or for digital
                numbers (uint16) of Sentinel-2 bands the offset in a product's metadata
                (``MTD_MSIL2A.xml``), in tags or a STAC item, or -1000 in a product whose
                name has a baseline of 04.00 or later.
            product: Another land-cover product, its name, or its YAML file, see
                :func:`torchgeo_softcon.landcover.find_product`. Not used if *worldcover*
                is a dataset, which has its own.
            level: Processing level of Sentinel-2, whose statistics scale the images,
                ``'L1C'`` or ``'L2A'``. By default what metadata, bands and names of each
                scene tell, see :meth:`.Products.level`.
            radar_quantiles: Clip each band of radar to its own 1 and 99 % quantiles in a
                window before it is scaled, as SoftCon's authors do in evaluation.
            on_error: ``'skip'`` takes another window for one whose files are damaged,
                always the same, and leaves out scenes with files that cannot be opened.
                :class:`.WorldCoverScenesDataModule` counts these draws per epoch and names
                the files at the end. By default a damaged file is an error.

        Raises:
            FileNotFoundError: If a path does not exist, if there is no raster, or if an
                image has no tile of WorldCover.
            OSError: If a file cannot be opened, or later, if it cannot be read.
            ValueError: If a file has no CRS, lacks a band, is smaller than a window, or
                if an argument does not fit.

        Warns:
            UserWarning: If tiles are missing under a part of an image, if files of one
                band without a name are taken for dates of one place, or later, if no
                window with enough data is found.
        """
        check_types(WorldCoverScenes.__init__, locals())
        check_seed(seed)
        check_counts(patch_size=patch_size, seasons=seasons, length=length)
        check_fractions(min_valid=min_valid)

        self.patch_size = patch_size
        self.seasons = seasons
        self.min_valid = min_valid
        self.seed = seed
        self.stream = 0
        self._warned: set[str] = set()
        if is_packed(images):
            if worldcover is None and not allow_unlabelled:
                worldcover = PackedCover(images)  # type: ignore[arg-type]
            images = os.path.join(images, 'images')  # type: ignore[arg-type]
        if isinstance(worldcover, ESAWorldCover | PackedCover):
            product = worldcover.product
        self.product = find_product(product)
        if transforms is None:
            transforms = WorldCoverMultiLabel(product=self.product)
        self.transforms = transforms

        self.left_out: dict[str, str] = {}
        damaged: list[str] | None = [] if on_error == 'skip' else None
        scenes = find_scenes(
            find_rasters(images, self.left_out),
            bands,
            all_bands,
            nodata,
            offset,
            to_digital=value_range in (None, 'softcon'),
            left_out=self.left_out,
            damaged=damaged,
        )
        scenes = with_level(scenes, level)
        self.bands = scenes[0].bands
        self.places = stack_scenes(scenes)
        if damaged is not None:
            self.damage = Damage(damaged)
        if damaged:  # places may have too few dates for that
            enough = [place for place in self.places if len(place.scenes) >= seasons]
            self.places = tuple(enough) or self.places
        warn_single_bands(self.places)
        self.scale = SceneScaler(scenes, value_range, radar_quantiles)
        self.level, self.value_range = self.scale.level, self.scale.value_range
        self._reader = RasterReader(open_mapped)
        self.kinds = self.scale.tell(scenes, self._reader)
        self._check_dates()
        self._set_rows(rows, length)

        self._covers = {}
        self._maps: dict[str, ESAWorldCover] = {}  # of scenes, where it is another one
        if isinstance(worldcover, PackedCover):
            if year != 'nearest':
                worldcover.check_year(year)
            self._covers = {
                place.name: worldcover.find(place.grid, place.name)
                for place in self.places
            }
        elif worldcover is not None and not isinstance(worldcover, ESAWorldCover):
            if year == 'nearest' and self.product.years:
                maps = open_years(worldcover, self.product)
                self._maps = choose_maps(self.places, maps)
                worldcover = next(iter(maps.values()))
            else:
                known = cast(int | None, year)
                worldcover = ESAWorldCover(worldcover, year=known, product=self.product)
        self.worldcover = worldcover
        if not (allow_unlabelled or self._covers):
            self._check_tiles()

    def _check_dates(self) -> None:
        for place in self.places:
            if len(place.scenes) < self.seasons:
                raise ValueError(
                    f'seasons={self.seasons} needs as many rasters on exactly the same '
                    f'grid, got {len(place.scenes)}: {place.names}'
                )

    def _set_rows(self, rows: tuple[float, float], length: int | None) -> None:
        """Set the rows of each place, how likely it is drawn, and the length."""
        if not 0 <= rows[0] < rows[1] <= 1:
            raise ValueError(f'rows must be 0 <= first < last <= 1, got {rows}')
        self._rows, areas = [], []
        for place in self.places:
            height, width = place.grid.height, place.grid.width
            first, last = (round(part * height) for part in rows)
            if min(last - first, width) < self.patch_size:
                part = f' (rows {first} to {last} of {height})' * (rows != (0, 1))
                raise ValueError(
                    f'patch_size must fit into every raster, got {self.patch_size} and '
                    f'{place.name} of {last - first} x {width} pixels{part}'
                )
            self._rows.append((first, last))
            areas.append(float(last - first) * width)
        self._cumulative = np.cumsum(areas) / sum(areas)
        covered = int(sum(areas)) // self.patch_size**2
        self.length = max(1, covered) if length is None else length

    def _check_tiles(self) -> None:
        """Check that every place touches a tile, and warn of those partly without."""
        worldcover = self.worldcover
        if worldcover is None or isinstance(worldcover, PackedCover):
            raise ValueError('worldcover must be given, or allow_unlabelled set')

        def covered(place: SceneStack, wholly: bool) -> bool:
            maps = {self._maps.get(scene.name, worldcover) for scene in place.scenes}
            return all(one.covers(*place.box, wholly) for one in maps)

        partly = [place for place in self.places if not covered(place, wholly=True)]
        without = [place for place in partly if not covered(place, wholly=False)]
        if not partly:
            return
        concerned = without or partly
        there = {os.path.basename(file) for file in worldcover.files}
        needed = {tile for p in concerned for tile in worldcover.tiles(*p.box)}
        tiles = list_names(sorted(needed - there)) or 'none'
        product = worldcover.product
        if without:
            folder = product.file_path('', worldcover.year).rpartition('/')[0]
            source = f' from {product.url}/{folder}/' if product.url else ''
            expected = f'. Expected {tiles}{source}' if needed else ''
            raise FileNotFoundError(
                f'no {product.title} tile lies under '
                f'{list_names([p.name for p in without])}{expected}. Set '
                'allow_unlabelled to go on without'
            )
        warnings.warn(
            f'{sum(len(p.scenes) for p in partly)} images are only partly covered by '
            f'{product.title} tiles, such as {partly[0].name}. There the mask is no '
            f'data. Not found by name: {tiles} (there are no tiles where only sea is)',
            UserWarning,
            stacklevel=3,
        )

    def with_windows(
        self,
        *,
        rows: tuple[float, float] = (0.0, 1.0),
        length: int | None = None,
        seed: int | None = None,
        seasons: int | None = None,
        stream: int = 0,
    ) -> Self:
        """Return other windows of the same rasters, without opening them again.

        Args:
            rows: Part of each raster's rows, as fractions from the top.
            length: Number of samples, None for as many as cover these rows once.
            seed: Seed of the windows, None for the same.
            seasons: Number of dates per sample, None for the same.
            stream: Number of an independent series of windows with the same seed.

        Raises:
            ValueError: If a window does not fit into the rows of a raster, or if an
                argument is out of range.
        """
        other = copy.copy(self)
        other._reader = RasterReader(open_mapped)
        other.seed = self.seed if seed is None else seed
        other.seasons = self.seasons if seasons is None else seasons
        other.stream = stream
        check_seed(other.seed)
        check_counts(seasons=other.seasons, length=length)
        other._check_dates()
        other._set_rows(rows, length)
        return other

    def divide(self, fraction: float) -> tuple[Self, Self, Self]:
        """Divide the rows of each raster, and take windows of their own in each part.

        Args:
            fraction: Part of the rows, at the lower end, in the third dataset, and as much
                above it in the second. With 0, windows of all three are from everywhere.

        Returns:
            Datasets for training, validation and testing.
        """
        cuts = (0.0, 1 - 2 * fraction, 1 - fraction, 1.0)
        rows = [(0.0, 1.0)] * 3 if fraction == 0 else [*pairwise(cuts)]
        first, second, third = (
            self.with_windows(rows=part, stream=stream)
            for stream, part in enumerate(rows)
        )
        return first, second, third

    def images(self) -> SceneGrid:
        """Return all windows side by side."""
        return SceneGrid(self)

    def __len__(self) -> int:
        """Return the number of samples per epoch."""
        return self.length

    def _draw_sample(self, index: int) -> Sample:
        rng = self._generator(index, self.stream)
        best: tuple[SceneStack, int, int, list[tuple[Scene, Values]]]
        most, best = -1.0, (self.places[0], 0, 0, [])
        for _ in range(_MAX_TRIES):
            number = int(np.searchsorted(self._cumulative, rng.random(), side='right'))
            place, (first, last) = self.places[number], self._rows[number]
            top = int(rng.integers(first, last - self.patch_size + 1))
            left = int(rng.integers(0, place.grid.width - self.patch_size + 1))
            windows: list[tuple[Scene, Values]] = []
            valid = 1.0
            for date in rng.permutation(len(place.scenes))[: self.seasons]:
                values = self._read(place.scenes[date], top, left)
                windows.append((place.scenes[date], values))
                # A pixel counts if any band has data: 0 is a value of the cirrus band
                valid = min(valid, float(np.isfinite(values).any(0).mean()))
                if valid < self.min_valid and valid <= most:
                    break  # not needed whatever the other dates have
            else:
                most, best = valid, (place, top, left, windows)
                if valid >= self.min_valid:
                    break
        name = best[0].name
        if most < self.min_valid and name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f'no window with data in min_valid={self.min_valid} of its pixels was '
                f'found in {_MAX_TRIES} tries, one of {name} with {most:.3g} is taken. '
                'Its label may be unknown',
                UserWarning,
                stacklevel=2,
            )
        return self._sample(*best)

    def _read(self, scene: Scene, top: int, left: int) -> Values:
        return self._reader.read(scene, top, left, self.patch_size, self.patch_size)

    def _sample(
        self,
        place: SceneStack,
        top: int,
        left: int,
        windows: Sequence[tuple[Scene, Values]],
    ) -> Sample:
        """Make a sample of the dates of a window, with the land cover of the first."""
        size, scene = self.patch_size, windows[0][0]
        worldcover = self._maps.get(scene.name, self.worldcover)
        if worldcover is None:
            mask = torch.full((size, size), self.product.fill)
        elif isinstance(worldcover, PackedCover):
            mask = worldcover.read(self._covers[place.name], top, left, size)
        else:
            grid = place.grid.window(top, left, size, size)
            mask = worldcover.read_window(grid.crs, grid.transform, size, size)
        return self.transforms(self.scale.sample(windows, mask, self.product.fill))

    def read_middle(self, scene: Scene) -> Values:
        """Read the window in the middle of a scene, before it is scaled."""
        return read_middle(self._reader, scene)
