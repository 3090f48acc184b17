# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Image patches with masks of WorldCover codes, without georeference."""

import copy
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from rasterio.windows import Window
from torch.utils.data import default_collate

from .._checks import check_counts, check_types
from .._compat import Sample
from ..bands import Level, normalize_band_names
from ..geo.describe import OpenedFile
from ..geo.mosaic import scale_codes
from ..geo.numbers import Numbers
from ..geo.rasters import (
    DamagedFileError,
    RasterReader,
    Scene,
    Values,
    open_raster,
    read_mask,
    read_raster,
)
from ..geo.sentinel2 import hint_at_offset
from ..transforms.worldcover import WorldCoverMultiLabel
from .base import DivisibleImages, check_seed, is_batched
from .damage import Damage, OnError
from .image_cache import Decoded, ImageCache
from .patches import (
    Patch,
    check_mask,
    choose_bands,
    describe_image,
    find_images,
    in_pixels,
    match_masks,
)
from .scaling import (
    ValueRange,
    scene_level,
    scene_ranges,
    tell_scenes,
    to_unit_range,
    with_level,
)

#: Files that an error message lists.
_MAX_NAMED = 5


#: Top, left, height and width.
_Window = tuple[int, int, int, int]


class ImageMaskFolder(DivisibleImages):
    """Image patches and masks of ESA WorldCover codes in two folders.

    ``images/a/b.png`` belongs to ``masks/a/b.*``, or to ``masks/a.*`` if that is the
    mask of all images in the folder ``a``. The mask may also be a band of the image.

    With *seasons* = 1 every image is a sample. With more, images of one folder are
    dates of one place, or those for which the regular expression *places* finds the
    same text, and a place is a sample with that many different dates in random order.
    The mask is that of the first date drawn.

    Random choices are a pure function of *seed* and the index. Indices beyond the
    length start again with the first sample and make new choices.

    Dataset features:

    * *image*: float32 in [0, 1] of shape (C, H, W), or (T, C, H, W) for T > 1 seasons.
      Pixels without data (nodata value, NaN, infinity, masked, transparent) are 0. A
      nodata value of 0 in integers counts only where all bands have it
    * *mask*: WorldCover codes, long of shape (H, W), 0 is no data, also where one of the
      dates has none in all of its bands. Masks of floats stay floats. The default
      *transforms* replace it by a multi-hot *label* of shape (K,)

    Images are read as by :class:`.WorldCoverScenes`: scale and offset that a file declares
    are applied, and a colour table becomes red, green and blue. A mask with a colour table
    keeps its codes.
    """

    _where = 'places'

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        images: str | os.PathLike[str] | None = None,
        masks: str | os.PathLike[str] | None = None,
        image_bands: Sequence[int] | None = None,
        mask_band: int | None = None,
        bands: Sequence[str] | None = None,
        value_range: ValueRange = None,
        nodata: float | None = None,
        seasons: int = 1,
        places: str | None = None,
        size: int | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        seed: int = 0,
        level: Level | None = None,
        cache: str | os.PathLike[str] | None = None,
        offset: float | None = None,
        on_error: OnError = 'raise',
    ) -> None:
        r"""Initialize a new ImageMaskFolder instance.

        Args:
            root: Folder with the folders ``images`` and ``masks``.
            images: Folder of images, searched recursively, instead of the one in
                *root*.
            masks: Folder of masks, instead of the one in *root*.
            image_bands: Positions of the bands to use, from 1. All by default, without
                the mask and an alpha band, which tells where the others have data.
            mask_band: Position of the mask in the image file, from 1, if it is there.
            bands: Names of the bands in *image_bands*. Without these, bands that files
                name in their descriptions are chosen by name, in each file on its own.
                By default the names that the first file has.
            value_range: What becomes 0 and 1: ``'softcon'``, a pair, or one pair per
                band, with the defaults of :class:`.WorldCoverScenes`.
            nodata: Value of pixels without data, None for what each file says.
            seasons: Number of different dates per sample.
            places: Regular expression for the path of an image below *images*, without
                suffix. Images with the same groups (or whole match) are of one place:
                ``'^(.*)_'`` for names of a place and a date,
                ``r'^(\d+\.\d)\d*_(\d+\.\d)'`` for squares of 0.1 degrees in names
                of latitude and longitude. By default those in one folder for more than
                one of *seasons*, and every image is its own place for one.
            size: Height and width of a random crop, None for whole images.
            transforms: Function of a sample, by default
                :class:`.WorldCoverMultiLabel`.
            seed: Seed of dates and crops.
            level: Processing level of Sentinel-2, whose statistics scale the images,
                ``'L1C'`` or ``'L2A'``. By default what metadata, bands and names of each
                image tell, see :meth:`.Products.level`.
            cache: Folder to which decoded images and masks are written, once, to be read
                from there: much faster than JPEG or PNG, and the same to the bit. About
                one byte per value of 8-bit images. For images of one size. A damaged
                file is an error when it is written.
            offset: What is added to the numbers as they are stored, None for what files
                and the names of their products tell, see :class:`.WorldCoverScenes`.
            on_error: ``'skip'`` leaves images out whose files, or those of their masks, are
                damaged. A sample that would show one is another one, always the same.
                :class:`.ImageMaskFolderDataModule` counts these draws per epoch and names
                the files at the end. By default a damaged file is an error.

        Raises:
            FileNotFoundError: If there are no images, or an image has no mask.
            OSError: If a file cannot be opened, or later, if it cannot be read.
            ValueError: If an image and its mask, or the images among themselves, do not
                have the same size, if a band is missing, or if an argument does not fit.
        """
        check_types(ImageMaskFolder.__init__, locals())
        if root is None and (images is None or (masks is None and mask_band is None)):
            raise ValueError(
                'root must be given, or images together with masks or mask_band'
            )
        if masks is not None and mask_band is not None:
            raise ValueError(
                f'masks must be left out, or mask_band, got masks = {masks} and mask_band = '
                f'{mask_band}'
            )
        check_counts(seasons=seasons, size=size)
        check_seed(seed)

        self.seasons = seasons
        self.size = size
        self._random = True
        self.mask_band = mask_band
        self.nodata = nodata
        self.seed = seed
        self.transforms = WorldCoverMultiLabel() if transforms is None else transforms

        image_root = Path(root or '', 'images') if images is None else Path(images)
        files = find_images(image_root, 'images')
        mask_files = list(files.values())
        if mask_band is None:
            mask_root = Path(root or '', 'masks') if masks is None else Path(masks)
            mask_files = match_masks(
                files, find_images(mask_root, 'masks'), image_root, mask_root
            )

        described: dict[str, tuple[OpenedFile, Path]] = {}
        damaged: dict[str, str] = {}
        for (stem, path), mask in zip(files.items(), mask_files, strict=True):
            try:
                file = describe_image(path, image_bands, mask_band, nodata)
                if mask != path:
                    check_mask(file.layer, mask)
                described[stem] = file, mask
            except DamagedFileError as error:
                if on_error == 'raise':
                    raise
                damaged[stem] = error.path
        if not described:
            raise OSError(
                f'all {len(damaged)} images or masks are damaged, such as '
                f'{next(iter(damaged.values()))}'
            )
        opened = [file for file, _ in described.values()]
        numbers = Numbers(opened, offset, value_range in (None, 'softcon'))
        given = None if bands is None else normalize_band_names(bands)
        scenes = choose_bands(opened, given, image_bands is None, numbers)
        self.bands = scenes[0].bands
        self.image_bands = scenes[0].layers[0].indexes
        hint_at_offset(numbers.untold)
        scenes = with_level(scenes, level)
        kept = [mask for _, mask in described.values()]
        patches = list(map(Patch, scenes, kept, range(len(scenes))))
        self._check_sizes(patches)
        self._ranges = scene_ranges(scenes, value_range)
        self.level = scene_level(scenes[0])
        self.value_range = self._ranges[self.level]
        # Not kept open: there may be any number of files, each read once in an epoch
        self._reader = RasterReader(max_open=0)
        tell_scenes(scenes, value_range, self._ranges, self._read_whole)

        self._cache = None
        if cache is not None:
            if len({scene_level(scene) for scene in scenes}) > 1:
                raise ValueError(
                    'cache needs images of one processing level, got L1C and L2A. Give '
                    'level, or leave cache out'
                )
            layers = [patch.scene.layers[0] for patch in patches]
            as_stored = not any(
                any(x.offset) or any(factor != 1 for factor in x.scale) for x in layers
            )
            dtypes = {x.dtype for x in layers} if as_stored else {'float32'}
            self._cache = ImageCache(
                cache,
                [*(patch.image for patch in patches), *dict.fromkeys(kept)],
                [
                    mask_band,
                    *(
                        (x.indexes, x.nodata, x.alpha, x.scale, x.offset)
                        for x in layers
                    ),
                ],
                str(np.result_type(*dtypes)),
                lambda number: self._decode(
                    patches[number], (0, 0, *patches[number].shape)
                ),
                len(patches),
                self.value_range,
            )

        groups: dict[str, list[Patch]] = {}
        for stem, patch in zip(described, patches, strict=True):
            groups.setdefault(self._place(stem, places), []).append(patch)
        if on_error == 'skip':
            self.damage = Damage(damaged.values())
            # Places that have too few dates because of damage
            lost = {self._place(stem, places) for stem in damaged}
            few = {name for name in lost if len(groups.get(name, ())) < seasons}
            groups = {k: v for k, v in groups.items() if k not in few} or groups
        self.samples, self.places = list(groups.values()), list(groups)
        self._knows_places = seasons > 1 or places is not None
        if seasons == 1:
            # Every image is a sample, places only matter for what is kept apart
            self._separate()
        else:
            self._check_dates()

    def _read_whole(self, scene: Scene) -> Values:
        return self._reader.read(scene, 0, 0, scene.grid.height, scene.grid.width)

    def _check_sizes(self, patches: Sequence[Patch]) -> None:
        """Check that crops, or whole images, make a batch."""
        first = patches[0]
        for patch in patches:
            if self.size is None and patch.shape != first.shape:
                raise ValueError(
                    'images must have one size, or size must be given for random crops: '
                    f'{first.image} has {in_pixels(first.shape)} and {patch.image} '
                    f'{in_pixels(patch.shape)} pixels'
                )
            if min(patch.shape) < (self.size or 0):
                raise ValueError(
                    f'size must fit into every image, got {self.size} and {patch.image} '
                    f'of {in_pixels(patch.shape)} pixels'
                )

    def _check_dates(self) -> None:
        """Check that places have enough images, all of one size."""
        groups = dict(zip(self.places, self.samples, strict=True))
        if few := [name for name in groups if len(groups[name]) < self.seasons]:
            raise ValueError(
                f'seasons={self.seasons} needs as many images of each place, '
                f'{len(few)} of {len(groups)} places have fewer: '
                f'{", ".join(few[:_MAX_NAMED])}'
            )
        for name, group in groups.items():
            if len({patch.shape for patch in group}) > 1:
                raise ValueError(f'images of one place must have one size: {name}')

    def _place(self, stem: str, places: str | None) -> str:
        """Return the name of the place of an image."""
        if places is None:
            folder = os.path.dirname(stem) if self.seasons > 1 else ''
            return folder or stem
        match = re.search(places, stem)
        found = () if match is None else match.groups() or (match[0],)
        # A group that takes no part, as in x(y)?, has not found the place either
        if None in found or not found:
            raise ValueError(
                f'places must match every image, {places!r} does not {stem}'
            )
        return '/'.join(found)

    def _separate(self) -> None:
        """Make every image a sample of its own."""
        groups = zip(self.places, self.samples, strict=True)
        self.places = [place for place, group in groups for _ in group]
        self.samples = [[patch] for group in self.samples for patch in group]

    def images(self) -> 'ImageMaskFolder':
        """Return every image as a sample of its own, in order, without random choices.

        If images are cropped, it is the middle of each.
        """
        other = copy.copy(self)
        other._separate()
        other.seasons, other._random = 1, False
        # Another image would stand for one that is damaged
        other.damage = None
        return other

    def place(self, index: int) -> str | None:
        """Return the place of a sample, None if every image is a place of its own."""
        return self.places[index % len(self)] if self._knows_places else None

    def _wheres(self) -> list[str]:
        return sorted(set(self.places))

    def _only(self, chosen: npt.NDArray[Any]) -> Self:
        other = copy.copy(self)
        numbers = np.flatnonzero(np.isin(self.places, chosen))
        other.samples = [self.samples[i] for i in numbers]
        other.places = [self.places[i] for i in numbers]
        return other

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def _draw_sample(self, index: int) -> Sample:
        # The transform says what is wrong with masks of floats, if anything is
        return self.transforms(self._draw(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Read samples; transforms that say they are *batched* see them together."""
        samples = [self._read_intact(self._draw, index) for index in indices]
        types = {sample['mask'].dtype for sample in samples}
        if len(samples) < 2 or len(types) > 1 or not is_batched(self.transforms):
            return [self.transforms(sample) for sample in samples]
        batch = self.transforms(default_collate(samples))
        keys, columns = batch.keys(), batch.values()
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]

    def _draw(self, index: int) -> Sample:
        """Read a sample as it is before the transforms, an error if a file is damaged."""
        rng = self._generator(index)
        place = self.samples[index % len(self.samples)]
        dates = rng.permutation(len(place))[: self.seasons]
        window = self._crop(place[0], rng)

        # The mask is that of the first date
        read = [self._read(place[date], window, date == dates[0]) for date in dates]
        image = read[0].image
        if self.seasons > 1:
            image = np.stack([one.image for one in read])
        mask = read[0].mask
        if mask.dtype.kind in 'iu':
            mask = mask.astype(np.int64)
            # A label must not speak of what the image does not show
            mask[np.any([one.empty for one in read], 0)] = 0
        return {'image': torch.from_numpy(image), 'mask': torch.from_numpy(mask)}

    def _crop(self, patch: Patch, rng: np.random.Generator) -> _Window:
        """Return top, left, height and width of a part of an image."""
        if self.size is None:
            return 0, 0, *patch.shape
        down, right = (length - self.size for length in patch.shape)
        top, left = down // 2, right // 2
        if self._random:
            top, left = int(rng.integers(0, down + 1)), int(rng.integers(0, right + 1))
        return top, left, self.size, self.size

    def _read(self, patch: Patch, window: _Window, masked: bool) -> Decoded:
        """Read an image in [0, 1] and, if *masked*, its mask, from the cache or files."""
        if self._cache is None:
            found = self._decode(patch, window, masked)
            limits = self._ranges[scene_level(patch.scene)]
            return found._replace(image=to_unit_range(found.image, limits))
        top, left, height, width = window
        rows, columns = slice(top, top + height), slice(left, left + width)
        return self._cache.read(patch.number, rows, columns)

    def _decode(self, patch: Patch, window: _Window, masked: bool = True) -> Decoded:
        """Read an image, NaN without data, and, if *masked*, its mask from files."""
        image = self._reader.read(patch.scene, *window)
        empty = ~np.any(np.isfinite(image), 0)
        return Decoded(image, empty, self._mask(patch, window) if masked else empty)

    def _mask(self, patch: Patch, window: _Window) -> npt.NDArray[Any]:
        """Read the codes of a mask, 0 where it has no data."""
        band = self.mask_band or 1
        top, left, height, width = window
        part = Window(left, top, width, height)
        with open_raster(patch.mask) as source:
            stored = read_raster(source, [band], part)[0]
            empty = stored == source.nodatavals[band - 1]
            empty |= ~read_mask(source, part, band)
            scale, offset = source.scales[band - 1], source.offsets[band - 1]
        mask = scale_codes(stored, scale, offset)
        mask[empty] = 0
        return mask
