# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file
from torch import Tensor, nn

from torchgeo_softcon.__main__ import main
from torchgeo_softcon._compat import HAS_TASKS, BaseTask
from torchgeo_softcon.export.encoder import convert_encoder
from torchgeo_softcon.export.files import export, push_to_hub
from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.models.convert import to_patch_size
from torchgeo_softcon.models.encoders import Encoder, read_encoder

from ..models.helpers import dino_checkpoint, randomize, vit_shapes

TASKS = import_module(BaseTask.__module__.rpartition('.')[0])
extract_backbone = import_module(f'{TASKS.__name__}.utils').extract_backbone


def host(name: str) -> str:
    return name if HAS_TASKS else f'{name}Task'


def softcon(model: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both branches of a run."""
    torch.manual_seed(seed)
    student = create_encoder(model, 4).state_dict()
    teacher = {k: v + 1 for k, v in student.items()}
    return student, teacher


def save_run(
    folder: Path, model: str, names: tuple[str, ...], *states: dict[str, Tensor]
) -> Path:
    """A checkpoint as a task leaves it, with what is beside it."""
    path = folder / 'version_0' / 'checkpoints' / 'epoch=0-loss=0.12.ckpt'
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        f'{n}{k}': v for n, s in zip(names, states, strict=True) for k, v in s.items()
    }
    state |= {
        'projector.0.weight': torch.ones(2, 2),
        'teacher_projector.a': torch.ones(1),
    }
    hparams = {'model': model, 'in_channels': 4, 'bands': ['B2', 'B3', 'B4', 'B8']}
    torch.save(
        {
            'state_dict': {**state, 'rng_seed': torch.tensor(3)},
            'hyper_parameters': {**hparams, 'size': 224},
            'epoch': 4,
            'global_step': 99,
            'optimizer_states': [{'lr': 0.1}],
        },
        path,
    )
    return path


SOFTCON = ('model.', 'teacher.')
DINO_MC = ('model.', 'student.')


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path, 'test_vit', SOFTCON, *softcon('test_vit'))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
        assert actual[key].device.type == 'cpu'


class TestBranch:
    @pytest.mark.parametrize(
        ('names', 'default', 'other'),
        [(SOFTCON, 'student', 'teacher'), (DINO_MC, 'teacher', 'student')],
    )
    def test_of_both_tasks(
        self, names: tuple[str, str], default: Any, other: Any, tmp_path: Path
    ) -> None:
        exported, beside = softcon('resnet18')
        path = save_run(tmp_path, 'resnet18', names, exported, beside)
        assert_equal(read_encoder(path).state_dict, exported)
        assert_equal(read_encoder(path, default).state_dict, exported)
        assert_equal(read_encoder(path, other).state_dict, beside)
        assert read_encoder(path).branch == default

    def test_absent(self, tmp_path: Path) -> None:
        path = save_run(tmp_path, 'resnet18', ('teacher.',), softcon('resnet18')[0])
        match = r"branch='student' is not in .*'projector', 'rng_seed', 'teacher'"
        with pytest.raises(ValueError, match=match):
            read_encoder(path)

    def test_one_branch_is_of_another_task(self, tmp_path: Path) -> None:
        student, teacher = softcon('resnet18')
        path = save_run(tmp_path, 'resnet18', ('model.',), student)
        match = r"task such as SoftConTask or DINOMCTask, got .*\['model', 'projector'"
        with pytest.raises(ValueError, match=match):
            export(path, 'timm')
        path = save_run(tmp_path, 'resnet18', SOFTCON, student, teacher)
        file, _ = export(path, 'torchgeo')
        match = r"DINOMCTask, got a file with \['model'\]\. Weights of others need no"
        with pytest.raises(ValueError, match=match):
            export(file, 'timm')

    def test_other_file(self, tmp_path: Path) -> None:
        state = {'conv1.weight': torch.ones(1)}
        torch.save(dino_checkpoint(state, state, False), tmp_path / 'a.ckpt')
        with pytest.raises(ValueError, match=r'SoftConTask or DINOMCTask, got .*args'):
            export(tmp_path / 'a.ckpt', 'timm')


class TestFormats:
    @pytest.mark.parametrize('model', ['test_vit', 'resnet18'])
    def test_torchgeo(self, model: str, tmp_path: Path) -> None:
        student, teacher = softcon(model)
        path = save_run(tmp_path, model, SOFTCON, student, teacher)
        file, _ = export(path, 'torchgeo', branch='teacher')
        assert file == path.with_name('epoch=0-loss=0.12_torchgeo.ckpt')
        name, state = extract_backbone(str(file))
        assert name == model
        assert_equal(state, teacher)
        task = getattr(TASKS, host('Classification'))(
            model=model, weights=str(file), in_channels=4, num_classes=3
        )
        for key, value in teacher.items():
            assert torch.equal(task.model.state_dict()[key], value)

    def test_timm(self, run: Path) -> None:
        file, _ = export(run, 'timm')
        assert_equal(torch.load(file, weights_only=True), softcon('test_vit')[0])
        encoder = timm.create_model('test_vit', in_chans=4, num_classes=0)
        encoder.load_state_dict(torch.load(file, weights_only=True))

    def test_safetensors(self, run: Path, tmp_path: Path) -> None:
        file, _ = export(run, 'safetensors', output=tmp_path / 'a')
        assert file == tmp_path / 'a.safetensors'
        assert_equal(load_file(file), softcon('test_vit')[0])
        timm.create_model(
            'test_vit', in_chans=4, num_classes=0, checkpoint_path=str(file)
        )

    @pytest.mark.parametrize(
        ('model', 'decoder', 'encoder'),
        [
            ('test_vit', 'dpt', 'tu-test_vit'),
            ('resnet18', 'unet', 'resnet18'),
            ('swin_tiny_patch4_window7_224', 'unet', 'tu-swin_tiny_patch4_window7_224'),
        ],
    )
    def test_smp(self, model: str, decoder: str, encoder: str, tmp_path: Path) -> None:
        student, teacher = softcon(model)
        path = save_run(tmp_path, model, SOFTCON, student, teacher)
        file, checkpoint, _ = export(path, 'smp', output=tmp_path / 'a.pth')
        assert [file, checkpoint] == [tmp_path / 'a.pth', tmp_path / 'a.ckpt']
        network: Any = {'dpt': smp.DPT, 'unet': smp.Unet}[decoder](
            encoder, encoder_weights=None, in_channels=4, classes=3
        )
        state = torch.load(file, weights_only=True)
        network.encoder.load_state_dict(dict(state))
        loaded = network.encoder.state_dict()
        if model != 'swin_tiny_patch4_window7_224':  # the same, slowly
            task = getattr(TASKS, host('SemanticSegmentation'))(
                model=decoder,
                backbone=encoder,
                weights=str(checkpoint),
                in_channels=4,
                num_classes=3,
            )
            assert_equal(task.model.encoder.state_dict(), loaded)
        for key, value in loaded.items():
            name = key.removeprefix('model.').replace('layers_', 'layers.')
            if name.startswith('head.'):
                assert not value.any()
            else:
                assert torch.equal(value, student[name])

    @pytest.mark.parametrize(
        ('model', 'others'),
        [
            (
                'swin_tiny_patch4_window7_224',
                'timm or safetensors, or smp for segmentation',
            ),
            ('test_convnext', 'timm or safetensors'),
            ('test_efficientnet', None),
        ],
    )
    def test_family_that_the_host_does_not_open(
        self, model: str, others: str | None, tmp_path: Path
    ) -> None:
        states = softcon(model)
        path = save_run(tmp_path, model, SOFTCON, *states)
        if others is None:
            file, _ = export(path, 'torchgeo')
            getattr(TASKS, host('Classification'))(
                model=model, weights=str(file), in_channels=4, num_classes=3
            )
            return
        match = f"format must be another than 'torchgeo' for {model}.* Choose {others}"
        with pytest.raises(ValueError, match=match):
            export(path, 'torchgeo')
        assert [*path.parent.iterdir()] == [path]


def features(model: Any, size: int = 224) -> Tensor:
    image = torch.rand(2, 4, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return cast(Tensor, model.eval()(image))


def front_matter(card: Path) -> dict[str, Any]:
    return cast(dict[str, Any], yaml.safe_load(card.read_text().split('---\n')[1]))


class TestHuggingFace:
    @pytest.mark.parametrize(
        ('model', 'kwargs', 'size'),
        [
            ('test_vit', {}, 160),
            ('test_vit', {'img_size': 96}, 96),
            ('resnet18', {}, 64),
            ('swin_tiny_patch4_window7_224', {}, 224),
            ('test_convnext', {}, 64),
        ],
    )
    def test_timm_opens_the_folder(
        self, model: str, kwargs: dict[str, int], size: int, tmp_path: Path
    ) -> None:
        path = save_run(tmp_path, model, SOFTCON, *softcon(model))
        out = tmp_path / 'out'
        written = export(path, 'hf', output=out, **kwargs)  # type: ignore[arg-type]
        names = ['config.json', 'model.safetensors', 'README.md']
        assert written == [out / name for name in names]
        opened: Any = timm.create_model(f'local-dir:{out}', pretrained=True)
        encoder = convert_encoder(read_encoder(path), **kwargs)
        assert torch.equal(features(opened, size), features(encoder.model, size))
        # With a new classifier
        timm.create_model(f'local-dir:{out}', pretrained=True, num_classes=3)
        assert opened.default_cfg['input_size'][0] == 4

    def test_without_this_package(self, tmp_path: Path) -> None:
        model = 'softcon_vit_small_patch14_224'
        state = randomize(vit_shapes(384, 14, 4, 16, True))
        del state['mask_token']
        path = save_run(tmp_path, model, SOFTCON, state, state)
        config, *_ = export(path, 'hf')
        assert config.parent == path.with_name('epoch=0-loss=0.12_hf')
        content = json.loads(config.read_text())
        assert content['architecture'] == 'vit_small_patch14_dinov2'
        assert content['model_args'] == {'in_chans': 4, 'img_size': 224}

    def test_again_in_the_same_folder(self, run: Path) -> None:
        assert export(run, 'hf') == export(run, 'hf')

    def test_front_matter(self, run: Path) -> None:
        (run.parents[1] / 'metrics.csv').write_text('epoch,val\n0,0.5\n1,0.75\n')
        *_, card = export(run, 'hf', license='cc-by-4.0')
        front = front_matter(card)
        assert front['license'] == 'cc-by-4.0'
        assert {'timm', 'torchgeo', 'softcon', 'sentinel-2'} <= {*front['tags']}
        assert front['bands'] == ['B2', 'B3', 'B4', 'B8']
        assert front['range'] == 'not known'
        assert front['metrics'] == ['epoch', 'val']
        ModelCardData(**front)  # checks what it knows
        (result,) = model_index_to_eval_results(front['model-index'])[1][1:]
        assert (result.metric_name, result.metric_value) == ('val', 0.75)

    def test_push(self, run: Path) -> None:
        class Api:
            def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
                assert kwargs == {'private': True, 'exist_ok': True}
                return SimpleNamespace(repo_id=f'me/{repo_id}')

            def upload_folder(self, **kwargs: Any) -> None:
                said.update(kwargs)

        said: dict[str, Any] = {}
        folder = export(run, 'hf')[0].parent
        (folder / 'other.txt').touch()
        assert push_to_hub(folder, 'a', private=True, api=Api()) == 'hf-hub:me/a'
        assert (said['repo_id'], said['folder_path']) == ('me/a', str(folder))
        assert {*said['allow_patterns']} == {p.name for p in folder.iterdir()} - {
            'other.txt'
        }

    def test_push_of_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r'has no config\.json, model'):
            push_to_hub(tmp_path, 'me/a', api=object())

    def test_push_of_another_format(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(['export', str(run), '--format', 'timm', '--push', 'me/a']) == 2
        assert '--push is for --format hf, got timm' in capsys.readouterr().err


@pytest.mark.parametrize('mask', [0o022, 0o027])
@pytest.mark.parametrize('format', ['safetensors', 'hf', 'timm', 'onnx'])
def test_others_may_read_the_files(format: Any, mask: int, run: Path) -> None:
    before = os.umask(mask)
    try:
        written = export(run, format)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~mask}


class TestOnnx:
    @pytest.mark.parametrize(
        ('model', 'kwargs', 'size'),
        [('test_vit', {'img_size': 96}, 96), ('resnet18', {}, 224)],
    )
    def test_features(
        self, model: str, kwargs: dict[str, int], size: int, tmp_path: Path
    ) -> None:
        runtime = pytest.importorskip('onnxruntime')
        path = save_run(tmp_path, model, SOFTCON, *softcon(model))
        file, card = export(path, 'onnx', **kwargs)  # type: ignore[arg-type]
        session = runtime.InferenceSession(str(file))
        expected = features(convert_encoder(read_encoder(path), **kwargs).model, size)
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(2, 4, size, size, generator=generator).numpy()
        for count in (1, 2):
            (found,) = session.run(None, {'image': images[:count]})
            assert abs(found - expected[:count].numpy()).max() < 1e-4
        assert f"InferenceSession('{file.name}')" in card.read_text()

    def test_without_the_extra(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, 'onnxscript', None)
        with pytest.raises(ValueError, match=r'torchgeo-softcon\[onnx\]'):
            export(run, 'onnx')


class TestOutput:
    @pytest.mark.parametrize(
        ('format', 'output', 'name'),
        [
            ('timm', 'a.pt', 'a.pt'),
            ('timm', 'a.pth', 'a.pth'),
            ('timm', 'a.safetensors', 'a.pth'),
            ('timm', 'epoch=0.5', 'epoch=0.5.pth'),
            ('safetensors', 'a.pt', 'a.safetensors'),
            ('torchgeo', 'a.pth', 'a.ckpt'),
            ('timm', '', 'epoch=0-loss=0.12_timm.pth'),
            ('torchgeo', '', 'epoch=0-loss=0.12_torchgeo.ckpt'),
        ],
    )
    def test_name(
        self, format: Any, output: str, name: str, run: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / 'out'
        folder.mkdir()
        file, card = export(run, format, output=folder / output)
        assert [file, card] == [folder / name, folder / f'{name}.md']
        assert {*folder.iterdir()} == {file, card}

    @pytest.mark.parametrize('output', ['none/x.pth', 'none/'])
    def test_missing_folder(self, output: str, tmp_path: Path) -> None:
        match = r'output must be in an existing folder, got .*none.* Make the folder'
        with pytest.raises(
            ValueError, match=match
        ):  # before it looks for the checkpoint
            export(tmp_path / 'a.ckpt', 'timm', output=f'{tmp_path}/{output}')

    def test_no_file_of_two_if_one_is_the_checkpoint(self, run: Path) -> None:
        with pytest.raises(ValueError, match='output must be another file'):
            export(run, 'smp', output=run)
        assert [*run.parent.iterdir()] == [run]


class TestSizes:
    @pytest.fixture
    def dino_v2(self, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
        state = randomize(vit_shapes(384, 14, 4, 16, True))
        del state['mask_token']
        model = 'vit_small_patch14_dinov2'
        return save_run(tmp_path, model, SOFTCON, state, state), state

    @pytest.mark.parametrize(
        ('model', 'patch', 'size', 'expected'),
        [
            ('softcon_vit_small_patch14_224', 14, 256, 'softcon_vit_small_patch16_256'),
            ('softcon_vit_small_patch14_224', 14, 224, 'softcon_vit_small_patch16_224'),
            ('vit_small_patch16_224', 16, 256, 'softcon_vit_small_patch16_256'),
            ('vit_small_patch16_224', 16, 224, 'vit_small_patch16_224'),
            ('vit_small_patch8_224', 8, 256, 'softcon_vit_small_patch16_256'),
            ('dinomc_vit_small_patch8_224', 8, 256, 'softcon_vit_small_patch16_256'),
            ('dinomc_vit_small_patch8_224', 8, 224, 'vit_small_patch16_224'),
        ],
    )
    def test_patch_size_of_other_models(
        self, model: str, patch: int, size: int, expected: str
    ) -> None:
        state = randomize(vit_shapes(384, patch, 4, 224 // patch, patch == 14))
        state.pop('mask_token', None)
        encoder = Encoder(state, model)
        converted = convert_encoder(encoder, 16, size)
        assert (converted.name, converted.options) == (expected, {})
        with torch.device('meta'):
            built: nn.Module = timm.create_model(expected, in_chans=4, num_classes=0)
        built.load_state_dict(converted.state_dict, assign=True)

    @pytest.mark.parametrize(
        ('kwargs', 'model', 'grid'),
        [
            ({'patch_size': 16}, 'vit_small_patch16_224', 14),
            ({'patch_size': 16, 'img_size': 256}, 'softcon_vit_small_patch16_256', 16),
        ],
    )
    def test_patch_size(
        self,
        kwargs: dict[str, int],
        model: str,
        grid: int,
        dino_v2: tuple[Path, dict[str, Tensor]],
    ) -> None:
        path, state = dino_v2
        file, _ = export(path, 'torchgeo', **kwargs)  # type: ignore[arg-type]
        name, exported = extract_backbone(str(file))
        assert name == model
        assert_equal(exported, to_patch_size(state, 16, grid))
        with torch.device('meta'):
            encoder: nn.Module = timm.create_model(name, in_chans=4, num_classes=0)
        encoder.load_state_dict(exported, assign=True)

    def test_name_that_the_host_can_build(
        self, dino_v2: tuple[Path, dict[str, Tensor]]
    ) -> None:
        path, state = dino_v2
        file, _ = export(path, 'torchgeo')
        name, exported = extract_backbone(str(file))
        assert name == 'softcon_vit_small_patch14_224'
        assert_equal(exported, state)

    def test_image_size_that_needs_an_argument(
        self, dino_v2: tuple[Path, dict[str, Tensor]]
    ) -> None:
        file, card = export(dino_v2[0], 'timm', img_size=98)
        state = torch.load(file, weights_only=True)
        assert state['pos_embed'].shape == (1, 50, 384)
        assert "'vit_small_patch14_dinov2', in_chans=4, num_classes=0, img_size=98" in (
            card.read_text()
        )
        with pytest.raises(
            ValueError, match=r"needs \{'img_size': 98\}, which cannot be"
        ):
            export(dino_v2[0], 'torchgeo', img_size=98)

    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'img_size': 100}, 'multiple of patch_size = 16, got 100'),
            ({'patch_size': 0}, 'multiple of patch_size = 0'),
            ({'patch_size': 15}, 'timm has no model for the result, tried test_vit'),
        ],
    )
    def test_bad_size(self, kwargs: dict[str, int], match: str, run: Path) -> None:
        with pytest.raises(ValueError, match=match):
            export(run, 'timm', **kwargs)  # type: ignore[arg-type]

    def test_no_patches(self, tmp_path: Path) -> None:
        path = save_run(tmp_path, 'resnet18', SOFTCON, *softcon('resnet18'))
        with pytest.raises(
            ValueError, match=r'for Vision Transformers .* got resnet18'
        ):
            export(path, 'timm', patch_size=16)


class TestCommand:
    def test_card(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (run.parents[1] / 'metrics.csv').write_text(
            'epoch,train_loss,val\n0,2.5,\n1,1.5,\n1,,0.75\n'
        )
        (run.parents[1] / 'config.yaml').write_text(
            'data:\n  class_path: torchgeo_softcon.SyntheticScenesDataModule\n'
            '  init_args:\n    size: 96\n    root: null\n'
        )
        assert (
            main(['export', str(run), '--format', 'timm', '--branch', 'teacher']) == 0
        )
        file, card = map(Path, capsys.readouterr().out.split())
        assert_equal(torch.load(file, weights_only=True), softcon('test_vit')[1])
        text = card.read_text()
        for row in (
            '| method | SoftCon (arXiv 2405.20462) |',
            '| encoder | test_vit, the teacher |',
            '| bands | B2, B3, B4, B8 |',
            '| value range | [0, 1] |',
            '| data | torchgeo_softcon.SyntheticScenesDataModule(size=96) |',
            '| epochs, steps | 5, 99 |',
            '| metrics at the end | epoch 1, train_loss 1.5, val 0.75 |',
        ):
            assert row in text
        assert f'torch {torch.__version__.partition("+")[0]}' in text

    @pytest.mark.parametrize(
        ('note', 'expected'),
        [
            ({'unit_range': True}, '[0, 1], as torchgeo_softcon.ToUnitRange scales'),
            ({'callbacks': {'UnitRange': {}}}, '[0, 1], as torchgeo_softcon.ToUnitR'),
            ({'unit_range': False}, 'not known |'),
        ],
    )
    def test_value_range_of_the_checkpoint(
        self, note: dict[str, Any], expected: str, tmp_path: Path
    ) -> None:
        path = save_run(tmp_path, 'resnet18', SOFTCON, *softcon('resnet18'))
        torch.save({**torch.load(path, weights_only=True), **note}, path)
        _, card = export(path, 'timm')
        assert f'| value range | {expected}' in card.read_text()

    def test_settings_are_yaml(self, tmp_path: Path) -> None:
        path = save_run(tmp_path, 'resnet18', SOFTCON, *softcon('resnet18'))
        checkpoint = torch.load(path, weights_only=True)
        settings = {
            'weights': 'a: b # c',
            'scale': (0.2, 1),
            'data': None,
            'n': {'a': 1},
        }
        checkpoint['hyper_parameters'] |= {**settings, '_class_path': 'x'}
        torch.save(checkpoint, path)
        _, card = export(path, 'timm')
        block = card.read_text().partition('```yaml\n')[2].removesuffix('\n```\n')
        assert yaml.safe_load(block) == {
            'model': 'resnet18',
            'in_channels': 4,
            'bands': ['B2', 'B3', 'B4', 'B8'],
            'size': 224,
            **settings,
            'scale': [0.2, 1],
        }

    def test_bad_input(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ['--format', 'timm']
        assert main(['export', str(run), *args, '--img-size', '100']) == 2
        assert 'export: img_size must be a multiple' in capsys.readouterr().err
        assert main(['export', str(tmp_path / 'none.ckpt'), *args]) == 2
        assert 'none.ckpt' in capsys.readouterr().err
        assert (
            main(['export', str(run), '--format', 'torchgeo', '--output', str(run)])
            == 2
        )
        assert 'output must be another file' in capsys.readouterr().err
        assert sorted(run.parent.iterdir()) == [run]
