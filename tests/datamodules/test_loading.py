# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from torchgeo_softcon._compat import Sample
from torchgeo_softcon.datamodules.base import DrawDataModule
from torchgeo_softcon.datamodules.loading import DrawSampler, ResumableDataLoader

from ..tasks.helpers import make_trainer


class Numbers(Dataset[Sample]):
    """The sample of a draw is its number."""

    def __init__(self, length: int = 22, **kwargs: Any) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return {'image': torch.tensor([float(index)])}


class NumbersDataModule(DrawDataModule):
    shuffle = True

    def __init__(self, num_workers: int | None = 0, batch_size: int = 4) -> None:
        super().__init__(
            Numbers,  # type: ignore[arg-type]
            batch_size,
            num_workers,
            val_fraction=0,
            seed=0,
            options={},
        )

    def setup(self, stage: str) -> None:
        self.train_dataset = Numbers()


class TestDefaults:
    @pytest.fixture(autouse=True)
    def cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Not there on macOS
        name = 'sched_getaffinity'
        monkeypatch.setattr(os, name, lambda _: {*range(12)}, raising=False)

    def loaders(
        self, num_workers: int | None, trainer: Trainer | None = None
    ) -> list[DataLoader[Sample]]:
        datamodule = NumbersDataModule(num_workers)
        datamodule.trainer = trainer
        datamodule.setup('fit')
        datamodule.val_dataset = Numbers()
        return [datamodule.train_dataloader(), datamodule.val_dataloader()]

    @pytest.mark.parametrize(('devices', 'workers'), [(1, 8), (2, 6), (16, 1)])
    def test_a_gpu_does_not_wait(
        self, monkeypatch: pytest.MonkeyPatch, devices: int, workers: int
    ) -> None:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: devices)
        train, val = self.loaders(None)
        assert train.num_workers == val.num_workers == workers
        assert train.pin_memory
        assert val.pin_memory
        assert train.prefetch_factor == 2
        assert train.persistent_workers
        assert not val.persistent_workers
        assert self.loaders(3)[0].num_workers == 3

    def test_a_cpu_trains_with_all_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        for loader in self.loaders(None):
            assert loader.num_workers == 0
            assert not loader.pin_memory

    def test_a_trainer_may_leave_the_gpu_alone(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        trainer = Trainer(accelerator='cpu', logger=False, default_root_dir=tmp_path)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
        for loader in self.loaders(None, trainer):
            assert loader.num_workers == 0
            assert not loader.pin_memory


class Recorder(LightningModule):
    """Remembers the draws it was trained with."""

    def __init__(self, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.ask_for_steps = ask_for_steps
        self.seen: list[list[int]] = []

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        self.seen.append(batch['image'].long().flatten().tolist())
        loss: Tensor = self.layer(batch['image'] / 100).mean()
        return loss

    def configure_optimizers(self) -> Any:
        if self.ask_for_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    model: Recorder,
    datamodule: LightningDataModule,
    root: Path,
    ckpt_path: Path | None = None,
    callbacks: Iterable[Callback] = (),
    **kwargs: Any,
) -> Trainer:
    options = {'max_epochs': 4, 'callbacks': list(callbacks)} | kwargs
    trainer = make_trainer(root, **options)
    trainer.fit(model, datamodule, ckpt_path=ckpt_path)
    return trainer


class TestDrawSampler:
    def test_rounds_are_permuted_and_share_no_draw(self) -> None:
        sampler = DrawSampler(range(10), shuffle=True)
        rounds = []
        for number in range(3):
            sampler.start = 10 * number
            rounds.append(list(sampler))
            assert sorted(rounds[-1]) == list(range(10 * number, 10 * number + 10))
        order = [[draw % 10 for draw in draws] for draws in rounds]
        assert order[0] != order[1] != order[2]
        sampler.start = 7
        assert list(sampler) == (rounds[0] + rounds[1])[7:17]

    def test_devices_share_the_draws_of_one(self) -> None:
        alone = list(DrawSampler(range(11), shuffle=True))
        ranks = [
            list(DrawSampler(range(11), True, num_replicas=3, rank=rank))
            for rank in range(3)
        ]
        together = [draw for draws in zip(*ranks, strict=True) for draw in draws]
        assert together == alone[:9]

    def test_without_shuffling_the_stream_counts(self) -> None:
        sampler = DrawSampler(range(10))
        sampler.start = 14
        assert list(sampler) == list(range(14, 24))
        assert len(sampler) == 10


def loader(num_replicas: int = 1, rank: int = 0, **kwargs: Any) -> ResumableDataLoader:
    sampler = DrawSampler(range(22), True, 0, num_replicas, rank)
    return ResumableDataLoader(
        Numbers(), sampler=sampler, drop_last=True, **({'batch_size': 4} | kwargs)
    )


def draws(batches: Iterable[Sample]) -> list[list[int]]:
    return [batch['image'].long().flatten().tolist() for batch in batches]


class TestResumableDataLoader:
    @pytest.mark.parametrize('num_workers', [0, 2])
    def test_goes_on_after_what_was_handed_out(self, num_workers: int) -> None:
        whole = loader()
        expected = draws(whole) + draws(whole)
        first = loader(num_workers=num_workers)
        iterator = iter(first)
        begun = draws(next(iterator) for _ in range(2))
        state = first.state_dict()
        assert state == {'samples': 8}
        second = loader(num_workers=num_workers)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert len(second) == 5
        assert begun + draws(second) == expected[:7]

    def test_nothing_is_left_out(self) -> None:
        actual = loader()
        seen = [draw for _ in range(3) for batch in draws(actual) for draw in batch]
        assert sorted(seen[:44]) == list(range(44))

    def test_iterators_that_are_not_used_change_nothing(self) -> None:
        actual = loader(num_workers=1)
        iter(actual)
        unused = iter(actual)
        assert actual.state_dict() == {'samples': 0}
        assert draws(actual) == draws(loader())
        del unused

    def test_goes_on_with_another_batch_size_and_devices(self) -> None:
        whole = loader()
        expected = [draw for batch in draws(whole) + draws(whole) for draw in batch]
        ranks = [loader(2, rank, batch_size=3) for rank in range(2)]
        for rank in ranks:
            rank.load_state_dict({'samples': 8})
        first, second = map(draws, ranks)
        together = [
            draw
            for batches in zip(first, second, strict=True)
            for pair in zip(*batches, strict=True)
            for draw in pair
        ]
        assert together == expected[8:26]
        assert ranks[0].state_dict() == {'samples': 26}


class TestResume:
    @pytest.fixture(scope='class')
    def expected(self, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
        model = Recorder()
        fit(model, NumbersDataModule(), tmp_path_factory.mktemp('whole'))
        assert len(model.seen) == 20
        return model.seen

    @pytest.mark.parametrize(
        ('step', 'num_workers', 'ask_for_steps'),
        [(3, 0, False), (3, 2, False), (12, 0, True), (12, 2, True), (5, 0, True)],
    )
    def test_batches_are_those_of_a_whole_run(
        self,
        expected: list[list[int]],
        tmp_path: Path,
        step: int,
        num_workers: int,
        ask_for_steps: bool,
    ) -> None:
        # Lightning takes the epoch that max_steps cuts short for complete
        begun, rest = Recorder(ask_for_steps), Recorder(ask_for_steps)
        trainer = fit(begun, NumbersDataModule(num_workers), tmp_path, max_steps=step)
        trainer.save_checkpoint(tmp_path / 'a.ckpt')
        fit(
            rest,
            NumbersDataModule(num_workers),
            tmp_path,
            tmp_path / 'a.ckpt',
            max_steps=20,
            max_epochs=-1,
        )
        assert begun.seen == expected[:step]
        assert rest.seen == expected[step:]

    def test_reloading_goes_on(self, expected: list[list[int]], tmp_path: Path) -> None:
        model = Recorder()
        fit(model, NumbersDataModule(), tmp_path, reload_dataloaders_every_n_epochs=1)
        assert model.seen == expected

    @pytest.mark.parametrize('every', [3, 5])
    def test_checkpoints_at_the_end_of_a_batch(
        self, expected: list[list[int]], tmp_path: Path, every: int
    ) -> None:
        callback = ModelCheckpoint(
            tmp_path, '{step}', every_n_train_steps=every, save_top_k=-1
        )
        options: dict[str, Any] = {
            'callbacks': [callback],
            'enable_checkpointing': True,
        }
        fit(Recorder(), NumbersDataModule(), tmp_path, **options)
        for path in sorted(tmp_path.glob('*.ckpt')):
            step = int(path.stem.removeprefix('step='))
            if step == 20:
                continue
            model = Recorder(ask_for_steps=True)
            fit(model, NumbersDataModule(), tmp_path, path)
            assert model.seen == expected[step:]

    def test_checkpoints_at_the_end_of_an_epoch(
        self, expected: list[list[int]], tmp_path: Path
    ) -> None:
        callback = ModelCheckpoint(tmp_path, '{epoch}', save_top_k=-1)
        options: dict[str, Any] = {
            'callbacks': [callback],
            'enable_checkpointing': True,
        }
        fit(Recorder(), NumbersDataModule(), tmp_path, **options)
        model = Recorder(ask_for_steps=True)
        fit(model, NumbersDataModule(), tmp_path, tmp_path / 'epoch=1.ckpt')
        assert model.seen == expected[10:]

    def test_a_batch_whose_step_failed_comes_again(
        self, expected: list[list[int]], tmp_path: Path
    ) -> None:
        path = tmp_path / 'a.ckpt'

        class Save(Callback):
            """What a signal in the middle of a step does."""

            def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
                if trainer.global_step == 7:
                    trainer.save_checkpoint(path)
                    trainer.should_stop = True

        fit(Recorder(), NumbersDataModule(), tmp_path, callbacks=[Save()])
        model = Recorder(ask_for_steps=True)
        fit(model, NumbersDataModule(), tmp_path, path)
        assert model.seen == expected[7:]

    def test_fewer_samples_than_a_batch(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match='batch_size must be at most 22'):
            fit(Recorder(), NumbersDataModule(batch_size=23), tmp_path)

    def test_lightning_leaves_the_sampler_alone(self, tmp_path: Path) -> None:
        trainer = fit(Recorder(), NumbersDataModule(), tmp_path, max_steps=1)
        assert isinstance(trainer.train_dataloader, DataLoader)
        # What Lightning looks at before it wraps a sampler
        assert isinstance(trainer.train_dataloader.sampler, DistributedSampler)


class Gatherer(Recorder):
    """Writes down what all processes together were trained with."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        together = cast(Tensor, self.all_gather(batch['image']))
        with open(self.path, 'a') as file:
            if self.global_rank == 0:
                # The draws of one device, dealt out to two
                print(*together.squeeze(-1).T.flatten().long().tolist(), file=file)
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
def test_two_processes_share_the_stream_and_resume(tmp_path: Path) -> None:
    whole = loader(batch_size=8)
    expected = draws(whole) + draws(whole) + draws(whole)

    def run(max_steps: int, ckpt_path: Path | None = None) -> Trainer:
        return fit(
            Gatherer(tmp_path / 'draws'),
            NumbersDataModule(),
            tmp_path,
            ckpt_path,
            devices=2,
            strategy='ddp_fork',
            max_steps=max_steps,
            max_epochs=-1,
            callbacks=[ModelCheckpoint(tmp_path, 'a', every_n_train_steps=3)],
            enable_checkpointing=True,
        )

    run(3)
    run(6, tmp_path / 'a.ckpt')
    lines = (tmp_path / 'draws').read_text().splitlines()
    assert [list(map(int, line.split())) for line in lines] == expected
