# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import copy
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import timm
import torch
import torchgeo.models
from torch import Tensor
from torchvision.models._api import WeightsEnum

import torchgeo_softcon
from torchgeo_softcon import models
from torchgeo_softcon.bands import (
    SENTINEL1_BANDS,
    SENTINEL2_BANDS,
    SENTINEL2_SUBSETS,
    normalize_band_names,
)
from torchgeo_softcon.models import timm_models
from torchgeo_softcon.models.convert import swin_to_timm
from torchgeo_softcon.models.hub import WEIGHTS_VARIABLE
from torchgeo_softcon.models.weights import (
    EncoderWeights,
    ResNet50_Weights,
    Swin_T_Weights,
    ViTSmall8_Weights,
    ViTSmall14_DINOv2_Weights,
    ViTSmall16_Weights,
    WideResNet50_2_Weights,
)

from .helpers import (
    WeightsFolder,
    dino_checkpoint,
    randomize,
    serve,
    torchvision_backbone,
    vit_shapes,
    vit_tokens,
)

ENUMS: list[Any] = EncoderWeights.__subclasses__()
MEMBERS = [member for enum in ENUMS for member in enum]
SOFTCON = [member for member in MEMBERS if member.name.endswith('SOFTCON')]
DINO_MC = [member for member in MEMBERS if member not in SOFTCON]


def test_a_class_is_one_entry_that_all_lists_follow() -> None:
    """What has to name each class: two lazy faces and the entry points."""
    names = {enum.__name__ for enum in ENUMS}
    for face in (torchgeo_softcon, models):
        assert {name for name in face.__all__ if name.endswith('_Weights')} == names
        assert all(getattr(face, enum.__name__) is enum for enum in ENUMS)
    pyproject = Path(torchgeo_softcon.__file__).parents[1] / 'pyproject.toml'
    declared = tomllib.loads(pyproject.read_text())['project']['entry-points']
    assert declared['torchgeo.weights'] == {
        name: f'torchgeo_softcon.models:{name}' for name in names
    }
    assert declared['timm.models'] == {
        name: f'{timm_models.__name__}:{name}' for name in timm_models._MODELS
    }
    # Models of timm name the class and its members
    for model in timm_models._MODELS.values():
        members = {member.name.lower() for member in getattr(models, model.enum)}
        assert model.bands.keys() <= members


def test_a_name_loads_little(tmp_path: Path) -> None:
    """A weight by its name adds nothing heavy to what the host has loaded."""
    code = """
import sys
import torchgeo.models
before = {*sys.modules}
torchgeo.models.get_weight('ViTSmall16_Weights.SENTINEL2_SOFTCON')
heavy = ('kornia', 'lightly', 'lightning', 'torchmetrics')
new = {name for name in sys.modules.keys() - before if name.startswith(heavy)}
new |= {n for n in sys.modules if n.startswith('torchgeo_softcon.tasks')}
print(sorted(new))
"""
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == '[]'


@pytest.fixture
def local(weights_folder: WeightsFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    return weights_folder.use(monkeypatch)


@pytest.fixture(scope='module')
def folder(weights_folder: WeightsFolder) -> Path:
    return weights_folder.root


def host_of(weights: WeightsEnum) -> WeightsEnum:
    """The host's weights of the same file."""
    enum = type(weights).__name__.replace('16', '14_DINOv2')
    name = weights.name.replace('2_', '2_ALL_').replace('1_', '1_GRD_')
    return getattr(torchgeo.models, enum)[name]


@pytest.mark.parametrize('weights', SOFTCON, ids=str)
class TestSoftCon:
    def test_file_and_meta_are_those_of_the_host(self, weights: WeightsEnum) -> None:
        host = host_of(weights)
        assert weights.url == host.url
        for key, value in host.meta.items():
            if key != 'model' or '16' not in str(weights):
                assert weights.meta[key] == value
        assert weights.meta['value_range'] == (0, 1)
        assert weights.meta['license'] == 'Apache-2.0'
        bands = SENTINEL1_BANDS if '1' in weights.name[:9] else SENTINEL2_BANDS
        assert normalize_band_names(weights.meta['bands']) == bands

    def test_transform_is_the_hosts_scaled_to_the_unit_range(
        self, weights: WeightsEnum
    ) -> None:
        host = host_of(weights)
        mean, std = (
            torch.tensor(getattr(host.transforms[-1], k)).view(-1, 1, 1)
            for k in ('mean', 'std')
        )
        image = mean + 2.5 * std * torch.randn(len(mean), 264, 264)
        score = host.transforms({'image': image.clone()})['image']
        unit = weights.transforms({'image': image})['image']
        assert unit.shape == (len(mean), 224, 224)
        torch.testing.assert_close(unit, ((score + 2) / 4).clamp(0, 1))
        assert unit.min() == 0
        assert unit.max() == 1


@pytest.mark.parametrize('weights', DINO_MC, ids=str)
def test_transform_of_dino_mc(weights: WeightsEnum) -> None:
    image = torch.randint(0, 256, (3, 264, 300), dtype=torch.uint8)
    out = weights.transforms({'image': image, 'label': torch.tensor(3)})
    assert out['label'].dtype == torch.int64
    assert out['image'].shape == (3, 224, 224)
    mean, std = (torch.tensor(weights.meta[k]).view(3, 1, 1) for k in ('mean', 'std'))
    photo = out['image'] * std + mean
    assert photo.min() > -0.3
    assert photo.max() < 1.3
    assert photo.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize('weights', MEMBERS, ids=str)
class TestEveryMember:
    def test_found_by_name(self, weights: WeightsEnum) -> None:
        assert torchgeo.models.get_weight(str(weights)) is weights

    def test_meta(self, weights: WeightsEnum) -> None:
        assert weights.meta.keys() >= {
            *('dataset', 'in_chans', 'img_size', 'model', 'publication', 'repo'),
            *('ssl_method', 'bands', 'license', 'value_range'),
        }
        assert len(weights.meta['bands']) == weights.meta['in_chans']

    @pytest.mark.slow
    def test_published_file(self, weights: WeightsEnum) -> None:
        state = weights.get_state_dict(check_hash=True)
        assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())
        key = {'swin_t': 'features.0.0.weight'}.get(weights.meta['model'])
        key = key or next(
            k for k in state if k in ('conv1.weight', 'patch_embed.proj.weight')
        )
        assert state[key].shape[1] == weights.meta['in_chans']


