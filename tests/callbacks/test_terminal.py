# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from tests.tasks.helpers import Scenes, make_loader, make_task, make_trainer
from torchgeo_softcon import plugin
from torchgeo_softcon.callbacks import CollapseMonitor, KNNProbe
from torchgeo_softcon.tasks.quiet import _is_for_users, silence_adverts


@pytest.fixture
def run(
    tmp_path: Path, capsys: Any, caplog: Any, recwarn: pytest.WarningsRecorder
) -> list[str]:
    """All lines of a run with validation data, a probe and the default callbacks."""
    task = make_task()
    probe = KNNProbe(Scenes(16), Scenes(8), k=3, every_n_epochs=1)
    trainer = make_trainer(
        tmp_path,
        callbacks=[CollapseMonitor(every_n_steps=4), probe],
        logger=CSVLogger(tmp_path, '', ''),
        log_every_n_steps=4,
        max_epochs=2,
        **dict.fromkeys(
            ('enable_checkpointing', 'enable_progress_bar', 'enable_model_summary'),
            True,
        ),
    )
    with caplog.at_level('INFO'):
        trainer.fit(task, make_loader(), make_loader())
    out, err = capsys.readouterr()
    logged = [r.getMessage() for r in caplog.records]
    warned = [str(w.message) for w in recwarn]
    return '\n'.join([out, err, *logged, *warned]).splitlines()


def test_no_line_is_for_others(run: list[str]) -> None:
    text = '\n'.join(run)
    for noise in ('Tip', 'TPU', 'entry point', 'validation_step', 'LeafSpec', 'FLOPs'):
        assert noise not in text, noise


def test_lines_instead_of_a_bar(run: list[str]) -> None:
    steps = [line for line in run if re.match(r'step \d+/8: ', line)]
    assert [line.split(':')[0] for line in steps] == ['step 4/8', 'step 8/8']
    for shown in ('loss_contrast', 'loss_soft', 'feature_std', 'images/s', 'min left'):
        assert shown in steps[0]
    assert not any('it/s' in line for line in run)


def test_what_it_is_and_what_was_learned(run: list[str]) -> None:
    text = '\n'.join(run)
    assert re.search(
        r'SoftCon: test_vit with 0\.\d M parameters, 0\.\d M are trained', text
    )
    assert 'Do features of different images differ?' in text
    # From the probe before the training to the last one
    assert re.search(r'knn_map_cls went from [\d.]+ to [\d.]+, chance is', text)
    order = [
        next(i for i, line in enumerate(run) if part in line)
        for part in ('Does the loss fall?', 'torchgeo-softcon report', 'encoder is in')
    ]
    assert order == sorted(order)


class Host(LightningModule):
    """A task of somebody else."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


def test_other_tasks_are_left_alone(tmp_path: Path) -> None:
    trainer: Any = make_trainer(
        tmp_path, max_epochs=1, enable_progress_bar=True, enable_model_summary=True
    )
    before = [type(callback) for callback in trainer.callbacks]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer.fit(Host(), make_loader())
    assert [type(callback) for callback in trainer.callbacks] == before


def test_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('TORCHGEO_SOFTCON_AUTOLOAD', '0')
    assert plugin.callbacks() == []
    trainer: Any = Trainer(logger=False)
    assert not any('Terminal' in repr(c) for c in trainer.callbacks)


def test_no_logging(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, log_every_n_steps=0)
    trainer.fit(make_task(), make_loader())
    assert trainer.global_step == 4


def test_a_task_made_after_its_trainer_is_quiet(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(make_task(), make_loader(), make_loader())
    assert not [w for w in recwarn if 'validation_step' in str(w.message)]


def test_other_messages_pass() -> None:
    for text, shown in (('GPU available: True', True), ('💡 Tip: For seamless', False)):
        record = logging.LogRecord('x', logging.INFO, 'x', 0, text, (), None)
        assert _is_for_users(record) is shown


@pytest.mark.parametrize('package', ['lightning.pytorch', 'pytorch_lightning'])
def test_adverts_of_both_packages(
    package: str, caplog: pytest.LogCaptureFixture
) -> None:
    silence_adverts()
    with caplog.at_level('INFO'):
        logger = logging.getLogger(f'{package}.utilities.rank_zero')
        logger.info('TPU available: False, using: 0 TPU cores')
        logger.info('step 1')
    assert caplog.messages == ['step 1']
