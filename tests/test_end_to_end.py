# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What a user does: the stock command line, from rasters to a fine-tuned encoder."""

import csv
import json
import os
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchgeo.datasets import BigEarthNetV2, SeasonalContrastS2
from torchgeo.main import main

from tests.datamodules.helpers import write_raster
from tests.ssl4eo import archives
from tests.tasks.helpers import make_task, make_trainer
from torchgeo_softcon.__main__ import main as softcon_main
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


#: Two dates of each of four locations.
SEASONS = {f'{place:07}': ['20200604', '20200902'] for place in range(4)}


@pytest.mark.parametrize('form', ['folders', 'packed'])
def test_ssl4eo_s12_ml(form: str) -> None:
    archives.write_archive(Path('data'), {'s2c': SEASONS})
    labels = {
        place: {archives.season('s2c', day): [int(place)] for day in days}
        for place, days in SEASONS.items()
    }
    Path('labels.json').write_text(json.dumps(labels))
    data = ['--data.root', 'data', '--data.labels', 'labels.json']
    if form == 'packed':
        pack = ['pack', 'data', 'packed', '--labels', 'labels.json', '--verify']
        assert softcon_main(pack) == 0
        data = ['--data.root', 'packed']
    _, log = fit(
        *('--model', 'SoftConTask', '--data', 'SSL4EOS12MLDataModule', *data),
        *('--data.seasons', '2', '--model.seasons', 'different'),
        *('--model.model', 'test_vit', '--trainer.logger', 'CSVLogger', *SMALL),
    )
    assert len(losses(log)) == 1
    assert np.isfinite(losses(log)).all()
    assert all(float(row['train_unknown_share']) == 0 for row in log)


def test_real_ssl4eo_s12(shared: Path) -> None:
    """Two locations with one date each, in the published folders."""
    root = shared / 'ssl4eo_s12_layout'
    labels = {
        place.name: {image.name: [number] for image in place.iterdir()}
        for number, place in enumerate(sorted((root / 's2c').iterdir()))
    }
    Path('labels.json').write_text(json.dumps(labels))
    assert softcon_main(['pack', str(root), 'packed', '--labels', 'labels.json']) == 0
    assert softcon_main(['unpack', 'packed', 'back']) == 0
    for path in sorted((root / 's2c').rglob('*.tif')):
        with (
            rasterio.open(path) as old,
            rasterio.open(Path('back', path.relative_to(root))) as new,
        ):
            assert np.array_equal(old.read(), new.read())
            assert (old.crs, old.transform) == (new.crs, new.transform)
    rows = []
    for data in (['--data.root', str(root), '--data.labels', 'labels.json'], []):
        _, log = fit(
            *('--model', 'SoftConTask', '--data', 'SSL4EOS12MLDataModule'),
            *('--seed_everything', '0', '--trainer.logger', 'CSVLogger', *SMALL),
            *(*(data or ['--data.root', 'packed']), '--data.batch_size', '2'),
            *('--model.model', 'test_vit'),
        )
        rows.append(losses(log))
    # The same numbers from the folders and from the packed form
    assert len(rows[0]) == 1
    assert rows[0] == rows[1]


LABELS = ['Pastures', 'Sea and ocean', 'Mixed forest', 'Vineyards']


def write_bigearthnet(root: Path, count: int = 4) -> None:
    """Patches of BigEarthNet 1.0 as TorchGeo wants them, with small files."""
    rng = np.random.default_rng(0)
    patches = [(f'S2A_{i}', f'S1A_{i}') for i in range(count)]
    for i, (s2, s1) in enumerate(patches):
        for folder, name, bands in (
            ('BigEarthNet-v1.0', s2, [f'B{b:02}' for b in (*range(1, 10), 11, 12)]),
            ('BigEarthNet-S1-v1.0', s1, ['VV', 'VH']),
        ):
            path = root / folder / name
            path.mkdir(parents=True)
            for band in [*bands, *(['B8A'] if name == s2 else [])]:
                values = rng.integers(1, 9000, (1, 12, 12), dtype=np.uint16)
                write_raster(path / f'{name}_{band}.tif', values)
            labels = {'labels': [LABELS[i % 4]], 'corresponding_s2_patch': s2}
            (path / f'{name}_labels_metadata.json').write_text(json.dumps(labels))
    write_splits(root, patches)


