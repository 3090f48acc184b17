# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The data in a folder, and the configuration that ``pretrain`` makes of them."""

import math
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from pyproj import CRS

from ..datasets.image_masks import ImageMaskFolder
from ..datasets.packed_scenes import has_cover
from ..geo.discovery import find_rasters, find_scenes
from ..geo.grid import outline
from ..landcover.download import TileDownload, download_tiles, tiles_of
from ..landcover.files import find_map_files
from ..landcover.products import WORLDCOVER
from ..ssl4eo.lulc import LULC
from ..ssl4eo.record_archive import RecordArchive, index_path
from ..ssl4eo.shards import find_splits, modality_folder
from .recipe import recipes, section

#: Recipes by whether there are labels, and a CUDA device.
_RECIPES = {
    (True, False): 'quickstart',
    (True, True): 'own_area',
    (False, False): 'dino_mc_small',
    (False, True): 'dino_mc',
}

#: Splits of SSL4EO-S12 and TerraMesh, of which the first one that is there is taken.
_ORDER = ('s2c', 's2a', 's1', 's2rgb', 's1rtc')

#: Images from which on a Vision Transformer is trained.
_MANY = 10_000

#: Bytes for an image of 224 px, all branches and views, in half precision: a generous guess
#: from the saved activations of a ViT-S/16 (0.24 GB in float32 for one view).
_BYTES = {True: 0.25e9, False: 0.75e9}

#: Parts of each raster for validation, of which the smallest is taken that a window fits in.
_VAL_FRACTIONS = (0.1, 0.25)

#: Places from which on some are kept for validation.
_ENOUGH = 50

#: Steps of an epoch of windows, at least.
_EPOCH = 16

#: Checkpoints in a run, and probes.
_CHECKPOINTS, _PROBES = 20, 4

_NO_LABELS = (
    'no land cover was found (--worldcover DIR names tiles, --download gets them)'
)


@dataclass
class Found:
    """Images in a folder: what they are in words, and who reads them."""

    text: str
    datamodule: str
    labels: bool
    height: int  # of the smallest image
    width: int
    options: dict[str, Any] = field(default_factory=dict)


def find_data(root: Path, worldcover: Path | None, download: bool, run: Path) -> Found:
    """Find out what a folder holds, with *worldcover* or the tiles of WorldCover in it.

    Missing tiles under scenes are downloaded, if allowed, to the folder of the *run*.

    Raises:
        ValueError: If it holds nothing that can be trained on.
    """
    archives = find_splits(root)
    if archives:
        return _find_archive(root, min(archives, key=_ORDER.index))
    if (root / 'images').is_dir() and (root / 'masks').is_dir():
        return _find_patches(root)
    try:
        return _find_scenes(root, worldcover, download, run)
    except FileNotFoundError as error:
        raise ValueError(
            f'{root} must have georeferenced rasters, folders images and masks with files '
            f'of the same names, or the folders s2c, s2a or s1 of SSL4EO-S12. {error}'
        ) from error


def _find_archive(root: Path, split: str) -> Found:
    """Describe an archive of SSL4EO-S12."""
    labels = sorted({*root.glob('*multilabel*.json'), *root.glob('*label*.parquet')})
    options = {'root': str(root), 'split': split, 'val_fraction': 0.05}
    packed = index_path(root, split).exists()
    layer = None if packed else modality_folder(root, LULC.upper())
    source = labels[0] if labels else layer
    if source is not None:
        options['labels'] = str(source) if labels else LULC
    kept = packed and RecordArchive(root, split).labels is not None
    return Found(
        f'SSL4EO-S12, split {split}, {"packed" if packed else "as published"}'
        + (f', with the labels of {source.name}' if source else ', with labels' * kept),
        'SSL4EOS12MLDataModule',
        source is not None or kept,
        264,
        264,
        options,
    )


def _find_patches(root: Path) -> Found:
    """Describe a folder of patches with masks."""
    images = ImageMaskFolder(root, size=1)
    shapes = {patch.shape for patches in images.samples for patch in patches}
    height, width = (min(sides) for sides in zip(*shapes, strict=True))
    return Found(
        f'{len(images.samples)} patches of {height} x {width} pixels or more, with masks',
        'ImageMaskFolderDataModule',
        True,
        height,
        width,
        {'root': str(root), 'val_fraction': 0.1 * (len(images.samples) >= _ENOUGH)},
    )


def _find_scenes(
    root: Path, worldcover: Path | None, download: bool, run: Path
) -> Found:
    """Describe rasters, and find the land cover under them, also what is packed."""
    images = root / 'images' if (root / 'images').is_dir() else root
    scenes = find_scenes(find_rasters(images))
    grids = [scene.grid for scene in scenes]
    if download:
        worldcover = worldcover or run / 'worldcover'
        degrees = CRS.from_epsg(4326)
        boxes = [outline(grid.crs, degrees, grid.bounds).bounds for grid in grids]
        done: TileDownload = download_tiles(tiles_of(boxes), worldcover)
        print(f'WorldCover in {worldcover}: {done}')
        if done.failed:
            raise ValueError('not all tiles of WorldCover came: start again to go on')
    places = [worldcover] if worldcover else [root / 'worldcover', run / 'worldcover']
    tiles: list[str] = [str(place) for place in places if place.is_dir()]
    if not tiles:
        tiles = [str(file) for file in sorted(root.rglob('ESA_WorldCover_*.tif'))]
    if tiles:
        find_map_files(tiles, WORLDCOVER, WORLDCOVER.check_year(None))
    bands = scenes[0].bands
    named = f' ({", ".join(bands)})' if bands else ''
    text = f'{len(scenes)} scenes of {scenes[0].count} bands{named}'
    packed = not tiles and has_cover(root)
    source: dict[str, Any] = {'images': str(images), 'worldcover': tiles or None}
    if packed:
        source = {'root': str(root)}
    elif not tiles:
        source['allow_unlabelled'] = True
    cover = (
        'packed land cover' if packed else 'WorldCover' if tiles else 'no WorldCover'
    )
    return Found(
        f'{text}, and {cover}',
        'WorldCoverScenesDataModule',
        packed or bool(tiles),
        min(grid.height for grid in grids),
        min(grid.width for grid in grids),
        source,
    )


