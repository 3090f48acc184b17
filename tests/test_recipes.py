# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The recipes for data that nobody has at hand here, on small data of their layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchgeo.datasets import SSL4EOS12
from torchgeo.main import main

from torchgeo_softcon.__main__ import main as command
from torchgeo_softcon._compat import HAS_TASKS
from torchgeo_softcon.callbacks import KNNProbe
from torchgeo_softcon.callbacks.datamodule import choose_subset
from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.models import ViTSmall14_DINOv2_Weights, create_encoder
from torchgeo_softcon.models.encoders import Encoder

from .datamodules.host_data import (
    make_bigearthnet,
    make_bigearthnet_v2,
    make_eurosat,
    make_ssl4eo_s12,
)
from .ssl4eo.archives import season, write_archive

pytestmark = pytest.mark.usefixtures('own_folder')
EXAMPLES = Path(__file__).parents[1] / 'examples'

SMALL = [
    *('--data.batch_size', '2', '--data.num_workers', '0'),
    *('--trainer.fast_dev_run', 'true', '--trainer.accelerator', 'cpu'),
    *('--trainer.precision', '32-true', '--trainer.enable_progress_bar', 'false'),
    *('--trainer.enable_model_summary', 'false'),
]


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of data sets of the host."""
    root = tmp_path_factory.mktemp('data')
    return {
        'eurosat': str(make_eurosat(root / 'eurosat', 2, 1)),
        'bigearthnet': str(make_bigearthnet(root / 'bigearthnet', 20, 2)),
        'bigearthnet_v2': str(make_bigearthnet_v2(root / 'bigearthnet_v2')),
        'ssl4eo': str(make_ssl4eo_s12(root / 'ssl4eo', 's2c', 2)),
    }


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What reaches encoders: images of the first batches."""
    images: list[Tensor] = []
    vit, resnet = timm.models.VisionTransformer, timm.models.ResNet
    for family, name in (
        (vit, 'forward_features'),
        (vit, 'forward_intermediates'),
        (resnet, 'forward_features'),
    ):
        forward = getattr(family, name)

        def watched(
            self: Any, x: Tensor, *args: Any, f: Any = forward, **kw: Any
        ) -> Any:
            images.append(x.detach().clone())
            return f(self, x, *args, **kw)

        monkeypatch.setattr(family, name, watched)
    return images


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What probes find during the training."""
    values: list[dict[str, float]] = []
    probe = KNNProbe.probe

    def watched(self: Any, *args: Any) -> dict[str, float]:
        values.append(probe(self, *args))
        return values[-1]

    monkeypatch.setattr(KNNProbe, 'probe', watched)
    return values


def fit(recipe: str, *args: str) -> None:
    """Run a recipe. TorchGeo 0.10 has another name for one of the tasks."""
    text = (EXAMPLES / f'{recipe}.yaml').read_text()
    # There are few images here
    probe = '- class_path: torchgeo_softcon.callbacks.KNNProbe\n'
    few = {'k': 1, 'max_bank': 16, 'max_queries': 8}
    init_args = ''.join(f'        {name}: {value}\n' for name, value in few.items())
    text = text.replace(probe, f'{probe}      init_args:\n{init_args}')
    if HAS_TASKS:
        old = 'torchgeo.trainers.ClassificationTask'
        text = text.replace(old, 'torchgeo.tasks.Classification')
    Path('recipe.yaml').write_text(text)
    main(['fit', '--config', 'recipe.yaml', *SMALL, *args])


class TestEuroSAT:
    def test_finetune(self, data: dict[str, str], seen: list[Tensor]) -> None:
        optimizers: list[Any] = []
        handle = register_optimizer_step_post_hook(
            lambda optimizer, *args: optimizers.append(optimizer)
        )
        fit('eurosat_finetune', '--data.dict_kwargs.root', data['eurosat'])
        handle.remove()
        assert {type(optimizer) for optimizer in optimizers} == {torch.optim.SGD}
        assert {x.shape for x in seen} == {(2, 13, 224, 224)}
        assert all(x.min() >= 0 and x.max() <= 1 for x in seen)

    def test_linear(self, data: dict[str, str], seen: list[Tensor]) -> None:
        fit(
            'eurosat_linear',
            *('--data.dict_kwargs.root', data['eurosat'], '--model.size', '28'),
        )
        images = [x for x in seen if x.any()]  # one is empty, to count features
        assert images
        assert all(x.min() >= 0 and x.max() <= 1 for x in images)

    def test_knn(self, data: dict[str, str], seen: list[Tensor], capsys: Any) -> None:
        status = command(
            [
                *('evaluate', '--config', str(EXAMPLES / 'eurosat_linear.yaml')),
                *('--data.dict_kwargs.root', data['eurosat']),
                *('--data.num_workers', '0', '--data.batch_size', '20'),
                *('--weights', 'ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON'),
                *('--size', '28', '--device', 'cpu'),
            ]
        )
        assert status == 0
        out = capsys.readouterr().out
        for name in ('knn20_accuracy_cls', 'linear_accuracy_blocks'):
            assert name in out
        # B8A in its place, in the range of the pretraining: made around the mean
        assert seen[0].shape == (20, 13, 28, 28)
        assert (seen[0].mean((0, 2, 3)) - 0.5).abs().max() < 0.25


class TestBigEarthNet:
    def test_linear(
        self, data: dict[str, str], seen: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts: list[tuple[int, int]] = []
        choose = choose_subset

        def watched(count: int, *args: Any) -> list[int]:
            chosen = choose(count, *args)
            parts.append((count, len(chosen)))
            return chosen

        monkeypatch.setattr(
            'torchgeo_softcon.callbacks.datamodule.choose_subset', watched
        )
        fit(
            'bigearthnet_linear',
            *('--data.dict_kwargs.root', data['bigearthnet'], '--model.size', '28'),
        )
        images = [x for x in seen if x.any()]  # one is empty, to count features
        assert all(x.min() >= 0 and x.max() <= 1 for x in images)
        assert parts[-1] == (20, 2)

    def test_finetune(self, data: dict[str, str], seen: list[Tensor]) -> None:
        fit('bigearthnet_finetune', '--data.dict_kwargs.root', data['bigearthnet'])
        assert {x.shape for x in seen} == {(2, 12, 224, 224)}
        assert all(x.min() >= 0 and x.max() <= 1 for x in seen)

    def test_version_2(self, data: dict[str, str], seen: list[Tensor]) -> None:
        fit(
            'bigearthnet_v2',
            *('--data.dict_kwargs.root', data['bigearthnet_v2'], '--model.size', '28'),
        )
        images = [x for x in seen if x.any()]
        assert all(x.min() >= 0 and x.max() <= 1 for x in images)

    def test_radar(self, data: dict[str, str]) -> None:
        """As the header says."""
        fit(
            'bigearthnet_linear',
            *('--data.dict_kwargs.root', data['bigearthnet'], '--model.size', '28'),
            *('--data.dict_kwargs.bands', 's1', '--model.in_channels', '2'),
            *('--model.weights', 'ViTSmall14_DINOv2_Weights.SENTINEL1_SOFTCON'),
            *('--model.bands', '[VH, VV]'),
        )

    def test_knn(self, data: dict[str, str], seen: list[Tensor], capsys: Any) -> None:
        """As the header says."""
        lines = (EXAMPLES / 'bigearthnet_linear.yaml').read_text()
        bands = "'[B1,B2,B3,B4,B5,B6,B7,B8,B8A,B9,B11,B12]'"
        assert f'--bands {bands}' in lines
        status = command(
            [
                *('evaluate', '--config', str(EXAMPLES / 'bigearthnet_linear.yaml')),
                *('--data.dict_kwargs.root', data['bigearthnet'], '--k', '[1]'),
                *('--data.num_workers', '0', '--fraction', '0.1', '--split', 'val'),
                *('--weights', 'ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON'),
                *('--bands', bands.strip("'"), '--size', '28', '--device', 'cpu'),
            ]
        )
        assert status == 0
        assert 'knn1_micro_map_cls' in capsys.readouterr().out
        assert seen[0].shape == (2, 12, 28, 28)


def test_ssl4eo_s12(
    data: dict[str, str], seen: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SSL4EOS12, '__len__', lambda self: 2)
    sizes = ['[32, 28, 24]', '32']
    options = '--model.augmentations.init_args'
    fit(
        'ssl4eo_s12',
        *('--data.dict_kwargs.root', data['ssl4eo'], '--model.model', 'test_resnet'),
        *('--model.size', sizes[1], '--model.local_sizes', sizes[0]),
        *(f'{options}.global_size', sizes[1], f'{options}.local_sizes', sizes[0]),
        *('--model.output_dim', '16', '--model.hidden_dim', '16'),
    )
    assert seen
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)


def fit_labelled_archive(recipe: str, root: Path, *args: str) -> None:
    """Run a recipe on a small SSL4EO-S12-ML."""
    day, places = '20200604', [f'{place:07}' for place in range(8)]
    write_archive(root, {'s2c': {place: [day] for place in places}})
    labels = {
        place: {season('s2c', day): [number]} for number, place in enumerate(places)
    }
    Path('labels.json').write_text(json.dumps(labels))
    fit(
        recipe,
        *('--data.root', str(root), '--data.labels', 'labels.json'),
        *('--model.hidden_dim', '16', '--model.output_dim', '8'),
        *args,
    )


@pytest.mark.parametrize(
    'args',
    [
        ('--model.model', 'test_vit'),
        (
            *('--model.model', 'vit_tiny_patch16_dinov3_qkvb'),
            *('--model.in_layer_init', 'rgb'),
        ),
        ('--model.model', 'test_resnet', '--model.optimizer', 'sgd', '--model.lr', '1'),
    ],
    ids=lambda args: args[1],
)
def test_softcon_paper(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretrained(weights: Any, model: str, *args: Any) -> Encoder:
        assert weights is True
        encoder: Any = create_encoder(model)
        cfg = encoder.pretrained_cfg
        return Encoder(encoder.state_dict(), normalization=(cfg['mean'], cfg['std']))

    monkeypatch.setattr('torchgeo_softcon.tasks.base.initial_weights', pretrained)
    fit_labelled_archive('softcon_paper', tmp_path, *args, '--model.size', '32')


def test_ssl4eo_s12_ml(tmp_path: Path, probed: list[dict[str, float]]) -> None:
    fit_labelled_archive(
        'ssl4eo_s12_ml',
        tmp_path,
        *('--data.val_fraction', '0.25'),
        *('--model.model', 'test_vit', '--model.size', '32'),
    )
    assert all('knn_map_cls' in values for values in probed)
    assert len(probed) == 2


def test_sar(scenes: SyntheticScenes, tmp_path: Path, seen: list[Tensor]) -> None:
    rng = np.random.default_rng(0)
    for place in scenes.images.rglob('*.tif'):
        write_radar(place, tmp_path / 's1' / place.name, rng)
    fit(
        'sar',
        *('--data.images', 's1', '--data.worldcover', str(scenes.worldcover)),
        *('--data.patch_size', '48', '--data.length', '4', '--model.model', 'resnet18'),
        *('--model.size', '32', '--model.augmentations.init_args.size', '32'),
        *('--model.hidden_dim', '16', '--model.output_dim', '8'),
    )
    # Means of SSL4EO-S12 are in the middle
    teacher = seen[-1]
    assert teacher.shape == (2, 2, 32, 32)
    assert (teacher.mean((0, 2, 3)) - 0.5).abs().max() < 0.15


def write_radar(like: Path, path: Path, rng: np.random.Generator) -> None:
    """A Sentinel-1 scene on the grid of another one."""
    import rasterio

    with rasterio.open(like) as file:
        profile = {**file.profile, 'count': 2, 'dtype': 'float32', 'nodata': None}
        shape = file.shape
    path.parent.mkdir(exist_ok=True)
    means = np.array([-12.59, -20.26])[:, None, None]
    with rasterio.open(path, 'w', **profile) as file:
        file.write(rng.normal(means, 3, (2, *shape)).astype('float32'))


def test_continual(
    scenes: SyntheticScenes,
    monkeypatch: pytest.MonkeyPatch,
    probed: list[dict[str, float]],
) -> None:
    """With weights of DINOv2's shapes: all but the input layer are kept."""
    state = ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON.get_state_dict()
    published = {**state, 'patch_embed.proj.weight': torch.ones(384, 3, 14, 14)}
    monkeypatch.setattr(
        'torchgeo_softcon.tasks.base.initial_weights',
        lambda *args: Encoder(dict(published)),
    )
    fit(
        'continual_dinov2',
        *('--data.images', str(scenes.images)),
        *('--data.worldcover', str(scenes.worldcover)),
        *('--data.patch_size', '28', '--data.length', '4', '--model.size', '28'),
        *('--model.hidden_dim', '16', '--model.output_dim', '8'),
        *('--data.val_fraction', '0.3'),
    )
    assert all('knn_map_cls' in values for values in probed)
    assert len(probed) == 2