def write_splits(root: Path, patches: list[tuple[str, str]]) -> None:
    lines = '\n'.join(','.join(pair) for pair in patches)
    for split in ('train', 'val', 'test'):
        (root / f'bigearthnet-{split}.csv').write_text(lines)


def fit_bigearthnet(root: Path, bands: str, in_channels: int) -> list[dict[str, str]]:
    """The host's datamodule with our task, as it is."""
    _, log = fit(
        *('--model', 'SoftConTask', '--model.model', 'test_vit'),
        *('--model.in_channels', str(in_channels)),
        *('--data', 'BigEarthNetDataModule', '--data.dict_kwargs.root', str(root)),
        *('--data.dict_kwargs.bands', bands, '--trainer.logger', 'CSVLogger', *SMALL),
    )
    assert all(float(row['train_unknown_share']) == 0 for row in log)
    assert np.isfinite(losses(log)).all()
    return log


@pytest.mark.parametrize(('bands', 'count'), [('s1', 2), ('s2', 12), ('all', 14)])
def test_bigearthnet(bands: str, count: int) -> None:
    write_bigearthnet(Path('data'))
    assert len(losses(fit_bigearthnet(Path('data'), bands, count))) == 1


def test_real_bigearthnet(shared: Path) -> None:
    """Fourteen patches of Sentinel-2, six of them with Sentinel-1."""
    source = shared / 'bigearthnet_tiny'
    Path('data').mkdir()
    Path('data', 'BigEarthNet-v1.0').symlink_to(source / 'S2')
    Path('data', 'BigEarthNet-S1-v1.0').symlink_to(source / 'S1')
    with open(source / 'labels.csv') as file:
        rows = list(csv.DictReader(file))
    optical = [row['patch'] for row in rows if row['sensor'] == 'S2']
    write_splits(Path('data'), [(patch, '') for patch in optical])
    assert len(losses(fit_bigearthnet(Path('data'), 's2', 12))) == len(optical) // 4
    both = [(r['corresponding_s2'], r['patch']) for r in rows if r['sensor'] == 'S1']
    write_splits(Path('data'), [pair for pair in both if pair[0] in optical])
    assert len(losses(fit_bigearthnet(Path('data'), 'all', 14))) == 1


def test_bigearthnet_v2() -> None:
    """The host has no datamodule for it. Its samples have a mask, too."""
    rng = np.random.default_rng(0)
    names = [f'S2A_MSIL2A_T33UUP_{i:02}_00' for i in range(4)]
    for name in names:
        for folder, bands in (
            ('BigEarthNet-S2', ('B02', 'B03')),
            ('Reference_Maps', ()),
        ):
            path = Path('data', folder, 'S2A_MSIL2A_T33UUP', name)
            path.mkdir(parents=True)
            for band in bands:
                values = rng.integers(1, 9000, (1, 12, 12), dtype=np.uint16)
                write_raster(path / f'{name}_{band}.tif', values)
        forest = np.full((1, 120, 120), 313, np.uint16)
        write_raster(path / f'{name}_reference_map.tif', forest)
    Path('data', 'BigEarthNet-S1').mkdir()
    pd.DataFrame(
        {
            'patch_id': names,
            's1_name': names,
            'split': 'train',
            'labels': [['Mixed forest'], ['Pastures']] * 2,
        }
    ).to_parquet('data/metadata.parquet')
    loader = DataLoader(BigEarthNetV2('data', bands='s2'), batch_size=4)
    batch = next(iter(loader))
    assert set(batch) == {'image', 'label', 'mask'}
    task = make_task(in_channels=2)
    make_trainer(Path(), max_epochs=1).fit(task, loader)
    assert task.global_step == 1
    _, labels = task.draw_views(batch)
    assert labels[0] is not None
    assert torch.equal(labels[0], batch['label'].float())


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
