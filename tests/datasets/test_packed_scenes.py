# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.enums import ColorInterp

from torchgeo_softcon.__main__ import main
from torchgeo_softcon.datamodules import WorldCoverScenesDataModule
from torchgeo_softcon.datasets import SyntheticScenes, WorldCoverScenes
from torchgeo_softcon.datasets.scene_grid import SceneGrid
from torchgeo_softcon.datasets.scene_pack import pack_scenes, verify_scenes
from torchgeo_softcon.geo.discovery import find_rasters, find_scenes
from torchgeo_softcon.geo.mapped import MappedRaster, open_mapped
from torchgeo_softcon.geo.rasters import RasterReader


@pytest.fixture(scope='module')
def packed(scenes: SyntheticScenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('packed')
    assert pack_scenes(scenes.images, out, scenes.worldcover) == []
    return out


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) for k in one
    )


class TestPackedScenes:
    def test_samples_are_the_same(self, scenes: SyntheticScenes, packed: Path) -> None:
        options: dict[str, Any] = {'patch_size': 32, 'seasons': 2}
        direct = WorldCoverScenes(scenes.images, scenes.worldcover, **options)
        mapped = WorldCoverScenes(packed, **options)
        assert (direct.bands, direct.level, len(direct)) == (
            *(mapped.bands, mapped.level, len(mapped)),
        )
        for again in (mapped, pickle.loads(pickle.dumps(mapped))):
            assert all(equal(direct[index], again[index]) for index in range(8))
        mapped.transforms = direct.transforms = lambda sample: sample
        one, other = SceneGrid(direct), SceneGrid(mapped)
        assert len(one) == len(other)
        assert all(equal(one[index], other[index]) for index in range(len(one)))
        with mapped._reader.files.use(
            mapped.places[0].scenes[0].layers[0].path
        ) as file:
            assert isinstance(file, MappedRaster)

    def test_datamodule(self, scenes: SyntheticScenes, packed: Path) -> None:
        batches = []
        roots: list[dict[str, Any]] = [
            {'root': str(packed)},
            {'images': str(scenes.images), 'worldcover': str(scenes.worldcover)},
        ]
        for options in roots:
            datamodule = WorldCoverScenesDataModule(
                **options, batch_size=2, patch_size=16, val_fraction=0.2
            )
            datamodule.setup('fit')
            batches.append(next(iter(datamodule.train_dataloader())))
        assert equal(*batches)
        with pytest.raises(ValueError, match='one of images and root must be given'):
            WorldCoverScenesDataModule()
        with pytest.raises(FileNotFoundError, match='root must be a folder of `torch'):
            WorldCoverScenesDataModule(root=str(scenes.images))

    def test_further_runs(self, scenes: SyntheticScenes, tmp_path: Path) -> None:
        images, out = tmp_path / 'images', tmp_path / 'out'
        shutil.copytree(scenes.images, images)
        first, *others = find_rasters(images)
        later = tmp_path / 'later.tif'
        shutil.move(others[-1], later)
        pack_scenes(images, out, scenes.worldcover)
        times = {path: path.stat().st_mtime_ns for path in out.rglob('*.tif')}
        # A run that was killed while it wrote a line
        with open(out / 'scenes.jsonl', 'a') as file:
            file.write('{"format": 1, "fil')
        shutil.move(later, others[-1])
        with rasterio.open(first, 'r+') as raster:
            raster.write(raster.read() + 1)
        pack_scenes(images, out, scenes.worldcover)
        changed = {
            path.stem
            for path in out.rglob('*.tif')
            if times.get(path) != path.stat().st_mtime_ns
        }
        assert changed == {Path(first).stem, Path(others[-1]).stem}
        assert verify_scenes(out) == []
        # Files beside an image tell of it, too
        times = {path: path.stat().st_mtime_ns for path in out.rglob('*.tif')}
        Path(f'{first}.aux.xml').write_text('<PAMDataset/>')
        pack_scenes(images, out, scenes.worldcover)
        (again,) = [path for path in times if times[path] != path.stat().st_mtime_ns]
        assert again.stem == Path(first).stem
        direct = WorldCoverScenes(images, scenes.worldcover, patch_size=32)
        mapped = WorldCoverScenes(out, patch_size=32)
        assert all(equal(direct[index], mapped[index]) for index in range(4))

    def test_verify(
        self, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(packed, tmp_path / 'out')
        path = next((tmp_path / 'out' / 'cover').iterdir())
        with open(path, 'r+b') as file:
            file.seek(-1, os.SEEK_END)
            file.write(b'\x63')
        ((name, reason),) = verify_scenes(tmp_path / 'out')
        assert name == str(path)
        assert 'its checksum is not the one in the index' in reason

    def test_command(
        self,
        scenes: SyntheticScenes,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        images, out = tmp_path / 'images', tmp_path / 'out'
        shutil.copytree(scenes.images, images)
        (images / 'broken.tif').write_bytes(b'II*\0')
        arguments = ['pack', str(images), str(out), '--verify']
        assert main([*arguments, '--worldcover', str(scenes.worldcover)]) == 1
        assert f'{images / "broken.tif"}: cannot open' in capsys.readouterr().err
        assert len(WorldCoverScenes(out, patch_size=32)) > 0
        assert main([*arguments, '--split', 's2c']) == 2
        assert (
            'split must be left out, or root be a folder of' in capsys.readouterr().err
        )

    def test_errors(
        self, scenes: SyntheticScenes, packed: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=r'year must be 2021, which .* got 2020'):
            WorldCoverScenes(packed, year=2020, patch_size=32)
        pack_scenes(scenes.images, tmp_path / 'bare')
        with pytest.raises(FileNotFoundError, match='has no land cover: pack it again'):
            WorldCoverScenes(tmp_path / 'bare', patch_size=32)
        bare = WorldCoverScenes(tmp_path / 'bare', patch_size=32, allow_unlabelled=True)
        assert bare.worldcover is None
        with pytest.raises(ValueError, match='out must be another folder than images'):
            pack_scenes(scenes.images, scenes.images)
        with pytest.raises(
            ValueError, match='out must be a new folder or packed scenes'
        ):
            pack_scenes(scenes.images, scenes.root)
        shutil.copytree(packed, tmp_path / 'other')
        index = tmp_path / 'other' / 'scenes.jsonl'
        index.write_text(index.read_text().replace('"format": 1', '"format": 2'))
        with pytest.raises(ValueError, match='must be of format 1, got 2: pack the sc'):
            WorldCoverScenes(tmp_path / 'other', patch_size=32)


@pytest.mark.parametrize(
    'kind', ['alpha', 'nodata', 'mask', 'scale', 'palette', 'products', 'tiled']
)
def test_what_files_tell_is_kept(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / 'images'
    names = {'b.tif': 70}
    if kind == 'products':
        # A band of 20 m beside one of 10 m, of a baseline with an offset
        folder /= 'S2A_MSIL2A_20230601T101031_N0509_R022_T32TQM_20230601T120000.SAFE'
        names = {
            'T32TQM_20230601T101031_B02.jp2': 70,
            'T32TQM_20230601T101031_B11.jp2': 35,
        }
    folder.mkdir(parents=True)
    for name, side in names.items():
        count = {'alpha': 4, 'products': 1, 'palette': 1}.get(kind, 3)
        dtypes = {'mask': 'int16', 'nodata': 'float32'}
        dtypes |= dict.fromkeys(('alpha', 'palette'), 'uint8')
        dtype = dtypes.get(kind, 'uint16')
        pixel = 700 / side
        profile: dict[str, Any] = {
            'driver': 'JP2OpenJPEG' if kind == 'products' else 'GTiff',
            'width': side,
            'height': side,
            'count': count,
            'dtype': dtype,
            'crs': 'EPSG:32632',
            'transform': Affine(pixel, 0, 500000, 0, -pixel, 5400000),
            'nodata': -9999 if kind == 'nodata' else None,
        }
        if kind == 'tiled':
            profile |= {'tiled': True, 'blockxsize': 32, 'blockysize': 32}
            profile |= {'compress': 'deflate', 'interleave': 'pixel'}
        if kind == 'products':
            profile |= {'QUALITY': 100, 'REVERSIBLE': True}
        values = rng.integers(0, 200, (count, side, side)).astype(dtype)
        values[..., :5] = 0
        if kind == 'nodata':
            values[0, :9] = -9999
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False),
            rasterio.open(folder / name, 'w', **profile) as file,
        ):
            if kind == 'palette':
                colors = rng.integers(0, 256, (256, 4))
                file.write_colormap(1, dict(enumerate(map(tuple, colors.tolist()))))
            file.write(values)
            if kind == 'alpha':
                file.colorinterp = (
                    *(ColorInterp.red, ColorInterp.green, ColorInterp.blue),
                    ColorInterp.alpha,
                )
            if kind == 'mask':
                file.write_mask(rng.random((side, side)) < 0.5)
            if kind == 'scale':
                file.scales, file.offsets = (0.5, 1, 2), (1, 2, 3)
                file.descriptions = ('B4', 'B3', 'B2')
                file.update_tags(PROCESSING='L2A')
    assert pack_scenes(tmp_path / 'images', tmp_path / 'out') == []
    read = []
    for path in (tmp_path / 'images', tmp_path / 'out' / 'images'):
        (scene,) = find_scenes(find_rasters(path))
        reader = RasterReader(open_mapped)
        window = reader.read(scene, 3, 5, 40, 50)
        everything = reader.read(scene, 0, 0, scene.grid.height, scene.grid.width)
        read.append((scene.bands, scene.grid, window.tobytes(), everything.tobytes()))
        with reader.files.use(scene.layers[0].path) as source:
            tags = source.tags()
    assert read[0] == read[1]
    assert (tags.get('PROCESSING') == 'L2A') == (kind == 'scale')
