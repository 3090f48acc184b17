# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchgeo.models
from timm.layers import resample_abs_pos_embed

from torchgeo_softcon import models
from torchgeo_softcon.bands import SENTINEL2_BANDS, SENTINEL2_SUBSETS
from torchgeo_softcon.models import timm_models

from .helpers import WeightsFolder

NAMES = [*timm_models._MODELS]
KEY = 'patch_embed.proj.weight'


@pytest.fixture(autouse=True)
def folder(weights_folder: WeightsFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    return weights_folder.use(monkeypatch)


def create(name: str, pretrained: bool = True, **kwargs: Any) -> Any:
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def test_timm_lists_them() -> None:
    assert {*timm.list_models(['softcon_*', 'dinomc_*'])} == {*NAMES}
    listed = timm.list_pretrained(['softcon_*', 'dinomc_*'])
    assert len(listed) == 2 * len(NAMES)
    assert 'dinomc_resnet50.sentinel2_rgb_dinotp' in listed


@pytest.mark.parametrize('name', [name for name in NAMES if 'base' not in name])
def test_default_is_the_encoder_for_all_bands(name: str) -> None:
    model = create(name, pretrained=False)
    channels = 13 if name.startswith('softcon') else 3
    assert model.num_classes == 0
    for size in (224, 64):
        out = model.eval()(torch.zeros(1, channels, size, size))
        assert out.shape == (1, model.num_features)


@pytest.mark.parametrize(
    ('name', 'weights', 'kwargs'),
    [
        ('softcon_resnet50', models.ResNet50_Weights.SENTINEL2_SOFTCON, {}),
        (
            'softcon_vit_small_patch14_224',
            models.ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON,
            {'num_classes': 7},
        ),
        (
            'softcon_vit_small_patch16_224.sentinel1_softcon',
            models.ViTSmall16_Weights.SENTINEL1_SOFTCON,
            {},
        ),
        (
            'dinomc_swin_tiny_patch4_window7_224',
            models.Swin_T_Weights.SENTINEL2_RGB_DINOMC,
            {'num_classes': 7},
        ),
        (
            'dinomc_vit_small_patch8_224.sentinel2_rgb_dinotp',
            models.ViTSmall8_Weights.SENTINEL2_RGB_DINOTP,
            {},
        ),
    ],
)
def test_pretrained_parameters_are_those_of_the_enum(
    name: str, weights: Any, kwargs: dict[str, Any]
) -> None:
    model = create(name, **kwargs)
    loaded = model.state_dict()
    expected = weights.get_state_dict(layout='timm')
    head = {key for key in loaded if key.startswith(('head.', 'fc.'))}
    assert loaded.keys() - head == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    assert ('num_classes' in kwargs) == bool(head)
    assert model.pretrained_cfg['tag'] == weights.name.lower()


class TestTorchGeo:
    @pytest.mark.parametrize(
        'name', ['softcon_resnet50', 'dinomc_swin_tiny_patch4_window7_224']
    )
    def test_models_with_each_of_their_weights(self, name: str) -> None:
        for weights in torchgeo.models.get_model_weights(name):
            model = torchgeo.models.get_model(name, weights, num_classes=2)
            tagged = create(f'{name}.{weights.name.lower()}').state_dict()
            loaded = model.state_dict()
            assert all(torch.equal(loaded[key], tagged[key]) for key in tagged)

    def test_weights_of_another_model(self) -> None:
        weights = models.ResNet50_Weights.SENTINEL2_RGB_DINOMC
        match = r"get_model_weights\('softcon_resnet50'\), got ResNet50_Weights.SENT"
        with pytest.raises(ValueError, match=match):
            torchgeo.models.get_model('softcon_resnet50', weights)


class TestBands:
    @pytest.mark.parametrize('count', [13, 12, 10, 4, 3])
    def test_a_number_of_bands(self, count: int) -> None:
        whole = models.ViTSmall16_Weights.SENTINEL2_SOFTCON.get_state_dict()[KEY]
        model = create('softcon_vit_small_patch16_224', in_chans=count)
        indices = [SENTINEL2_BANDS.index(band) for band in SENTINEL2_SUBSETS[count]]
        assert torch.equal(model.patch_embed.proj.weight, whole[:, indices])

    def test_two_bands_are_sar(self) -> None:
        model = create('softcon_resnet50', in_chans=2)
        expected = models.ResNet50_Weights.SENTINEL1_SOFTCON.get_state_dict()[
            'conv1.weight'
        ]
        assert torch.equal(model.conv1.weight, expected)

    @pytest.mark.parametrize('bands', [['B8A', 'B2', 'B12'], ['VH'], ['B1']])
    def test_names(self, bands: list[str]) -> None:
        sar = bands == ['VH']
        weights: Any = [*models.ResNet50_Weights][sar]
        model = create('softcon_resnet50', bands=bands)
        expected = weights.get_state_dict(bands=bands)['conv1.weight']
        assert torch.equal(model.conv1.weight, expected)

    @pytest.mark.parametrize(
        ('name', 'kwargs', 'match'),
        [
            (
                'softcon_resnet50',
                {'in_chans': 5},
                '^5 bands of B1, .*3 or 4 or 10 or 12 or',
            ),
            ('softcon_resnet50', {'in_chans': 1}, r'Name them: bands=\[\.\.\.\]'),
            (
                'softcon_resnet50.sentinel1_softcon',
                {'in_chans': 1},
                '1 bands of VV, VH could be any, only 2 would be clear',
            ),
            (
                'dinomc_resnet50',
                {'in_chans': 13},
                '13 bands are too many, there are 3: B4, B3',
            ),
            ('dinomc_resnet50', {'bands': ['B8']}, 'B8 is not'),
            (
                'softcon_resnet50',
                {'bands': 'RGB', 'in_chans': 2},
                "list of .* got 'RGB'",
            ),
            (
                'softcon_resnet50',
                {'in_chans': 3, 'bands': ['B2']},
                'in_chans must be the number of bands, 1, got 3',
            ),
        ],
    )
    def test_unclear(self, name: str, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            create(name, **kwargs)

    def test_any_number_from_scratch(self) -> None:
        model = create('softcon_resnet50', pretrained=False, in_chans=5)
        assert model.conv1.in_channels == 5


class TestImageSize:
    @pytest.mark.parametrize('name', ['224', '256'])
    def test_grid(self, name: str) -> None:
        model = create(f'softcon_vit_small_patch16_{name}')
        weights = models.ViTSmall16_Weights.SENTINEL2_SOFTCON
        expected = weights.get_state_dict(img_size=int(name))['pos_embed']
        assert torch.equal(model.pos_embed, expected)

    def test_argument(self) -> None:
        small = create('softcon_vit_small_patch16_224', img_size=256)
        expected = create('softcon_vit_small_patch16_256').state_dict()
        for key, value in small.state_dict().items():
            assert torch.equal(value, expected[key])
        # As TorchGeo's ChangeViT builds its encoders
        odd = create(
            'softcon_vit_small_patch14_224', img_size=256, dynamic_img_size=True
        )
        assert odd.pos_embed.shape[1] == 1 + 18 * 18
        wide = create('softcon_vit_small_patch16_224', img_size=(96, 128))
        native = models.ViTSmall16_Weights.SENTINEL2_SOFTCON.get_state_dict()[
            'pos_embed'
        ]
        assert torch.equal(wide.pos_embed, resample_abs_pos_embed(native, [6, 8]))
        assert not torch.equal(wide.pos_embed, resample_abs_pos_embed(native, [8, 6]))


def test_arguments_that_lose_weights() -> None:
    with pytest.raises(ValueError, match=r'no place for the weights .*norm.bias'):
        create('softcon_vit_small_patch16_224', num_classes=3, global_pool='avg')


def test_unknown_tag() -> None:
    with pytest.raises(
        ValueError, match=r"one of the tags \['sentinel2_softcon', .*'s3'"
    ):
        create('softcon_resnet50.s3')


class TestConfiguration:
    """timm's own way to say which weights."""

    @pytest.mark.parametrize('as_dict', [False, True])
    @pytest.mark.parametrize('tag', ['sentinel2_softcon', 'sentinel1_softcon'])
    def test_ours(self, tag: str, as_dict: bool) -> None:
        cfg: Any = timm.get_pretrained_cfg(f'softcon_resnet50.{tag}')
        model = create(
            'softcon_resnet50', pretrained_cfg=asdict(cfg) if as_dict else cfg
        )
        member = getattr(models.ResNet50_Weights, tag.upper())
        assert torch.equal(model.conv1.weight, member.get_state_dict()['conv1.weight'])
        again = create('softcon_resnet50', pretrained_cfg=model.pretrained_cfg)
        assert torch.equal(again.conv1.weight, model.conv1.weight)
        assert again.pretrained_cfg['tag'] == tag

    def test_of_another_model(self) -> None:
        cfg = timm.get_pretrained_cfg('dinomc_wide_resnet50_2')
        match = (
            r'must be of ResNet50_Weights for softcon_resnet50, got WideResNet50_2_W'
        )
        with pytest.raises(ValueError, match=match):
            create('softcon_resnet50', pretrained_cfg=cfg)

    def test_file_in_it(self, tmp_path: Path) -> None:
        state = create('softcon_resnet50', pretrained=False, in_chans=13).state_dict()
        torch.save(state, tmp_path / 'mine.pth')
        cfg: Any = timm.get_pretrained_cfg('softcon_resnet50')
        cfg = {**asdict(cfg), 'file': str(tmp_path / 'mine.pth')}
        model = create('softcon_resnet50', in_chans=13, pretrained_cfg=cfg)
        assert torch.equal(model.conv1.weight, state['conv1.weight'])

    @pytest.mark.parametrize(
        ('name', 'weights'),
        [
            ('dinomc_resnet50', models.ResNet50_Weights.SENTINEL2_RGB_DINOMC),
            (
                'dinomc_wide_resnet50_2',
                models.WideResNet50_2_Weights.SENTINEL2_RGB_DINOMC,
            ),
            (
                'dinomc_vit_small_patch8_224',
                models.ViTSmall8_Weights.SENTINEL2_RGB_DINOMC,
            ),
            (
                'dinomc_swin_tiny_patch4_window7_224',
                models.Swin_T_Weights.SENTINEL2_RGB_DINOMC,
            ),
        ],
    )
    def test_values_that_timm_scales_to(self, name: str, weights: Any) -> None:
        resolve: Any = timm.data.resolve_model_data_config
        config = resolve(create(name, pretrained=False))
        assert config['mean'] == weights.meta['mean'] == (0.485, 0.456, 0.406)
        assert config['std'] == weights.meta['std'] == (0.229, 0.224, 0.225)


def test_file_of_the_users_own(tmp_path: Path) -> None:
    state = create('softcon_resnet50', pretrained=False, in_chans=13).state_dict()
    torch.save(state, tmp_path / 'mine.pth')
    overlay = {'file': str(tmp_path / 'mine.pth')}
    model = create('softcon_resnet50', in_chans=13, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.conv1.weight, state['conv1.weight'])


class TestSegmentationModels:
    """``tu-`` encoders of segmentation_models_pytorch."""

    @pytest.mark.parametrize(
        ('decoder', 'name', 'channels'),
        [
            (smp.DPT, 'softcon_vit_small_patch16_224', 12),
            (smp.Unet, 'softcon_resnet50', 2),
            (smp.Unet, 'dinomc_swin_tiny_patch4_window7_224', 3),
        ],
    )
    def test_is_pretrained(self, decoder: Any, name: str, channels: int) -> None:
        with warnings.catch_warnings():  # of TorchGeo's way to say so
            warnings.simplefilter('ignore', UserWarning)
            model = decoder(
                f'tu-{name}',
                encoder_weights='imagenet',
                in_channels=channels,
                classes=3,
            )
        expected = create(name, in_chans=channels).state_dict()
        found = model.encoder.model.state_dict()
        for key, value in found.items():
            assert torch.equal(value, expected[key.replace('layers_', 'layers.')]), key
        assert len(found) > 0.9 * len(expected)
        image = torch.zeros(1, channels, 64, 64)
        assert model.eval()(image).shape == (1, 3, 64, 64)
