# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What a user does: the stock command line, from rasters to a fine-tuned encoder."""

import csv
import os
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchgeo.datasets import SeasonalContrastS2
from torchgeo.main import main

from torchgeo_softcon._compat import HAS_TASKS, BaseTask
from torchgeo_softcon.datasets import SyntheticScenes

EXAMPLES = Path(__file__).parents[1] / 'examples'

SMALL = [
    *('--model.size', '32', '--model.hidden_dim', '32', '--model.output_dim', '16'),
    *('--data.batch_size', '4', '--trainer.max_epochs', '1'),
    *('--trainer.accelerator', 'cpu', '--trainer.enable_progress_bar', 'false'),
    *('--trainer.enable_model_summary', 'false', '--trainer.log_every_n_steps', '1'),
    *('--trainer.logger.init_args.save_dir', '.'),
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder. The command line sets options of GDAL for the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['torchgeo'])
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def host(name: str) -> str:
    """Name of a task in the installed TorchGeo."""
    return name if HAS_TASKS else f'{name}Task'


def fit(*args: str) -> tuple[Path, list[dict[str, str]]]:
    """Run ``torchgeo fit`` and return the checkpoint and the log."""
    main(['fit', *args])
    run = max(Path().glob('*/version_*'), key=os.path.getmtime)
    (checkpoint,) = run.glob('checkpoints/*.ckpt')
    with open(run / 'metrics.csv') as file:
        return checkpoint, list(csv.DictReader(file))


def losses(log: list[dict[str, str]]) -> list[float]:
    return [float(row['train_loss']) for row in log if row.get('train_loss')]


