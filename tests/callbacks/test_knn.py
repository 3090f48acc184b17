# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import csv
import math
import random
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, RandomSampler, Subset
from torchgeo.datamodules import EuroSATDataModule

from torchgeo_softcon._compat import HAS_TASKS
from torchgeo_softcon.callbacks import CollapseMonitor, KNNProbe, knn
from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.evaluation.features import encode, find_encoder
from torchgeo_softcon.evaluation.loop import Score
from torchgeo_softcon.models import create_encoder

from ..datamodules.host_data import make_eurosat
from ..helpers import scenes_datamodule
from ..tasks.helpers import make_task, make_trainer
from .helpers import Patches, PatchesDataModule, fingerprint, run

SSL = 'torchgeo.tasks' if HAS_TASKS else 'torchgeo.trainers'


def host(name: str, **kwargs: Any) -> Any:
    """One of TorchGeo's tasks, for four bands."""
    kwargs = {'model': 'resnet18', 'in_channels': 4, **kwargs}
    return getattr(import_module(SSL), name if HAS_TASKS else f'{name}Task')(**kwargs)


def log(root: Path) -> list[dict[str, str]]:
    with open(root / 'metrics.csv') as file:
        return list(csv.DictReader(file))


def column(root: Path, name: str) -> dict[int, float]:
    """Values of a metric by step."""
    return {int(row['step']): float(row[name]) for row in log(root) if row.get(name)}


class TestTrainingIsTheSame:
    @pytest.mark.parametrize(
        'model', [{'model': 'test_vit', 'drop_path_rate': 0.5}, {'model': 'resnet18'}]
    )
    def test_to_the_bit(self, model: dict[str, Any], tmp_path: Path) -> None:
        runs = []
        for name in ('without', 'with'):
            seed_everything(1, verbose=False)
            callbacks = [
                KNNProbe(PatchesDataModule(), k=3, every_n_steps=2, linear=True),
                CollapseMonitor(1, min_std=100),
            ]
            trainer = run(
                tmp_path / name,
                callbacks if name == 'with' else [],
                make_task(**model),
                max_epochs=2,
            )
            runs.append([*fingerprint(trainer), torch.rand(1)])
            own = [random.random(), np.random.rand()]  # noqa: NPY002
            runs[-1].append(torch.tensor(own))
        assert len(runs[0]) == len(runs[1])
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)
        losses = [column(tmp_path / name, 'train_loss') for name in ('without', 'with')]
        assert losses[0] == losses[1]

    def test_modules_keep_their_modes(self, tmp_path: Path) -> None:
        task = make_task(model='resnet18')
        trainer = make_trainer(tmp_path, max_epochs=1)
        modes: list[list[bool]] = []

        class Probe(KNNProbe):
            def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
                task.teacher.eval()  # the task itself has put all into training mode

            def probe(self, *args: Any) -> dict[str, float]:
                modes.append([m.training for m in task.modules()])
                values = super().probe(*args)
                modes.append([m.training for m in task.modules()])
                return values

        trainer.callbacks.append(Probe(Patches(), Patches(split='val'), k=3))  # type: ignore[attr-defined]
        from ..tasks.helpers import make_loader

        trainer.fit(task, make_loader())
        assert len(modes) == 4
        assert modes[0] == modes[1]
        assert modes[2] == modes[3]
        assert len(set(modes[2])) == 2


