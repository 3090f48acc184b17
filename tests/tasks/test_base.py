# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from lightly.utils.lars import LARS
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from torchgeo_softcon import (
    ResNet50_Weights,
    SyntheticScenesDataModule,
    ViTSmall16_Weights,
)
from torchgeo_softcon.__main__ import main
from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.losses import jaccard_similarity
from torchgeo_softcon.tasks import SoftConTask
from torchgeo_softcon.tasks.guard import NonFiniteGuard, NonFiniteLossError
from torchgeo_softcon.tasks.optimizers import (
    cosine_warmup,
    create_optimizer,
    parameter_groups,
)
from torchgeo_softcon.tasks.runs import images_per_step, warn_of_lost_gradients
from torchgeo_softcon.transforms.seasons import _warn_once, split_seasons

from ..models.helpers import WeightsFolder
from .helpers import (
    TASKS,
    Scenes,
    assert_resumes,
    make_batch,
    make_dino,
    make_loader,
    make_task,
    make_trainer,
)


def test_split_seasons() -> None:
    image = torch.arange(2 * 6 * 4.0).view(2, 6, 2, 2)
    assert torch.equal(split_seasons(image, 6), image[:, None])
    assert torch.equal(split_seasons(image, 2)[:, 1], image[:, 2:4])
    assert torch.equal(split_seasons(image.view(2, 3, 2, 2, 2), 2)[:, 2], image[:, 4:])


@pytest.mark.parametrize(
    'shape', [(2, 4, 0, 0), (2, 4, 8, 0), (0, 4, 8, 8), (2, 0, 8, 8)]
)
def test_batches_without_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"batch\['image'\] must have images, and these"
    ):
        split_seasons(torch.empty(shape), 4)


class TestParameterGroups:
    @pytest.mark.parametrize(
        'model', ['vit_tiny_patch16_224', 'vit_small_patch14_dinov2', 'resnet18']
    )
    def test_who_is_decayed(self, model: str) -> None:
        network = timm.create_model(model, num_classes=0)
        decay, no_decay = parameter_groups([network], 0.1)
        names = {id(p): n for n, p in network.named_parameters()}
        decayed = {names[id(p)] for p in decay['params']}
        plain = {names[id(p)] for p in no_decay['params']}
        assert (decay['weight_decay'], no_decay['weight_decay']) == (0.1, 0)
        assert decayed | plain == set(names.values())
        for name in plain:
            assert name.endswith('.bias') or any(
                part in name for part in ('norm', 'gamma', 'bn', 'downsample.1')
            )
        for name in decayed:
            assert not name.endswith('.bias')
            assert 'gamma' not in name
        if model.startswith('vit'):
            assert {'pos_embed', 'cls_token'} <= decayed

    def test_teacher_is_not_optimized(self, tmp_path: Path) -> None:
        task = make_task()
        trainer = make_trainer(tmp_path, fast_dev_run=True)
        trainer.fit(task, make_loader())
        optimized = {
            id(p) for g in trainer.optimizers[0].param_groups for p in g['params']
        }
        expected = {
            id(p)
            for m in (task.model, task.projector, task.predictor)
            for p in m.parameters()
        }
        assert optimized == expected

    def test_optimizers(self) -> None:
        groups = parameter_groups([torch.nn.Linear(2, 2)], 0.1)
        assert isinstance(create_optimizer('lars', groups, 0.1, False), LARS)
        sgd = create_optimizer('sgd', groups, 0.1, False)
        assert sgd.defaults['momentum'] == 0.9
        with pytest.raises(ValueError, match=r"optimizer must be .* got 'adam'"):
            create_optimizer('adam', groups, 0.1, False)  # type: ignore[arg-type]


class Watch(Callback):
    """Records what a run does per batch."""

    def __init__(self) -> None:
        self.lr: list[float] = []
        self.teacher: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.lr.append(trainer.optimizers[0].param_groups[0]['lr'])

    def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
        self.teacher.append(task.teacher.get_parameter('cls_token').detach().clone())


