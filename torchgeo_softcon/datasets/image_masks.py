# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Image patches with masks of WorldCover codes, without georeference."""

import copy
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from rasterio.windows import Window

from .._checks import check_counts, check_types
from .._compat import Sample
from ..bands import RGB_BANDS, Level, normalize_band_names
from ..geo.find_files import find_files
from ..geo.rasters import (
    RGB_COLORS,
    drop_empty,
    find_alpha,
    has_mask,
    nodata_of,
    open_raster,
    read_raster,
    read_values,
)
from ..transforms.worldcover import WorldCoverMultiLabel
from .base import DivisibleImages, check_seed
from .image_cache import Decoded, ImageCache
from .scaling import ValueRange, choose_level, resolve_value_range, to_unit_range

#: File types that a folder is searched for.
SUFFIXES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.jp2')

#: Files that an error message lists.
_MAX_NAMED = 5


class Patch(NamedTuple):
    """Files of an image and its mask, one if the mask is a band, and rows and columns."""

    image: Path
    mask: Path
    shape: tuple[int, int]
    number: int


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
      Pixels without data (nodata value, NaN, infinity, transparent) are 0. A nodata
      value of 0 in integers counts only where all bands have it
    * *mask*: WorldCover codes, long of shape (H, W), 0 is no data. Masks of floats stay
      floats. The default *transforms* replace it by a multi-hot *label* of shape
      (K,)
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
            bands: Names of the bands in *image_bands*.
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
                ``'L1C'`` or ``'L2A'``. By default what names and bands tell, see
                :func:`.choose_level`.
            cache: Folder to which decoded images and masks are written, once, to be read
                from there: much faster than JPEG or PNG, and the same to the bit. About
                one byte per value of 8-bit images. For images of one size.

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
        files = _find(image_root, 'images')
        mask_files = list(files.values())
        if mask_band is None:
            mask_root = Path(root or '', 'masks') if masks is None else Path(masks)
            mask_files = _match(files, _find(mask_root, 'masks'), image_root, mask_root)

        first = next(iter(files.values()))
        with open_raster(first) as source:
            needed = source.count
            self.image_bands, self.bands = self._choose_bands(
                source, image_bands, bands
            )
        if image_bands is not None:
            needed = max(*self.image_bands, mask_band or 1)
        patches = []
        dtypes = set()
        pairs = zip(files.values(), mask_files, strict=True)
        for number, (path, mask) in enumerate(pairs):
            with open_raster(path) as source:
                dtypes.add(str(source.dtypes[0]))
                patches.append(Patch(path, mask, source.shape, number))
                more = source.count > needed and image_bands is None
                if source.count < needed or more:
                    raise ValueError(
                        f'{path} must have {needed} bands as {first}, got {source.count}'
                    )
            if mask != path:
                _check_mask(patches[-1])
        self._check_sizes(patches)
        self.level = choose_level(
            level,
            self.bands,
            files.values(),
            value_range == 'softcon' or (value_range is None and dtypes != {'uint8'}),
        )
        self.value_range = resolve_value_range(
            value_range, self.bands, len(self.image_bands), dtypes, self.level
        )

        self._cache = None
        if cache is not None:
            self._cache = ImageCache(
                cache,
                [*files.values(), *dict.fromkeys(mask_files)],
                (self.image_bands, mask_band, nodata),
                str(np.result_type(*dtypes)),
                lambda number: self._decode(patches[number]),
                len(patches),
            )

        groups: dict[str, list[Patch]] = {}
        for stem, patch in zip(files, patches, strict=True):
            groups.setdefault(self._place(stem, places), []).append(patch)
        self.samples, self.places = list(groups.values()), list(groups)
        self._knows_places = seasons > 1 or places is not None
        if seasons == 1:
            # Every image is a sample, places only matter for what is kept apart
            self._separate()
        else:
            self._check_dates()

    def _choose_bands(
        self,
        source: Any,
        image_bands: Sequence[int] | None,
        bands: Sequence[str] | None,
    ) -> tuple[tuple[int, ...], tuple[str, ...] | None]:
        """Return positions and names of the bands of the first image."""
        if image_bands is None:
            without = (self.mask_band, find_alpha(source))
            image_bands = [i for i in source.indexes if i not in without]
        indexes = tuple(image_bands)
        mask_band = (1 if self.mask_band is None else self.mask_band,)
        for option, chosen in ('mask_band', mask_band), ('image_bands', indexes):
            if not chosen or not {*chosen} <= {*source.indexes}:
                raise ValueError(
                    f'{option} must be from 1 to {source.count}, the number of bands of '
                    f'{source.name}, got {", ".join(map(str, chosen)) or "none"}'
                )
        if bands is not None:
            names = normalize_band_names(bands)
            if len(names) != len(indexes):
                raise ValueError(
                    f'bands must name the {len(indexes)} image_bands, got {names}'
                )
            return indexes, names
        colors = tuple(source.colorinterp[i - 1] for i in indexes)
        return indexes, RGB_BANDS if colors == RGB_COLORS else None

    def _check_sizes(self, patches: Sequence[Patch]) -> None:
        """Check that crops, or whole images, make a batch."""
        first = patches[0]
        for patch in patches:
            if self.size is None and patch.shape != first.shape:
                raise ValueError(
                    'images must have one size, or size must be given for random crops: '
                    f'{first.image} has {_pixels(first.shape)} and {patch.image} '
                    f'{_pixels(patch.shape)} pixels'
                )
            if min(patch.shape) < (self.size or 0):
                raise ValueError(
                    f'size must fit into every image, got {self.size} and {patch.image} '
                    f'of {_pixels(patch.shape)} pixels'
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

    def __getitem__(self, index: int) -> Sample:
        """Read a sample."""
        rng = self._generator(index)
        place = self.samples[index % len(self.samples)]
        dates = rng.permutation(len(place))[: self.seasons]
        window = self._crop(place[0], rng)

        # The mask is that of the first date
        images = [self._read(place[date], window, date == dates[0]) for date in dates]
        pixels = [to_unit_range(image, self.value_range) for image, _, _ in images]
        image = pixels[0] if self.seasons == 1 else np.stack(pixels)
        mask = images[0].mask
        if mask.dtype.kind in 'iu':
            mask = mask.astype(np.int64)
            # What a mask of an image leaves out has no label, as in WorldCoverScenes
            mask[np.any([empty for _, empty, _ in images], 0)] = 0
        # The transform says what is wrong with floats, if anything is
        sample: Sample = {
            'image': torch.from_numpy(image),
            'mask': torch.from_numpy(mask),
        }
        return self.transforms(sample)

    def _crop(self, patch: Patch, rng: np.random.Generator) -> Window | None:
        if self.size is None:
            return None
        down, right = (length - self.size for length in patch.shape)
        top, left = down // 2, right // 2
        if self._random:
            top, left = int(rng.integers(0, down + 1)), int(rng.integers(0, right + 1))
        return Window(left, top, self.size, self.size)

    def _read(self, patch: Patch, window: Window | None, masked: bool) -> Decoded:
        """Read an image and, if *masked*, its mask, from the cache if there is one."""
        if self._cache is None:
            return self._decode(patch, window, masked)
        rows, columns = (slice(None),) * 2 if window is None else window.toslices()
        return self._cache.read(patch.number, rows, columns)

    def _decode(
        self, patch: Patch, window: Window | None = None, masked: bool = True
    ) -> Decoded:
        """Read an image and, if *masked*, its mask from their files."""
        with open_raster(patch.image) as source:
            alpha = find_alpha(source)
            if alpha in (*self.image_bands, self.mask_band):
                alpha = None
            nodata = nodata_of(source, self.image_bands, self.nodata)
            values, zero = read_values(source, self.image_bands, nodata, alpha, window)
            empty = np.zeros(values.shape[1:], np.bool_)
            if has_mask(source):
                empty = source.dataset_mask(window=window) == 0
        mask = self._mask(patch, window) if masked else empty
        return Decoded(drop_empty(values, zero), empty, mask)

    def _mask(self, patch: Patch, window: Window | None) -> npt.NDArray[Any]:
        band = self.mask_band or 1
        with open_raster(patch.mask) as source:
            mask: npt.NDArray[Any] = read_raster(source, [band], window)[0]
            nodata = source.nodatavals[band - 1]
        if nodata is not None:
            mask[mask == nodata] = 0
        return mask


def _find(folder: Path, what: str) -> dict[str, Path]:
    """List files by their path below a folder, without suffix."""
    files: dict[str, Path] = {}
    found = find_files(folder, SUFFIXES, what) if folder.is_dir() else []
    for path in map(Path, found):
        stem = path.relative_to(folder).with_suffix('').as_posix()
        if stem in files:
            raise ValueError(
                f'{what} must have one file per name: {files[stem]}, {path}'
            )
        files[stem] = path
    if not files:
        raise FileNotFoundError(
            f'{what} must be a folder with files ({", ".join(SUFFIXES)}), found none in '
            f'{folder}'
        )
    return files


def _match(
    images: dict[str, Path], masks: dict[str, Path], image_root: Path, mask_root: Path
) -> list[Path]:
    """Find the mask of each image, its own or that of its folder."""
    found = [masks.get(stem) or masks.get(os.path.dirname(stem)) for stem in images]
    missing = [stem for stem, mask in zip(images, found, strict=True) if mask is None]
    if missing:
        raise FileNotFoundError(
            f'{len(missing)} of {len(images)} images in {image_root} have no mask of the '
            f'same name in {mask_root}: {", ".join(missing[:_MAX_NAMED])}'
        )
    return [mask for mask in found if mask is not None]


def _check_mask(patch: Patch) -> None:
    """Check that a mask has one band, and as many pixels as its image."""
    with open_raster(patch.mask) as source:
        count, shape = source.count, source.shape
    if count != 1:
        raise ValueError(
            f'a mask must have one band of WorldCover codes, {patch.mask} has {count}'
        )
    if shape != patch.shape:
        raise ValueError(
            f'an image and its mask must have one size, {patch.image} has '
            f'{_pixels(patch.shape)} and {patch.mask} {_pixels(shape)} pixels'
        )


def _pixels(shape: tuple[int, int]) -> str:
    return f'{shape[0]} x {shape[1]}'