def plan(
    found: Found, max_steps: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration of ``torchgeo fit`` and the reasons for it.

    It is a recipe: without a CUDA device one of the quick starts, with one that of a real
    run. With CUDA, the encoder is a ResNet-50 for fewer than 10,000 images, of which a
    Vision Transformer learns too little, else a ViT-S/16. A batch is the largest power of
    two up to 256 (64 without CUDA) that fits into half of the memory of the device, and is
    at most a quarter of the images. A run takes 100 epochs, but from 5,000 to 100,000 steps
    (without CUDA 300), or *max_steps*.

    Raises:
        ValueError: If there are too few images, or they are too small.
    """
    memory = 0
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    recipe = _RECIPES[found.labels, memory > 0]
    config: dict[str, Any] = yaml.safe_load(recipes()[recipe])
    model, chosen = config['model']['init_args'], config['data']['init_args']
    patch = min(chosen.get('patch_size', 264), found.height, found.width)
    size = min(model.get('size', 224), patch // 16 * 16)
    if size < 16:
        raise ValueError(
            f'images must have at least 16 x 16 pixels, found {found.text}'
        )
    data = dict(found.options)
    drawn = found.datamodule == 'WorldCoverScenesDataModule'  # windows, without end
    if drawn:
        parts = [p for p in _VAL_FRACTIONS if int(p * found.height) >= patch]
        data |= {'patch_size': patch, 'val_fraction': parts[0] if parts else 0.0}
    elif found.datamodule == 'ImageMaskFolderDataModule':
        data['size'] = patch
    images, channels = _count(found.datamodule, data)

    for name in ('bands', 'value_range'):
        model.pop(name, None)
    if memory:
        model['model'] = 'vit_small_patch16_224' if images >= _MANY else 'resnet50'
    if not found.labels and memory and images < _MANY:
        model['output_dim'] = 4096  # few images cannot tell more prototypes apart
    method = config['model']['class_path'].removesuffix('Task')
    device = f'{memory / 1e9:.0f} GB of device memory' if memory else 'no CUDA device'
    encoder = f'{model["model"]}, {size} px, for {images} images and {device}'

    most = 64 if not memory else min(256, memory / 2 / _BYTES[found.labels])
    batch = 2 ** int(math.log2(max(2, min(most, images if drawn else images / 4))))
    if drawn:
        data['length'] = images = max(images, _EPOCH * batch)
    per_epoch = max(1, images // batch)
    steps = min(max(100 * per_epoch, 5000), 100_000) if memory else 300
    steps = max_steps or steps
    # A divisor: the last step is saved, too
    some = range(max(1, steps // _CHECKPOINTS), steps + 1)
    every = next(number for number in some if steps % number == 0)
    model |= {'in_channels': channels, 'size': size}
    model['warmup_epochs'] = round(steps / 10 / per_epoch, 3)
    callbacks = [
        section(
            'lightning.pytorch.callbacks.ModelCheckpoint',
            every_n_train_steps=every,
            filename='{step}',
        ),
        section('torchgeo_softcon.callbacks.CollapseMonitor', every_n_steps=every),
    ]
    reasons = [
        f'Method: {method}, {"there is land cover" if found.labels else _NO_LABELS}',
        f'Encoder: {encoder} (recipe {recipe})',
        f'Steps: {steps} of {batch} images',
    ]
    if found.labels and data['val_fraction']:
        probe = max(1, steps // _PROBES)
        callbacks.append(
            section('torchgeo_softcon.callbacks.KNNProbe', every_n_steps=probe)
        )
    else:
        reasons.append('Probe: none, as no labelled ground can be kept apart for it')
    result = {
        'seed_everything': 0,
        'model': config['model'],
        'data': section(found.datamodule, **data, batch_size=batch),
        'trainer': {
            'max_steps': steps,
            'max_epochs': -1,
            'precision': 'bf16-mixed' if memory else '32-true',
            'log_every_n_steps': max(1, every // 3),
            'callbacks': callbacks,
            'logger': {'class_path': 'lightning.pytorch.loggers.CSVLogger'},
        },
    }
    return result, reasons


def _count(datamodule: str, options: dict[str, Any]) -> tuple[int, int]:
    """Return the number of images per epoch, and of their bands."""
    kind = getattr(import_module('torchgeo_softcon.datamodules'), datamodule)
    source = kind(batch_size=1, **options).source
    if len(source) < 2:
        raise ValueError(f'at least 2 images are needed, got {len(source)}')
    return len(source), source[0]['image'].shape[-3]
