# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Vision Transformers of tasks are built for the size of the task."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from torchgeo_softcon import DINOMCTask, LinearProbeTask, SoftConTask
from torchgeo_softcon._compat import HAS_TASKS, BaseTask
from torchgeo_softcon.export.files import export
from torchgeo_softcon.models.encoders import read_encoder

from ..models.helpers import randomize, vit_shapes, vit_tokens
from .helpers import make_dino, make_loader, make_task, make_trainer

TASKS = import_module(BaseTask.__module__.rpartition('.')[0])
HEADS: dict[str, Any] = {'hidden_dim': 8, 'output_dim': 8}
TASK: dict[type[Any], dict[str, Any]] = {
    SoftConTask: HEADS,
    DINOMCTask: {**HEADS, 'local_sizes': (84,)},
    LinearProbeTask: {'num_classes': 3},
}


@pytest.fixture(scope='module')
def published(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Tensor]]:
    """A file as SoftCon's authors publish it, with rough positions."""
    state = randomize(vit_shapes(384, 14, 2, 16, True))
    state['pos_embed'] = state['pos_embed'] * 50
    path = tmp_path_factory.mktemp('weights') / 'B2_vits14_softcon_enc.pth'
    torch.save(state, path)
    return path, {key: value.double() for key, value in state.items()}


@pytest.mark.parametrize('task', TASK)
@pytest.mark.parametrize(
    'model', ['vit_small_patch14_dinov2', 'softcon_vit_small_patch14_224']
)
def test_patch_14_is_the_published_encoder(
    model: str, task: type[Any], published: tuple[Path, dict[str, Tensor]]
) -> None:
    path, state = published
    made = task(model, str(path), in_channels=2, size=224, **TASK[task])
    image = torch.rand(1, 2, 224, 224, dtype=torch.double)
    expected = vit_tokens(state, image)[:, 0]
    torch.testing.assert_close(made.model.double().eval()(image), expected)


def host_task(path: Path, model: str, **options: Any) -> Any:
    task = TASKS.Classification if HAS_TASKS else TASKS.ClassificationTask
    return task(model, str(path), num_classes=3, **options)


def features(encoder: Any, image: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = encoder.eval().forward_head(
            encoder.forward_features(image), pre_logits=True
        )
    return result


class TestAnotherSize:
    """The host builds `test_vit` for 160 pixels."""

    @pytest.fixture(scope='class', params=[make_task, make_dino])
    def run(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Any, Path]:
        task, folder = request.param(), tmp_path_factory.mktemp('run')
        trainer = make_trainer(folder, max_epochs=1)
        trainer.fit(task, make_loader())
        trainer.save_checkpoint(folder / 'run.ckpt')
        return task.eval(), folder / 'run.ckpt'

    def test_grid_is_of_the_size(self, run: tuple[Any, Path]) -> None:
        assert run[0].model.patch_embed.grid_size == (2, 2)

    def test_host_opens_it_with_one_flag(self, run: tuple[Any, Path]) -> None:
        theirs = host_task(run[1], 'test_vit', in_channels=4)
        own = run[0].model.state_dict()
        for key, value in theirs.model.state_dict().items():
            if not key.startswith(('head', 'pos_embed')):
                assert torch.equal(value, own[key]), key
        positions = theirs.model.pos_embed
        assert positions.shape == (1, 101, 64)
        assert torch.equal(positions[:, 0], own['pos_embed'][:, 0])
        back = resample_abs_pos_embed(own['pos_embed'], [10, 10])
        torch.testing.assert_close(positions.data, back)

    def test_readers_have_it_as_it_is(self, run: tuple[Any, Path]) -> None:
        image = torch.rand(2, 4, 32, 32)
        task, path = run
        expected = features(task.model, image)
        assert torch.equal(features(read_encoder(path).model, image), expected)
        again = type(task).load_from_checkpoint(path, map_location='cpu')
        assert torch.equal(features(again.model, image), expected)
        probe = LinearProbeTask(
            'test_vit', str(path), in_channels=4, size=32, num_classes=2
        )
        assert torch.equal(features(probe.model, image), expected)

    def test_exports(self, run: tuple[Any, Path]) -> None:
        file, card = export(run[1], 'timm')
        positions = torch.load(file, weights_only=True)['pos_embed']
        assert torch.equal(positions, run[0].model.pos_embed)
        assert 'img_size=32' in card.read_text()
        file, _ = export(run[1], 'torchgeo')
        host_task(file, 'test_vit', in_channels=4)

    def test_checkpoint_of_an_older_run_keeps_its_grid(
        self, run: tuple[Any, Path], tmp_path: Path
    ) -> None:
        checkpoint = torch.load(run[1], weights_only=True)
        del checkpoint['positions']
        state = checkpoint['state_dict']
        for branch in run[0].branches.values():
            state[f'{branch}.pos_embed'] = torch.randn(1, 101, 64)
        torch.save(checkpoint, tmp_path / 'old.ckpt')
        task: nn.Module = type(run[0]).load_from_checkpoint(
            tmp_path / 'old.ckpt', map_location='cpu'
        )
        for branch in run[0].branches.values():
            vit: Any = getattr(task, branch)
            assert torch.equal(vit.pos_embed, state[f'{branch}.pos_embed'])
            assert vit(torch.rand(1, 4, 32, 32)).shape == (1, 64)


def test_size_of_a_probe_is_of_whole_patches() -> None:
    with pytest.raises(
        ValueError, match=r'size must be a multiple .* 16 .* got 30 x 30'
    ):
        LinearProbeTask('test_vit', in_channels=4, size=30, num_classes=2)
