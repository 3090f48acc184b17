# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A pretraining task from outside the package, which nothing in the package names."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchgeo_softcon.__main__ import main
from torchgeo_softcon.models.checkpoints import read_checkpoint
from torchgeo_softcon.models.encoders import read_encoder
from torchgeo_softcon.tasks import DINOMCTask, PretrainingTask, SoftConTask
from torchgeo_softcon.tasks.loading import find_task, load_task
from torchgeo_softcon.transforms import RandomView

from .helpers import make_dino, make_loader, make_task, make_trainer

PATCHES = 'tests.callbacks.helpers.PatchesDataModule'


class SiameseTask(PretrainingTask):
    """Two views of an image have similar features."""

    method = 'Siamese'
    reference = 'arXiv 2011.10566'

    def __init__(
        self,
        model: str = 'test_vit',
        in_channels: int = 4,
        size: int = 32,
        lr: float = 0.1,
        bands: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(augmentations=RandomView(size))

    def configure_models(self) -> None:
        self.model = self.create_encoder()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.step_rng(batch_idx):
            views = [self.augment(batch['image']) for _ in range(2)]
        loss = 1 - F.cosine_similarity(*map(self.model, views)).mean()
        self.guard.watch(self.global_step, loss, batch['image'])
        self.log_step({'train_loss': loss}, len(views[0]))
        return loss


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    task = SiameseTask(bands=('B2', 'B3', 'B4', 'B8'))
    before = task.model.get_parameter('cls_token').clone()
    root = tmp_path_factory.mktemp('run')
    trainer = make_trainer(root, max_epochs=1)
    trainer.fit(task, make_loader(length=8))
    assert trainer.global_step == 2
    assert not torch.equal(task.model.get_parameter('cls_token'), before)
    path = root / 'checkpoints' / 'last.ckpt'
    trainer.save_checkpoint(path)
    return path


def test_export_and_card(checkpoint: Path, tmp_path: Path) -> None:
    args = ['--format', 'timm', '--output', str(tmp_path / 'a.pth')]
    assert main(['export', str(checkpoint), *args]) == 0
    exported = torch.load(tmp_path / 'a.pth', weights_only=True)
    content = torch.load(checkpoint, weights_only=True)
    # As they were trained, and not as timm builds the model
    state = {**content['state_dict'], 'model.pos_embed': content['positions']}
    assert {f'model.{k}' for k in exported} == {k for k in state if 'model.' in k}
    for key, value in exported.items():
        assert torch.equal(value, state[f'model.{key}'])
    card = (tmp_path / 'a.pth.md').read_text()
    assert '| method | Siamese (arXiv 2011.10566) |' in card
    assert '| bands | B2, B3, B4, B8 |' in card
    with pytest.raises(ValueError, match="branch='teacher' is not in"):
        read_encoder(checkpoint, 'teacher')


def test_embed_evaluate_and_report(checkpoint: Path, tmp_path: Path) -> None:
    args = ['--checkpoint', str(checkpoint), '--data', PATCHES]
    out = tmp_path / 'a.parquet'
    assert main(['embed', *args, '--out', str(out), '--accelerator', 'cpu']) == 0
    out = tmp_path / 'a.json'
    options = ['--out', str(out), '--device', 'cpu', '--k', '[2]']
    assert main(['evaluate', *args, *options]) == 0
    assert 0 <= json.loads(out.read_text())['linear_map_blocks'] <= 1
    report = ['report', *args, '--out', str(tmp_path), '--samples', '8']
    assert main(report) == 0
    assert (tmp_path / 'report.html').exists()
    assert (tmp_path / 'views.webp').exists()


def test_rebuilt_by_its_class(checkpoint: Path) -> None:
    task = load_task(checkpoint, read_checkpoint(str(checkpoint)))
    assert type(task) is SiameseTask
    assert task.hparams['lr'] == 0.1
    # An option that it does not name
    assert task.hparams['layer_decay'] == 1


def test_nothing_is_imported_because_a_file_says_so(checkpoint: Path) -> None:
    """Here the class is there; in a fresh process it is not, and is not loaded."""
    code = f"""
import sys
from torchgeo_softcon.models.checkpoints import read_checkpoint
from torchgeo_softcon.tasks.loading import find_task
checkpoint = read_checkpoint({str(checkpoint)!r})
assert checkpoint['pretraining']['task'].startswith('tests.tasks.test_third_method.')
assert find_task(checkpoint) is None
assert not [name for name in sys.modules if name.startswith('tests')]
"""
    subprocess.run([sys.executable, '-c', code], check=True)
    assert find_task({'pretraining': {'task': 'antigravity.Task'}}) is None
    assert find_task({'hyper_parameters': {'_class_path': 'antigravity.Task'}}) is None


@pytest.mark.parametrize(
    ('make', 'options', 'method'),
    [
        (make_task, {}, 'SoftCon'),
        (make_dino, {}, 'DINO-MC'),
        (make_dino, {'views': 'temporal'}, 'DINO-TP'),
    ],
)
@pytest.mark.parametrize('noted', [True, False])
def test_method_and_branches_of_our_tasks(
    make: Any, options: dict[str, Any], method: str, noted: bool, tmp_path: Path
) -> None:
    """With the note, and without it as in checkpoints of the version before it."""
    task = make(**options)
    path = tmp_path / 'checkpoints' / 'a.ckpt'
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(task, make_loader(length=4, seasons=2))
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    note = content.pop('pretraining')
    assert note['method'] == method
    if not noted:
        torch.save(content, path)
    encoder = read_encoder(path)
    assert encoder.method == method
    for key, value in task.model.state_dict().items():
        assert torch.equal(encoder.state_dict[key], value)
    (student, teacher), *_ = task.ema_pairs()
    for branch, expected in (('student', student), ('teacher', teacher)):
        found = read_encoder(path, branch).state_dict['cls_token']  # type: ignore[arg-type]
        assert torch.equal(found, expected.cls_token)
    assert find_task(read_checkpoint(str(path))) is type(task)
    out = tmp_path / 'a.pth'
    assert main(['export', str(path), '--format', 'timm', '--output', str(out)]) == 0
    assert f'| method | {method} (arXiv 2' in (tmp_path / 'a.pth.md').read_text()


@pytest.mark.parametrize(
    ('hparams', 'task'),
    [
        ({'_class_path': 'torchgeo_softcon.SoftConTask'}, SoftConTask),
        ({'_class_path': 'torchgeo_softcon.tasks.DINOMCTask'}, DINOMCTask),
        ({'_class_path': 'torchgeo_softcon.LinearProbeTask'}, None),
        ({'local_sizes': [8]}, DINOMCTask),
        ({'soft_weight': 1}, SoftConTask),
        ({}, None),
    ],
)
def test_class_of_checkpoints_without_a_note(hparams: Any, task: Any) -> None:
    assert find_task({'hyper_parameters': hparams}) is task
