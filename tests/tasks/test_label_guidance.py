# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.models.utils import update_momentum
from torch import Tensor

from torchgeo_softcon.callbacks import LabelControl
from torchgeo_softcon.losses import soft_label_loss

from .helpers import (
    TASKS,
    Corners,
    Whole,
    assert_resumes,
    make_batch,
    make_dino,
    make_fixed,
    make_loader,
    make_task,
    make_trainer,
)

#: Weights that both tasks take.
WEIGHTS: tuple[Any, ...] = (3.0, 'auto')


class TestDINOMC:
    def test_no_labels_by_default(self) -> None:
        task, batch = make_dino(), make_batch()
        del batch['label']
        task.training_step(batch, 0)
        assert not any('soft' in name for name in task.state_dict())

    def test_soft_term_of_the_bottleneck_of_global_crops(self) -> None:
        task = make_fixed(make_dino, soft_weight=2, soft_options={'temperature': 0.5})
        plain, batch = make_fixed(make_dino), make_batch()
        more = task.training_step(batch, 0) - plain.training_step(batch, 0)
        crops = Corners()(batch['image'])[:2]
        student = [task.head.embed(task.student(crop)) for crop in crops]
        teacher = [task.teacher_head.embed(task.model(crop)) for crop in crops]
        expected = sum(
            soft_label_loss(query, key, batch['label'], temperature=0.5)
            for query, key in zip(student, teacher[::-1], strict=True)
        )
        torch.testing.assert_close(
            more, torch.as_tensor(expected), atol=1e-5, rtol=1e-5
        )

    def test_similarity_of_labels(self) -> None:
        options: dict[str, Any] = {'label_similarity': 'jaccard'}
        for given in (options, {'soft_options': options}):
            task = make_dino(soft_weight=1, **given)
            assert task.soft_criterion.label_similarity == 'jaccard'

    @pytest.mark.parametrize('views', ['multi_crop', 'temporal'])
    def test_labels_of_seasons(self, views: Any) -> None:
        task = make_dino(soft_weight=1, views=views)
        batch = make_batch(seasons=3)
        per_season = batch['label'][:, None].repeat(1, 3, 1)
        losses = [
            task.training_step({**batch, 'label': label}, 0)
            for label in (batch['label'], per_season)
        ]
        torch.testing.assert_close(*losses)

    @pytest.mark.parametrize(('weight', 'learns'), [(20, True), (1e-4, False)])
    def test_learns_the_labels_of_a_batch(self, weight: float, learns: bool) -> None:
        """Each of four labels is a brighter band: half of the way from chance, and more."""
        task = make_fixed(
            make_dino, soft_weight=weight, soft_options={'soft_bias': 'batch'}
        )
        batch = make_batch(8)
        batch['image'] = batch['image'] / 5 + batch['label'][:, :4, None, None]
        optimizer = torch.optim.AdamW(task.parameters(), 3e-4)
        for _ in range(20):
            optimizer.zero_grad()
            task.training_step(batch, 0).backward()
            optimizer.step()
            for student, teacher in task.ema_pairs():
                update_momentum(student, teacher, m=0.9)
        agreement = task.soft_criterion.agreement(*task.label_pairs(batch, 0))
        assert bool(agreement.explained > 0.5) is learns


