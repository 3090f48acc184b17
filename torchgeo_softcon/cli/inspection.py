# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Print what training would read of images."""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from affine import Affine
from lightning.fabric.utilities.rank_zero import rank_zero_module
from rasterio.windows import Window
from torch import nn

from .._cores import count_cores
from ..datasets.image_masks import ImageMaskFolder
from ..datasets.packed_scenes import PackedCover, is_packed
from ..datasets.patches import SUFFIXES
from ..datasets.scenes import WorldCoverScenes
from ..geo.discovery import find_rasters
from ..geo.find_files import find_files
from ..geo.grid import LONLAT, apply, parse_crs, projection
from ..geo.rasters import Scene, Values, has_mask, open_raster, read_raster
from ..landcover.products import WORLDCOVER
from ..report.pictures import Display, plot_classes, plot_images
from .parsers import CommandError, print_table

#: Size of a window by default, that of SSL4EO-S12.
_PATCH_SIZE = 264

#: Scenes and files that are listed by name, and side of the grid that land cover is read on.
_MOST_LISTED = 20
_COVER_SIDE = 256

#: Windows side by side in a picture, and draws for each that is not there yet.
_COLUMNS = 4
_TRIES = 4

#: Numbers that a check reads at once.
_AT_ONCE = 2**25


def inspect(
    paths: Sequence[str], check: bool, plot: str | None, windows: int, **options: Any
) -> int:
    """Print all about images, and return the exit status.

    *options* are those of :class:`.WorldCoverScenes` or :class:`.ImageMaskFolder`.
    """
    damaged = _check(paths) if check else {}
    masks = len(paths) == 1 and all(
        Path(paths[0], name).is_dir() for name in ('images', 'masks')
    )
    dataset: Any = None
    with _collect_notes() as notes:
        if not masks:
            dataset = _open_scenes(paths, damaged, options)
        elif not damaged:
            dataset = _open_folder(paths[0], options)
        if dataset is not None:
            (_print_folder if masks else _print_scenes)(dataset)
            if plot is not None:
                _plot(dataset, plot, windows)
    kinds = [line for line, _ in getattr(dataset, 'kinds', ())]
    _print_list('notes', [note for note in notes if note not in kinds])
    return int(bool(damaged))


@contextmanager
def _collect_notes() -> Iterator[list[str]]:
    """Collect what is logged and warned of, which a training would print."""
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    # Which of Lightning's loggers it is depends on which of its packages was imported last
    logger = rank_zero_module.log
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', UserWarning)
            yield notes
        notes += [str(w.message) for w in caught if w.category is UserWarning]
    finally:
        logger.handlers, logger.propagate = before


def _check(paths: Sequence[str]) -> dict[str, str]:
    """Read all files, and print and return those that cannot be read, with the reason."""
    files = find_files(paths, SUFFIXES, 'images')
    print(f'reading {len(files)} files ...', file=sys.stderr, flush=True)
    with ThreadPoolExecutor(count_cores()) as pool:
        reasons = zip(files, pool.map(_find_damage, files), strict=True)
        damaged = {file: reason for file, reason in reasons if reason}
    print(f'{len(damaged)} of {len(files)} files are damaged')
    for reason in damaged.values():
        print(f'  {reason}')
    return damaged


