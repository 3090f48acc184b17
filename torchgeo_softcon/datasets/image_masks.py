# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Image patches with masks of WorldCover codes, without georeference."""

import copy
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from .._checks import check_counts, check_types
from .._compat import Sample
from ..bands import Level
from ..transforms.worldcover import WorldCoverMultiLabel
from .base import DrawnImages, check_seed, is_batched
from .damage import Damage, OnError
from .image_cache import ImageCache
from .patches import Part, Patch, PatchFiles, find_patches, in_pixels
from .scaling import SceneScaler, ValueRange

#: Places that an error message lists.
_MAX_NAMED = 5


class ImageMaskFolder(DrawnImages):
    """Image patches and masks of ESA WorldCover codes in two folders.

    ``images/a/b.png`` belongs to ``masks/a/b.*``, or to ``masks/a.*`` if that is the
    mask of all images in the folder ``a``. The mask may also be a band of the image.

    With *seasons* = 1 every image is a sample. With more, images of one folder are
    dates of one place, or those for which the regular expression *places* finds the
    same text, and a place is a sample with that many different dates in random order.
    The mask is that of the first date drawn.

    Random choices are a pure function of *seed* and the index. Indices beyond the
    length start again with the first sample and make new choices.

    Images are read as by :class:`.WorldCoverScenes`. A mask with a colour table keeps its
    codes.

    Dataset features:

    * *image*: float32 in [0, 1] of shape (C, H, W), or (T, C, H, W) for T > 1 seasons.
      Pixels without data (nodata value, NaN, infinity, masked, transparent) are 0. A
      nodata value of 0 in integers counts only where all bands have it
    * *mask*: WorldCover codes, long of shape (H, W), 0 is no data, also where one of the
      dates has none in all of its bands. Masks of floats stay floats. The default
      *transforms* replace it by a multi-hot *label* of shape (K,)
    """

    _places = 'places'

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
        radar_quantiles: bool = False,
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
            value_range: What becomes 0 and 1, see :class:`.WorldCoverScenes`.
            nodata: Value of pixels without data, None for what each file says.
            seasons: Number of different dates per sample.
            places: Regular expression for the path of an image below *images*, without
                suffix. Images with the same groups (or whole match) are of one place:
                ``'^(.*)_'`` for names of a place and a date,
                ``r'^(\d+\.\d)\d*_(\d+\.\d)'`` for squares of 0.1 degrees in names
                of latitude and longitude. By default those in one folder with more than
                one of *seasons*, else every image is a place.
            size: Height and width of a random crop, None for whole images.
            transforms: Function of a sample, by default
                :class:`.WorldCoverMultiLabel`.
            seed: Seed of dates and crops.
            level: Processing level of Sentinel-2, see :class:`.WorldCoverScenes`.
            cache: Folder to which decoded images and masks are written once, to be read
                from there: much faster than JPEG or PNG, the same to the bit, a byte per
                value of 8-bit images. For images of one size, none of which is damaged.
            offset: What is added to the numbers as they are stored, see
                :class:`.WorldCoverScenes`.
            on_error: ``'skip'`` leaves images out whose files, or those of their masks, are
                damaged. A sample that would show one is another one, always the same.
                :class:`.ImageMaskFolderDataModule` counts these draws per epoch and names
                the files at the end. By default a damaged file is an error.
            radar_quantiles: Clip each band of radar to its own quantiles in a crop, see
                :class:`.WorldCoverScenes`.

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
        if cache is not None and on_error == 'skip':
            raise ValueError(
                "on_error='skip' must be left out with cache, which is written of files "
                'that can all be read. Take damaged ones out of the folders: `torchgeo-'
                'softcon inspect --check` lists them'
            )
        check_counts(seasons=seasons, size=size)
        check_seed(seed)

        self.seasons = seasons
        self.size = size
        self._random = True
        self.seed = seed
        self.transforms = WorldCoverMultiLabel() if transforms is None else transforms

        damaged: dict[str, str] = {}
        patches = find_patches(
            Path(root or '', 'images') if images is None else Path(images),
            Path(root or '', 'masks') if masks is None else Path(masks),
            bands,
            image_bands,
            mask_band,
            nodata,
            offset,
            level,
            to_digital=value_range in (None, 'softcon'),
            damaged=None if on_error == 'raise' else damaged,
        )
        scenes = [patch.scene for patch in patches]
        self.bands = scenes[0].bands
        self.image_bands = scenes[0].layers[0].indexes
        self._check_sizes(patches)
        self._scale = SceneScaler(scenes, value_range, radar_quantiles)
        self.level, self.value_range = self._scale.level, self._scale.value_range
        files = PatchFiles(mask_band)
        self._scale.tell(scenes, files.reader)
        self._source: PatchFiles | ImageCache = files
        if cache is not None:
            self._source = ImageCache(cache, patches, files)

        groups: dict[str, list[Patch]] = {}
        for patch in patches:
            groups.setdefault(self._place(patch.stem, places), []).append(patch)
        if on_error == 'skip':
            self.damage = Damage(damaged.values())
            # Places that have too few dates because of damage
            lost = {self._place(stem, places) for stem in damaged}
            enough = {
                name: group
                for name, group in groups.items()
                if name not in lost or len(group) >= seasons
            }
            groups = enough or groups
        self.samples, self.places = list(groups.values()), list(groups)
        self._knows_places = seasons > 1 or places is not None
        if seasons == 1:
            # Every image is a sample, places only matter for what is kept apart
            self._separate()
        else:
            self._check_dates()

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
        few = []
        for name, group in zip(self.places, self.samples, strict=True):
            few += [name] * (len(group) < self.seasons)
            if len({patch.shape for patch in group}) > 1:
                raise ValueError(f'images of one place must have one size: {name}')
        if few:
            raise ValueError(
                f'seasons={self.seasons} needs as many images of each place, '
                f'{len(few)} of {len(self.places)} places have fewer: '
                f'{", ".join(few[:_MAX_NAMED])}'
            )

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

    def images(self) -> Self:
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

    def _keys(self) -> list[str]:
        return self.places

    def _only(self, numbers: npt.NDArray[np.int64]) -> Self:
        other = copy.copy(self)
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
        part = self._crop(place[0], rng)
        chosen = [place[date] for date in dates]
        windows = [(p.scene, self._source.read_image(p, part)) for p in chosen]
        mask = self._source.read_mask(chosen[0], part)
        if mask.dtype.kind in 'iu':
            mask = mask.astype(np.int64)
        return self._scale.sample(windows, torch.from_numpy(mask))

    def _crop(self, patch: Patch, rng: np.random.Generator) -> Part:
        """Return top, left, height and width of a part of an image."""
        if self.size is None:
            return 0, 0, *patch.shape
        down, right = (length - self.size for length in patch.shape)
        top, left = down // 2, right // 2
        if self._random:
            top, left = int(rng.integers(0, down + 1)), int(rng.integers(0, right + 1))
        return top, left, self.size, self.size
