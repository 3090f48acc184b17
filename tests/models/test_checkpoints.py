# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from torchgeo_softcon.models import create_encoder, load_encoder, read_weights
from torchgeo_softcon.models.checkpoints import (
    check_architecture,
    dino_mc_encoder,
    read_checkpoint,
)

from .helpers import dino_checkpoint, torchvision_backbone

STATE = {'a.weight': torch.arange(3.0), 'b.backbone.head.bias': torch.ones(2)}
TEACHER = {k: v + 1 for k, v in STATE.items()}


class Foreign:
    """An object that runs code when it is unpickled."""

    def __init__(self, function: Any, argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('batch_norm', [False, True])
def test_training_checkpoint_of_dino_mc(
    tmp_path: Path, legacy: bool, batch_norm: bool
) -> None:
    path = str(tmp_path / 'a.pth')
    torch.save(
        dino_checkpoint(STATE, TEACHER, batch_norm),
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    checkpoint = read_checkpoint(path)
    assert checkpoint['args'].arch == 'vit_small'
    for branch, expected in (('student', STATE), ('teacher', TEACHER)):
        encoder = dino_mc_encoder(checkpoint, branch)  # type: ignore[arg-type]
        assert encoder.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(encoder[key], value)
    assert torch.equal(dino_mc_encoder(checkpoint)['a.weight'], TEACHER['a.weight'])


def test_scalars_of_old_numpy(tmp_path: Path) -> None:
    # numpy 1 has another name for the module
    path = tmp_path / 'a.pth'
    torch.save(
        dino_checkpoint(STATE, TEACHER, True),
        path,
        _use_new_zipfile_serialization=False,
    )
    content = path.read_bytes()
    assert b'numpy._core.multiarray' in content
    path.write_bytes(content.replace(b'numpy._core.', b'numpy.core.'))
    assert read_checkpoint(str(path))['optimizer']['param_groups'][0]['lr'] == 1e-4


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / 'a.safetensors'
    save_file(STATE, path)
    assert torch.equal(read_checkpoint(str(path))['a.weight'], STATE['a.weight'])


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
    ('function', 'name'), [(os.mkdir, r'posix\.mkdir'), (Path, r'pathlib\S*\.Path')]
)
def test_foreign_objects_are_named_and_do_not_run(
    tmp_path: Path, legacy: bool, function: Any, name: str
) -> None:
    path = tmp_path / 'a.pth'
    torch.save(
        {'student': STATE, 'args': Foreign(function, str(tmp_path / 'made'))},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    match = rf'a\.pth is not .* safely: it holds Python objects \({name}\), which could.* Remove the file; or'
    with pytest.raises(ValueError, match=match):
        read_checkpoint(str(path))
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('content', [b'', b'no checkpoint', pickle.dumps({'a': 1})[:9]])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r'can load safely: .*remove the file and download it again'
    ):
        read_checkpoint(str(path))


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match='download it again'):
        read_checkpoint(str(path))


def test_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_checkpoint(str(tmp_path / 'a.pth'))


class TestBranch:
    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match=r"branch must be .* got 'ema'"):
            dino_mc_encoder({}, 'ema')  # type: ignore[arg-type]

    def test_absent(self) -> None:
        with pytest.raises(ValueError, match=r"'teacher' is not in .*\['epoch', 'stud"):
            dino_mc_encoder({'student': {}, 'epoch': 1})

    @pytest.mark.parametrize(
        'keys',
        [
            ['encoder.backbone.a'],
            ['backbone.a', 'xbackbone.b'],
            ['module.module.backbone.a'],
            ['head.a'],
        ],
    )
    def test_other_prefixes(self, keys: list[str]) -> None:
        with pytest.raises(ValueError, match=r'start with \(module\.\)backbone'):
            dino_mc_encoder({'teacher': {key: torch.ones(1) for key in keys}})


class TestCheckArchitecture:
    def test_equal(self) -> None:
        for model, size in (('resnet18', None), ('vit_tiny_patch16_224', 96)):
            kwargs: dict[str, Any] = {'img_size': size} if size else {}
            state = timm.create_model(model, in_chans=5, num_classes=0, **kwargs)
            check_architecture(state.state_dict(), model, 5, size)
        swin = torchvision_backbone('swin_t').state_dict()
        assert len(swin) == 183
        check_architecture(swin, 'swin_t', 3)

    def test_different(self) -> None:
        state = timm.create_model('resnet18', num_classes=0).state_dict()
        with pytest.raises(
            ValueError, match=r'resnet18 with 5 bands: .*1 of other shap'
        ):
            check_architecture(state, 'resnet18', 5)
        with pytest.raises(
            ValueError, match=r'of resnet34 .* 96 keys missing .*layer1.2'
        ):
            check_architecture(state, 'resnet34', 3)

    def test_layer_scale_is_told(self) -> None:
        state = timm.create_model('test_vit', num_classes=0, init_values=1).state_dict()
        with pytest.raises(ValueError, match=r'12 unexpected .*to_patch_size'):
            check_architecture(state, 'test_vit', 3)


class TestEncoder:
    """What a task can start from."""

    def test_layer_scale_is_not_dropped(self) -> None:
        # timm's own filter resizes patches and positions, and leaves LayerScale over
        state = timm.create_model('test_vit', num_classes=0, init_values=1).state_dict()
        with pytest.raises(ValueError, match=r'12 unexpected .*to_patch_size'):
            load_encoder(create_encoder('test_vit'), state)

    def test_training_checkpoint(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        student, teacher = (
            timm.create_model('test_vit', num_classes=0).state_dict() for _ in range(2)
        )
        path = tmp_path / 'a.pth'
        torch.save(dino_checkpoint(student, teacher, False), path)
        encoder = create_encoder('test_vit')
        load_encoder(encoder, read_weights(str(path)))
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, teacher[key])

    def test_torchvision_swin(self, tmp_path: Path) -> None:
        state = torchvision_backbone('swin_t').state_dict()
        torch.save(state, tmp_path / 'a.pth')
        encoder = create_encoder('swin_tiny_patch4_window7_224')
        load_encoder(encoder, read_weights(str(tmp_path / 'a.pth')))
        key = 'layers.1.downsample.reduction.weight'
        expected = state['features.2.reduction.weight']
        assert torch.equal(encoder.state_dict()[key], expected)
