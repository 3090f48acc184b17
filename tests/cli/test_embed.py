# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from pyproj import CRS

from torchgeo_softcon import SyntheticScenesDataModule
from torchgeo_softcon.__main__ import main
from torchgeo_softcon._compat import HAS_TASKS
from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.evaluation.embed import embed
from torchgeo_softcon.models.encoders import open_encoder
from torchgeo_softcon.storage.resumable import ResumableParquet

from ..callbacks.helpers import Patches, PatchesDataModule
from ..datamodules.helpers import write_raster
from ..tasks.helpers import make_loader, make_task, make_trainer

PATCHES = 'tests.callbacks.helpers.PatchesDataModule'
QUIET: dict[str, Any] = {'enable_progress_bar': False, 'enable_model_summary': False}

#: Is killed in the middle of its work unless a file is there.
KILLED = """
import os, signal, sys
from pathlib import Path
import torchgeo_softcon.evaluation.embedding_file as embeddings
from torchgeo_softcon.evaluation.embed import embed
from torchgeo_softcon.models.encoders import open_encoder
from tests.callbacks.helpers import Patches, PatchesDataModule

embeddings.ROWS = 4
read = Patches.__getitem__
def get(self, index):
    if index == 13 and not Path('alive').exists():
        os.kill(os.getpid(), signal.SIGKILL)
    Path('reads').open('a').write(f'{index}\\n')
    return read(self, index)
Patches.__getitem__ = get
embed(open_encoder('run.ckpt'), PatchesDataModule(), 'e.parquet', 'test', accelerator='cpu')
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(make_task(), make_loader())
    trainer.save_checkpoint(tmp_path / 'run.ckpt')
    return tmp_path / 'run.ckpt'


def vectors(path: Path) -> Any:
    return np.stack(pd.read_parquet(path).sort_values('index')['embedding'])


class TestEmbed:
    def test_geoparquet_of_scenes(
        self, scenes: SyntheticScenes, checkpoint: Path, tmp_path: Path
    ) -> None:
        task = make_task(model='resnet18', in_channels=13)
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.fit(task, make_loader(channels=13))
        trainer.save_checkpoint(checkpoint)
        args: dict[str, Any] = {'root': scenes.root, 'size': 96, 'dates': 2}
        data = SyntheticScenesDataModule(**args, patch_size=48, batch_size=4)
        path = tmp_path / 'e.parquet'
        rows = embed(open_encoder(checkpoint), data, path, accelerator='cpu', **QUIET)
        frame = geopandas.read_parquet(path)
        frame = frame.sort_values('index', ignore_index=True)
        # Two places of two dates, four windows each
        assert rows == len(frame) == 16
        assert CRS(frame.crs).equals(CRS('OGC:CRS84'))
        assert frame['crs'].unique().tolist() == ['EPSG:32632', 'EPSG:32633']

        grid = data.predict_dataset
        assert grid is not None
        with rasterio.open(grid.scenes.places[0].scenes[0].layers[0].path) as source:  # type: ignore[attr-defined]
            west, _, _, north = source.bounds
            first = frame.geometry.to_crs(source.crs)[0]
        assert first.bounds == pytest.approx(
            (west, north - 480, west + 480, north), abs=0.1
        )
        assert 2015 < frame['start'][0].year < 2030
        assert (frame['stop'] - frame['start']).dt.days.eq(0).all()
        with torch.no_grad():
            image = torch.stack([grid[i]['image'] for i in range(16)])
            expected = open_encoder(checkpoint).model(image)
        np.testing.assert_allclose(vectors(path), expected, rtol=1e-3, atol=1e-5)

    def test_killed_in_the_middle(self, checkpoint: Path, tmp_path: Path) -> None:
        script = [sys.executable, '-c', KILLED]
        run: dict[str, Any] = {
            'cwd': tmp_path,
            'env': {'PYTHONPATH': str(Path(__file__).parents[2]), 'PATH': ''},
            'capture_output': True,
            'timeout': 300,
        }
        assert subprocess.run(script, check=False, **run).returncode == -9
        assert not (tmp_path / 'e.parquet').exists()
        assert len(list((tmp_path / 'e.parquet.parts').glob('part-*.parquet'))) == 3
        (tmp_path / 'alive').touch()
        done = subprocess.run(script, check=False, **run)
        assert done.returncode == 0, done.stderr
        assert b'12 of 24 samples' in done.stdout

        frame = pd.read_parquet(tmp_path / 'e.parquet')
        assert frame['index'].tolist() == list(range(24))
        data = PatchesDataModule()
        encoder = open_encoder(checkpoint)
        embed(
            encoder,
            data,
            tmp_path / 'whole.parquet',
            'test',
            accelerator='cpu',
            **QUIET,
        )
        np.testing.assert_allclose(
            vectors(tmp_path / 'e.parquet'),
            vectors(tmp_path / 'whole.parquet'),
            rtol=1e-4,
            atol=1e-6,
        )
        # What was written is not read again
        reads = [int(line) for line in (tmp_path / 'reads').read_text().split()]
        assert reads.count(5) == 1
        assert reads.count(12) == 2

    def test_interrupted_while_joining(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / 'e.parquet'
        encoder, data = open_encoder(checkpoint), PatchesDataModule()
        options: dict[str, Any] = {'accelerator': 'cpu', **QUIET}
        join = ResumableParquet.join
        monkeypatch.setattr(ResumableParquet, 'join', _disk_full)
        with pytest.raises(OSError, match='full'):
            embed(encoder, data, path, **options)
        monkeypatch.setattr(ResumableParquet, 'join', join)
        with (
            ResumableParquet(path, {}).open(overwrite=True),
            pytest.raises(
                BlockingIOError, match=r'another run is writing .*e\.parquet'
            ),
        ):
            embed(encoder, data, path, **options)
        assert embed(encoder, data, path, **options) == 24
        assert len(pd.read_parquet(path)) == 24

    def test_pooling(self, checkpoint: Path, tmp_path: Path) -> None:
        encoder, data = open_encoder(checkpoint), PatchesDataModule()
        options: dict[str, Any] = {'accelerator': 'cpu', **QUIET}
        for pooling in ('cls', 'mean'):
            embed(encoder, data, tmp_path / pooling, pooling=pooling, **options)
        embed(encoder, data, tmp_path / 'own', **options)
        assert np.array_equal(vectors(tmp_path / 'own'), vectors(tmp_path / 'cls'))
        assert not np.allclose(vectors(tmp_path / 'own'), vectors(tmp_path / 'mean'))
        with pytest.raises(
            ValueError, match=r"the encoder has \(cls, mean\), got 'max'"
        ):
            embed(encoder, data, tmp_path / 'max', pooling='max', **options)
        assert not list(tmp_path.glob('max*'))

    def test_workers_are_those_of_the_trainer(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        """Without a trainer, they are those of a GPU where there is one."""

        class Asked(PatchesDataModule):
            @property
            def num_workers(self) -> int:
                assert self.trainer is not None
                assert isinstance(self.trainer.accelerator, CPUAccelerator)
                return 0

            @num_workers.setter
            def num_workers(self, value: int) -> None:
                pass

        path = tmp_path / 'e.parquet'
        embed(open_encoder(checkpoint), Asked(), path, accelerator='cpu', **QUIET)

    def test_hook_of_the_datamodule(self, checkpoint: Path, tmp_path: Path) -> None:
        """Pixels are those that a trainer would give to a task."""

        class Hooked(PatchesDataModule):
            def on_after_batch_transfer(
                self, batch: dict[str, Any], dataloader_idx: int
            ) -> dict[str, Any]:
                batch = {**batch, 'image': batch['image'].flip(1)}
                return super().on_after_batch_transfer(batch, dataloader_idx)  # type: ignore[no-any-return]

            def setup(self, stage: str) -> None:
                self.predict_dataset = Patches(split='test')

        class Task(LightningModule):
            def predict_step(self, batch: Any, batch_idx: int) -> Any:
                return open_encoder(checkpoint).model(batch['image'])

        data: Any = Hooked()
        data.predict_aug = lambda batch: {**batch, 'image': batch['image'] * 2}
        path = tmp_path / 'e.parquet'
        embed(open_encoder(checkpoint), data, path, accelerator='cpu', **QUIET)
        trainer = Trainer(accelerator='cpu', logger=False, **QUIET)
        expected: Any = trainer.predict(Task(), data)
        np.testing.assert_array_equal(vectors(path), torch.cat(expected))

    def test_datasets_of_the_host(self, checkpoint: Path, tmp_path: Path) -> None:
        datasets = import_module('torchgeo.datasets')
        samplers = import_module('torchgeo.samplers')
        modules = import_module('torchgeo.datamodules')
        for i in range(2):
            values = torch.randint(255, (4, 64, 96)).numpy().astype('uint8')
            write_raster(
                tmp_path / 'rasters' / f'place_202106{29 + i}.tif',
                values,
                origin=(500000 + 2000 * i, 5540000),
            )

        class Rasters(datasets.RasterDataset):  # type: ignore[misc, name-defined]
            filename_glob = '*.tif'
            filename_regex = r'place_(?P<date>\d{8})'

        class Module(modules.GeoDataModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__(Rasters, 2, patch_size=32, num_workers=0)
                if (
                    HAS_TASKS
                ):  # TorchGeo 0.8 gives them to the GPU, which takes no names
                    self.aug = torch.nn.Identity()

            def setup(self, stage: str) -> None:
                self.predict_dataset = Rasters(tmp_path / 'rasters')
                grid = getattr(samplers, 'GriddedPatchSampler', None)
                sampler = grid or samplers.GridGeoSampler
                self.predict_sampler = sampler(self.predict_dataset, size=32, stride=32)

        path = tmp_path / 'e.parquet'
        encoder = open_encoder(checkpoint)
        rows = embed(encoder, Module(), path, accelerator='cpu', **QUIET)
        frame = geopandas.read_parquet(path)
        # The samplers of the two versions treat the rim differently
        assert rows == len(frame) >= 12
        assert set(frame['crs']) == {'EPSG:32633'}
        days = set(frame['start'].dt.date.astype(str))
        assert '2021-06-29' in days
        assert days <= {'2021-06-29', '2021-06-30'}
        places = frame.geometry.to_crs(32633)
        assert places.area.to_numpy() == pytest.approx(320**2, rel=1e-3)
        left, bottom, right, top = places.total_bounds
        assert (left, top) == pytest.approx((500000, 5540000), abs=320)
        assert (right, bottom) == pytest.approx((502960, 5539360), abs=320)


def _disk_full(self: Any, samples: int, arrange: Any = None) -> int:
    raise OSError('the disk is full')


class TestCommand:
    def test_from_checkpoint_to_file(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / 'e.parquet'
        args = ['embed', '--checkpoint', str(checkpoint), '--out', str(out)]
        args += ['--accelerator', 'cpu', '--data', PATCHES, '--data.batch_size', '5']
        assert main(args) == 0
        assert '24 embeddings are in' in capsys.readouterr().out
        assert main(args) == 2
        assert 'exists already' in capsys.readouterr().err
        assert main([*args, '--overwrite']) == 0

    def test_data_of_a_configuration(self, checkpoint: Path, tmp_path: Path) -> None:
        config = tmp_path / 'config.yaml'
        config.write_text(
            f'model:\n  class_path: Nothing\ndata:\n  class_path: {PATCHES}\n'
            '  init_args:\n    batch_size: 7\ntrainer:\n  max_epochs: 3\n'
        )
        out = tmp_path / 'e.parquet'
        args = ['embed', '--checkpoint', str(checkpoint), '--out', str(out)]
        args += ['--config', str(config), '--accelerator', 'cpu', '--split', 'val']
        assert main(args) == 0
        assert len(pd.read_parquet(out)) == 24

    def test_data_beside_a_configuration(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = tmp_path / 'config.yaml'
        config.write_text(
            f'data:\n  class_path: {PATCHES}\n  dict_kwargs:\n    length: 10\n'
        )
        out = tmp_path / 'e.parquet'
        args = ['embed', '--checkpoint', str(checkpoint), '--out', str(out)]
        args += ['--config', str(config), '--accelerator', 'cpu']
        assert main([*args, '--data', PATCHES, '--data.batch_size', '3']) == 0
        assert len(pd.read_parquet(out)) == 10
        assert main([*args, '--data=SyntheticScenesDataModule', '--data.size=96']) == 2
        message = 'PatchesDataModule, got SyntheticScenesDataModule. Leave out --config'
        assert message in capsys.readouterr().err
        assert main([*args, '--data', '{bad']) == 2
        assert 'data {bad is not YAML' in capsys.readouterr().err

    def test_goes_on_with_a_smaller_batch(
        self,
        checkpoint: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / 'e.parquet'
        args = ['embed', '--checkpoint', str(checkpoint), '--out', str(out)]
        args += ['--accelerator', 'cpu', '--data', PATCHES]
        with monkeypatch.context() as patch:
            patch.setattr(ResumableParquet, 'join', _disk_full)
            assert main([*args, '--data.batch_size', '5']) == 2
        assert main([*args, '--data.dict_kwargs.kind', 'multiclass']) == 2
        message = 'interrupted run with data.kind = None, not multiclass. Choose'
        assert message in capsys.readouterr().err
        assert main([*args, '--data.batch_size', '2']) == 0
        assert '24 of 24 samples are in' in capsys.readouterr().out

    @pytest.mark.usefixtures('own_folder')
    def test_like_earth_index(self, tmp_path: Path) -> None:
        """Runs as written in examples/README.md."""
        page = (Path(__file__).parents[2] / 'examples/README.md').read_text()
        (text,) = re.findall(r'(?s)### Like Earth.*?```bash\n(.*?)```', page)
        images = SyntheticScenes(tmp_path, size=32, seasons=1).images
        args = shlex.split(text.replace('DIR', str(images)).replace('\\\n', ''))
        assert main([*args[1:], '--accelerator', 'cpu']) == 0

        frame = geopandas.read_parquet('area.parquet')
        assert len(frame) == 2
        assert frame['footprint'].to_crs(32632).area.to_numpy() == pytest.approx(
            320**2, rel=0.01
        )
        datasets = import_module('torchgeo.datasets')
        if hasattr(datasets, 'EarthIndexEmbeddings'):
            sample = datasets.EarthIndexEmbeddings('area.parquet')[1]
            assert sample['embedding'].shape == (384,)
            assert 12 < sample['x'] < 12.1
            assert 45.2 < sample['y'] < 45.8

    @pytest.mark.parametrize(
        ('args', 'message'),
        [
            ([], 'data must be given'),
            (['--config', 'none.yaml'], 'config none.yaml does not exist'),
            (['--config', __file__], 'test_embed.py is not YAML'),
            (['--data', PATCHES], 'one of checkpoint and weights must be given'),
            (['--data', PATCHES, '--checkpoint', 'none.ckpt'], 'does not exist'),
            (['--data', PATCHES, '--split', 'all'], 'split must be one of'),
            (['--data', PATCHES, '--weights', 'ResNet_W.X'], 'ResNet_W.X'),
        ],
    )
    def test_bad_input(
        self, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(['embed', *args]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
    def test_no_such_accelerator(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ['embed', '--checkpoint', str(checkpoint), '--data', PATCHES]
        args += ['--accelerator', 'cuda', '--out', str(tmp_path / 'e.parquet')]
        assert main(args) == 2
        assert (
            'embed: `CUDAAccelerator` can not run on your system'
            in capsys.readouterr().err
        )
        assert not list(tmp_path.glob('e.*'))