class TestClassIndices:
    @TASKS
    def test_become_one_hot(self, make: Any) -> None:
        batch = make_batch()
        index = torch.tensor([2, 0, -1, 2])
        hot = torch.eye(3)[index.clamp(min=0)] * (index >= 0)[:, None]
        losses = [
            make(soft_weight=1, num_classes=classes).training_step(
                {**batch, 'label': label}, 0
            )
            for classes, label in ((3, index), (None, hot))
        ]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize(
        ('label', 'match'),
        [
            (
                torch.ones(4, 5),
                r'class indices .* because num_classes = 3, got .*float32',
            ),
            (torch.ones(4, 5).long(), r'\(B, T\) = \(4, 1\) .* shape \(4, 5\)'),
            (torch.arange(4), 'below num_classes = 3, got 3'),
        ],
    )
    def test_bad_labels(self, label: Tensor, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_task(num_classes=3).training_step({**make_batch(), 'label': label}, 0)


class TestAutoWeight:
    @TASKS
    @pytest.mark.parametrize('size', [4, 16])
    def test_keeps_the_ratio_of_gradients(self, make: Any, size: int) -> None:
        task = make(soft_weight='auto', soft_ratio=0.7)
        seen: dict[str, Tensor] = {}
        weigh = task.weigh_soft

        def record(main: Tensor, soft: Tensor, features: Tensor) -> Tensor:
            weight: Tensor = weigh(main, soft, features)
            for name, term in {'main': main, 'soft': weight * soft}.items():
                grad = torch.autograd.grad(term, features, retain_graph=True)[0]
                seen[name] = grad.norm()
            return weight

        task.weigh_soft = record
        task.training_step(make_batch(size), 0).backward()
        assert seen['soft'] / seen['main'] == pytest.approx(0.7, rel=1e-4)

    def test_moves_slowly_and_not_by_batches_without_labels(self) -> None:
        task = make_task(soft_weight='auto')
        terms = [torch.rand((), requires_grad=True) for _ in range(2)]
        features = torch.stack(terms)

        def weigh(ratio: float) -> float:
            return float(task.weigh_soft(features[0], features[1] / ratio, features))

        assert weigh(4) == pytest.approx(4)
        assert weigh(8) == pytest.approx(4 * 2**0.1)
        before = task.auto_weight.clone()
        weight = task.weigh_soft(features[0], features[1] * 0, features)
        assert weight == task.auto_weight == before

    @TASKS
    def test_resumes_to_the_bit(self, make: Any, tmp_path: Path) -> None:
        assert_resumes(lambda: make_fixed(make, soft_weight='auto'), tmp_path, 4)

    def test_is_logged(self, tmp_path: Path) -> None:
        task = make_task(soft_weight='auto')
        trainer = make_trainer(tmp_path, max_steps=2)
        trainer.fit(task, make_loader())
        assert trainer.callback_metrics['schedule/soft_weight'] == task.auto_weight > 0


class TestSoftProjector:
    def test_embeds_for_the_soft_term_alone(self) -> None:
        task = make_task(soft_projector=True, mask_ratio=0, augmentations=Whole())
        with torch.no_grad():
            for parameter in task.soft_projector.parameters():
                parameter.add_(torch.rand_like(parameter))
        batch = make_batch(8)
        terms, features, soft = task.compare_views(
            (batch['image'],) * 2, (batch['label'],) * 2
        )
        expected = soft_label_loss(*soft, batch['label'])
        torch.testing.assert_close(terms[1], expected)
        head = task.soft_predictor(task.soft_projector(features))
        torch.testing.assert_close(soft[0], head)
        terms[1].backward()
        for head, learns in ((task.projector, False), (task.soft_projector, True)):
            (weight, *_) = head.parameters()
            assert weight.grad is not None
            assert bool(weight.grad.any()) == learns

    def test_has_a_teacher(self, tmp_path: Path) -> None:
        assert_resumes(lambda: make_task(soft_projector=True), tmp_path, 4)
        pairs = make_task(soft_projector=True).ema_pairs()
        assert len(pairs) == 3


@TASKS
@pytest.mark.parametrize('weight', WEIGHTS)
def test_what_labels_did_is_logged(make: Any, weight: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    task = make(soft_weight=weight)
    trainer.fit(task, make_loader())
    logged = trainer.callback_metrics
    main = 'contrast' if make is make_task else 'dino'
    total = logged[f'train_loss_{main}']
    total = total + logged['schedule/soft_weight'] * logged['train_loss_soft']
    torch.testing.assert_close(logged['train_loss'], total)
    candidates = 4 if make is make_task else task.hparams['output_dim']
    chance = math.log(candidates)
    assert logged[f'train_loss_{main}_chance'] == pytest.approx(chance)
    assert -1 <= logged['train_label_correlation'] <= 1
    assert logged['train_loss_soft_floor'] < logged['train_loss_soft_chance']
    assert logged['train_soft_explained'] < 1


class TestLabelControl:
    @TASKS
    def test_training_is_the_same(self, make: Any, tmp_path: Path) -> None:
        states = []
        for callbacks in ([], [LabelControl(every_n_steps=1)]):
            task = make(soft_weight=3)
            trainer = make_trainer(tmp_path, max_steps=3, callbacks=callbacks)
            trainer.fit(task, make_loader())
            states.append(task.state_dict())
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]), key
        logged = trainer.callback_metrics
        difference = logged['label_control/permuted'] - logged['label_control/soft']
        torch.testing.assert_close(difference, logged['label_control/difference'])
        assert logged['label_control/spread'] > 0

    def test_embeddings_that_follow_labels_are_told_from_others(self) -> None:
        class Given:
            """A task whose embeddings are given."""

            soft_criterion = make_task().soft_criterion

            def __init__(self, query: Tensor, label: Tensor) -> None:
                self.pairs = query, query, label, label

            def label_pairs(self, batch: Any, batch_idx: int) -> Any:
                return self.pairs

            def modules(self) -> list[Any]:
                return []

            def eval(self) -> None:
                pass

        label = torch.eye(4).repeat(8, 1)
        trainer = make_trainer(Path())
        differences = []
        for query in (label, torch.rand(32, 4)):
            task: Any = Given(query, label)
            values: Any = LabelControl().look(trainer, task, {})
            differences.append(values['label_control/difference'])
            assert values['label_control/spread'] < 0.1
        assert differences[0] > 0.3
        assert abs(differences[1]) < 0.05

    def test_needs_labels(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, callbacks=[LabelControl()])
        match = 'LabelControl needs a task that labels guide, got DINOMCTask with soft'
        with pytest.raises(ValueError, match=match):
            trainer.fit(make_dino(), make_loader())

    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'every_n_steps': 0}, 'every_n_steps must be at least 1, got 0'),
            ({'permutations': 1}, 'permutations must be at least 2, got 1'),
        ],
    )
    def test_bad_argument(self, kwargs: dict[str, int], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            LabelControl(**kwargs)
