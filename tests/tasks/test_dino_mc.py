# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import copy
import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from torchgeo_softcon.models.loading import default_drop_path_rate
from torchgeo_softcon.modules.heads import DINOHead
from torchgeo_softcon.tasks import DINOMCTask
from torchgeo_softcon.tasks.optimizers import clip_each_gradient, cosine_warmup
from torchgeo_softcon.transforms import MultiCropView

from .helpers import (
    Corners,
    Scenes,
    assert_resumes,
    make_batch,
    make_dino,
    make_loader,
    make_trainer,
)

PROTOTYPES = 'last_layer.weight_v'


class TestConstructor:
    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'size': 0}, 'size must be at least 1, got 0'),
            ({'in_channels': 0}, 'in_channels must be at least 1'),
            ({'output_dim': 1}, 'output_dim must be at least 2 prototypes, got 1'),
            ({'hidden_dim': 0}, 'hidden_dim must be at least 1'),
            ({'bottleneck_dim': 0}, 'bottleneck_dim must be at least 1'),
            ({'student_temperature': 0}, 'student_temperature must be > 0, got 0'),
            ({'teacher_temperature': -1}, 'teacher_temperature must be > 0, got -1'),
            (
                {'warmup_teacher_temperature': 0},
                'warmup_teacher_temperature must be > 0',
            ),
            (
                {'teacher_temperature_epochs': -1},
                'teacher_temperature_epochs must be >= 0',
            ),
            ({'center_momentum': 1}, r'center_momentum must be in \[0, 1\), got 1'),
            ({'momentum': 1.5}, r'momentum must be in \[0, 1\], got 1.5'),
            ({'momentum_final': -1}, r'momentum_final must be in \[0, 1\]'),
            ({'lr': 0}, 'lr must be > 0'),
            ({'lr_final': -1}, 'lr_final must be >= 0'),
            ({'weight_decay': -1}, 'weight_decay must be >= 0'),
            ({'weight_decay_final': -1}, 'weight_decay_final must be >= 0'),
            ({'warmup_epochs': -1}, 'warmup_epochs must be >= 0'),
            ({'freeze_last_layer': -1}, 'freeze_last_layer must be >= 0'),
            ({'clip_grad': 0}, 'clip_grad must be > 0, got 0'),
            ({'crop_batching': 'padded'}, "crop_batching must be 'auto', "),
            (
                {'crop_batching': 'packed', 'model': 'test_resnet'},
                "crop_batching = 'packed' needs a Vision Transformer",
            ),
            (
                {'compile_encoder': True, 'model': 'test_resnet'},
                'compile_encoder = True needs a Vision Transformer',
            ),
            ({'position_rule': 'moco'}, "position_rule must be 'timm' or 'dino'"),
            (
                {'position_rule': 'dino', 'model': 'test_resnet'},
                "position_rule = 'dino' needs a Vision Transformer .* such as vit_small",
            ),
            (
                {'compile_encoder': True, 'crop_batching': 'by_size'},
                "got crop_batching = 'by_size'",
            ),
            ({'teacher_statistics': 'none'}, "must be 'own' or 'student', got 'none'"),
            ({'drop_path_rate': 1.0}, r'drop_path_rate must be in \[0, 1\), got 1.0'),
            ({'drop_path_rate': -0.5}, r'drop_path_rate must be in \[0, 1\), got -0.5'),
            ({'teacher_temperature': math.nan}, 'teacher_temperature must be finite'),
            ({'warmup_epochs': math.nan}, 'warmup_epochs must be finite, got nan'),
            ({'value_range': (0, 1, 2)}, r'value_range must be \(a number, a number\)'),
            ({'num_local_crops': -1}, 'num_local_crops must be >= 0, got -1'),
            ({'num_local_crops': 4}, 'num_local_crops = 4 .* a size for each crop'),
            ({'global_scale': (1, 0.5)}, 'global_scale'),
            ({'local_scale': (0.5, 2)}, 'local_scale'),
            ({'views': 'tp'}, "views must be 'multi_crop' or 'temporal', got 'tp'"),
            ({'bands': ['B2']}, 'bands must name all in_channels = 4'),
            (
                {'local_sizes': (8,)},
                r'of 8 x 8 pixels: crops must have .* got 8 x 8\. Change the sizes',
            ),
            (
                {'augmentations': MultiCropView(32, (8,))},
                'does not take images of 8 x 8 pixels',
            ),
            ({'model': 'vit_tiny'}, "must be the name of a timm model, got 'vit_tiny'"),
            ({'model': 'mixer_s16_224'}, 'does not take images of 16 x 16'),
        ],
    )
    def test_bad_argument(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises((TypeError, ValueError), match=match):
            make_dino(**kwargs)

    def test_defaults_are_those_of_the_paper(self) -> None:
        task = DINOMCTask(output_dim=64)
        views = task.augmentations
        assert isinstance(views, MultiCropView)
        assert views.sizes == (224, 224, 184, 164, 144, 124, 104, 84)
        assert task.hparams['model'] == 'vit_small_patch8_224'
        assert sum(p.numel() for p in task.model.parameters()) == 21_670_272
        rates = [
            getattr(block.drop_path1, 'drop_prob', 0.0)
            for block in cast(Any, task.student).blocks
        ]
        assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])

    @pytest.mark.parametrize(
        ('model', 'rate'),
        [
            ('vit_small_patch16_224', 0.1),
            ('deit_tiny_patch16_224.fb_in1k', 0.1),
            ('swin_tiny_patch4_window7_224', 0.2),
            ('resnet50', 0),
        ],
    )
    def test_default_stochastic_depth(self, model: str, rate: float) -> None:
        assert default_drop_path_rate(model) == rate

    @pytest.mark.parametrize(
        ('model', 'sizes'),
        [
            ('resnet18', (28, 20)),
            ('test_convnext', (32, 32)),
            ('swin_tiny_patch4_window7_224', (28, 20)),
        ],
    )
    def test_models(self, model: str, sizes: tuple[int, ...]) -> None:
        task = make_dino(model=model, local_sizes=sizes)
        loss = task.training_step(make_batch(), 0)
        assert loss.isfinite()
        for module in task.model.modules():
            assert getattr(module, 'drop_prob', 0) == 0
        if 'swin' in model:
            rates = [getattr(m, 'drop_prob', 0) for m in task.student.modules()]
            assert max(rates) == pytest.approx(0.2)

    def test_global_size_is_cut_to_whole_patches(self) -> None:
        task = make_dino(size=40)
        assert task.training_step(make_batch(size=4), 0).isfinite()

    def test_options_arrive(self) -> None:
        task = make_dino(
            norm_last_layer=False,
            center_momentum=0.7,
            student_temperature=0.2,
            local_sizes=(8, 24, 20),  # 8 px are less than a patch, and not used
            num_local_crops=2,
            global_scale=(0.5, 0.9),
            local_scale=(0.1, 0.2),
            value_range=(-1, 1),
        )
        assert task.head.last_layer.weight_g.requires_grad
        assert task.criterion.center_momentum == 0.7
        assert task.criterion.student_temperature == 0.2
        views = task.augmentations
        assert isinstance(views, MultiCropView)
        assert views.sizes == (32, 32, 24, 20)
        assert views.global_scale == (0.5, 0.9)
        assert views.local_scale == (0.1, 0.2)
        assert views.value_range == (-1, 1)

    def test_local_sizes_are_not_those_of_own_augmentations(self) -> None:
        task = make_dino(local_sizes=(8,), augmentations=Corners((32, 32)))
        assert task.training_step(make_batch(), 0).isfinite()

    def test_teacher_starts_as_the_student(self) -> None:
        task = make_dino()
        for student, teacher in task.ema_pairs():
            for key, value in student.state_dict().items():
                assert torch.equal(teacher.state_dict()[key], value)
            assert not any(p.requires_grad for p in teacher.parameters())

    def test_only_the_teacher_has_keys_of_a_model(self) -> None:
        keys = make_dino().state_dict()
        model = {k for k in keys if 'model.' in k}
        assert model == {f'model.{k}' for k in make_dino().model.state_dict()}
        assert 'criterion.center' in keys


