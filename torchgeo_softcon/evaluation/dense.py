# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Features of the patches of whole scenes, as rasters."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
import rasterio
import torch
from lightning.pytorch import LightningDataModule
from rasterio.transform import Affine
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..datamodules.normalization import match_images
from ..datamodules.protocol import offer_of
from ..datasets.scene_grid import SceneGrid
from ..datasets.scenes import WorldCoverScenes
from ..geo.rasters import Scene
from ..models.encoders import Encoder
from ..storage.whole_file import whole_file
from .embedding_file import describe
from .loop import make_runner

#: Windows side by side share this part of their side: each place is in four windows, and
#: in the middle of one.
_OVERLAP = 0.5

Array = npt.NDArray[np.float32]


def embed_dense(
    encoder: Encoder,
    datamodule: LightningDataModule,
    out: str | os.PathLike[str],
    size: int | None = None,
    overwrite: bool = False,
    source: str = '',
    **trainer: Any,
) -> list[Path]:
    """Write the features of the patches of whole scenes as rasters.

    A band is a dimension, a pixel a patch of a Vision Transformer, or a cell of the last
    feature map of another encoder. Windows overlap, and their features fade into each
    other. Up to a patch at the right and the lower edge is left out. NaN is no data.

    Args:
        encoder: From :func:`.open_encoder`.
        datamodule: One that predicts whole scenes, such as WorldCoverScenesDataModule.
        out: Folder for one cloud-optimised GeoTIFF per scene, named after it, or a Zarr
            store (``.zarr``) with such groups, which needs the extra *zarr*.
        size: Side of the windows in pixels, which are not resized. Defaults to that of
            the training, or 224.
        overwrite: Whether to replace files that exist.
        source: What the data are, for the note in the files.
        **trainer: Arguments of Lightning's trainer.

    Raises:
        FileExistsError: If a file exists, and is not to be replaced.
        ValueError: If *datamodule* has no whole scenes, a scene is too small, or packages
            are missing.
    """
    datamodule.prepare_data()
    datamodule.setup('predict')
    match_images(datamodule, encoder.bands, encoder.unit_range)
    grid = offer_of(datamodule).predict_dataset
    if not isinstance(grid, SceneGrid):
        raise ValueError(  # noqa: TRY004
            'dense features need whole scenes, as of WorldCoverScenesDataModule or '
            f'SyntheticScenesDataModule, got {type(datamodule).__name__}'
        )
    runner = make_runner(**trainer)
    device = runner.strategy.root_device
    model = encoder.model.to(device)
    side = size or encoder.size or 224
    patch = _cell_size(model, encoder.in_channels, device)
    zarr = Path(out).suffix == '.zarr'
    write = _write_zarr if zarr else _write_geotiff
    if zarr and not all(map(find_spec, ('xarray', 'zarr'))):
        raise ValueError(f'{out} needs: pip install "torchgeo-softcon[zarr]"')
    scenes: dict[str, tuple[Scene, Path]] = {}
    for scene in (scene for place in grid.scenes.places for scene in place.scenes):
        name = Path(scene.name).stem
        # Scenes of different folders may have the same name
        name = f'{name}_{len(scenes)}' if name in scenes else name
        target = Path(out, name if zarr else f'{name}.tif')
        if target.exists() and not overwrite:
            raise FileExistsError(
                f'{target} exists already. Set overwrite to replace it'
            )
        if min(scene.grid.height, scene.grid.width) < patch:
            raise ValueError(f'{scene.name} is smaller than a patch of {patch} pixels')
        scenes[name] = scene, target
    Path(out).mkdir(parents=True, exist_ok=True)
    about = describe(encoder, 'none', None, (side, side), source, grid, 'pixel')
    for scene, target in tqdm(
        scenes.values(), 'embed', leave=False, disable=not runner.progress_bar_callback
    ):
        values = _features(model, grid.scenes, scene, side, patch, device)
        transform = scene.grid.transform * Affine.scale(patch)
        note = {**about, 'emb:dimensions': len(values), 'data_type': 'float32'}
        write(target, values, scene.grid.crs, transform, json.dumps(note))
    return [target for _, target in scenes.values()]


def feature_map(model: nn.Module, image: Tensor) -> Tensor:
    """Return the last features of a timm model with their places, (B, F, h, w)."""
    timm_model: Any = model
    maps = timm_model.forward_intermediates(
        image, indices=1, norm=True, intermediates_only=True
    )
    features: Tensor = maps[-1]
    return features


