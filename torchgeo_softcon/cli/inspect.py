# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Tell what training would read of some files: ``torchgeo-softcon inspect``."""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .parsers import CommandError, CommandParser, list_of

if TYPE_CHECKING:
    from ..datasets.image_masks import ImageMaskFolder
    from ..datasets.scenes import WorldCoverScenes
    from ..geo.rasters import Scene, Values

_DESCRIPTION = """\
Print what training would read of images: which files and bands make a scene, level, offset,
scale and no data of their numbers, a sample before and after scaling, and the land cover
below. PATH is a file, a folder or a pattern of georeferenced images, or a folder with the
folders images and masks. The exit status is 1 if --check finds damaged files."""

_EXAMPLES = """\
torchgeo-softcon inspect S2A_MSIL2A_20230601T101031_N0509_R022_T32UNE_20230601T120000.SAFE
  torchgeo-softcon inspect images --worldcover worldcover --plot windows.png --check"""

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


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        'inspect',
        _DESCRIPTION,
        _EXAMPLES,
        usage='%(prog)s PATH [PATH ...] [OPTIONS]',
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument('paths', nargs='+', metavar='PATH', help='images')
    group = parser.add_argument_group(
        'reading, as the options of the same names of the datamodules'
    )
    group.add_argument('--bands', type=list_of(str), help='to use: [B4,B3,B2]')
    group.add_argument('--all-bands', type=list_of(str), help='in file order')
    group.add_argument('--level', choices=('L1C', 'L2A'), help='of Sentinel-2')
    group.add_argument('--offset', type=float, help='what is added to all numbers')
    group.add_argument(
        '--value-range',
        type=_value_range,
        metavar='RANGE',
        help='what becomes 0 and 1: softcon, [0,10000], or a pair for each band',
    )
    group.add_argument('--nodata', type=float, help='value of pixels without data')
    group.add_argument('--patch-size', type=int, metavar='N', help='of a window')
    group = parser.add_argument_group('land cover')
    group.add_argument(
        '--worldcover', nargs='+', metavar='PATH', help='folders of tiles, or tiles'
    )
    group.add_argument('--year', type=int, help='year of the map')
    group.add_argument('--product', metavar='NAME', help='name or .yaml file')
    group = parser.add_argument_group('output')
    group.add_argument('--plot', metavar='FILE', help='picture of windows to write')
    group.add_argument(
        '--windows', type=int, default=8, metavar='N', help='windows of it, default: 8'
    )
    group.add_argument(
        '--check',
        action='store_true',
        default=False,
        help='read every file wholly, and list the damaged ones',
    )
    return parser


def _value_range(text: str) -> Any:
    """Read softcon, a pair of numbers, or a list of pairs."""
    return text if text == 'softcon' else list_of(lambda value: value)(text)


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = vars(parser().parse_args(args))
    paths, check = options.pop('paths'), options.pop('check')
    plot, windows = options.pop('plot', None), options.pop('windows')
    damaged = _check(paths) if check else {}
    folder = len(paths) == 1 and all(
        Path(paths[0], name).is_dir() for name in ('images', 'masks')
    )
    dataset: Any
    with _collect_notes() as notes:
        if folder and not damaged:
            dataset = _open_folder(paths[0], options)
            _print_folder(dataset)
        elif not folder:
            dataset = _open_scenes(paths, damaged, options)
            if dataset is not None:
                _print_scenes(dataset)
        else:
            dataset = None
        if plot is not None and dataset is not None:
            _plot(dataset, plot, windows)
    kinds = [line for line, _ in getattr(dataset, 'kinds', ())]
    _print_list('notes', [note for note in notes if note not in kinds])
    return int(bool(damaged))


@contextmanager
def _collect_notes() -> Iterator[list[str]]:
    """Collect what is logged and warned of, which a training would print."""
    from lightning.fabric.utilities.rank_zero import rank_zero_module

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
    from .._cores import count_cores
    from ..datasets.patches import SUFFIXES
    from ..geo.find_files import find_files

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
    from rasterio.windows import Window

    from ..geo.rasters import open_raster, read_raster

    try:
        with open_raster(path) as source:
            if source.driver == 'PNG':
                read_raster(source, source.indexes)
                return ''
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
) -> 'WorldCoverScenes | None':
    """Open georeferenced images as training does, but for damaged ones."""
    from torch import nn

    from ..datasets.packed_scenes import PackedCover, is_packed
    from ..datasets.scenes import WorldCoverScenes
    from ..geo.discovery import find_rasters

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


def _open_folder(root: str, options: dict[str, Any]) -> 'ImageMaskFolder':
    """Open images and masks as training does."""
    from torch import nn

    from ..datasets.image_masks import ImageMaskFolder

    options['size'] = options.pop('patch_size', None)
    if others := set(options) - {*signature(ImageMaskFolder.__init__).parameters}:
        names = ', '.join(f'--{name.replace("_", "-")}' for name in sorted(others))
        raise CommandError(f'{names} must be left out for a folder of images and masks')
    return ImageMaskFolder(root, transforms=nn.Identity(), **options)