class TestLoss:
    @pytest.mark.parametrize('model', ['test_vit', 'resnet18'])
    def test_teacher_sees_the_global_crops(self, model: str) -> None:
        task = make_dino(model=model, augmentations=Corners(), drop_path_rate=0)
        batch = make_batch()
        with torch.no_grad():
            for parameter in task.student.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            expected = slow_loss(copy.deepcopy(task), batch['image'])
        torch.testing.assert_close(task.training_step(batch, 0), expected)

    def test_gradients(self) -> None:
        task = make_dino()
        task.training_step(make_batch(), 0).backward()
        for name, parameter in task.named_parameters():
            if name.startswith(('model.', 'teacher_head.')) or 'weight_g' in name:
                assert parameter.grad is None
            else:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all()

    def test_seasons(self) -> None:
        seen = []

        class Spy(Corners):
            def forward(self, image: Tensor) -> list[Tensor]:
                seen.append(tuple(image.shape))
                return super().forward(
                    image.flatten(1, 2)[:, :4] if image.ndim == 5 else image
                )

        task = make_dino(augmentations=Spy())
        task.training_step(make_batch(seasons=3), 0)
        task.training_step(make_batch(), 0)
        assert seen == [(4, 3, 4, 32, 32), (4, 4, 32, 32)]

    def test_temporal(self) -> None:
        task = make_dino(views='temporal')
        assert task.num_global == 3
        teacher: list[int] = []
        task.teacher_head.register_forward_pre_hook(
            lambda _, args: teacher.append(len(args[0]))
        )
        assert task.training_step(make_batch(seasons=3), 0).isfinite()
        assert task.training_step(make_batch(seasons=2), 0).isfinite()
        assert teacher == [3 * 4, 3 * 4]

    @pytest.mark.parametrize(
        ('batch', 'match'),
        [
            ({'label': torch.ones(4)}, r"key 'image', got \['label'\]"),
            ({'image': torch.rand(4, 4, 32, 32)}, 'at least two seasons'),
            ({'image': torch.rand(4, 1, 4, 32, 32)}, 'at least two seasons'),
            ({'image': torch.rand(4, 6, 32, 32)}, 'in_channels = 4, got'),
        ],
    )
    def test_bad_batch(self, batch: dict[str, Tensor], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_dino(views='temporal').training_step(batch, 0)

    def test_bad_augmentations(self) -> None:
        task = make_dino(augmentations=nn.Identity())
        with pytest.raises(ValueError, match='list of at least 2 crops, got Tensor'):
            task.training_step(make_batch(), 0)
        task = make_dino(augmentations=Corners((32,)))
        with pytest.raises(ValueError, match='list of at least 2 crops, got 1'):
            task.training_step(make_batch(), 0)


class Watch(Callback):
    """Records what a run does per batch."""

    def __init__(self) -> None:
        self.groups: list[tuple[float, float, float]] = []
        self.metrics: list[dict[str, float]] = []
        self.prototypes: list[Tensor] = []
        self.center: list[Tensor] = []

    def on_before_zero_grad(self, trainer: Any, task: Any, optimizer: Any) -> None:
        decay, no_decay = optimizer.param_groups
        self.groups.append(
            (decay['lr'], decay['weight_decay'], no_decay['weight_decay'])
        )

    def on_train_batch_end(self, trainer: Any, task: Any, *args: Any) -> None:
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.prototypes.append(task.head.get_parameter(PROTOTYPES).detach().clone())
        self.center.append(task.criterion.center.clone())


class TestSchedules:
    def test_all_per_step(self, tmp_path: Path) -> None:
        watch = Watch()
        task = make_dino(
            lr=0.64,
            warmup_teacher_temperature=0.02,
            teacher_temperature=0.05,
            teacher_temperature_epochs=1,
        )
        make_trainer(tmp_path, callbacks=[watch]).fit(task, make_loader())
        used = watch.groups[-12:]
        for i in range(12):
            # 4 images per step; 4 steps of warm-up
            lr = cosine_warmup(i, 12, 0.01, 1e-6, 4)
            decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * i / 12)) / 2
            momentum = 1 + (0.996 - 1) * (1 + math.cos(math.pi * i / 12)) / 2
            temperature = 0.02 + 0.01 * min(i, 3)
            metrics = watch.metrics[i]
            assert metrics['schedule/lr'] == pytest.approx(lr, rel=1e-5)
            assert metrics['schedule/weight_decay'] == pytest.approx(decay)
            assert metrics['schedule/momentum'] == pytest.approx(momentum)
            assert metrics['schedule/teacher_temperature'] == pytest.approx(temperature)
        # What was logged is what the optimizer did
        assert [g[2] for g in used] == [0] * len(used)
        decays = {round(g[1], 6) for g in watch.groups}
        logged = {round(m['schedule/weight_decay'], 6) for m in watch.metrics}
        assert logged <= decays

    def test_length_in_steps_instead_of_epochs(self, tmp_path: Path) -> None:
        used = []
        for length in ({'max_epochs': 2}, {'max_epochs': -1, 'max_steps': 8}):
            watch = Watch()
            task = make_dino(lr=0.64)
            make_trainer(tmp_path, callbacks=[watch], **length).fit(task, make_loader())
            used.append((watch.groups, task.total_steps, task.epoch_steps))
        assert used[0] == used[1]
        assert used[0][1:] == (8, 4)
        assert max(g[0] for g in used[0][0]) == pytest.approx(0.01)

    def test_float16_clips_what_is_unscaled(self, tmp_path: Path) -> None:
        scaler = torch.amp.GradScaler('cpu', init_scale=64.0)
        plugin = MixedPrecision('16-mixed', 'cpu', scaler)
        trainer = make_trainer(tmp_path, max_epochs=1, plugins=[plugin])
        trainer.fit(make_dino(), make_loader())
        assert trainer.optimizers[0].defaults['fused'] is False

    def test_accumulation(self, tmp_path: Path) -> None:
        watch = Watch()
        task = make_dino(augmentations=Corners(), drop_path_rate=0)
        kwargs: dict[str, Any] = {'max_epochs': 1, 'precision': '64-true'}
        make_trainer(
            tmp_path, callbacks=[watch], accumulate_grad_batches=2, **kwargs
        ).fit(task, make_loader())
        moved = [not torch.equal(a, b) for a, b in pairwise(watch.center)]
        assert moved == [True, False, True]

        # The same as batches of twice the size
        whole = make_dino(augmentations=Corners(), drop_path_rate=0)
        make_trainer(tmp_path, **kwargs).fit(whole, DataLoader(Scenes(), batch_size=8))
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(task.state_dict()[key], value, msg=key)

    @pytest.mark.parametrize('epochs', [0, 1, 2])
    def test_prototypes_wait(self, tmp_path: Path, epochs: int) -> None:
        watch = Watch()
        task = make_dino(freeze_last_layer=epochs, weight_decay=0.4, lr=1)
        start = task.head.get_parameter(PROTOTYPES).detach().clone()
        make_trainer(tmp_path, callbacks=[watch]).fit(task, make_loader())
        still = [torch.equal(p, start) for p in watch.prototypes]
        # The first step of the warm-up has a learning rate of 0; at most half of 12 steps
        frozen = max(1, min(4 * epochs, 6))
        assert still == [True] * frozen + [False] * (12 - frozen)

    @pytest.mark.parametrize('length', [{'max_epochs': 1}, {'max_steps': 4}])
    def test_prototypes_do_not_wait_for_the_end(
        self, tmp_path: Path, length: dict[str, int]
    ) -> None:
        watch = Watch()
        task = make_dino(lr=1, warmup_epochs=0)
        with pytest.warns(UserWarning, match='freeze_last_layer = 1 is 4 of the 4'):
            make_trainer(tmp_path, callbacks=[watch], **length).fit(task, make_loader())
        moved = [not torch.equal(a, b) for a, b in pairwise(watch.prototypes)]
        assert moved == [False, True, True]

    def test_prototypes_wait_for_an_epoch_of_unknown_length(
        self, tmp_path: Path
    ) -> None:
        class Endless(IterableDataset[dict[str, Tensor]]):
            def __iter__(self) -> Iterator[dict[str, Tensor]]:
                scenes = Scenes()
                return (scenes[i] for i in range(len(scenes)))

        watch = Watch()
        task = make_dino(lr=1, warmup_epochs=0)
        make_trainer(tmp_path, callbacks=[watch], max_epochs=-1, max_steps=20).fit(
            task, DataLoader(Endless(), batch_size=4)
        )
        moved = [not torch.equal(a, b) for a, b in pairwise(watch.prototypes)]
        assert moved == [False] * 3 + [True] * 16


