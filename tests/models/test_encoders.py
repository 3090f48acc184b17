# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from torchgeo_softcon import WorldCoverScenesDataModule
from torchgeo_softcon._compat import HAS_TASKS, BaseTask
from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.evaluation.features import encode
from torchgeo_softcon.models import create_encoder, encoders, read_weights
from torchgeo_softcon.models.encoders import initial_weights, open_encoder, read_encoder

from ..tasks.helpers import make_loader, make_task, make_trainer
from .helpers import WeightsFolder, dino_checkpoint, torchvision_backbone

TASKS = import_module(BaseTask.__module__.rpartition('.')[0])


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('run')
    trainer = make_trainer(folder, max_epochs=1)
    trainer.fit(make_task(), make_loader())
    trainer.save_checkpoint(folder / 'run.ckpt')
    return folder / 'run.ckpt'


def save_host_task(name: str, path: Path, **options: Any) -> nn.Module:
    """A checkpoint of one of TorchGeo's own tasks."""
    task = getattr(TASKS, name if HAS_TASKS else f'{name}Task')(**options)
    hparams = {k: v for k, v in task.hparams.items() if isinstance(v, int | str)}
    torch.save({'state_dict': task.state_dict(), 'hyper_parameters': hparams}, path)
    return task


class TestReadEncoder:
    """One reader for all who open a file."""

    @pytest.mark.parametrize(
        ('beside', 'default'), [('teacher', 'student'), ('student', 'teacher')]
    )
    def test_branches(self, beside: Any, default: str, tmp_path: Path) -> None:
        state = {'model.a': torch.zeros(1), f'{beside}.a': torch.ones(1)}
        hparams = {'model': 'resnet18'}
        torch.save({'state_dict': state, 'hyper_parameters': hparams}, tmp_path / 'a')
        encoder = read_encoder(tmp_path / 'a')
        assert (encoder.branch, encoder.name) == (default, 'resnet18')
        assert encoder.state_dict == {'a': torch.zeros(1)}
        assert read_encoder(tmp_path / 'a', beside).state_dict == {'a': torch.ones(1)}

    def test_training_checkpoint_of_dino_mc(self, tmp_path: Path) -> None:
        student, teacher = ({'conv1.weight': torch.full((1,), i)} for i in (1.0, 2.0))
        path = tmp_path / 'run.pth'
        torch.save(dino_checkpoint(student, teacher, False), path)
        assert read_encoder(path).state_dict == teacher
        assert read_encoder(path).branch == 'teacher'
        assert read_encoder(path, 'student').state_dict == student
        assert read_weights(str(path)) == teacher

    def test_swin_of_torchvision(self, tmp_path: Path) -> None:
        torch.save(torchvision_backbone('swin_t').state_dict(), tmp_path / 'a')
        encoder = open_encoder(tmp_path / 'a', model='swin_tiny_patch4_window7_224')
        own = torchvision_backbone('swin_t').eval()
        own.load_state_dict(torch.load(tmp_path / 'a', weights_only=True))
        image = torch.rand(1, 3, 224, 224)
        torch.testing.assert_close(encoder.model(image), own(image))

    def test_initial_weights_from_tasks_of_the_host(self, tmp_path: Path) -> None:
        """TorchGeo itself does not open checkpoints of its self-supervised tasks."""
        path = tmp_path / 'run.ckpt'
        task: Any = save_host_task('MoCo', path, model='resnet18', in_channels=4)
        own: dict[str, Tensor] = task.backbone.state_dict()
        for key, value in read_weights(str(path)).items():
            assert torch.equal(value, own[key])

    def test_bad_input(self, tmp_path: Path) -> None:
        torch.save({'model.a': torch.ones(1)}, tmp_path / 'a')
        with pytest.raises(ValueError, match=r"branch='teacher' is for files with two"):
            read_encoder(tmp_path / 'a', 'teacher')
        with pytest.raises(ValueError, match="must be 'student' or 'teacher', got 'x'"):
            read_encoder(tmp_path / 'a', 'x')  # type: ignore[arg-type]