# DINO-TP has the files of DINO-MC, with other numbers
@pytest.mark.parametrize(
    'weights', [m for m in MEMBERS if m.name[-2:] != 'TP'], ids=str
)
def test_loads_strictly_into_the_model_of_its_name(
    weights: WeightsEnum, local: Path
) -> None:
    # As TorchGeo 0.10 asks
    state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    name, channels = weights.meta['model'], weights.meta['in_chans']
    if name == 'swin_t':
        model = copy.deepcopy(torchvision_backbone(name))
    else:
        size: Any = {'img_size': 224} if 'dinov2' in name else {}
        with torch.device('meta'):
            model = timm.create_model(name, in_chans=channels, num_classes=0, **size)
    model.load_state_dict(state, assign=True)
    assert all(v.is_contiguous() and v.device.type == 'cpu' for v in state.values())


@pytest.mark.parametrize(
    'weights',
    [ViTSmall16_Weights.SENTINEL1_SOFTCON, Swin_T_Weights.SENTINEL2_RGB_DINOTP],
    ids=str,
)
def test_every_dict_is_new(weights: WeightsEnum, local: Path) -> None:
    first = weights.get_state_dict()
    expected = next(iter(first.values())).clone()
    next(iter(first.values())).zero_()
    first.popitem()
    second = weights.get_state_dict()
    assert len(second) == len(first) + 1
    assert torch.equal(next(iter(second.values())), expected)


@pytest.mark.parametrize(
    'weights',
    [
        *(ResNet50_Weights.SENTINEL2_SOFTCON, ResNet50_Weights.SENTINEL2_RGB_DINOMC),
        *(
            ViTSmall14_DINOv2_Weights.SENTINEL1_SOFTCON,
            Swin_T_Weights.SENTINEL2_RGB_DINOTP,
        ),
        *(ViTSmall16_Weights.SENTINEL2_SOFTCON, ViTSmall16_Weights.SENTINEL1_SOFTCON),
    ],
    ids=str,
)
def test_loads_into_the_hosts_builder(weights: WeightsEnum, local: Path) -> None:
    builder = getattr(torchgeo.models, weights.meta['model'])
    model = builder(weights=weights)
    state = weights.get_state_dict()
    for key, value in model.state_dict().items():
        assert key.startswith(('head.', 'fc.')) or torch.equal(value, state[key]), key


class TestBands:
    @pytest.mark.parametrize('count', [12, 10, 4, 3])
    @pytest.mark.parametrize(
        'weights',
        [ResNet50_Weights.SENTINEL2_SOFTCON, ViTSmall16_Weights.SENTINEL2_SOFTCON],
        ids=str,
    )
    def test_some_bands(self, weights: Any, count: int, local: Path) -> None:
        key = 'conv1.weight' if 'ResNet' in str(weights) else 'patch_embed.proj.weight'
        whole, bands = weights.get_state_dict(), SENTINEL2_SUBSETS[count]
        state = weights.get_state_dict(bands=[b.replace('B', 'B0') for b in bands])
        indices = [SENTINEL2_BANDS.index(band) for band in bands]
        assert torch.equal(state[key], whole[key][:, indices])
        name = weights.meta['model']
        model = timm.create_model(name, in_chans=count, num_classes=0)
        model.load_state_dict(state)

    def test_sar(self, local: Path) -> None:
        weights: Any = ViTSmall14_DINOv2_Weights.SENTINEL1_SOFTCON
        key = 'patch_embed.proj.weight'
        state = weights.get_state_dict(bands=['vh', 'vv'])
        assert torch.equal(state[key], weights.get_state_dict()[key].flip(1))
        with pytest.raises(ValueError, match='among those of the weights, VV, VH'):
            weights.get_state_dict(bands=['B2'])