def test_continual_imagenet(tmp_path: Path) -> None:
    """With weights of EfficientNet-Lite0's shapes."""
    rng = np.random.default_rng(0)
    for kind, shape in (('images', (64, 64, 3)), ('masks', (64, 64))):
        (tmp_path / 'patches' / kind).mkdir(parents=True)
        for i in range(8):
            pixels = rng.choice(np.array([10, 40, 80], np.uint8), shape)
            path = tmp_path / 'patches' / kind / f'{i}.png'
            Image.fromarray(pixels).save(path)
    torch.manual_seed(0)
    start = timm.create_model('efficientnet_lite0', num_classes=0)
    torch.save(start.state_dict(), tmp_path / 'start.pth')
    fit(
        'continual_imagenet',
        *('--data.root', str(tmp_path / 'patches')),
        *('--model.weights', str(tmp_path / 'start.pth')),
        *('--model.hidden_dim', '16', '--model.output_dim', '8'),
    )


@pytest.mark.parametrize('path', sorted(EXAMPLES.glob('*.yaml')), ids=lambda p: p.stem)
def test_headers(path: Path) -> None:
    """Every recipe says what it does, how it is run, and what to expect."""
    text = path.read_text()
    assert f'--config examples/{path.name}' in text
    header = [line for line in text.splitlines() if line.startswith('#')]
    assert text.splitlines()[: len(header)] == header
    for word in ('# What:', '# Data:', '# Expect:'):
        assert any(line.startswith(word) for line in header), word
    assert max(map(len, text.splitlines())) <= 96
    assert yaml.safe_load(text).keys() >= {'model', 'data', 'trainer'}
