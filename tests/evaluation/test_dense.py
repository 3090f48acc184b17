# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
import xarray
from pyproj import CRS
from rasterio.transform import from_origin

from tests.geo.layouts import write
from torchgeo_softcon import WorldCoverScenesDataModule
from torchgeo_softcon.evaluation.dense import embed_dense, feature_map
from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.models.encoders import Encoder

from ..callbacks.helpers import PatchesDataModule

QUIET: dict[str, Any] = {
    'accelerator': 'cpu',
    'enable_progress_bar': False,
    'enable_model_summary': False,
}


def ground(height: int, width: int) -> Any:
    """Colours that change over some pixels."""
    noise = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    image = F.interpolate(noise, (height, width), mode='bicubic').clamp(0, 1)
    return (image[0] * 255).byte().numpy()


def write_scene(path: Path, values: Any, left: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile: Any = {
        'driver': 'GTiff',
        'dtype': 'uint8',
        'count': 3,
        'height': values.shape[1],
        'width': values.shape[2],
        'crs': 'EPSG:32632',
        'transform': from_origin(500000 + left, 5500000, 10, 10),
    }
    with rasterio.open(path, 'w', **profile) as dataset:
        dataset.write(values)
    return path


def data(folder: Path) -> WorldCoverScenesDataModule:
    return WorldCoverScenesDataModule(
        images=str(folder), worldcover=None, allow_unlabelled=True, patch_size=64
    )


def encoder(model: str = 'test_vit') -> Encoder:
    torch.manual_seed(0)
    state = create_encoder(model, 3).state_dict()
    return Encoder(state, model, 64, unit_range=False)


def read(path: Path) -> Any:
    with rasterio.open(path) as dataset:
        return dataset.read()


@pytest.mark.parametrize(('model', 'cell'), [('test_vit', 16), ('resnet18', 32)])
def test_cloud_optimised_geotiff(model: str, cell: int, tmp_path: Path) -> None:
    values = ground(200, 150)
    write_scene(tmp_path / 'in' / 'a.tif', values)
    encoded = encoder(model)
    (path,) = embed_dense(encoded, data(tmp_path / 'in'), tmp_path / 'out', **QUIET)
    assert path == tmp_path / 'out' / 'a.tif'
    with rasterio.open(path) as dataset:
        assert dataset.tags(ns='IMAGE_STRUCTURE')['LAYOUT'] == 'COG'
        assert dataset.crs.to_epsg() == 32632
        assert dataset.transform == from_origin(500000, 5500000, 10 * cell, 10 * cell)
        assert dataset.shape == (200 // cell, 150 // cell)
        assert dataset.count == encoded.model.num_features
        note = json.loads(dataset.tags()['emb'])
        found = dataset.read()
    assert (note['emb:type'], note['emb:dimensions']) == ('pixel', len(found))
    # The corner is in one window only
    image = torch.from_numpy(values[None, :, :64, :64] / np.float32(255))
    with torch.inference_mode():
        corner = feature_map(encoded.model, image)[0, :, 0, 0]
    np.testing.assert_allclose(found[:, 0, 0], corner, rtol=1e-4, atol=1e-5)


def test_zarr(tmp_path: Path) -> None:
    """It has what a GeoTIFF has, to the bit."""
    for name in 'ab':
        write_scene(tmp_path / 'in' / f'{name}.tif', ground(100, 150), ord(name))
    args = encoder(), data(tmp_path / 'in')
    tiff = embed_dense(*args, tmp_path / 'out', **QUIET)[1]
    store = tmp_path / 'out.zarr'
    written = embed_dense(*args, store, **QUIET)
    assert written == [store / 'a', store / 'b']
    with pytest.raises(FileExistsError, match=r'a exists already'):
        embed_dense(*args, store, **QUIET)
    assert embed_dense(*args, store, overwrite=True, **QUIET) == written

    found = xarray.open_zarr(store, group='b', decode_coords='all')
    assert sorted(path.name for path in store.iterdir()) == ['a', 'b', 'zarr.json']
    with rasterio.open(tiff) as dataset:
        np.testing.assert_array_equal(found['features'], dataset.read())
        assert found.attrs['emb'] == dataset.tags()['emb']
        x, y = dataset.xy(range(1, 3), range(1, 3))
        np.testing.assert_allclose(found['x'][1:3], x)
        np.testing.assert_allclose(found['y'][1:3], y)
        # Where rioxarray looks for them
        mapping = found['features'].spatial_ref.attrs
        assert CRS.from_cf(mapping) == CRS.from_user_input(dataset.crs)
        numbers = map(float, mapping['GeoTransform'].split())
        assert tuple(numbers) == dataset.transform.to_gdal()


def test_zarr_without_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scene(tmp_path / 'in' / 'a.tif', ground(64, 64))
    monkeypatch.setattr('torchgeo_softcon.evaluation.dense.find_spec', {}.get)
    with pytest.raises(ValueError, match=r'a\.zarr needs: pip install'):
        embed_dense(encoder(), data(tmp_path / 'in'), tmp_path / 'a.zarr', **QUIET)


def test_no_seams(tmp_path: Path) -> None:
    """The same ground has nearly the same features, wherever windows begin."""
    values, side, cell = ground(160, 320), 64, 16
    write_scene(tmp_path / 'whole' / 'a.tif', values)
    write_scene(tmp_path / 'part' / 'a.tif', values[:, :, cell:], 10 * cell)
    whole, part = (
        read(
            embed_dense(encoder(), data(tmp_path / n), tmp_path / f'{n}_out', **QUIET)[
                0
            ]
        )
        for n in ('whole', 'part')
    )
    error = np.abs(whole[:, :, 1:] - part).mean()

    def side_by_side(image: Any) -> Any:
        """Windows that do not overlap."""
        pixels = torch.from_numpy(image / np.float32(255))
        windows = pixels.unfold(1, side, side).unfold(2, side, side)
        maps = feature_map(
            encoder().model, windows.permute(1, 2, 0, 3, 4).flatten(0, 1)
        )
        rows, columns = windows.shape[1:3]
        maps = maps.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        return maps.flatten(3).flatten(1, 2).detach().numpy()

    first, second = side_by_side(values), side_by_side(values[:, :, cell:])
    shifted = np.abs(first[:, :, 1:][:, :, : second.shape[2]] - second).mean()
    assert error < 0.6 * shifted


def test_no_data(tmp_path: Path) -> None:
    values = ground(64, 96)
    values[:, :, 40:] = 0
    path = write_scene(tmp_path / 'in' / 'a.tif', values)
    with rasterio.open(path, 'r+') as dataset:
        dataset.nodata = 0
    found = read(embed_dense(encoder(), data(tmp_path / 'in'), tmp_path, **QUIET)[0])
    assert np.isnan(found[:, :, 3:]).all()
    assert np.isfinite(found[:, :, :3]).all()


def test_each_scene_is_scaled_by_its_level(tmp_path: Path) -> None:
    values = 1000 + 20 * ground(64, 64).astype('uint16')
    for level in ('L1C', 'L2A'):
        name = f'S2A_MSI{level}_20230601T101031_N0509_R022_T32UNE_20230601T120000.tif'
        write(tmp_path / 'in' / name, values, ('B4', 'B3', 'B2'))
    images = data(tmp_path / 'in')
    first, second = map(read, embed_dense(encoder(), images, tmp_path, **QUIET))
    assert np.abs(first - second).mean() > 1e-3


def test_scenes_of_the_same_name(tmp_path: Path) -> None:
    for number in range(2):
        write_scene(tmp_path / 'in' / str(number) / 'a.tif', ground(64, 64), number)
    args = encoder(), data(tmp_path / 'in'), tmp_path / 'out'
    written = embed_dense(*args, **QUIET)
    assert [path.name for path in written] == ['a.tif', 'a_1.tif']
    with pytest.raises(FileExistsError, match=r'a\.tif exists already'):
        embed_dense(*args, **QUIET)
    assert embed_dense(*args, overwrite=True, **QUIET) == written


def test_data_without_scenes(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r'need whole scenes, .* got PatchesDataModule'
    ):
        embed_dense(encoder(), PatchesDataModule(), tmp_path, **QUIET)