class TestOpenEncoder:
    def test_task(self, checkpoint: Path) -> None:
        encoder = open_encoder(checkpoint)
        assert (encoder.name, encoder.in_channels, encoder.size) == ('test_vit', 4, 32)
        content = torch.load(checkpoint, weights_only=True)
        # As they were trained, and not as timm builds the model
        state = {**content['state_dict'], 'model.pos_embed': content['positions']}
        for key, value in encoder.model.state_dict().items():
            assert torch.equal(value, state[f'model.{key}'])
        assert not encoder.model.training

    @pytest.mark.parametrize('name', ['MoCo', 'SimCLR', 'BYOL'])
    def test_tasks_of_the_host(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / 'run.ckpt'
        task: Any = save_host_task(name, path, model='resnet18', in_channels=4)
        encoder = open_encoder(path)
        image = torch.rand(2, 4, 64, 64)
        own = task.model.backbone.model if name == 'BYOL' else task.backbone
        expected = encode(own.eval(), image)['pooled']
        torch.testing.assert_close(encoder.model(image), expected)

    def test_state_dict_needs_a_name(self, tmp_path: Path) -> None:
        path = tmp_path / 'encoder.pth'
        torch.save(create_encoder('resnet18', 2).state_dict(), path)
        assert open_encoder(path, model='resnet18').in_channels == 2
        with pytest.raises(ValueError, match='Set model to the name'):
            open_encoder(path)
        with pytest.raises(
            ValueError, match=r'no parameters of a test_vit: patch_embed'
        ):
            open_encoder(path, model='test_vit')

    def test_positions_of_another_size_are_not_resampled(self, tmp_path: Path) -> None:
        vit = timm.create_model('vit_tiny_patch16_384', img_size=224, num_classes=0)
        path = tmp_path / 'encoder.pth'
        torch.save(vit.state_dict(), path)
        encoder = open_encoder(path, model='vit_tiny_patch16_384')
        image = torch.rand(1, 3, 224, 224)
        torch.testing.assert_close(encoder.model(image), vit.eval()(image))

    def test_bad_input(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match='one of checkpoint and weights'):
            open_encoder()
        with pytest.raises(FileNotFoundError, match='does not exist'):
            open_encoder(tmp_path / 'none.ckpt')
        torch.save({}, tmp_path / 'empty.ckpt')
        with pytest.raises(ValueError, match='has no parameters of a resnet18'):
            open_encoder(tmp_path / 'empty.ckpt', model='resnet18')
        (tmp_path / 'text.ckpt').write_text('no checkpoint')
        with pytest.raises(ValueError, match='PyTorch can load safely'):
            open_encoder(tmp_path / 'text.ckpt')

    def test_bands_of_a_checkpoint(self, tmp_path: Path) -> None:
        state = create_encoder('resnet18', 2).state_dict()
        hparams = {'model': 'resnet18', 'bands': ['B2', 'B3']}
        torch.save({'state_dict': state, 'hyper_parameters': hparams}, tmp_path / 'a')
        assert open_encoder(tmp_path / 'a', bands=['B02', 'B03']).in_channels == 2
        with pytest.raises(
            ValueError, match=r"with, \('B2', 'B3'\), got \('B3', 'B2'\)"
        ):
            open_encoder(tmp_path / 'a', bands=['B3', 'B2'])

    def test_bands_of_weights_of_the_host(self) -> None:
        name = 'ResNet18_Weights.SENTINEL2_RGB_MOCO'
        with pytest.raises(ValueError, match=r'weights of this package only, got .*B2'):
            open_encoder(weights=name, bands=['B2'])

    @pytest.mark.parametrize('value_range', ['softcon', (0, 10000)])
    def test_range_of_a_run_on_data_of_this_package(
        self, value_range: Any, scenes: SyntheticScenes, tmp_path: Path
    ) -> None:
        """What a frozen encoder needs when it sees other data."""
        data = WorldCoverScenesDataModule(
            str(scenes.images),
            str(scenes.worldcover),
            patch_size=48,
            batch_size=4,
            length=4,
            value_range=value_range,
        )
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.fit(make_task(in_channels=13), data)
        trainer.save_checkpoint(tmp_path / 'run.ckpt')
        expected = True if value_range == 'softcon' else None
        assert open_encoder(tmp_path / 'run.ckpt').unit_range is expected

    @pytest.mark.parametrize(
        ('weights', 'bands', 'unit'),
        [
            ('ViTSmall16_Weights.SENTINEL2_SOFTCON', 13, True),
            ('ResNet50_Weights.SENTINEL1_SOFTCON', 2, True),
            ('Swin_T_Weights.SENTINEL2_RGB_DINOMC', 3, False),
        ],
    )
    def test_published_weights(
        self,
        weights: str,
        bands: int,
        unit: bool,
        weights_folder: WeightsFolder,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        weights_folder.use(monkeypatch)
        encoder = open_encoder(weights=weights)
        assert encoder.bands is not None
        assert (encoder.in_channels, len(encoder.bands)) == (bands, bands)
        assert (encoder.size, encoder.unit_range) == (224, unit)


class TestNormalization:
    """What is known of the mean by which images were normalized, red first."""

    def test_published_weights(
        self, weights_folder: WeightsFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights_folder.use(monkeypatch)
        imagenet: tuple[float, ...] = (0.485, 0.456, 0.406)
        for weights, expected in (
            ('ResNet50_Weights.SENTINEL2_RGB_DINOMC', imagenet),
            (str(weights_folder.root / 'dinomc_resnet50.pth'), imagenet),
            ('ResNet50_Weights.SENTINEL2_SOFTCON', None),
            (str(weights_folder.root / 'B2_rn50_softcon.pth'), None),
        ):
            found = initial_weights(weights, 'resnet50', 3).normalization
            assert expected == (found and found[0])
        for model, bands, expected in (
            ('dinomc_resnet50', None, imagenet),
            ('dinomc_resnet50', ('B02', 'B03', 'B04'), imagenet[::-1]),
            ('dinomc_resnet50', ('R', 'B'), imagenet[::2]),
            ('softcon_resnet50', ('B02', 'B03', 'B04'), None),
        ):
            found = initial_weights(
                True, model, len(bands or '123'), bands
            ).normalization
            assert expected == (found and tuple(found[0]))

    def test_models_of_timm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def create(model: str, pretrained: bool) -> nn.Module:
            return timm.create_model(model, pretrained=not pretrained)

        monkeypatch.setattr(encoders, 'create_encoder', create)
        found = initial_weights(True, 'vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m', 3)
        assert found.normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        found = initial_weights(True, 'test_vit', 3)
        assert found.normalization == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    'prefix', ['module.base_encoder.', 'base_encoder.', 'module.encoder_q.', 'module.']
)
def test_files_of_moco(tmp_path: Path, prefix: str) -> None:
    state = create_encoder('test_vit', 4).state_dict()
    other = {f'module.encoder_k.{key}': value + 1 for key, value in state.items()}
    mine = {f'{prefix}{key}': value for key, value in state.items()}
    content = {
        'epoch': 1,
        'state_dict': mine | (other if 'encoder_q' in prefix else {}),
    }
    torch.save(content, tmp_path / 'a.pth')
    found = read_weights(str(tmp_path / 'a.pth'))
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_file_of_mae(tmp_path: Path) -> None:
    state = create_encoder('test_vit', 4).state_dict()
    beside = {'mask_token': torch.zeros(1), 'decoder_embed.weight': torch.zeros(1)}
    torch.save({'model': state | beside, 'epoch': 1}, tmp_path / 'a.pth')
    found = read_weights(str(tmp_path / 'a.pth'))
    assert found.keys() == state.keys()