class TestClipping:
    def test_each_gradient_by_itself(self) -> None:
        parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 4, 3)]
        for parameter, norm in zip(parameters, (20.0, 3.5, 0.5), strict=True):
            parameter.grad = torch.ones_like(parameter)
            parameter.grad *= norm / parameter.grad.norm()
        unused = nn.Parameter(torch.zeros(2))
        clip_each_gradient([*parameters, unused], 3.0)
        norms = [p.grad.norm().item() for p in parameters if p.grad is not None]
        assert norms == pytest.approx([3, 3, 0.5], abs=1e-5)
        assert unused.grad is None
        clip_each_gradient([unused], 3.0)

    @pytest.mark.parametrize('trainer_clips', [False, True])
    def test_who_clips(self, tmp_path: Path, trainer_clips: bool) -> None:
        norms: list[list[float]] = []

        class Norms(Callback):
            def on_before_zero_grad(self, trainer: Any, task: Any, *args: Any) -> None:
                grads = [p.grad for p in task.parameters() if p.grad is not None]
                if grads:
                    norms.append([float(g.norm()) for g in grads])

        trainer = make_trainer(
            tmp_path,
            callbacks=[Norms()],
            max_epochs=1,
            gradient_clip_val=0.02 if trainer_clips else None,
        )
        trainer.fit(make_dino(clip_grad=0.01, student_temperature=0.01), make_loader())
        largest = max(max(n) for n in norms)
        total = max(math.hypot(*n) for n in norms)
        if trainer_clips:
            assert total == pytest.approx(0.02, rel=1e-3)
            assert largest > 0.01
        else:
            assert largest == pytest.approx(0.01, rel=1e-3)
            assert total > 0.02
        assert trainer.optimizers[0].defaults['fused'] is not trainer_clips