class TestSchedules:
    def test_learning_rate_per_step(self, tmp_path: Path) -> None:
        watch = Watch()
        trainer = make_trainer(tmp_path, callbacks=[watch])
        trainer.fit(make_task(lr=0.64), make_loader())  # 4 steps of 4 images an epoch
        expected = [0.01 * cosine_warmup(i, 12, 1, 0, 4) for i in range(12)]
        assert watch.lr == pytest.approx(expected)
        assert max(watch.lr) == pytest.approx(0.64 * 4 / 256)

    def test_accumulation_counts_for_the_learning_rate(self, tmp_path: Path) -> None:
        watch = Watch()
        trainer = make_trainer(tmp_path, callbacks=[watch], accumulate_grad_batches=2)
        trainer.fit(make_task(lr=0.64, warmup_epochs=0), make_loader())
        expected = [0.02 * cosine_warmup(i // 2, 6, 1, 0) for i in range(12)]
        assert watch.lr == pytest.approx(expected)

    def test_batch_size_of_a_batch_sampler(self, tmp_path: Path) -> None:
        sampler = torch.utils.data.BatchSampler(range(16), 8, drop_last=True)
        loader = DataLoader(Scenes(), batch_sampler=sampler)
        watch = Watch()
        trainer = make_trainer(tmp_path, callbacks=[watch], max_epochs=1)
        trainer.fit(make_task(lr=0.64, warmup_epochs=0), loader)
        assert watch.lr[0] == pytest.approx(0.64 * 8 / 256)

    def test_batch_size_that_is_not_known(self, tmp_path: Path) -> None:
        batches: Any = [make_batch()] * 2
        watch = Watch()
        trainer = make_trainer(tmp_path, callbacks=[watch], max_epochs=1)
        with pytest.warns(UserWarning, match='batch size cannot be read .* as it is'):
            trainer.fit(
                make_task(lr=0.01, warmup_epochs=0),
                DataLoader(batches, batch_size=None),
            )
        assert watch.lr[0] == 0.01

    def test_long_warmup_is_cut(self, tmp_path: Path) -> None:
        watch = Watch()
        trainer = make_trainer(tmp_path, callbacks=[watch], max_epochs=2)
        with pytest.warns(UserWarning, match='warmup_epochs = 10 is 40 of the 8'):
            trainer.fit(make_task(lr=0.64, warmup_epochs=10), make_loader())
        assert max(watch.lr) == pytest.approx(0.01)

    def test_run_without_end(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, max_epochs=-1)
        with pytest.raises(ValueError, match=r'trainer\.max_epochs = -1 .* Set one'):
            trainer.fit(make_task(), make_loader())

    def test_teacher_moves_once_per_optimizer_step(self, tmp_path: Path) -> None:
        watch = Watch()
        trainer = make_trainer(
            tmp_path, callbacks=[watch], accumulate_grad_batches=4, max_epochs=4
        )
        task = make_task(warmup_epochs=0, lr=1, momentum=0.5, momentum_final=0.5)
        start = task.teacher.get_parameter('cls_token').detach().clone()
        trainer.fit(task, make_loader())
        moved = [
            not torch.equal(a, b)
            for a, b in zip([start, *watch.teacher], watch.teacher, strict=False)
        ]
        assert trainer.global_step == 4
        assert moved == [False, False, False, True] * 4

    def test_teacher_is_the_average_of_the_students(self, tmp_path: Path) -> None:
        students: list[Tensor] = []

        class Students(Callback):
            def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
                students.append(
                    task.model.get_parameter('cls_token').detach().double().clone()
                )

        task = make_task(lr=1, momentum=0.9, momentum_final=1)
        expected = task.teacher.get_parameter('cls_token').detach().double().clone()
        make_trainer(tmp_path, callbacks=[Students()]).fit(task, make_loader())
        for step, student in enumerate(students):
            momentum = 1 - 0.1 * (1 + math.cos(math.pi * step / 12)) / 2
            expected = momentum * expected + (1 - momentum) * student
        torch.testing.assert_close(
            task.teacher.get_parameter('cls_token').double(), expected
        )


class TestStepRng:
    def test_depends_on_seed_and_batch_alone(self) -> None:
        task, batch = make_task(), make_batch()
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = task.training_step(batch, 0)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(task.training_step(batch, 0), first)
        assert not torch.equal(task.training_step(batch, 1), first)

    def test_ranks_draw_differently(self, monkeypatch: pytest.MonkeyPatch) -> None:
        task = make_task()
        numbers = []
        for rank in range(2):
            monkeypatch.setattr(SoftConTask, 'global_rank', rank)
            with task.step_rng(0):
                numbers.append(torch.rand(4))
        assert not torch.equal(*numbers)

    def test_seed_is_in_the_checkpoint(self) -> None:
        task = make_task()
        torch.manual_seed(5)
        other = SoftConTask(
            'test_vit', in_channels=4, size=32, hidden_dim=16, output_dim=8
        )
        assert other.rng_seed != task.rng_seed
        other.load_state_dict(task.state_dict())
        batch = make_batch()
        assert torch.equal(other.training_step(batch, 0), task.training_step(batch, 0))


class TestResume:
    @pytest.mark.parametrize('model', ['test_vit', 'test_resnet'])
    @pytest.mark.parametrize('step', [4, 8])
    def test_same_numbers_as_without_interruption(
        self, tmp_path: Path, model: str, step: int
    ) -> None:
        def make() -> SoftConTask:
            return make_task(model=model, mask_mode='pixel', drop_path_rate=0.1)

        assert_resumes(make, tmp_path, step)

    def test_accumulated_batches(self, tmp_path: Path) -> None:
        def train(name: str, start: Path | None = None) -> SoftConTask:
            task = make_task(model='test_resnet', mask_mode='pixel')
            save = ModelCheckpoint(
                tmp_path / name, '{step}', every_n_train_steps=1, save_top_k=-1
            )
            trainer = make_trainer(
                tmp_path,
                callbacks=[save],
                enable_checkpointing=True,
                accumulate_grad_batches=2,
            )
            trainer.fit(task, make_loader(), ckpt_path=start)
            return task

        torch.manual_seed(0)
        whole = train('whole')
        resumed = train('resumed', tmp_path / 'whole/step=2.ckpt')
        # Not step 2 again, with the first of two batches done and its gradient lost
        names = {path.name for path in (tmp_path / 'resumed').iterdir()}
        assert names == {f'step={step}.ckpt' for step in range(3, 7)}
        for key, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key

    @pytest.mark.parametrize('batches', [1, 2])
    def test_again_after_the_end_of_an_epoch(
        self, batches: int, scenes: SyntheticScenes, tmp_path: Path
    ) -> None:
        """From the last step of an epoch, and then from the first step after it."""

        def train(name: str, start: Path | None = None) -> dict[str, Tensor]:
            task = make_task(in_channels=13)
            torch.manual_seed(len(name))  # a new process has other random numbers
            save = ModelCheckpoint(
                tmp_path / name, '{step}', every_n_train_steps=1, save_top_k=-1
            )
            trainer = make_trainer(
                tmp_path,
                callbacks=[save],
                enable_checkpointing=True,
                accumulate_grad_batches=batches,
            )
            trainer.fit(
                task,
                # Goes on in the middle of an epoch
                SyntheticScenesDataModule(
                    scenes.root,
                    size=96,
                    dates=2,
                    patch_size=40,
                    batch_size=4,
                    length=16,
                ),
                ckpt_path=start,
            )
            assert trainer.global_step == 12 // batches
            return task.state_dict()

        whole, end = train('whole'), 4 // batches
        train('once', tmp_path / f'whole/step={end}.ckpt')
        twice = train('twice', tmp_path / f'once/step={end + 1}.ckpt')
        for key, value in whole.items():
            assert torch.equal(value, twice[key]), key

    @pytest.mark.parametrize(('ready', 'lost'), [(3, True), (4, False)])
    def test_lost_gradients(self, tmp_path: Path, ready: int, lost: bool) -> None:
        progress = {'current': {'ready': ready}, 'is_last_batch': False}
        loops = {'fit_loop': {'epoch_loop.batch_progress': progress}}
        trainer = make_trainer(tmp_path, accumulate_grad_batches=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            warn_of_lost_gradients({'loops': loops}, trainer)
        told = [str(warning.message) for warning in caught]
        assert (
            any('gradients of 1 of 2 batches are lost' in text for text in told) == lost
        )

    def test_in_a_task_that_was_trained_before(self, tmp_path: Path) -> None:
        run = make_task()
        run.rng_seed.fill_(7)
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.fit(run, make_loader())
        trainer.save_checkpoint(tmp_path / 'run.ckpt')

        used, fresh = make_task(), make_task()
        make_trainer(tmp_path, max_epochs=1).fit(used, make_loader())
        for task in (used, fresh):
            make_trainer(tmp_path, max_epochs=2).fit(
                task, make_loader(), ckpt_path=tmp_path / 'run.ckpt'
            )
        for key, value in fresh.state_dict().items():
            assert torch.equal(value, used.state_dict()[key]), key


def test_modules_used_before_are_trained(tmp_path: Path) -> None:
    task = make_task(model='test_resnet', mask_mode='pixel')
    task.eval()
    before = task.teacher.get_buffer('bn1.running_mean').clone()
    make_trainer(tmp_path, max_epochs=1).fit(task, make_loader())
    assert not torch.equal(task.teacher.get_buffer('bn1.running_mean'), before)


class TestModelsOfThisPackage:
    @pytest.mark.parametrize(
        ('model', 'bands'),
        [
            ('softcon_vit_small_patch16_224', None),
            ('softcon_resnet50', ['B8', 'B4', 'B3', 'B2']),
        ],
    )
    def test_weights_for_the_bands(
        self,
        model: str,
        bands: list[str] | None,
        weights_folder: WeightsFolder,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        weights_folder.use(monkeypatch)
        # At the size of the weights: for another one, positions are resampled
        task = make_task(model=model, weights=True, bands=bands, size=224)
        enum = ViTSmall16_Weights if 'vit' in model else ResNet50_Weights
        names = bands or ['B2', 'B3', 'B4', 'B8']
        expected = enum.SENTINEL2_SOFTCON.get_state_dict(bands=names)
        for key, value in task.model.state_dict().items():
            assert torch.equal(value, expected[key]), key

    def test_stochastic_depth(self) -> None:
        task = make_dino(model='softcon_vit_small_patch16_224')
        assert max(getattr(m, 'drop_prob', 0) for m in task.student.modules()) > 0


class OnMps(Tensor):
    """A tensor that says to be on a device without CUDA's events."""

    device = torch.device('mps')


class TestNonFinite:
    def test_nan_pixels_stop_the_run_before_they_spoil_it(self, tmp_path: Path) -> None:
        class Spoilt(Scenes):
            def __getitem__(self, index: int) -> dict[str, Tensor]:
                sample = super().__getitem__(index)
                if index == 9:
                    sample['image'][1, 2, 3:5] = math.nan
                return sample

        task = make_task()
        trainer = make_trainer(tmp_path)
        loader = DataLoader(Spoilt(), batch_size=4)
        match = r'train_loss is nan at optimizer step 2\. .* 2 pixels are NaN'
        with pytest.raises(NonFiniteLossError, match=match):
            trainer.fit(task, loader)
        assert all(p.isfinite().all() for p in task.parameters())

    def test_ranges_are_told(self, tmp_path: Path) -> None:
        task = make_task()
        with torch.no_grad():
            next(task.projector.parameters()).fill_(math.inf)
        batch = make_batch()
        batch['image'][0, 0, 0, 0] = -7
        with pytest.raises(NonFiniteLossError, match=r'ranges from -7 to (1|0\.99)'):
            task.training_step(batch, 0)

    def test_other_devices_are_read_at_once(self) -> None:
        guard, image = NonFiniteGuard(), torch.ones(2, 3)
        guard.watch(0, torch.tensor(1.0).as_subclass(OnMps), image)
        with pytest.raises(NonFiniteLossError, match='nan at optimizer step 1'):
            guard.watch(1, torch.tensor(math.nan).as_subclass(OnMps), image)
        task, batch = make_task(), make_batch()
        label = -batch['label'].as_subclass(OnMps)
        with pytest.raises(ValueError, match='must be finite and >= 0, got values'):
            task.read_label({'label': label}, batch['image'][:, None])


class TestCheckpoint:
    def test_load_from_checkpoint(self, tmp_path: Path) -> None:
        task = make_task(bands=['B2', 'B3', 'B4', 'B8'])
        trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
        trainer.fit(task, make_loader())
        assert trainer.checkpoint_callback is not None
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[attr-defined]
        torch.load(path, weights_only=True)
        loaded = SoftConTask.load_from_checkpoint(path)
        assert dict(loaded.hparams) == dict(task.hparams)
        for key, value in task.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key])

    def test_continues_from_its_own_encoder(self, tmp_path: Path) -> None:
        task = make_task()
        trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
        trainer.fit(task, make_loader())
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        other = make_task(weights=path)
        for key, value in task.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[key])
        with pytest.raises(ValueError, match='weights are of another architecture'):
            make_task(model='resnet18', weights=path)

    def test_says_where_it_is(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
        with caplog.at_level('INFO', logger='lightning.pytorch'):
            trainer.fit(make_task(), make_loader())
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        assert f'The pretrained encoder is in {path}' in caplog.text
        assert f'--model.model test_vit --model.weights {path}' in caplog.text

    def test_family_that_the_host_does_not_open(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
        task = make_dino(model='test_convnext', local_sizes=(32,))
        with caplog.at_level('INFO', logger='lightning.pytorch'):
            trainer.fit(task, make_loader())
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        assert f'torchgeo-softcon export {path} --format timm' in caplog.text
        assert 'Fine-tune from it with' not in caplog.text

        # What it says works
        file = tmp_path / 'encoder.pth'
        main(['export', path, '--format', 'timm', '--output', str(file)])
        model = timm.create_model('test_convnext', in_chans=4, num_classes=3)
        missing, unexpected = model.load_state_dict(torch.load(file), strict=False)
        assert not unexpected
        assert missing == ['head.fc.weight', 'head.fc.bias']
        for key, value in task.model.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)

    def test_augmentations_are_not_in_it(self, tmp_path: Path) -> None:
        class Scale(torch.nn.Module):
            def __init__(self, factor: float) -> None:
                super().__init__()
                self.register_buffer('factor', torch.tensor(factor))

            def forward(self, image: Tensor) -> Tensor:
                return image * self.get_buffer('factor')

        trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
        trainer.fit(make_task(augmentations=Scale(2.0)), make_loader())
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        with pytest.warns(
            UserWarning, match='made with augmentations=Scale.*RandomView'
        ):
            SoftConTask.load_from_checkpoint(path)
        task = SoftConTask.load_from_checkpoint(path, augmentations=Scale(3.0))
        assert task.augmentations.get_buffer('factor') == 3

    def test_function_of_the_labels_is_not_in_it(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
        task = make_task(label_similarity=jaccard_similarity)
        trainer.fit(task, make_loader())
        path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        match = 'made with label_similarity=jaccard_similarity.*goes on with cosine'
        with pytest.warns(UserWarning, match=match):
            SoftConTask.load_from_checkpoint(path)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            SoftConTask.load_from_checkpoint(path, label_similarity=jaccard_similarity)


@pytest.mark.parametrize('precision', ['bf16-mixed', '32-true'])
def test_precision_and_clipping(tmp_path: Path, precision: Any) -> None:
    trainer = make_trainer(
        tmp_path, max_epochs=1, precision=precision, gradient_clip_val=1.0
    )
    trainer.fit(make_task(), make_loader())
    assert trainer.callback_metrics['train_loss'].isfinite()
    assert trainer.optimizers[0].defaults['fused'] is False


@TASKS
def test_double_precision(make: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, precision='64-true')
    trainer.fit(make(), make_loader())
    assert trainer.callback_metrics['train_loss'].isfinite()


def test_precision_that_stops_the_teacher(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, precision='bf16-true')
    with pytest.raises(ValueError, match=r'rounds the small steps .* Use bf16-mixed'):
        trainer.fit(make_task(), make_loader())


def test_learning_rate_counts_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task()
    loader = make_loader()
    trainer = SimpleNamespace(
        train_dataloader=loader, world_size=3, accumulate_grad_batches=2
    )
    monkeypatch.setattr(SoftConTask, 'trainer', trainer)
    assert images_per_step(task.trainer) == 4 * 3 * 2


def test_seasons_in_channels_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level('INFO', logger='lightning.pytorch'):
        for _ in range(2):
            split_seasons(torch.zeros(2, 33, 4, 4), 11)
    assert (
        caplog.text.count('33 channels are read as 3 seasons of in_channels = 11') == 1
    )


class TestSeasonsInChannels:
    """Channels may be seasons, or more bands than the task was told of."""

    @pytest.fixture(autouse=True)
    def forget(self) -> None:
        _warn_once.cache_clear()

    @TASKS
    def test_not_asked_for(self, make: Any) -> None:
        match = '12 channels are read as 3 seasons .* set in_channels .* bands, 12'
        with pytest.warns(UserWarning, match=match):
            make().training_step(make_batch(seasons=3), 0)

    @pytest.mark.parametrize('asked', [False, True])
    def test_silent(self, asked: bool) -> None:
        batch = make_batch(seasons=3)
        if not asked:
            batch['image'] = batch['image'].unflatten(1, (3, 4))
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            for task in (
                make_task(seasons='different' if asked else 'same'),
                make_dino(views='temporal' if asked else 'multi_crop'),
            ):
                task.training_step(batch, 0)
