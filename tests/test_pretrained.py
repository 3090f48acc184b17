# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretrained weights in the host's own tasks, as configurations select them."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import timm
import torch
import torchgeo.models
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from rasterio.transform import from_origin
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.datasets import EuroSAT
from torchgeo.main import main

from torchgeo_softcon import (
    ResNet50_Weights,
    SoftConTask,
    Swin_T_Weights,
    ViTSmall8_Weights,
    ViTSmall14_DINOv2_Weights,
    ViTSmall16_Weights,
    WideResNet50_2_Weights,
)
from torchgeo_softcon._compat import HAS_TASKS, BaseTask
from torchgeo_softcon.bands import SENTINEL2_SUBSETS
from torchgeo_softcon.callbacks import resize
from torchgeo_softcon.datasets import SyntheticScenes

pytestmark = pytest.mark.usefixtures('own_folder')
TASKS = import_module(BaseTask.__module__.rpartition('.')[0])
QUIET = [
    *('--trainer.fast_dev_run', 'true', '--trainer.accelerator', 'cpu'),
    *('--trainer.enable_progress_bar', 'false'),
    *('--trainer.enable_model_summary', 'false', '--data.batch_size', '2'),
]


def host(name: str) -> str:
    """Name of a task in the installed TorchGeo."""
    return name if HAS_TASKS else f'{name}Task'


@pytest.fixture(scope='module')
def eurosat(tmp_path_factory: Any) -> str:
    """EuroSAT with one image per class and split."""
    root = tmp_path_factory.mktemp('eurosat')
    size = 64
    for split in ('train', 'val', 'test'):
        names = [f'Class{label}_{split}' for label in range(10)]
        (root / f'eurosat-{split}.txt').write_text('\n'.join(f'{n}.jpg' for n in names))
        for number, name in enumerate(names):
            folder = root / EuroSAT.base_dir / name.partition('_')[0]
            folder.mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                *(folder / f'{name}.tif', 'w', 'GTiff', size, size, 13),
                crs='EPSG:32633',
                transform=from_origin(0, 0, 10, 10),
                dtype='uint16',
                compress='deflate',
            ) as file:
                file.write(np.full((13, size, size), 200 * number, dtype=np.uint16))
    return str(root)


def configure(**model: Any) -> str:
    """A configuration file. JSON is YAML."""
    config = {'model': {'class_path': model.pop('task'), 'init_args': model}}
    Path('config.yaml').write_text(json.dumps(config))
    return 'config.yaml'