class TestMetrics:
    def test_multi_labels(self, tmp_path: Path) -> None:
        probe = KNNProbe(PatchesDataModule(), k=3, linear=True, every_n_epochs=2)
        trainer = run(tmp_path, [probe], max_epochs=3)
        # Before the training, after two epochs of four steps, and at the end
        assert list(column(tmp_path, 'knn_map_cls')) == [0, 8, 12]
        for name in (
            'knn_map_cls',
            'knn_map_mean',
            'linear_map_cls',
            'linear_map_mean',
        ):
            assert column(tmp_path, name)[0] > 0.9
            assert 0 < float(trainer.callback_metrics[name]) <= 1
        # One in three has either class
        assert column(tmp_path, 'knn_map_chance')[0] == pytest.approx(1 / 3)

    @pytest.mark.parametrize('kind', ['multiclass', 'column'])
    def test_classes(self, kind: str, tmp_path: Path) -> None:
        probe = KNNProbe(PatchesDataModule(kind=kind), k=3, linear=True, prefix='x_')
        run(tmp_path, [probe], make_task(model='resnet18'), max_epochs=1)
        assert column(tmp_path, 'x_knn_accuracy')[0] > 0.9
        assert column(tmp_path, 'x_linear_accuracy')[0] > 0.9
        assert column(tmp_path, 'x_knn_accuracy_chance')[0] == pytest.approx(1 / 3)

    @pytest.mark.parametrize('kind', ['shares', 'unknown'])
    def test_kinds_of_labels(self, kind: str, tmp_path: Path) -> None:
        data = Patches(36, kind), Patches(kind=kind, split='val')
        run(tmp_path, [KNNProbe(*data, k=3)], max_epochs=1)
        assert column(tmp_path, 'knn_map_cls')[0] > 0.9
        assert column(tmp_path, 'knn_map_chance')[0] == pytest.approx(1 / 3, abs=0.01)

    def test_the_datamodule_of_the_training(self, tmp_path: Path) -> None:
        run(
            tmp_path,
            [KNNProbe(k=3)],
            fit={'datamodule': PatchesDataModule(batch_size=4)},
            max_epochs=1,
        )
        assert 'knn_map_cls' in log(tmp_path)[0]

    def test_steps_are_those_of_the_optimizer(self, tmp_path: Path) -> None:
        probe = KNNProbe(PatchesDataModule(), k=3, every_n_steps=2)
        trainer = run(
            tmp_path,
            [probe],
            max_epochs=3,
            accumulate_grad_batches=2,
            log_every_n_steps=50,
        )
        assert trainer.global_step == 6
        assert list(column(tmp_path, 'knn_map_cls')) == [0, 2, 4, 6]

    def test_can_choose_checkpoints(self, tmp_path: Path) -> None:
        best = ModelCheckpoint(tmp_path, monitor='knn_map_mean', mode='max')
        probe = KNNProbe(PatchesDataModule(), k=3, every_n_epochs=1)
        trainer = run(tmp_path, [best, probe], max_epochs=2, enable_checkpointing=True)
        assert best.best_model_score is not None
        values = column(tmp_path, 'knn_map_mean')
        assert float(best.best_model_score) == pytest.approx(max(values[4], values[8]))
        assert trainer.checkpoint_callback is best

    def test_goes_on_after_a_resume(self, tmp_path: Path) -> None:
        probe = KNNProbe(PatchesDataModule(), k=3, every_n_epochs=1)
        trainer = run(tmp_path / 'a', [probe], max_epochs=1)
        trainer.save_checkpoint(tmp_path / 'one.ckpt')
        fit = {'ckpt_path': tmp_path / 'one.ckpt'}
        run(tmp_path / 'b', [probe], fit=fit, max_epochs=2)
        assert list(column(tmp_path / 'b', 'knn_map_cls')) == [8]

    def test_images_are_a_fixed_choice_within_the_budget(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(knn, '_MIN_SAMPLES', 128)
        bank, queries = Patches(1000), Patches(1000, split='val')
        run(tmp_path, [KNNProbe(bank, queries, k=3, every_n_epochs=1)], max_epochs=2)
        # The first one is looked at. Training is short: the smallest number of images.
        reads = bank.read[1:]
        assert len(reads) == 3 * 96
        assert reads[:96] == reads[96:192] == sorted(set(reads))
        assert len(queries.read[1:]) == 3 * 32

    @pytest.mark.parametrize(('length', 'endless'), [(1000, False), (20, True)])
    def test_images_of_all_splits_are_cross_validated(
        self,
        length: int,
        endless: bool,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(knn, '_MIN_SAMPLES', 128)
        data: Any = PatchesDataModule()
        both = Patches(length)
        both.endless = endless  # type: ignore[attr-defined]
        data.train_dataset = data.val_dataset = both
        data.setup = lambda stage: None
        run(tmp_path, [KNNProbe(data, k=3, every_n_epochs=1)], max_epochs=1)
        reads = both.read[1:]  # one is looked at
        probed = reads[: len(reads) // 2]
        assert probed == sorted(set(probed))
        assert len(probed) == 128
        assert column(tmp_path, 'knn_spread_map_cls')[0] < 0.1

    @pytest.mark.parametrize('val_fraction', [0, 1 / 3])
    def test_windows_of_the_same_ground(
        self, val_fraction: float, scenes: SyntheticScenes, tmp_path: Path
    ) -> None:
        data = scenes_datamodule(scenes, 32, 4, length=4, val_fraction=val_fraction)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            run(
                tmp_path,
                [KNNProbe(k=3, max_bank=16, max_queries=8)],
                make_task(in_channels=13),
                fit={'datamodule': data},
                max_epochs=1,
            )
        texts = [str(warning.message) for warning in caught]
        told = [text for text in texts if 'windows of the same ground' in text]
        assert len(told) == (val_fraction == 0)
        assert all('val_fraction of SyntheticScenesDataModule' in t for t in told)

    def test_resizes_to_the_size_of_the_task(self, tmp_path: Path) -> None:
        sizes: list[tuple[int, ...]] = []
        task = make_task(size=16)
        task.model.register_forward_hook(lambda *args: None)
        task.model.patch_embed.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda module, args: sizes.append(tuple(args[0].shape))
        )
        probe = KNNProbe(Patches(8), Patches(8, split='val'), k=3)
        run(tmp_path, [probe], task, max_epochs=1)
        assert sizes[0] == (8, 4, 16, 16)

    def test_a_batch_with_the_normalization_of_its_datamodule(
        self, tmp_path: Path
    ) -> None:
        data = PatchesDataModule()
        seen: list[float] = []

        class Bright(nn.Module):
            def forward(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
                return {'image': sample['image'] + 7}

        data.aug = Bright()
        task = make_task()
        task.model.patch_embed.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda module, args: seen.append(float(args[0].min()))
        )
        run(tmp_path, [KNNProbe(data, k=3)], task, max_epochs=1)
        assert seen[0] >= 7

    @pytest.mark.parametrize('unit_range', [False, True])
    def test_a_datamodule_of_the_host_in_the_range_of_softcon(
        self, unit_range: bool, tmp_path: Path
    ) -> None:
        bands = ('B02', 'B03', 'B04', 'B08')
        data: Any = EuroSATDataModule(root=make_eurosat(tmp_path, 2, 1), bands=bands)
        seen: list[Tensor] = []
        task = make_task()
        task.model.patch_embed.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda module, args: seen.append(args[0])
        )
        run(tmp_path, [KNNProbe(data, k=3, unit_range=unit_range)], task, max_epochs=1)
        probed = seen[0]
        assert (bool(probed.min() >= 0) and bool(probed.max() <= 1)) == unit_range


class Placed(Patches):
    """Images of a few places, each with a class and a look of its own."""

    def __init__(self, places: int, length: int = 48, offset: int = 0) -> None:
        super().__init__(length)
        self.places, self.offset = places, offset

    def place(self, index: int) -> str:
        return f'p{index % self.places + self.offset}'

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        number = index % self.places
        look = torch.Generator().manual_seed(number)
        label = torch.randint(
            2, (3,), generator=torch.Generator().manual_seed(9 + number)
        )
        image = torch.rand(4, 32, 32, generator=look) + index / 1000
        return {'image': image, 'label': label.float()}


class TestPlaces:
    def scores(self, root: Path, train: Any, val: Any) -> tuple[float, str]:
        data: Any = PatchesDataModule()
        data.train_dataset, data.val_dataset = train, val
        data.setup = lambda stage: None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            run(root, [KNNProbe(data, k=3)], max_epochs=1)
        texts = ' '.join(str(warning.message) for warning in caught)
        return column(root, 'knn_map_cls')[0], texts

    def test_neighbours_of_the_same_place_do_not_help(self, tmp_path: Path) -> None:
        both = Placed(8)
        split, told = self.scores(tmp_path / 'a', both, both)
        assert 'of places' not in told
        # The same images, whose places nobody knows
        unknown: Any = Subset(ConcatDataset([both]), range(48))
        leaking, _ = self.scores(tmp_path / 'b', unknown, unknown)
        assert split < 0.9
        assert leaking > 0.99

    @pytest.mark.parametrize(('offset', 'count'), [(0, 48), (6, 12), (8, 0)])
    def test_places_on_both_sides(
        self, offset: int, count: int, tmp_path: Path
    ) -> None:
        _, told = self.scores(tmp_path, Placed(8), Placed(8, offset=offset))
        assert (f'{count} of 48 samples of the queries' in told) == (count > 0)
        assert ('the scores are too high' in told) == (count > 0)

    def test_all_of_one_place(self, tmp_path: Path) -> None:
        train = Placed(8)
        train.place = lambda index: 'here'  # type: ignore[method-assign]
        _, told = self.scores(tmp_path, train, train)
        assert 'are of one place (here)' in told


class TestStart:
    def test_a_run_that_falls_below_its_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        probe = KNNProbe(PatchesDataModule(), k=3, every_n_epochs=1)
        values = iter([0.9, 0.85, 0.7, 0.6])

        def score(*args: Any, **kwargs: Any) -> Any:
            yield Score('chance', None, '', 'map', 0.3)
            yield Score('knn', 3, 'cls', 'map', next(values), 0.1)

        lines: list[str] = []
        monkeypatch.setattr(knn, 'score_probes', score)
        monkeypatch.setattr(knn, 'rank_zero_info', lines.append)
        with pytest.warns(
            UserWarning, match=r'worse than before .*, at step 8'
        ) as told:
            run(tmp_path, [probe], max_epochs=3)
        assert len([w for w in told if 'worse than before' in str(w.message)]) == 1
        assert lines[0] == 'KNNProbe, step 0: knn_map_cls 0.900 ± 0.100'
        assert lines[2].endswith('knn_map_cls 0.700 ± 0.100 (start 0.900)')
        assert column(tmp_path, 'knn_spread_map_cls')[0] == 0.1
        # A run that goes on remembers both
        other = KNNProbe(PatchesDataModule(), k=3)
        other.load_state_dict(probe.state_dict())
        assert other.state_dict() == {'start': {'knn_map_cls': 0.9}, 'warned': True}
        assert other.state_key != KNNProbe(PatchesDataModule(), prefix='x').state_key


class TestHostTasks:
    @pytest.mark.parametrize(
        ('name', 'kwargs'),
        [
            ('MoCo', {'version': 2, 'size': 32}),
            ('SimCLR', {'version': 1, 'size': 32}),
            ('BYOL', {}),
        ],
    )
    def test_probe_and_monitor(
        self, name: str, kwargs: dict[str, Any], tmp_path: Path
    ) -> None:
        states = []
        for callbacks in ([], [KNNProbe(PatchesDataModule(), k=3), CollapseMonitor(1)]):
            torch.manual_seed(3)
            task = host(name, **kwargs)
            folder = tmp_path / str(len(callbacks))
            trainer = run(
                folder,
                callbacks,
                task,
                max_epochs=1,
                limit_train_batches=1,
                limit_val_batches=0,
            )
            states.append(fingerprint(trainer))
        for one, other in zip(*states, strict=True):
            assert torch.equal(one, other)
        assert column(folder, 'knn_map')[0] > 0.5
        assert len(column(folder, 'collapse/effective_rank')) == 1

    @pytest.mark.parametrize('name', ['MoCo', 'SimCLR', 'BYOL'])
    def test_encoder_is_the_one_that_is_trained(self, name: str) -> None:
        task = host(name)
        encoder = find_encoder(task)
        assert type(encoder).__name__ == 'ResNet'
        assert any(p.requires_grad for p in encoder.parameters())
        if name == 'BYOL':
            assert encoder is task.model.backbone.model
            # Without its classifier of 1000 classes
            assert encode(encoder.eval(), torch.rand(2, 4, 32, 32))['pooled'].shape == (
                2,
                512,
            )

    @pytest.mark.skipif(not HAS_TASKS, reason='TorchGeo 0.8 has no MAE')
    def test_encoder_of_a_masked_autoencoder(self) -> None:
        task = host('MAE', model='vit_small_patch16_224', size=224)
        assert find_encoder(task) is task.backbone.vit


class TestEncoder:
    def test_by_name(self) -> None:
        task = make_task()
        assert find_encoder(task) is task.model
        assert find_encoder(task, 'teacher') is task.teacher

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"teacher.*, got 'tutor'"):
            find_encoder(make_task(), 'tutor')

    def test_none(self) -> None:
        with pytest.raises(ValueError, match='Set encoder to the name'):
            find_encoder(nn.Linear(1, 1))

    @pytest.mark.parametrize('model', ['test_vit', 'vit_tiny_patch16_224'])
    def test_token_and_mean_of_patches(self, model: str) -> None:
        encoder = create_encoder(model, 4).eval()
        image = torch.rand(2, 4, 32, 32)
        features = encode(encoder, image)
        assert list(features) == ['cls', 'mean']
        tokens = encoder.forward_features(image)  # type: ignore[operator]
        torch.testing.assert_close(features['cls'], encoder(image))
        torch.testing.assert_close(features['mean'], tokens[:, 1:].mean(1))

    def test_the_own_pooling_comes_first(self) -> None:
        encoder = create_encoder('test_vit2', 4).eval()
        encoder.global_pool = 'avg'  # type: ignore[assignment]
        image = torch.rand(2, 4, 32, 32)
        features = encode(encoder, image)
        assert next(iter(features)) in ('mean', 'pooled')
        torch.testing.assert_close(next(iter(features.values())), encoder(image))

    def test_any_module(self) -> None:
        layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        assert encode(layer, torch.rand(2, 4, 8, 8))['pooled'].shape == (2, 4)


