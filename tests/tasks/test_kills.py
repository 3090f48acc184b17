# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Runs that are killed at random moments end with the numbers of undisturbed ones."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from torchgeo_softcon import SyntheticScenesDataModule
from torchgeo_softcon.datasets import SyntheticScenes

from .helpers import make_dino, make_task, make_trainer

#: Kills of each variant, 54 in all.
KILLS = 9

#: Task, its options, and those of the trainer. Epochs are of 4 batches.
VARIANTS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    'ViT': (make_task, {}, {}),
    'ResNet': (make_task, {'model': 'test_resnet'}, {'max_epochs': 2}),
    'bf16': (make_task, {}, {'precision': 'bf16-mixed'}),
    'workers': (make_task, {}, {}),
    'accumulation of 2': (make_task, {}, {'accumulate_grad_batches': 2}),
    'accumulation of 3': (make_dino, {}, {'accumulate_grad_batches': 3}),
}


def train(variant: str, folder: Path, scenes: Path) -> None:
    """Start a run, or go on with it from its last checkpoint, and leave its state."""
    torch.set_num_threads(1)
    make, options, more = VARIANTS[variant]
    task = make(in_channels=13, **options)
    torch.manual_seed(time.time_ns())  # not what decides
    # A plain loader would begin an epoch again, of which Lightning warns
    data = SyntheticScenesDataModule(
        scenes,
        size=96,
        dates=2,
        patch_size=40,
        batch_size=4,
        length=16,
        num_workers=2 if variant == 'workers' else 0,
    )
    save = ModelCheckpoint(folder, '{step}', every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        folder, **{'max_epochs': 3, **more}, callbacks=[save], enable_checkpointing=True
    )
    saved = sorted(folder.glob('step=*.ckpt'), key=lambda path: int(path.stem[5:]))
    trainer.fit(task, data, ckpt_path=saved[-1] if saved else None)
    optimizer = trainer.optimizers[0].state_dict()
    state = {
        'task': task.state_dict(),
        'optimizer': optimizer,
        'step': task.global_step,
    }
    torch.save(state, folder / 'state.pt')


def start(variant: str, folder: Path, scenes: Path) -> int:
    """Train in a process of its own, with all that is imported already."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()  # workers of loaders die with it
        train(variant, folder, scenes)
        status = 0
    finally:
        os._exit(status)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = [*one.values()], [*other.values()]
    if isinstance(one, list | tuple):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_kills(variant: str, scenes: SyntheticScenes, tmp_path: Path) -> None:
    data, draw = scenes.root.parent, random.Random(variant)

    def folder(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        return path

    # Twice, as the first one may have to write the scenes
    assert os.waitpid(start(variant, folder('first'), data), 0)[1] == 0
    begin = time.monotonic()
    assert os.waitpid(start(variant, folder('whole'), data), 0)[1] == 0
    duration = time.monotonic() - begin
    whole = torch.load(tmp_path / 'whole/state.pt', weights_only=True)
    assert_equal(torch.load(tmp_path / 'first/state.pt', weights_only=True), whole)

    kills, runs, inside = 0, 0, set()
    while kills < KILLS or not (tmp_path / f'{runs}/state.pt').exists():
        run = folder(f'{runs}')
        child = start(variant, run, data)
        if kills < KILLS:
            time.sleep(draw.uniform(0, duration))
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(child, signal.SIGKILL)  # it has no group yet, or is done
        status = os.waitpid(child, 0)[1]
        if status:
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
            kills += 1
            inside.add(len([*run.glob('step=*.ckpt')]))
        else:
            assert_equal(torch.load(run / 'state.pt', weights_only=True), whole)
            runs += kills < KILLS
    print(f'{variant}: {kills} kills of {runs + 1} runs, after steps {sorted(inside)}')
