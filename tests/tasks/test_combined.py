# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What long runs use, all at once: precision, compilation, processes, accumulation."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, Sampler

from torchgeo_softcon.modules import packing
from torchgeo_softcon.modules.ema import make_teacher
from torchgeo_softcon.tasks import DINOMCTask, SoftConTask

from .helpers import (
    TASKS,
    Corners,
    Scenes,
    Whole,
    make_dino,
    make_loader,
    make_task,
    make_trainer,
)


class EverySecond(Sampler[int]):
    """Another half of the data in each of two processes, not shuffled."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(torch.distributed.get_rank(), 32, 2))

    def __len__(self) -> int:
        return 16


class Uneven(Sampler[int]):
    """As many images as a list says for each process."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        ready = torch.distributed.is_initialized()
        return self.counts[torch.distributed.get_rank() if ready else 0]


class Report(Callback):
    """Writes what each process saw, and compiles in it if asked to."""

    def __init__(self, root: Path, compiles: bool) -> None:
        self.root, self.compiles = root, compiles
        self.losses: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.compiles:
            return
        # In each process, and without a C++ compiler
        counters.clear()
        compiled = torch.compile(
            packing._encode_packed, dynamic=False, backend='aot_eager'
        )
        packing._compiled = lambda: compiled  # type: ignore[assignment]
        if isinstance(pl_module, SoftConTask):
            for encoder in (pl_module.model, pl_module.teacher):
                encoder.compile(backend='aot_eager')

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        # Lightning has divided it by the number of batches
        self.losses.append(outputs['loss'].float() * trainer.accumulate_grad_batches)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report = {
            'losses': torch.stack(self.losses),
            'steps': trainer.global_step,
            'graphs': counters['stats']['unique_graphs'],
            'state': pl_module.state_dict(),
        }
        torch.save(report, self.root / f'{pl_module.global_rank}.pt')


def make_small(make: Any, **kwargs: Any) -> SoftConTask | DINOMCTask:
    """A task without anything that depends on how images are put together."""
    if make is make_dino:
        task = make_dino(augmentations=Corners(), drop_path_rate=0, lr=1e-3, **kwargs)
    else:
        task = make_task(augmentations=Whole(), mask_ratio=0, lr=1e-3)
        # Without batch norm, whose statistics are those of one process
        task.projector = nn.Linear(task.feature_size, 8)
        task.predictor = nn.Linear(8, 8)
        task.teacher_projector = make_teacher(task.projector)
    encoder: Any
    for encoder in next(iter(task.ema_pairs())):
        encoder.blocks = encoder.blocks[:2]  # compiles in seconds
    return task


@TASKS
def test_everything_together(make: Any, tmp_path: Path) -> None:
    plain = {}
    for precision in ('bf16-mixed', '32-true'):
        make_trainer(
            tmp_path,
            max_epochs=1,
            accumulate_grad_batches=2,
            precision=precision,
            callbacks=[Report(tmp_path, compiles=False)],
        ).fit(make_small(make), DataLoader(Scenes(32), batch_size=8))
        plain[precision] = torch.load(tmp_path / '0.pt')
    expected = plain['32-true']

    options = {'compile_encoder': True} if make is make_dino else {}
    make_trainer(
        tmp_path,
        devices=2,
        strategy='ddp_fork',
        max_epochs=1,
        accumulate_grad_batches=2,
        precision='bf16-mixed',
        use_distributed_sampler=False,
        callbacks=[Report(tmp_path, compiles=True)],
    ).fit(
        make_small(make, **options),
        DataLoader(Scenes(32), batch_size=4, sampler=EverySecond()),
    )
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]

    for rank in ranks:
        # One for the student and one for the teacher
        assert rank['graphs'] == 2
        assert rank['steps'] == expected['steps'] == 2
    # Of every second image
    losses = (ranks[0]['losses'] + ranks[1]['losses']) / 2
    same = plain['bf16-mixed']['losses']
    torch.testing.assert_close(losses, same, rtol=0.01, atol=0)
    # One process in bfloat16 is as far off: logits near 1, rounded to 1 / 256 and divided
    # by temperatures of 0.1 and 0.04. Up to 4 % for other random parameters than these
    torch.testing.assert_close(losses, expected['losses'], rtol=0.02, atol=0)
    for name, value in ranks[0]['state'].items():
        assert torch.equal(value, ranks[1]['state'][name]), name
    start = make_small(make).state_dict()
    name = 'model.blocks.0.attn.qkv.weight'
    way, whole_way = (x['state'][name] - start[name] for x in (ranks[0], expected))
    assert torch.cosine_similarity(way.flatten(), whole_way.flatten(), dim=0) > 0.8


@pytest.mark.parametrize(
    ('make', 'counts', 'message'),
    [
        (make_task, [8, 12], r'as many batches per epoch, got \[2, 3\]'),
        (make_dino, [8, 12], r'as many batches per epoch, got \[2, 3\]'),
        (make_task, [10, 11], r'as many images per epoch, got \[10, 11\]'),
        # It exchanges no features: nothing aborts
        (make_dino, [10, 11], None),
    ],
)
def test_uneven_ranks(
    make: Any, counts: list[int], message: str | None, tmp_path: Path
) -> None:
    """One message that tells what to do, before a backend aborts or waits for ever."""
    trainer = make_trainer(
        tmp_path,
        devices=2,
        strategy='ddp_fork',
        max_epochs=1,
        use_distributed_sampler=False,
    )
    loader = DataLoader(Scenes(32), batch_size=4, sampler=Uneven(counts))
    expected = pytest.raises(ProcessRaisedException, match=message)
    with expected if message else nullcontext():
        trainer.fit(make(), loader)


def test_a_rank_that_raises_ends_all(tmp_path: Path) -> None:
    class Full(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_rank and trainer.global_step:
                raise OSError('No space left on device')

    trainer = make_trainer(tmp_path, devices=2, strategy='ddp_fork', callbacks=[Full()])
    begin = time.monotonic()
    with pytest.raises(ProcessRaisedException, match='No space left on device'):
        trainer.fit(make_task(), make_loader())
    assert time.monotonic() - begin < 30