def _find_damage(path: str) -> str:
    """Read a whole file, and return why that fails, empty if it does not."""
    try:
        with open_raster(path) as source:
            block = source.block_shapes[0][0]
            rows = max(1, _AT_ONCE // (source.width * source.count) // block) * block
            for top in range(0, source.height, rows):
                window = Window(0, top, source.width, min(rows, source.height - top))
                read_raster(source, source.indexes, window)
    except OSError as error:
        return str(error)
    return ''


def _open_scenes(
    paths: Sequence[str], damaged: dict[str, str], options: dict[str, Any]
) -> WorldCoverScenes | None:
    """Open georeferenced images as training does, but for damaged ones."""
    left_out: dict[str, str] = {}
    worldcover = options.pop('worldcover', None)
    if len(paths) == 1 and is_packed(paths[0]):
        if worldcover is None:
            with suppress(FileNotFoundError):  # packed without land cover
                worldcover = PackedCover(paths[0])
        paths = [str(Path(paths[0], 'images'))]
    if damaged:
        paths = [f for f in find_rasters(paths, left_out) if f not in damaged]
        if not paths:
            return None
    size = options.pop('patch_size', None)
    dataset = WorldCoverScenes(
        paths,
        worldcover,
        patch_size=size or 1,
        transforms=nn.Identity(),
        allow_unlabelled=worldcover is None,
        min_valid=0.5,
        **options,
    )
    dataset.left_out = {**left_out, **dataset.left_out}
    if size is None:
        sides = [min(p.grid.height, p.grid.width) for p in dataset.places]
        dataset.patch_size = min(_PATCH_SIZE, *sides)
        dataset = dataset.with_windows()
    return dataset


def _open_folder(root: str, options: dict[str, Any]) -> ImageMaskFolder:
    """Open images and masks as training does."""
    options['size'] = options.pop('patch_size', None)
    if others := set(options) - {*signature(ImageMaskFolder.__init__).parameters}:
        names = ', '.join(f'--{name.replace("_", "-")}' for name in sorted(others))
        raise CommandError(f'{names} must be left out for a folder of images and masks')
    return ImageMaskFolder(root, transforms=nn.Identity(), **options)


def _print_folder(dataset: ImageMaskFolder) -> None:
    """Print what is read of images with masks."""
    sample = dataset[0]
    image, codes = sample['image'], sample['mask'].unique().tolist()
    bands = ', '.join(dataset.bands or [f'{len(image)} unnamed bands'])
    print(f'{_count(len(dataset), "image")} with masks, {bands}')
    print(f'\n{dataset.samples[0][0].image}')
    print(f'  size        {image.shape[1]} x {image.shape[2]} pixels')
    print(f'  classes     {", ".join(map(str, codes))}')
    rows = [('band', 'becomes 0', 'becomes 1', 'in [0, 1]')]
    names = dataset.bands or range(1, 1 + len(image))
    for name, (low, high), pixels in zip(
        names, dataset.value_range, image.numpy(), strict=True
    ):
        rows.append((str(name), f'{low:.4g}', f'{high:.4g}', _extent(pixels)))
    print_table(rows, indent=2)


def _print_scenes(dataset: WorldCoverScenes) -> None:
    """Print what is read of georeferenced images."""
    scenes = [scene for place in dataset.places for scene in place.scenes]
    bands = ', '.join(dataset.bands or [f'{scenes[0].count} unnamed bands'])
    places = f'{_count(len(scenes), "scene")} at {_count(len(dataset.places), "place")}'
    print(f'{places}, windows of {dataset.patch_size} pixels, {bands}')
    for line, _ in dataset.kinds:
        print(line)
    shown = [scene for _, scene in dataset.kinds]
    for scene in shown:
        _print_scene(dataset, scene)
    others = [scene for scene in scenes if scene not in shown]
    _print_list('other scenes', [f'{s.name}, {_place(s)}' for s in others])
    left_out = [f'{path}: {reason}' for path, reason in dataset.left_out.items()]
    _print_list('left out', left_out)


def _print_scene(dataset: WorldCoverScenes, scene: Scene) -> None:
    """Print a scene with its bands."""
    values = dataset.read_middle(scene)
    scaled = dataset.scale(scene, values.copy())
    print(f'\n{scene.name}')
    print(f'  size        {_place(scene)}')
    print(f'  no data     {_no_data(scene)}')
    if dataset.worldcover is not None:
        print(f'  land cover  {_cover(dataset, scene)}')
    side = ' x '.join(map(str, values.shape[1:]))
    print(f'  sample      the {side} pixels in the middle')
    rows = [
        ('band', 'file', 'type', 'scale', 'offset', 'stored', 'in [0, 1]', 'clipped')
    ]
    bands = [
        (layer, *band)
        for layer in scene.layers
        for band in zip(layer.indexes, layer.scale, layer.offset, strict=True)
    ]
    names = scene.bands or range(1, 1 + len(bands))
    for name, band, read, pixels in zip(names, bands, values, scaled, strict=True):
        layer, index, scale, offset = band
        known = pixels[np.isfinite(read)]
        clipped = ((known <= 0) | (known >= 1)).mean() if known.size else 0
        rows.append(
            (
                *(str(name), f'{Path(layer.path).name} {index}', layer.dtype),
                *(f'{scale:g}', f'{offset:g}', _extent((read - offset) / scale)),
                *(_extent(known), f'{clipped:.0%}'),
            )
        )
    print_table(rows, indent=2)


def _extent(values: Values) -> str:
    """Write the smallest and largest of some values."""
    known = values[np.isfinite(values)]
    return f'{known.min():.4g} .. {known.max():.4g}' if known.size else 'no data'


def _place(scene: Scene) -> str:
    """Write size, pixels and place of a scene."""
    grid = scene.grid
    to_degrees = projection(grid.crs, parse_crs(LONLAT))
    x, y = apply(grid.transform, grid.width / 2, grid.height / 2)
    lon, lat = (x, y) if to_degrees is None else to_degrees.transform(x, y)
    size = abs(grid.transform.a) or abs(grid.transform.b)
    crs = ':'.join(grid.crs.to_authority() or [grid.crs.name])
    unit = grid.crs.axis_info[0].unit_name if grid.crs.axis_info else 'units'
    return (
        f'{grid.height} x {grid.width} pixels of {size:g} {unit} in {crs}, around '
        f'{abs(lon):.4f} {"E" if lon >= 0 else "W"} {abs(lat):.4f} {"N" if lat >= 0 else "S"}'
    )


def _no_data(scene: Scene) -> str:
    """Write what tells where a scene has no data."""
    values = dict.fromkeys(v for layer in scene.layers for v in layer.nodata)
    parts = [
        f'{value:g}{" in all bands" * (value == 0)}'
        for value in values
        if value is not None
    ]
    parts += [f'where band {layer.alpha} is 0' for layer in scene.layers if layer.alpha]
    with open_raster(scene.layers[0].path) as source:
        parts += ['the mask of the file'] * has_mask(source)
    return ', '.join(parts) or 'none but NaN'


def _cover(dataset: WorldCoverScenes, scene: Scene) -> str:
    """Write the share of each class of land cover below a scene."""
    cover, grid = dataset.worldcover, scene.grid
    assert cover is not None
    height, width = (min(n, _COVER_SIDE) for n in (grid.height, grid.width))
    if isinstance(cover, PackedCover):
        with open_raster(cover.find(grid, scene.name)) as source:
            mask = torch.from_numpy(source.read(1, out_shape=(height, width)))
    else:
        scale = Affine.scale(grid.width / width, grid.height / height)
        mask = cover.read_window(grid.crs, grid.transform * scale, height, width)
    codes, counts = (found.tolist() for found in mask.unique(return_counts=True))
    names = {dataset.product.fill: 'no data', **dataset.product.names}
    return ', '.join(
        f'{names.get(code, code)} {count / mask.numel():.0%}'
        for count, code in sorted(zip(counts, codes, strict=True), reverse=True)
    )


def _plot(dataset: Any, path: str, count: int) -> None:
    """Draw windows as training draws them, and their land cover."""
    samples: list[Any] = []
    for index in range(_TRIES * count):
        sample = dataset[index]
        # A window of the size of an image is drawn again and again
        if not any(torch.equal(sample['image'], s['image']) for s in samples):
            samples.append(sample)
        if len(samples) == count:
            break
    images = torch.stack([sample['image'] for sample in samples])
    show = Display(images, dataset.bands)
    pictures = [show(image) for image in images]
    if getattr(dataset, 'worldcover', samples) is None:
        figure = plot_images(pictures, columns=_COLUMNS)
    else:
        product = getattr(dataset, 'product', WORLDCOVER)
        masks = [sample['mask'] for sample in samples]
        figure = plot_classes(masks, pictures, product, _COLUMNS)
    figure.savefig(path, dpi=200)
    shown = _count(len(samples), 'window')
    print(f'\n{path} shows {shown} of {images.shape[-1]} pixels. {show.caption}')


def _count(number: int, noun: str) -> str:
    """Write a number of things."""
    return f'{number} {noun}{"s" * (number != 1)}'


def _print_list(title: str, lines: Sequence[str]) -> None:
    """Print the first of some lines below a title, and how many more there are."""
    if lines:
        print(f'\n{title}')
    for line in lines[:_MOST_LISTED]:
        print(f'  {line}')
    if len(lines) > _MOST_LISTED:
        print(f'  and {len(lines) - _MOST_LISTED} more')