def _cell_size(model: nn.Module, channels: int, device: torch.device) -> int:
    """Return the side of the place of a feature in pixels."""
    # A multiple of all usual patches and strides
    image = torch.zeros(1, channels, 224, 224, device=device)
    with torch.inference_mode():
        return 224 // feature_map(model, image).shape[-1]


def _features(
    model: nn.Module,
    scenes: WorldCoverScenes,
    scene: Scene,
    side: int,
    patch: int,
    device: torch.device,
) -> Array:
    """Return the features of a scene of shape (F, h, w), NaN where it has no data."""
    rows, columns = scene.grid.height // patch, scene.grid.width // patch
    tall, wide = min(side // patch, rows), min(side // patch, columns)
    weight = np.outer(_fade(tall), _fade(wide)).astype(np.float32)
    total = np.zeros((rows, columns), np.float32)
    summed: Array | None = None
    empty = np.zeros((rows, columns), bool)
    for top, left in itertools.product(_starts(rows, tall), _starts(columns, wide)):
        window = top * patch, left * patch, tall * patch, wide * patch
        values = scenes._reader.read(scene, *window)
        valid = np.isfinite(values).any(0)  # before it is scaled in place
        image = torch.from_numpy(scenes.scale(scene, values))
        with torch.inference_mode():
            found = feature_map(model, image[None].to(device))[0].float().cpu().numpy()
        if summed is None:
            summed = np.zeros((len(found), rows, columns), np.float32)
        place = slice(top, top + tall), slice(left, left + wide)
        summed[:, *place] += weight * found
        total[place] += weight
        empty[place] = ~valid.reshape(tall, patch, wide, patch).any((1, 3))
    assert summed is not None  # a scene has a window at least
    summed /= total
    summed[:, empty] = np.nan
    return summed


def _fade(count: int) -> npt.NDArray[np.float64]:
    """Return weights that fall towards both ends of a window, (N,)."""
    return np.asarray(np.sin((np.arange(count) + 0.5) / count * math.pi) ** 2)


def _starts(count: int, window: int) -> Iterator[int]:
    """Yield where windows begin, the last one ends with the scene."""
    step = max(1, round(window * (1 - _OVERLAP)))
    yield from range(0, count - window, step)
    yield count - window


def _write_geotiff(
    target: Path, values: Array, crs: Any, transform: Affine, note: str
) -> None:
    """Write a cloud-optimised GeoTIFF, all or nothing."""
    profile = {
        'driver': 'COG',
        'count': len(values),
        'height': values.shape[1],
        'width': values.shape[2],
        'dtype': 'float32',
        'crs': rasterio.CRS.from_user_input(crs),
        'transform': transform,
        'nodata': np.nan,
        'compress': 'DEFLATE',
        'predictor': 'YES',
        'blocksize': 128,
        'overview_resampling': 'average',
        'bigtiff': 'IF_SAFER',
    }
    with (
        whole_file(target) as unfinished,
        rasterio.open(unfinished, 'w', **profile) as file,
    ):
        file.write(values)
        file.update_tags(emb=note)


def _write_zarr(
    target: Path, values: Array, crs: Any, transform: Affine, note: str
) -> None:
    """Write a group of a Zarr store with the conventions of CF and of rioxarray."""
    import xarray
    import zarr

    _, height, width = values.shape
    mapping = pyproj.CRS.from_user_input(crs).to_cf()
    mapping['GeoTransform'] = ' '.join(map(repr, transform.to_gdal()))
    dataset = xarray.Dataset(
        {'features': (('band', 'y', 'x'), values, {'grid_mapping': 'spatial_ref'})},
        {
            'x': transform.c + transform.a * (np.arange(width) + 0.5),
            'y': transform.f + transform.e * (np.arange(height) + 0.5),
            'spatial_ref': ((), 0, mapping),
        },
        {'emb': note},
    )
    zarr.open_group(target.parent, mode='a', zarr_format=3)
    unfinished = target.with_name(f'{target.name}.tmp')
    chunks = len(values), min(height, 128), min(width, 128)
    dataset.to_zarr(
        unfinished,
        mode='w',
        zarr_format=3,
        consolidated=False,
        encoding={'features': {'chunks': chunks}},
    )
    if target.exists():
        shutil.rmtree(target)
    os.replace(unfinished, target)