def _print_folder(dataset: 'ImageMaskFolder') -> None:
    """Print what is read of images with masks."""
    count = len(dataset)
    sample = dataset[0]
    image, codes = sample['image'], sample['mask'].unique().tolist()
    bands = ', '.join(dataset.bands or [f'{len(image)} unnamed bands'])
    print(f'{count} image{"s" * (count > 1)} with masks, {bands}')
    print(f'\n{dataset.samples[0][0].image}')
    print(f'  size        {image.shape[1]} x {image.shape[2]} pixels')
    print(f'  classes     {", ".join(map(str, codes))}')
    rows = [('band', 'becomes 0', 'becomes 1', 'in [0, 1]')]
    names = dataset.bands or range(1, 1 + len(image))
    for name, pair, pixels in zip(names, dataset.value_range, image, strict=True):
        low, high = (f'{value:.4g}' for value in pair)
        rows.append((str(name), low, high, _extent(pixels.numpy())))
    _print_table(rows)


def _print_scenes(dataset: 'WorldCoverScenes') -> None:
    """Print what is read of georeferenced images."""
    scenes = [scene for place in dataset.places for scene in place.scenes]
    bands = ', '.join(dataset.bands or [f'{scenes[0].count} unnamed bands'])
    print(
        _count(len(scenes), 'scene'), 'at', _count(len(dataset.places), 'place'), end=''
    )
    print(f', windows of {dataset.patch_size} pixels, {bands}')
    for line, _ in dataset.kinds:
        print(line)
    shown = [scene for _, scene in dataset.kinds]
    for scene in shown:
        _print_scene(dataset, scene)
    others = [scene for scene in scenes if scene not in shown]
    _print_list('other scenes', [f'{s.name}, {_place(s)}' for s in others])
    left_out = [f'{path}: {reason}' for path, reason in dataset.left_out.items()]
    _print_list('left out', left_out)


def _print_scene(dataset: 'WorldCoverScenes', scene: 'Scene') -> None:
    """Print a scene with its bands."""
    values = dataset.read_middle(scene)
    stored = values.copy()
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
    number = 0
    for layer in scene.layers:
        for index, scale, offset in zip(
            layer.indexes, layer.scale, layer.offset, strict=True
        ):
            band = scene.bands[number] if scene.bands else str(number + 1)
            stored[number] = (stored[number] - offset) / scale
            pixels = scaled[number][~_missing(values[number])]
            clipped = (
                float(((pixels <= 0) | (pixels >= 1)).mean()) if pixels.size else 0
            )
            rows.append(
                (
                    *(band, f'{Path(layer.path).name} {index}', layer.dtype),
                    *(f'{scale:g}', f'{offset:g}', _extent(stored[number])),
                    *(_extent(pixels), f'{clipped:.0%}'),
                )
            )
            number += 1
    _print_table(rows)


def _missing(values: 'Values') -> Any:
    """Tell which values are no data."""
    import numpy as np

    return ~np.isfinite(values)


def _extent(values: 'Values') -> str:
    """Write the smallest and largest of some values."""
    known = values[~_missing(values)]
    return f'{known.min():.4g} .. {known.max():.4g}' if known.size else 'no data'


def _place(scene: 'Scene') -> str:
    """Write size, pixels and place of a scene."""
    from ..geo.grid import LONLAT, apply, parse_crs, projection

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


def _no_data(scene: 'Scene') -> str:
    """Write what tells where a scene has no data."""
    from ..geo.rasters import has_mask, open_raster

    parts = []
    for value in dict.fromkeys(v for layer in scene.layers for v in layer.nodata):
        if value is not None:
            parts.append(f'{value:g}{" in all bands" * (value == 0)}')
    parts += [f'where band {layer.alpha} is 0' for layer in scene.layers if layer.alpha]
    with open_raster(scene.layers[0].path) as source:
        parts += ['the mask of the file'] * has_mask(source)
    return ', '.join(parts) or 'none but NaN'


def _cover(dataset: 'WorldCoverScenes', scene: 'Scene') -> str:
    """Write the share of each class of land cover below a scene."""
    import torch
    from affine import Affine

    from ..datasets.packed_scenes import PackedCover
    from ..geo.rasters import open_raster

    cover = dataset.worldcover
    assert cover is not None
    grid = scene.grid
    height, width = (min(n, _COVER_SIDE) for n in (grid.height, grid.width))
    if isinstance(cover, PackedCover):
        with open_raster(cover.find(grid, scene.name)) as source:
            mask = torch.from_numpy(source.read(1, out_shape=(height, width)))
    else:
        scale = Affine.scale(grid.width / width, grid.height / height)
        mask = cover.read_window(grid.crs, grid.transform * scale, height, width)
    codes, counts = mask.unique(return_counts=True)
    names = {dataset.product.fill: 'no data', **dataset.product.names}
    shares = sorted(
        zip((counts / mask.numel()).tolist(), codes.tolist(), strict=True), reverse=True
    )
    return ', '.join(f'{names.get(code, code)} {share:.0%}' for share, code in shares)


def _plot(dataset: Any, path: str, count: int) -> None:
    """Draw windows as training draws them, and their land cover."""
    import torch

    from ..landcover.products import WORLDCOVER
    from ..report.pictures import Display, plot_classes, plot_images

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
        figure = plot_images(pictures, _COLUMNS)
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


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f'  {"  ".join(cells)}'.rstrip())