class TestPatchSixteen:
    @pytest.mark.parametrize('size', [224, 256, 96])
    def test_image_size(self, size: int, local: Path) -> None:
        weights: Any = ViTSmall16_Weights.SENTINEL2_SOFTCON
        state = weights.get_state_dict(img_size=size)
        original: Any = ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON
        positions = original.get_state_dict()['pos_embed']
        assert torch.equal(state['pos_embed'], positions) == (size == 256)
        name = 'vit_small_patch16_224'
        model = timm.create_model(name, img_size=size, in_chans=13, num_classes=0)
        model.load_state_dict(state)

    def test_patch_fourteen_at_another_size(self, local: Path) -> None:
        weights: Any = ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON
        assert weights.get_state_dict(img_size=98)['pos_embed'].shape == (1, 50, 384)


class TestDinoMc:
    def test_branch(self, local: Path) -> None:
        weights: Any = ViTSmall8_Weights.SENTINEL2_RGB_DINOMC
        student, teacher = (
            weights.get_state_dict(branch=branch) for branch in ('student', 'teacher')
        )
        for key, value in weights.get_state_dict().items():
            assert torch.equal(value, teacher[key])
            torch.testing.assert_close(value, student[key] + 1)

    def test_swin_in_timms_layout(self, local: Path) -> None:
        weights: Any = Swin_T_Weights.SENTINEL2_RGB_DINOMC
        state = weights.get_state_dict(layout='timm')
        expected = swin_to_timm(weights.get_state_dict())
        assert state.keys() == expected.keys()
        timm.create_model(
            'swin_tiny_patch4_window7_224', num_classes=0
        ).load_state_dict(state)