@pytest.fixture(scope='module')
def pretrained(
    scenes: SyntheticScenes, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints of SoftCon and DINO-MC, of a Vision Transformer and a ResNet."""
    paths = {}
    for run in ('test_vit', 'resnet18', 'dino-test_vit', 'dino-resnet18'):
        dino, _, model = run.rpartition('-')
        config = 'dino_mc_small.yaml' if dino else 'quickstart.yaml'
        folder = tmp_path_factory.mktemp(run)
        before = Path.cwd()
        os.chdir(folder)
        try:
            checkpoint, _ = fit(
                *('--config', str(EXAMPLES / config), '--model.model', model, *SMALL),
                *('--data.root', str(scenes.root.parent), '--data.size', '96'),
                *('--data.dates', '2', '--data.patch_size', '32', '--data.length', '8'),
                # Too little ground for the probe of the recipe
                *(
                    ['--trainer.callbacks', 'null', '--data.val_fraction', '0']
                    * bool(dino)
                ),
            )
            paths[run] = checkpoint.absolute()
        finally:
            os.chdir(before)
    return paths


def test_quickstart(pretrained: dict[str, Path]) -> None:
    checkpoint = torch.load(pretrained['resnet18'], weights_only=True)
    assert checkpoint['global_step'] == 2
    assert checkpoint['hyper_parameters']['model'] == 'resnet18'
    with open(pretrained['resnet18'].parents[1] / 'metrics.csv') as file:
        log = list(csv.DictReader(file))
    assert len(losses(log)) == 2
    for name in ('train_loss_contrast', 'train_loss_soft', 'train_feature_std'):
        assert all(np.isfinite(float(row[name])) for row in log)


def test_own_area(scenes: SyntheticScenes) -> None:
    _, log = fit(
        *('--config', str(EXAMPLES / 'own_area.yaml')),
        *('--data.images', str(scenes.images)),
        *('--data.worldcover', str(scenes.worldcover)),
        *('--model.model', 'test_vit', *SMALL, '--data.num_workers', '0'),
        *('--data.patch_size', '48', '--data.length', '8'),
    )
    assert len(losses(log)) == 2
    assert all(float(row['train_unknown_share']) == 0 for row in log)


def test_image_folder() -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        for kind, shape in (('images', (40, 40, 3)), ('masks', (40, 40))):
            array = rng.integers(0, 255, shape, dtype=np.uint8)
            if kind == 'masks':
                array = np.where(array > 100, np.uint8(10 + 10 * i % 90), np.uint8(80))
            Path('data', kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(Path('data', kind, f'{i}.png'))
    _, log = fit(
        *('--config', str(EXAMPLES / 'image_folder.yaml'), '--data.root', 'data'),
        *SMALL,
    )
    assert len(losses(log)) == 2


def test_real_patches_with_masks(shared: Path) -> None:
    """Sentinel-2 RGB with WorldCover of 2021, Delhi."""
    root = shared / 'delhi_s2rgb_worldcover'
    _, log = fit(
        *('--config', str(EXAMPLES / 'image_folder.yaml'), '--data.root', str(root)),
        *SMALL,
        *('--data.batch_size', '32', '--model.model', 'test_vit'),
    )
    assert len(losses(log)) == 288 // 32
    assert all(float(row['train_unknown_share']) == 0 for row in log)


def test_real_dates_as_seasons(shared: Path) -> None:
    """Seven HLS bands, several dates of a place, the mask is a band of the file."""
    folder = shared / 'hls_worldcover'
    with open(folder / 'labels.csv') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if int(row['n_dates']) > 1:
            place = Path('images', row['location'])
            place.mkdir(parents=True, exist_ok=True)
            (place / row['file']).symlink_to(folder / 'images' / row['file'])
    _, log = fit(
        *('--config', str(EXAMPLES / 'image_folder.yaml'), *SMALL),
        *('--model.in_channels', '7', '--model.bands', 'null'),
        *('--model.seasons', 'different', '--data.root', 'null'),
        *('--data.images', 'images', '--data.seasons', '2', '--data.batch_size', '2'),
        *('--data.image_bands', '[1,2,3,4,5,6,7]', '--data.mask_band', '11'),
        *('--data.value_range', '[0,4000]'),
    )
    assert losses(log)


def test_dino_small() -> None:
    _, log = fit(
        *('--config', str(EXAMPLES / 'dino_mc_small.yaml'), '--data.root', 'data'),
        *('--data.size', '256', '--data.places', '1', '--data.dates', '1'),
        *('--data.length', '32', '--data.batch_size', '8', '--trainer.max_epochs', '1'),
        *('--trainer.accelerator', 'cpu', '--trainer.enable_progress_bar', 'false'),
        *('--trainer.logger.init_args.save_dir', '.'),
    )
    probes = [row for row in log if row.get('linear_map')]
    assert [row['step'] for row in probes] == ['0', '4']
    assert all(0 < float(row['linear_map']) <= 1 for row in probes)
    assert all(float(row['knn_map']) > 0 for row in probes)


@pytest.fixture
def seco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight places of SeCo, as TorchGeo reads it, instead of 20,000."""
    monkeypatch.setattr(SeasonalContrastS2, '__len__', lambda self: 8)
    rng = np.random.default_rng(0)
    for place in range(8):
        for season in range(5):
            folder = tmp_path / f'seasonal_contrast_100k/{place:06}/{season}'
            folder.mkdir(parents=True)
            for band in ('B4', 'B3', 'B2'):
                array = rng.integers(0, 255, (264, 264), dtype=np.uint8)
                Image.fromarray(array).save(folder / f'{band}.tif')
    return tmp_path


@pytest.mark.filterwarnings('ignore::rasterio.errors.NotGeoreferencedWarning')
@pytest.mark.parametrize('example', ['dino_mc', 'dino_tp'])
def test_seco(example: str, seco: Path) -> None:
    checkpoint, log = fit(
        *(
            '--config',
            str(EXAMPLES / f'{example}.yaml'),
            '--data.dict_kwargs.root',
            str(seco),
        ),
        *(*SMALL, '--model.model', 'test_vit', '--model.local_sizes', '[28, 20, 16]'),
        *('--trainer.precision', '32-true', '--data.num_workers', '0'),
    )
    assert len(losses(log)) == 2
    assert np.isfinite(losses(log)).all()
    hparams = torch.load(checkpoint, weights_only=True)['hyper_parameters']
    assert hparams['views'] == ('temporal' if example == 'dino_tp' else 'multi_crop')


@pytest.mark.parametrize(
    'name',
    [
        'DINOMCTask',
        'SoftConTask',
        'torchgeo_softcon.DINOMCTask',
        'torchgeo_softcon.SoftConTask',
    ],
)
@pytest.mark.parametrize('option', ['--model', '--model.class_path'])
def test_names_of_the_task(name: str, option: str, scenes: SyntheticScenes) -> None:
    main(
        [
            *('fit', option, name, '--model.model', 'test_vit', '--model.size', '32'),
            *('--model.output_dim', '16'),
            *(
                ('--model.local_sizes', '[24, 16]', '--model.in_channels', '13')
                if 'DINO' in name
                else ()
            ),
            *(
                '--data',
                'SyntheticScenesDataModule',
                '--data.root',
                str(scenes.root.parent),
            ),
            *('--data.size', '96', '--data.dates', '2', '--data.patch_size', '32'),
            *('--data.batch_size', '4', '--data.length', '4'),
            *('--trainer.fast_dev_run', 'true', '--trainer.accelerator', 'cpu'),
        ]
    )


@pytest.mark.parametrize(('model', 'size'), [('resnet18', 96), ('test_vit', 176)])
def test_printed_command_runs(
    model: str, size: int, scenes: SyntheticScenes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level('INFO', logger='lightning.pytorch'):
        fit(
            *('--config', str(EXAMPLES / 'quickstart.yaml'), '--model.model', model),
            *(*SMALL, '--data.root', str(scenes.root.parent), '--data.dates', '2'),
            *('--data.size', str(size), '--data.patch_size', '48'),
            *('--data.length', '4'),
        )
    (command,) = re.findall('torchgeo fit (.*)', caplog.text)
    small = ['--trainer.fast_dev_run', 'true', '--trainer.accelerator', 'cpu']
    main(['fit', *shlex.split(command), *small, '--data.batch_size', '2'])


class TestFineTuning:
    """Contract: a checkpoint opens in the host's own tasks."""

    def data(self, scenes: SyntheticScenes, target: str, size: int) -> list[str]:
        return [
            *(
                '--data',
                'SyntheticScenesDataModule',
                '--data.root',
                str(scenes.root.parent),
            ),
            *('--data.size', '96', '--data.dates', '2', '--data.target', target),
            *('--data.patch_size', str(size), '--data.batch_size', '2'),
            *('--data.length', '4', '--trainer.fast_dev_run', 'true'),
            *('--trainer.accelerator', 'cpu'),
        ]

    @pytest.mark.parametrize(
        'run', ['test_vit', 'resnet18', 'dino-test_vit', 'dino-resnet18']
    )
    def test_classification(
        self, run: str, pretrained: dict[str, Path], scenes: SyntheticScenes
    ) -> None:
        model = run.rpartition('-')[2]
        main(
            [
                *('fit', '--model', host('Classification'), '--model.model', model),
                *('--model.weights', str(pretrained[run])),
                *('--model.in_channels', '13', '--model.task', 'multilabel'),
                *('--model.num_labels', '11', '--model.loss', 'bce'),
                *self.data(scenes, 'label', 64),
            ]
        )

    @pytest.mark.parametrize('run', ['resnet18', 'dino-resnet18'])
    def test_segmentation(
        self, run: str, pretrained: dict[str, Path], scenes: SyntheticScenes
    ) -> None:
        main(
            [
                *('fit', '--model', host('SemanticSegmentation')),
                *('--model.model', 'unet', '--model.backbone', 'resnet18'),
                *('--model.weights', str(pretrained[run])),
                *('--model.in_channels', '13', '--model.num_classes', '12'),
                *('--model.ignore_index', '0'),
                *self.data(scenes, 'mask', 64),
            ]
        )

    @pytest.mark.parametrize(
        'run', ['test_vit', 'resnet18', 'dino-test_vit', 'dino-resnet18']
    )
    def test_parameters_are_equal(self, run: str, pretrained: dict[str, Path]) -> None:
        model = run.rpartition('-')[2]
        tasks = import_module(BaseTask.__module__.rpartition('.')[0])
        path = str(pretrained[run])
        saved = torch.load(path, weights_only=True)['state_dict']
        expected = {k[6:]: v for k, v in saved.items() if k.startswith('model.')}
        task = getattr(tasks, host('Classification'))(
            model=model, weights=path, in_channels=13, num_classes=10
        )
        loaded = task.model.state_dict()
        head = {k for k in loaded if k.startswith(('head.', 'fc.'))}
        assert loaded.keys() - head == expected.keys()
        for key, value in expected.items():
            assert torch.equal(loaded[key], value), key

        if model == 'resnet18':
            task = getattr(tasks, host('SemanticSegmentation'))(
                model='unet',
                backbone=model,
                weights=path,
                in_channels=13,
                num_classes=12,
            )
            loaded = task.model.encoder.state_dict()
            assert loaded.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize('stop', [3, 4, 6])
def test_killed_run_resumes(stop: int, scenes: SyntheticScenes, tmp_path: Path) -> None:
    """With the numbers it would have had, bit for bit, also from mid-epoch."""
    args = [
        *('--config', str(EXAMPLES / 'quickstart.yaml'), '--model.model', 'test_vit'),
        *SMALL,
        *(
            '--data.root',
            str(scenes.root.parent),
            '--data.size',
            '96',
            '--data.dates',
            '2',
        ),
        *(
            '--data.patch_size',
            '40',
            '--data.length',
            '16',
            '--trainer.max_epochs',
            '2',
        ),
    ]
    every = '--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint'
    save = [every, '--trainer.callbacks.every_n_train_steps=1']
    save += ['--trainer.callbacks.save_top_k=-1', '--trainer.callbacks.filename={step}']

    main(['fit', *args, *save, '--trainer.logger.init_args.name', 'whole'])
    (whole,) = Path('whole').glob('version_0')
    killed = whole / 'checkpoints' / f'step={stop}.ckpt'
    main(
        [
            *('fit', *args, *save, '--trainer.logger.init_args.name', 'resumed'),
            *('--ckpt_path', str(killed), '--seed_everything', '99'),
        ]
    )
    states = [
        torch.load(
            Path(run, 'version_0', 'checkpoints', 'step=8.ckpt'), weights_only=True
        )
        for run in ('whole', 'resumed')
    ]
    first, second = (s['state_dict'] for s in states)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
