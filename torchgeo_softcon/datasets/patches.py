# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Image patches in folders, their bands, and the masks that belong to them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
from affine import Affine
from rasterio.windows import Window

from ..bands import Level, normalize_band_names
from ..geo.describe import OpenedFile, describe_file
from ..geo.discovery import scene_from_file
from ..geo.find_files import find_files
from ..geo.grid import LONLAT, Grid, parse_crs
from ..geo.mosaic import scale_codes
from ..geo.numbers import Numbers
from ..geo.rasters import (
    DamagedFileError,
    RasterReader,
    Scene,
    Values,
    find_alpha,
    open_raster,
    read_mask,
    read_raster,
)
from ..geo.sentinel2 import hint_at_offset
from .scaling import with_level

#: File types that a folder is searched for.
SUFFIXES = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.jp2')

#: Top, left, height and width.
Part = tuple[int, int, int, int]

#: Files that an error message lists.
_MAX_NAMED = 5


class Patch(NamedTuple):
    """An image, whose place is unknown: path without suffix, number, and mask."""

    stem: str
    number: int
    scene: Scene
    mask: Path

    @property
    def image(self) -> Path:
        """File of the image, that of the mask, too, if it is one of the bands."""
        return Path(self.scene.name)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.scene.grid.height, self.scene.grid.width


class PatchFiles:
    """Reads windows of images and their masks from files."""

    def __init__(self, mask_band: int | None) -> None:
        """Initialize a new PatchFiles instance."""
        self.mask_band = mask_band
        # Not kept open: there may be any number of files, each read once in an epoch
        self.reader = RasterReader(max_open=0)

    def read_image(self, patch: Patch, part: Part) -> Values:
        """Read an image (C, H, W), NaN where it has no data."""
        return self.reader.read(patch.scene, *part)

    def read_mask(self, patch: Patch, part: Part) -> npt.NDArray[Any]:
        """Read the codes of a mask, 0 where it has no data."""
        top, left, height, width = part
        window, band = Window(left, top, width, height), self.mask_band or 1
        with open_raster(patch.mask) as source:
            stored = read_raster(source, [band], window)[0]
            empty = stored == source.nodatavals[band - 1]
            empty |= ~read_mask(source, window, band)
            scale, offset = source.scales[band - 1], source.offsets[band - 1]
        mask = scale_codes(stored, scale, offset)
        mask[empty] = 0
        return mask


def find_patches(
    images: Path,
    masks: Path,
    bands: Sequence[str] | None,
    image_bands: Sequence[int] | None,
    mask_band: int | None,
    nodata: float | None,
    offset: float | None,
    level: Level | None,
    to_digital: bool,
    damaged: dict[str, str] | None,
) -> list[Patch]:
    """Find images and the masks that belong to them, see :class:`.ImageMaskFolder`.

    Reflectance goes *to_digital* numbers, see :func:`.find_scenes`. Damaged files are noted
    by the stem of their image in *damaged*, or an error without.
    """
    files = _find_images(images, 'images')
    mask_files = list(files.values())
    if mask_band is None:
        mask_files = _match_masks(files, _find_images(masks, 'masks'), images, masks)
    opened: dict[str, tuple[OpenedFile, Path]] = {}
    for (stem, path), mask in zip(files.items(), mask_files, strict=True):
        try:
            file = _describe_image(path, image_bands, mask_band, nodata)
            if mask != path:
                _check_mask(file.layer.grid, path, mask)
            opened[stem] = file, mask
        except DamagedFileError as error:
            if damaged is None:
                raise
            damaged[stem] = error.path
    if not opened:
        names = [*(damaged or {}).values()]
        raise OSError(
            f'all {len(names)} images or masks are damaged, such as {names[0]}'
        )
    described = [file for file, _ in opened.values()]
    numbers = Numbers(described, offset, to_digital)
    given = None if bands is None else normalize_band_names(bands)
    scenes = _choose_bands(described, given, image_bands is None, numbers)
    hint_at_offset(numbers.untold)
    kept = (mask for _, mask in opened.values())
    return list(map(Patch, opened, range(len(opened)), with_level(scenes, level), kept))


def _find_images(folder: Path, what: str) -> dict[str, Path]:
    """List files by their path below a folder, without suffix."""
    files: dict[str, Path] = {}
    for path in find_files(folder, SUFFIXES, what) if folder.is_dir() else ():
        stem = Path(path).relative_to(folder).with_suffix('').as_posix()
        if stem in files:
            raise ValueError(
                f'{what} must have one file per name: {files[stem]}, {path}'
            )
        files[stem] = Path(path)
    if not files:
        raise FileNotFoundError(
            f'{what} must be a folder with files ({", ".join(SUFFIXES)}), found none in '
            f'{folder}'
        )
    return files


def _match_masks(
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


def _check_mask(grid: Grid, image: Path, path: Path) -> None:
    """Check that a mask has one band, and as many pixels as its image."""
    with open_raster(path) as source:
        count = source.count - (find_alpha(source) is not None)
        shape, expected = source.shape, (grid.height, grid.width)
    if count != 1:
        raise ValueError(
            f'a mask must have one band of WorldCover codes, {path} has {count}'
        )
    if shape != expected:
        raise ValueError(
            f'an image and its mask must have one size, {image} has '
            f'{in_pixels(expected)} and {path} {in_pixels(shape)} pixels'
        )


def in_pixels(shape: tuple[int, int]) -> str:
    """Word a size for messages."""
    return f'{shape[0]} x {shape[1]}'


def _describe_image(
    path: Path,
    image_bands: Sequence[int] | None,
    mask_band: int | None,
    nodata: float | None,
) -> OpenedFile:
    """Describe an image, and name its bands if it does so itself."""
    with open_raster(path) as source:
        mask = (1 if mask_band is None else mask_band,)
        chosen = (1,) if image_bands is None else tuple(image_bands)
        for option, positions in ('mask_band', mask), ('image_bands', chosen):
            if not positions or not {*positions} <= {*source.indexes}:
                raise ValueError(
                    f'{option} must be from 1 to {source.count}, the number of bands '
                    f'of {path}, got {", ".join(map(str, positions)) or "none"}'
                )
        # Nobody asks for its place
        grid = Grid(parse_crs(LONLAT), Affine.identity(), *source.shape)
        file = describe_file(source, grid, None, nodata, image_bands, mask_band)
    return file._replace(names=None if file.guess else file.names)


def _choose_bands(
    files: Sequence[OpenedFile],
    given: tuple[str, ...] | None,
    by_name: bool,
    numbers: Numbers,
) -> list[Scene]:
    """Bring the bands of all images, *given* or of the first one, into one order."""
    bands = files[0].names if given is None else given
    scenes: list[Scene] = []
    for file in files:
        names, wanted = file.names, None
        if bands and names and by_name and {*bands} <= {*names}:
            wanted = bands
        elif bands and names and given is None and bands != names:
            raise ValueError(
                f'{file.layer.path} must have the bands {", ".join(bands)} as '
                f'{files[0].layer.path}, it has {", ".join(names)}: choose common '
                'ones with bands'
            )
        else:
            file = file._replace(names=bands)
        count = len(file.layer.indexes) if wanted is None else len(wanted)
        if scenes and count != scenes[0].count:
            raise ValueError(
                f'{file.layer.path} must have {scenes[0].count} bands as '
                f'{files[0].layer.path}, got {count}'
            )
        if bands is not None and len(bands) != count:
            raise ValueError(f'bands must name the {count} image_bands, got {bands}')
        scenes.append(scene_from_file(file, wanted, numbers))
    return scenes