class TestClassification:
    @pytest.fixture
    def said(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """What is said about resized images."""
        said: list[str] = []
        monkeypatch.setattr(resize, 'rank_zero_info', said.append)
        return said

    def test_name_on_the_command_line(self, eurosat: str, said: list[str]) -> None:
        """The model is timm's, which takes 224 px only; the tiles have 64."""
        main(
            [
                *('fit', '--model', host('Classification')),
                *('--model.model', 'vit_small_patch16_224'),
                *('--model.weights', 'ViTSmall16_Weights.SENTINEL2_SOFTCON'),
                *('--model.in_channels', '13', '--model.num_classes', '10'),
                *('--data', 'EuroSATDataModule', '--data.dict_kwargs.root', eurosat),
                *QUIET,
            ]
        )
        assert len(said) == 1
        assert 'resizes the images of (64, 64) pixels to (224, 224)' in said[0]

    @pytest.mark.parametrize(
        ('model', 'weights', 'bands'),
        [
            (
                'softcon_vit_small_patch14_224',
                'ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON',
                13,
            ),
            ('softcon_vit_small_patch14_224', True, 12),
            ('dinomc_swin_tiny_patch4_window7_224', True, 3),
        ],
    )
    def test_our_models(
        self, model: str, weights: Any, bands: int, eurosat: str, said: list[str]
    ) -> None:
        names = SENTINEL2_SUBSETS[bands]
        args = [
            *('--model.model', model, '--model.in_channels', str(len(names))),
            *('--model.num_classes', '10', '--data', 'EuroSATDataModule'),
            # EuroSAT has another order
            f'--data.dict_kwargs={{"root": "{eurosat}", "bands": {json.dumps(spell(names))}}}',
        ]
        if weights is True:
            # On the command line, TorchGeo takes this for a name
            task = f'{TASKS.__name__}.{host("Classification")}'
            args = ['--config', configure(task=task, weights=True), *args]
        else:
            chosen = ['--model', host('Classification'), '--model.weights', weights]
            args = [*chosen, *args]
        main(['fit', *args, *QUIET])
        assert said == []


def spell(names: tuple[str, ...]) -> list[str]:
    """Band names as EuroSAT has them."""
    return [name if len(name) == 3 else f'B0{name[1:]}' for name in names]


def expected_of(weights: Any, channels: int) -> dict[str, Tensor]:
    """Parameters that a task must have."""
    whole = len(weights.meta['bands']) == channels
    bands = None if whole else SENTINEL2_SUBSETS[channels]
    state: dict[str, Tensor] = weights.get_state_dict(layout='timm', bands=bands)
    return state


def missing_in(task: torch.nn.Module, expected: dict[str, Tensor]) -> list[str]:
    """Parameters that a task does not have, whatever it calls them."""
    found = {
        key.replace('layers_', 'layers.'): value
        for key, value in task.state_dict().items()
    }
    return [
        name
        for name, value in expected.items()
        if not any(
            f'.{key}'.endswith(f'.{name}') and torch.equal(found[key], value)
            for key in found
        )
    ]


S2_16 = ViTSmall16_Weights.SENTINEL2_SOFTCON
S2_14 = ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON
S2_50 = ResNet50_Weights.SENTINEL2_SOFTCON
S1_50 = ResNet50_Weights.SENTINEL1_SOFTCON
RGB_8 = ViTSmall8_Weights.SENTINEL2_RGB_DINOMC
RGB_SWIN = Swin_T_Weights.SENTINEL2_RGB_DINOMC
RGB_WIDE = WideResNet50_2_Weights.SENTINEL2_RGB_DINOMC

BATCH_NORM = ('running_mean', 'running_var', 'num_batches_tracked')
P14, P16 = 'softcon_vit_small_patch14_224', 'softcon_vit_small_patch16_224'
SWIN = 'dinomc_swin_tiny_patch4_window7_224'

#: Task, its model, backbone, weights (True: those of the model's name), which ones these
#: are, number of bands.
TABLE: dict[str, tuple[str, str, str | None, Any, Any, int]] = {
    'enum': ('Classification', 'vit_small_patch16_224', None, S2_16, S2_16, 13),
    'enum p14': ('Classification', P14, None, S2_14, S2_14, 13),
    'name p14': ('Classification', P14, None, str(S2_14), S2_14, 13),
    'true p14': ('Classification', P14, None, True, S2_14, 10),
    'swin': ('Classification', SWIN, None, True, RGB_SWIN, 3),
    'vit 8': ('Classification', 'vit_small_patch8_224', None, RGB_8, RGB_8, 3),
    'wide': ('Classification', 'wide_resnet50_2', None, RGB_WIDE, RGB_WIDE, 3),
    'regression': ('Regression', P16, None, S2_16, S2_16, 13),
    'sar': ('Regression', 'resnet50', None, S1_50, S1_50, 2),
    'moco': ('MoCo', 'resnet50', None, S2_50, S2_50, 13),
    'simclr': ('SimCLR', 'vit_small_patch16_224', None, S2_16, S2_16, 13),
    'byol': ('BYOL', 'resnet50', None, S2_50, S2_50, 13),
    'unet': ('SemanticSegmentation', 'unet', 'resnet50', S2_50, S2_50, 13),
    'deeplab': ('SemanticSegmentation', 'deeplabv3+', 'resnet50', S1_50, S1_50, 2),
    'dpt': ('SemanticSegmentation', 'dpt', f'tu-{P16}', True, S2_16, 12),
    'unet swin': ('SemanticSegmentation', 'unet', f'tu-{SWIN}', True, RGB_SWIN, 3),
    'pixels': ('PixelwiseRegression', 'unet', 'resnet50', S2_50, S2_50, 13),
    'siamese': ('ChangeDetection', 'fcsiamdiff', 'resnet50', S2_50, S2_50, 13),
    'siamese 2': (
        'ChangeDetection',
        'fcsiamconc',
        'tu-softcon_resnet50',
        True,
        S2_50,
        4,
    ),
    'changevit': ('ChangeDetection', 'changevit', P16, True, S2_16, 13),
}


@pytest.fixture
def changevit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network of timm's beside the encoder, which would be downloaded."""
    module = import_module('torchgeo.models.changevit')
    original = module.DetailCaptureModule
    monkeypatch.setattr(
        module, 'DetailCaptureModule', lambda **kwargs: original(kwargs['in_channels'])
    )


@pytest.mark.usefixtures('changevit')
@pytest.mark.parametrize('name', TABLE)
def test_task_has_the_weights(name: str) -> None:
    task, model, backbone, weights, chosen, channels = TABLE[name]
    kwargs: dict[str, Any] = {'model': model, 'weights': weights}
    kwargs['in_channels'] = channels
    if backbone is not None:
        kwargs['backbone'] = backbone
    if task in ('Classification', 'SemanticSegmentation'):
        kwargs['num_classes'] = 5
    built = getattr(TASKS, host(task))(**kwargs)

    expected = expected_of(chosen, channels)
    if model == 'changevit':
        # Builds its encoder for 256 pixels
        expected = chosen.get_state_dict(img_size=256)
    if task == 'BYOL':
        # Runs its encoder while it is built, which moves the statistics of batch norm
        expected = {k: v for k, v in expected.items() if not k.endswith(BATCH_NORM)}
    lost = missing_in(built, expected)
    # An encoder of a segmentation network has no last norm
    assert lost == (['norm.weight', 'norm.bias'] if name == 'unet swin' else [])
    shape = (1, 2, channels, 64, 64) if 'Change' in task else (1, channels, 64, 64)
    if 'patch' not in model or 'softcon' in model or 'dinomc' in model:
        out = built.eval()(torch.zeros(shape))
        # MoCo gives features and projections
        assert all(
            x.isfinite().all() for x in (out if isinstance(out, tuple) else [out])
        )


def test_segmentation_by_the_command_line(scenes: SyntheticScenes) -> None:
    task = f'{TASKS.__name__}.{host("SemanticSegmentation")}'
    config = configure(
        task=task, model='dpt', backbone=f'tu-{P16}', weights=True, ignore_index=0
    )
    args = [
        '--config',
        config,
        '--model.in_channels',
        '13',
        '--model.num_classes',
        '12',
    ]
    args += ['--data', 'SyntheticScenesDataModule', '--data.target', 'mask']
    args += ['--data.root', str(scenes.root.parent), '--data.size', '96']
    args += ['--data.dates', '2', '--data.patch_size', '64', '--data.length', '4']
    main(['fit', *args, *QUIET])


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Two images of a place each, and what has changed."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mask = torch.randint(0, 2, (1, 64, 64))
        return {'image': torch.rand(2, 13, 64, 64), 'mask': mask}


@pytest.mark.usefixtures('changevit')
@pytest.mark.parametrize(
    ('model', 'backbone', 'weights'),
    [('fcsiamdiff', 'resnet50', S2_50), ('changevit', P16, True)],
)
def test_change_detection(model: str, backbone: str, weights: Any) -> None:
    task = getattr(TASKS, host('ChangeDetection'))(
        model=model, backbone=backbone, weights=weights, in_channels=13
    )
    trainer = Trainer(
        fast_dev_run=True, accelerator='cpu', logger=False, enable_progress_bar=False
    )
    loader = DataLoader(Pairs(), batch_size=2)
    trainer.fit(task, loader, loader)
    assert trainer.global_step == 1


@pytest.mark.parametrize('as_name', [False, True])
@pytest.mark.parametrize(
    ('task', 'model', 'weights', 'fitting'),
    [
        ('Classification', 'swin_tiny_patch4_window7_224', RGB_SWIN, SWIN),
        ('Classification', 'vit_small_patch14_dinov2', S2_14, P14),
        ('Regression', 'resnet18', S2_50, 'softcon_resnet50'),
        ('SemanticSegmentation', 'unet', RGB_WIDE, 'dinomc_wide_resnet50_2'),
    ],
)
def test_weights_that_do_not_fit_name_their_model(
    task: str, model: str, weights: Any, fitting: str, as_name: bool
) -> None:
    options: dict[str, Any] = {'in_channels': len(weights.meta['bands'])}
    if task != 'Regression':
        options['num_classes'] = 3
    if model == 'unet':
        options['backbone'] = 'resnet18'
    fitting = f'{fitting}.{weights.name.lower()}'
    with pytest.raises(ValueError, match=rf'do not fit .*Set model to .{fitting}.'):
        getattr(TASKS, host(task))(
            model=model, weights=str(weights) if as_name else weights, **options
        )
    # The remedy works
    created = timm.create_model(fitting, pretrained=True, num_classes=0)
    assert not missing_in(created, weights.get_state_dict(layout='timm'))


def test_true_on_the_command_line_is_no_name() -> None:
    parser = ArgumentParser(exit_on_error=False)
    for task in ('Classification', 'MoCo', 'SemanticSegmentation'):
        parser.add_class_arguments(getattr(TASKS, host(task)), task)
    parser.add_class_arguments(SoftConTask, 'ours')
    names = ('Classification', 'MoCo', 'SemanticSegmentation', 'ours')
    for text, value in (('true', True), ('null', None), ('run.ckpt', 'run.ckpt')):
        args = parser.parse_args([f'--{name}.weights={text}' for name in names])
        assert [args[name].weights for name in names] == [value] * 4


def test_user_code() -> None:
    weights = torchgeo.models.get_weight('ViTSmall16_Weights.SENTINEL2_SOFTCON')
    assert weights is ViTSmall16_Weights.SENTINEL2_SOFTCON
    encoder = timm.create_model('vit_small_patch16_224', in_chans=13, num_classes=0)
    encoder.load_state_dict(weights.get_state_dict(progress=True))
    theirs = torchgeo.models.vit_small_patch16_224(weights=weights, num_classes=0)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[key])
    image = weights.transforms({'image': torch.full((13, 264, 264), 1500.0)})['image']
    assert encoder.eval()(image[None]).shape == (1, 384)


def test_ambiguous_number_of_bands_is_told_by_a_task() -> None:
    with pytest.raises(ValueError, match=r'^5 bands of B1.* Name them'):
        getattr(TASKS, host('Classification'))(
            model=P14, weights=True, in_channels=5, num_classes=2
        )