def slow_loss(task: DINOMCTask, image: Tensor, temperature: float = 0.04) -> Tensor:
    """One forward pass per crop size and an explicit loop over pairs of crops."""
    crops = task.augmentations(image)
    patch = 16 if task.hparams['model'] == 'test_vit' else 1

    def encode(encoder: nn.Module, crops: list[Tensor]) -> list[Tensor]:
        cut = [
            c[..., : c.shape[-2] // patch * patch, : c.shape[-1] // patch * patch]
            for c in crops
        ]
        # Both global crops are normalised together
        together = encoder(torch.cat(cut[:2])).chunk(2)
        return [*together, *(encoder(c) for c in cut[2:])]

    student = [task.head(f) for f in encode(task.student, crops)]
    with torch.no_grad():
        teacher = [task.teacher_head(f) for f in encode(task.model, crops[:2])]
    total = image.new_zeros(())
    for t, teacher_logits in enumerate(teacher):
        q = ((teacher_logits - task.criterion.center) / temperature).softmax(-1)
        for s, student_logits in enumerate(student):
            if s != t:
                total = (
                    total - (q * (student_logits / 0.1).log_softmax(-1)).sum(-1).mean()
                )
    task.criterion.center.mul_(0.9).add_(0.1 * torch.cat(teacher).mean(0))
    return total / (2 * len(student) - 2)


def slow_training(task: DINOMCTask, epochs: int) -> None:
    """The paper's optimization with nothing but loops over parameters."""
    data, steps = Scenes(), 4 * epochs
    trained = [*task.student.named_parameters(), *task.head.named_parameters()]
    trained = [(n, p) for n, p in trained if p.requires_grad]
    decay = [p for n, p in trained if p.ndim > 1 and not n.endswith('.bias')]
    plain = [p for n, p in trained if p.ndim <= 1 or n.endswith('.bias')]
    optimizer = torch.optim.AdamW(
        [{'params': decay}, {'params': plain}], lr=0, foreach=False, fused=False
    )
    for step in range(steps):
        part = range(4 * (step % 4), 4 * (step % 4) + 4)
        image = torch.stack([data[i]['image'] for i in part]).double()
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        peak = 0.01 * 4 / 256
        progress = (1 + math.cos(math.pi * (step - 4) / (steps - 4))) / 2
        lr = peak * step / 3 if step < 4 else 1e-6 + (peak - 1e-6) * progress
        optimizer.param_groups[0]['weight_decay'] = 0.4 + (0.04 - 0.4) * cosine
        optimizer.param_groups[1]['weight_decay'] = 0
        for group in optimizer.param_groups:
            group['lr'] = lr

        optimizer.zero_grad()
        # Warm-up of the teacher's temperature over the first epoch
        slow_loss(task, image, 0.02 + 0.03 * min(step, 3) / 3).backward()
        for _, parameter in trained:
            assert parameter.grad is not None
            norm = parameter.grad.norm()
            if 3.0 / (norm + 1e-6) < 1:
                parameter.grad.mul_(3.0 / (norm + 1e-6))
        if step < 4:
            task.head.get_parameter(PROTOTYPES).grad = None
        optimizer.step()
        momentum = 1 + (0.996 - 1) * cosine
        with torch.no_grad():
            for student, teacher in task.ema_pairs():
                for theta, average in zip(
                    student.parameters(), teacher.parameters(), strict=True
                ):
                    average.mul_(momentum).add_((1 - momentum) * theta)


@pytest.mark.parametrize('model', ['test_vit', 'test_resnet'])
def test_training_equals_a_slow_independent_form(tmp_path: Path, model: str) -> None:
    def make() -> DINOMCTask:
        return make_dino(
            model=model,
            augmentations=Corners(),
            drop_path_rate=0,
            warmup_teacher_temperature=0.02,
            teacher_temperature=0.05,
            teacher_temperature_epochs=1,
        )

    task, slow = make(), make()
    start = {k: v.clone() for k, v in task.state_dict().items()}
    # Adam turns the rounding of gradients that are zero into steps: more digits
    make_trainer(tmp_path, max_epochs=2, precision='64-true').fit(task, make_loader())
    slow_training(slow.double(), 2)
    state = task.state_dict()
    for key, expected in slow.state_dict().items():
        if not expected.is_floating_point():
            continue
        error = (state[key] - expected).norm()
        assert error <= 1e-5 * expected.norm() + 1e-7, key
        if key.startswith('student.') and key.endswith('weight'):
            # Far less than what training changed
            assert error < 0.01 * (start[key] - expected).norm(), key


class SaveGradients(Callback):
    """Writes what the optimizer gets, rank by rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_before_optimizer_step(self, trainer: Any, task: Any, *args: Any) -> None:
        grads = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
        state = {'grads': grads, 'center': task.criterion.center}
        path = f'{task.global_rank}-{trainer.global_step}.pt'
        torch.save(state, self.folder / path)


class Half(Corners):
    """Crops of every second image, another half in each process."""

    def forward(self, image: Tensor) -> list[Tensor]:
        return super().forward(image[torch.distributed.get_rank() :: 2])


def test_two_processes_equal_the_whole_batch(tmp_path: Path) -> None:
    tasks = []
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
        two: dict[str, Any] = {
            'devices': 2,
            'strategy': 'ddp_fork',
            # Lightning's own would shuffle
            'use_distributed_sampler': False,
        }
        trainer = make_trainer(
            tmp_path,
            max_epochs=1,
            precision='64-true',
            callbacks=[SaveGradients(tmp_path / name)],
            **(two if name == 'two' else {}),
        )
        task = make_dino(
            augmentations=Half() if name == 'two' else Corners(),
            drop_path_rate=0,
            freeze_last_layer=0,
            # Both processes read whole batches, and the rule counts them
            lr=0.01 / trainer.world_size,
        )
        trainer.fit(task, DataLoader(Scenes(24), batch_size=8))
        tasks.append(task)

    for step in range(3):
        whole = torch.load(tmp_path / 'one' / f'0-{step}.pt')
        for rank in range(2):
            part = torch.load(tmp_path / 'two' / f'{rank}-{step}.pt')
            torch.testing.assert_close(part['center'], whole['center'])
            assert part['grads'].keys() == whole['grads'].keys()
            for name, grad in whole['grads'].items():
                error = (part['grads'][name] - grad).norm()
                assert error <= 1e-5 * grad.norm() + 1e-8, name
    for key, value in tasks[0].state_dict().items():
        if value.is_floating_point():
            error = (tasks[1].state_dict()[key] - value).norm()
            assert error <= 1e-5 * value.norm() + 1e-8, key


@pytest.mark.parametrize('model', ['test_vit', 'test_resnet'])
@pytest.mark.parametrize('step', [4, 8])
def test_resumes_bit_for_bit(tmp_path: Path, model: str, step: int) -> None:
    kwargs: dict[str, Any] = {
        'model': model,
        'teacher_temperature': 0.07,
        'teacher_temperature_epochs': 1.5,
    }
    assert_resumes(lambda: make_dino(**kwargs), tmp_path, step)


def test_load_from_checkpoint(tmp_path: Path) -> None:
    task = make_dino(value_range=(0, 1), bands=['B2', 'B3', 'B4', 'B8'])
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True)
    trainer.fit(task, make_loader())
    path = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    torch.load(path, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        loaded = DINOMCTask.load_from_checkpoint(path)
    assert dict(loaded.hparams) == dict(task.hparams)
    for key, value in task.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])
    # Continual pretraining starts from the teacher
    other = make_dino(weights=path)
    for encoder in (other.student, other.model):
        for key, value in task.model.state_dict().items():
            assert torch.equal(encoder.state_dict()[key], value)


@pytest.mark.parametrize('model', ['test_vit', 'resnet18'])
def test_half_precision(tmp_path: Path, model: str) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, precision='bf16-mixed')
    # PyTorch 2.15 computes wrong gradients of strided bfloat16 convolutions of 1 x 1
    # pixels on a CPU, which 16 px give in the last stage of a ResNet
    task = make_dino(model=model, size=64, local_sizes=(48, 40))
    trainer.fit(task, make_loader())
    assert trainer.callback_metrics['train_loss'].isfinite()
    assert task.criterion.center.dtype == torch.float32
    assert trainer.optimizers[0].defaults['fused']


@pytest.mark.slow
def test_compiled_encoder(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        task = make_dino(
            augmentations=Corners(), drop_path_rate=0, compile_encoder=compiled
        )
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.fit(task, make_loader())
        losses.append(trainer.callback_metrics['train_loss'])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_synchronised_batch_norm() -> None:
    task = TorchSyncBatchNorm().apply(make_dino(model='test_resnet'))
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    for encoder in (cast(nn.Module, task.student), cast(nn.Module, task.model)):
        found = [m for m in encoder.modules() if isinstance(m, norms)]
        assert found
        assert all(isinstance(m, nn.SyncBatchNorm) for m in found)


def test_teacher_has_statistics_of_its_own(tmp_path: Path) -> None:
    task = make_dino(model='resnet18', momentum=1)
    before = task.model.get_buffer('bn1.running_mean').clone()
    make_trainer(tmp_path, max_epochs=1).fit(task, make_loader())
    after = task.model.get_buffer('bn1.running_mean')
    assert not torch.equal(after, before)
    assert not torch.allclose(after, task.student.get_buffer('bn1.running_mean'))


def test_teacher_takes_the_statistics_of_the_student(tmp_path: Path) -> None:
    task = make_dino(model='resnet18', momentum=1, teacher_statistics='student')
    make_trainer(tmp_path, max_epochs=1).fit(task, make_loader())
    teacher = dict(task.model.named_buffers())
    for name, buffer in task.student.named_buffers():
        assert torch.equal(teacher[name], buffer)
    # Parameters are the teacher's own
    weight = 'conv1.weight'
    assert not torch.equal(
        task.model.get_parameter(weight), task.student.get_parameter(weight)
    )


def test_exported_encoder_is_the_teacher(tmp_path: Path) -> None:
    task = make_dino(momentum=0.5, lr=1)
    make_trainer(tmp_path, max_epochs=1).fit(task, make_loader())
    task.eval()
    batch = make_batch()
    features = task.predict_step(batch, 0)
    torch.testing.assert_close(features, task.model(batch['image']))
    assert not torch.allclose(features, task.student(batch['image']))


class TestCollapse:
    def fit(self, tmp_path: Path, **kwargs: Any) -> DINOMCTask:
        class Blind(DINOHead):
            def forward(self, x: Tensor) -> Tensor:
                return 0 * super().forward(x)

        task = make_dino(**kwargs)
        task.head.__class__ = Blind
        loader = DataLoader(Scenes(12), batch_size=1)
        make_trainer(tmp_path).fit(task, loader)
        return task

    def test_is_told_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr('torchgeo_softcon.tasks.dino_mc._PLATEAU_STEPS', 20)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            self.fit(tmp_path)
        told = [str(w.message) for w in caught if 'log(output_dim)' in str(w.message)]
        assert len(told) == 1
        assert 'log(output_dim) = 3.178 for 24 steps' in told[0]
        assert 'teacher_temperature' in told[0]

    def test_not_if_it_learns(self, tmp_path: Path) -> None:
        task = make_dino()
        task.plateau.fill_(500)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            make_trainer(tmp_path, max_epochs=2).fit(task, make_loader())
        assert task.plateau == 0