class TestBadInput:
    @pytest.mark.parametrize(
        ('kwargs', 'message'),
        [
            ({'k': 0}, 'k must be at least 1, got 0'),
            ({'every_n_steps': 0}, 'every_n_steps must be at least 1, got 0'),
            ({'temperature': 0.0}, 'temperature must be > 0'),
            ({'k': 9, 'max_bank': 8}, 'k must be at most max_bank = 8, got 9'),
            ({'data': Patches()}, 'queries must be given if'),
            ({'queries': Patches()}, 'queries must be given if'),
            ({'unit_range': True}, 'unit_range is for a datamodule in data'),
        ],
    )
    def test_arguments(self, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            KNNProbe(**kwargs)

    @pytest.mark.parametrize(
        ('kind', 'message'),
        [
            ('mask', r"image and label, got .*'mask'.*WorldCoverMultiLabel"),
            ('wrong', 'values in'),
            ('matrix', r'got the shape \(1, 2, 3, 4\)'),
        ],
    )
    def test_labels(self, kind: str, message: str, tmp_path: Path) -> None:
        probe = KNNProbe(PatchesDataModule(kind=kind), k=3)
        with pytest.raises(ValueError, match=message):
            run(tmp_path, [probe])

    def test_one_class(self, tmp_path: Path) -> None:
        for kind in ('multiclass', 'multilabel'):
            probe = KNNProbe(PatchesDataModule(kind=kind, classes=1), k=3)
            with pytest.raises(ValueError, match=r'bank .* at least two classes'):
                run(tmp_path, [probe])

    def test_more_neighbours_than_samples(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match='labelled samples in the bank, 24, got 25'
        ):
            run(tmp_path, [KNNProbe(PatchesDataModule(), k=25)])

    def test_nan(self, tmp_path: Path) -> None:
        data = Patches(), Patches(split='val', bad=math.nan)
        with pytest.raises(ValueError, match=r'1 of 24 features of the queries .* NaN'):
            run(tmp_path, [KNNProbe(*data, k=3)])

    def test_nothing_to_probe_with(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match='needs labelled data: set data'):
            run(tmp_path, [KNNProbe(k=3)])

    def test_no_validation_data(self, tmp_path: Path) -> None:
        data = PatchesDataModule()
        data.setup = lambda stage: setattr(data, 'train_dataset', Patches())  # type: ignore[method-assign]
        with pytest.raises(ValueError, match='has no val_dataset'):
            run(tmp_path, [KNNProbe(data, k=3)])

    def test_other_bands(self, tmp_path: Path) -> None:
        probe = KNNProbe(PatchesDataModule(channels=3), k=3)
        with pytest.raises(ValueError, match='in_channels = 4'):
            run(tmp_path, [probe])

    def test_bank_and_queries_of_two_kinds(self, tmp_path: Path) -> None:
        data = Patches(kind='multiclass'), Patches(split='val')
        with pytest.raises(ValueError, match='labels of one kind'):
            run(tmp_path, [KNNProbe(*data, k=3)])


def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    for ranks in (1, 2):
        # 23 and 11 do not divide by two
        data = Patches(23), Patches(11, split='val')
        root = tmp_path / str(ranks)
        ddp: dict[str, Any] = {'strategy': 'ddp_fork', 'devices': 2}
        run(
            root,
            [KNNProbe(*data, k=3, linear=True), CollapseMonitor(1)],
            max_epochs=1,
            **(ddp if ranks == 2 else {}),
        )
    for name in ('knn_map_cls', 'knn_map_mean', 'linear_map_cls', 'knn_map_chance'):
        one, two = (column(tmp_path / ranks, name)[0] for ranks in '12')
        assert one == pytest.approx(two, abs=1e-6)
    assert len(column(tmp_path / '2', 'collapse/effective_rank')) == 2


def test_a_sampler_of_places(tmp_path: Path) -> None:
    data: Any = PatchesDataModule()
    data.setup('fit')
    data.train_sampler = RandomSampler(data.train_dataset, num_samples=12)
    data.setup = lambda stage: None
    read = []
    for folder in ('a', 'b'):
        data.train_dataset.read.clear()
        run(tmp_path / folder, [KNNProbe(data, k=3)], max_epochs=1)
        read.append(list(data.train_dataset.read))
    assert read[0] == read[1]
    assert len(read[0]) == 1 + 2 * 12