class TestEqualFeatures:
    """From the published layout, through the enum, to timm."""

    def check(
        self, weights: Any, expected: Tensor, image: Tensor, tolerance: float
    ) -> None:
        size: Any = {'img_size': 224} if 'vit' in weights.meta['model'] else {}
        name = weights.meta['model'].replace('swin_t', 'swin_tiny_patch4_window7_224')
        # Swin has constants that are not in its state dict
        with torch.device('cpu' if 'swin' in name else 'meta'):
            model: Any = timm.create_model(
                name, in_chans=image.shape[1], num_classes=0, **size
            ).eval()
        model.load_state_dict(weights.get_state_dict(layout='timm'), assign=True)
        with torch.no_grad():
            actual = model.forward_features(image) if size else model(image)
        assert expected.std() > 0.01
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)

    @pytest.mark.parametrize(
        ('enum', 'patch'), [(ViTSmall14_DINOv2_Weights, 14), (ViTSmall8_Weights, 8)]
    )
    def test_vit(
        self, enum: Any, patch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
        weights = next(iter(enum))
        channels = weights.meta['in_chans']
        state = randomize(vit_shapes(384, patch, channels, 224 // patch, patch == 14))
        if patch == 14:
            torch.save(state, tmp_path / 'B13_vits14_softcon_enc.pth')
        else:
            checkpoint = dino_checkpoint({}, state, False)
            torch.save(checkpoint, tmp_path / weights.meta['file'])
        image = torch.randn(1, channels, 224, 224)
        self.check(weights, vit_tokens(state, image), image, 1e-5)

    @pytest.mark.parametrize(
        ('enum', 'size'), [(WideResNet50_2_Weights, 84), (Swin_T_Weights, 224)]
    )
    def test_convolutions_and_swin(
        self, enum: Any, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
        weights = next(iter(enum))
        reference = torchvision_backbone(weights.meta['model'])
        checkpoint = dino_checkpoint({}, reference.state_dict(), size == 84)
        torch.save(checkpoint, tmp_path / weights.meta['file'])
        image = torch.randn(1, 3, size, size)
        with torch.no_grad():
            self.check(weights, reference(image), image, 1e-6)

    @pytest.mark.parametrize('channels', [13, 2])
    def test_resnet_of_softcon(
        self, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(WEIGHTS_VARIABLE, str(tmp_path))
        weights = [*ResNet50_Weights][channels == 2]
        reference = torchvision_backbone('resnet50', channels)
        torch.save(reference.state_dict(), tmp_path / f'B{channels}_rn50_softcon.pth')
        image = torch.randn(1, channels, 64, 64)
        with torch.no_grad():
            self.check(weights, reference(image), image, 1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            (
                {'img_size': 230},
                'img_size must be a multiple of the patch size 16 .* 224',
            ),
            ({'img_size': 8}, 'img_size must be .* got 8. The nearest one is 16'),
            ({'img_size': '224'}, "as a number, such as 224, got '224'"),
            ({'img_size': (224, 224)}, r'as a number, .* got \(224, 224\)'),
            ({'bands': 'B2'}, "bands must be a list of names, .* got 'B2'"),
            ({'bands': ['B14']}, "unknown name 'B14'"),
            ({'branch': 'student'}, 'branch must be left out .* one is published'),
            ({'layout': 'smp'}, "layout must be 'host' or 'timm', got 'smp'"),
            ({'root': '/nowhere'}, 'root must be a folder'),
        ],
    )
    def test_argument(self, kwargs: dict[str, Any], match: str, local: Path) -> None:
        with pytest.raises(ValueError, match=match):
            ViTSmall16_Weights.SENTINEL2_SOFTCON.get_state_dict(**kwargs)

    def test_another_file_of_that_name(self, folder: Path, tmp_path: Path) -> None:
        source = folder / 'B13_vitb14_softcon_enc.pth'
        (tmp_path / 'B13_vits14_softcon_enc.pth').symlink_to(source)
        match = (
            r'B13_vits14_softcon_enc.pth of ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON '
            r'must have the parameters of vit_small_patch14_dinov2 with 13 bands: .*'
            r'\(1, 1, 768\) instead of \(1, 1, 384\).* Remove the file if it is not'
        )
        with pytest.raises(ValueError, match=match):
            ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON.get_state_dict(root=tmp_path)

    def test_checkpoint_without_the_branch(self, folder: Path, tmp_path: Path) -> None:
        weights: Any = ViTSmall8_Weights.SENTINEL2_RGB_DINOMC
        torch.save({'epoch': 1}, tmp_path / weights.meta['file'])
        with pytest.raises(
            ValueError, match="branch='student' is not in the checkpoint"
        ):
            weights.get_state_dict(root=tmp_path, branch='student')


def test_from_a_server_by_the_cache_of_torch_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: Any = ResNet50_Weights.SENTINEL2_SOFTCON
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    with serve(folder) as server:
        url = f'{server.url}/B13_rn50_softcon.pth'
        monkeypatch.setattr(weights.value, 'url', url)
        weights.get_state_dict(progress=False)
        weights.get_state_dict(progress=False)
        assert len(server.requests) == 1
    assert (tmp_path / 'hub' / 'checkpoints' / 'B13_rn50_softcon.pth').exists()


def test_links_are_those_of_the_authors() -> None:
    # The tables of https://github.com/WennyXY/DINO-MC#readme
    expected = {
        'ResNet50_Weights.SENTINEL2_RGB_DINOMC': '1Tku4QoQDc3BU1BOr8PzQWFPyVStUDsVE',
        'ResNet50_Weights.SENTINEL2_RGB_DINOTP': '1mHR9uv5G7-9FpEzGBvdEOcJcWbnHOGEV',
        'Swin_T_Weights.SENTINEL2_RGB_DINOMC': '1rod3PxdZ2OGqNJxLp5CAtXm7vIsLO7us',
        'Swin_T_Weights.SENTINEL2_RGB_DINOTP': '1E00rYPB2wFvnq7exmQwVRe1koQ98BECL',
        'ViTSmall8_Weights.SENTINEL2_RGB_DINOMC': '18RqKqZYzigOjwbyNzLsys8bmwqxrNhyt',
        'ViTSmall8_Weights.SENTINEL2_RGB_DINOTP': '1BIRR56wCwTDlB4_eQTA0DpYYPHACHfxN',
        'WideResNet50_2_Weights.SENTINEL2_RGB_DINOMC': '1WlNDoks3Uo_Al5pUHWrhQpljDrt4Ip__',
        'WideResNet50_2_Weights.SENTINEL2_RGB_DINOTP': '1MoclNnRlSGOKhudm5lreDYSxYJqciQar',
    }
    queries = {str(w): parse_qs(urlparse(w.url).query) for w in DINO_MC}
    assert {name: query['id'][0] for name, query in queries.items()} == expected
    assert len({weights.meta['file'] for weights in DINO_MC}) == 8


def test_arguments_of_the_host_are_understood() -> None:
    parameters = inspect.signature(ENUMS[0].get_state_dict).parameters
    theirs = {'progress', 'check_hash', 'weights_only', 'model_dir', 'map_location'}
    assert theirs <= {*parameters}
