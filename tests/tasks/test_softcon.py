# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchgeo.models import ViTSmall16_Weights

from torchgeo_softcon.losses import jaccard_similarity
from torchgeo_softcon.tasks import SoftConTask
from torchgeo_softcon.transforms import RandomView

from .helpers import Scenes, make_batch, make_loader, make_task, make_trainer


class TestConstructor:
    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'in_channels': 0}, 'in_channels must be at least 1, got 0'),
            ({'size': 40}, 'size must be a multiple of the patch size 16 .* 32'),
            ({'model': 'vit_tinny_patch16_224'}, 'did you mean .*vit_tiny_patch16_224'),
            (
                {'bands': ['B2', 'B3']},
                'bands must name all in_channels = 4 bands, got 2',
            ),
            ({'bands': ['B2', 'B3', 'B4', 'B88']}, "unknown name 'B88'"),
            ({'momentum': 1.1}, r'momentum must be in \[0, 1\], got 1.1'),
            ({'seasons': 'all'}, "seasons must be .* got 'all'"),
            ({'lr': 0}, 'lr must be > 0'),
            ({'lr': math.nan}, 'lr must be finite, got nan'),
            ({'optimizer': 'adam'}, r"optimizer must be .* got 'adam'"),
            ({'in_layer_init': 'x'}, r"in_layer_init must be .* got 'x'"),
            ({'weight_decay': -1}, 'weight_decay must be >= 0, got -1'),
            ({'warmup_epochs': -1}, 'warmup_epochs must be >= 0, got -1'),
            ({'mask_patch_size': 0}, 'mask_patch_size must be at least 1, got 0'),
            ({'hidden_dim': 0}, 'hidden_dim must be at least 1, got 0'),
            ({'output_dim': 0}, 'output_dim must be at least 1, got 0'),
            ({'mask_ratio': 1}, r'ratio must be in \[0, 1\), got 1'),
            ({'mask_mode': 'drop', 'model': 'resnet18'}, 'needs a Vision Transformer'),
            ({'soft_loss': 'kl'}, "got 'kl'"),
            ({'soft_weight': -1}, 'soft_weight must be >= 0'),
            ({'soft_weight': 'much'}, "soft_weight must be 'auto' or a number, got"),
            ({'soft_ratio': 0}, 'soft_ratio must be > 0, got 0'),
            ({'num_classes': 0}, 'num_classes must be at least 1, got 0'),
            (
                {'batch_norm': 'x'},
                "batch_norm must be 'train', 'frozen' or None, got 'x'",
            ),
            ({'weights': 'nowhere.ckpt'}, "existing file or the name .*'nowhere.ckpt'"),
            ({'projector_layers': 0}, 'projector_layers must be at least 1, got 0'),
            ({'predictor_layers': 0}, 'predictor_layers must be at least 1, got 0'),
        ],
    )
    def test_bad_argument(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_task(**kwargs)

    @pytest.mark.parametrize(
        ('model', 'mode', 'momentum'),
        [('test_vit', 'drop', (0.99, 1)), ('resnet18', 'pixel', (0.999, 0.999))],
    )
    def test_defaults_follow_the_encoder(
        self, model: str, mode: str, momentum: tuple[float, float]
    ) -> None:
        task = make_task(model=model)
        task.total_steps = 10
        assert task.masking.mode == mode
        assert (task.momentum_at(0), task.momentum_at(10)) == momentum

    def test_teacher_starts_as_the_pretrained_student(self, tmp_path: Path) -> None:
        other = make_task(in_channels=3)
        torch.save(other.model.state_dict(), tmp_path / 'rgb.pth')
        task = make_task(weights=str(tmp_path / 'rgb.pth'))
        for name, parameter in task.model.named_parameters():
            assert torch.equal(parameter, task.teacher.get_parameter(name))
            loaded = other.model.get_parameter(name)
            # The paper: a random input layer, everything else pretrained
            assert (parameter.shape == loaded.shape) == (
                name != 'patch_embed.proj.weight'
            )
            if parameter.shape == loaded.shape:
                assert torch.equal(parameter, loaded)

    def test_weights_of_the_host_by_member_and_name(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        member = ViTSmall16_Weights.SENTINEL2_ALL_DINO
        torch.manual_seed(3)
        state = timm.create_model('vit_small_patch16_224', in_chans=13).state_dict()
        monkeypatch.setattr(
            type(member), 'get_state_dict', lambda *args, **kwargs: dict(state)
        )
        for weights in (member, str(member)):
            task = make_task(
                model='vit_small_patch16_224', in_channels=13, weights=weights
            )
            for key, value in task.model.state_dict().items():
                if key != 'pos_embed':  # resampled
                    assert torch.equal(value, state[key])

    def test_weights_of_timm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(3)
        rgb: Any = timm.create_model('test_vit', num_classes=0)
        create = timm.create_model

        def pretrained(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
            return rgb if pretrained else create(*args, **kwargs)

        monkeypatch.setattr(timm, 'create_model', pretrained)
        bands = ['B2', 'B3', 'B4', 'B8']
        task = make_task(weights=True, bands=bands, in_layer_init='rgb')
        weight = task.model.get_parameter('patch_embed.proj.weight')
        # Images of timm's model have a mean and a standard deviation of 0.5
        red = rgb.patch_embed.proj.weight[:, 0] / 0.5
        torch.testing.assert_close(weight[:, 2], red * 3 / 4)
        assert torch.equal(task.model.get_parameter('cls_token'), rgb.cls_token)
        assert torch.equal(task.teacher.get_parameter('cls_token'), rgb.cls_token)

    def test_frozen_patch_embedding(self) -> None:
        task = make_task(freeze_patch_embed=True)
        frozen = [n for n, p in task.model.named_parameters() if not p.requires_grad]
        assert frozen == ['patch_embed.proj.weight', 'patch_embed.proj.bias']

    def test_options_arrive(self) -> None:
        task = make_task(
            soft_temperature=0.7,
            temperature=0.3,
            gather_distributed=False,
            soft_loss='mse',
            drop_path_rate=0.2,
            mask_mode='pixel',
            mask_patch_size=8,
            mask_ratio=0.25,
            projector_layers=2,
            predictor_layers=1,
        )
        criterion, masking = task.criterion, task.masking
        assert (criterion.temperature, criterion.soft.temperature) == (0.3, 0.7)
        assert (criterion.gather_distributed, criterion.soft.soft_loss) == (
            False,
            'mse',
        )
        assert (masking.mode, masking.patch_size, masking.ratio) == ('pixel', 8, 0.25)
        rates = [getattr(m, 'drop_prob', 0) or 0 for m in task.model.modules()]
        assert max(rates) == pytest.approx(0.2)
        layers = [
            sum(isinstance(m, nn.Linear) for m in head.modules())
            for head in (task.projector, task.predictor)
        ]
        assert layers == [2, 1]
        assert make_task().criterion.gather_distributed

    def test_teachers_follow_encoder_and_projector(self) -> None:
        task = make_task()
        assert task.ema_pairs() == [
            (task.model, task.teacher),
            (task.projector, task.teacher_projector),
        ]

    @pytest.mark.parametrize(
        'model', ['mobilenetv3_small_050', 'test_vit2', 'test_vit3']
    )
    def test_any_model_that_pools(self, model: str) -> None:
        task = make_task(model=model)
        task.training_step(make_batch(), 0).backward()

    def test_model_that_takes_another_size(self) -> None:
        with pytest.raises(ValueError, match='does not take images of 40 x 40'):
            make_task(model='mixer_s32_224', size=40)

    def test_no_augmentation_is_not_the_default(self) -> None:
        nothing = nn.Sequential()
        assert make_task(augmentations=nothing).augmentations is nothing

    def test_hyperparameters_are_plain(self) -> None:
        task = make_task(
            weights=None,
            augmentations=nn.Identity(),
            label_similarity=jaccard_similarity,
        )
        for name in ('weights', 'augmentations', 'label_similarity'):
            assert name not in task.hparams
        assert task.hparams['model'] == 'test_vit'
        assert isinstance(task.augmentations, nn.Identity)
        assert task.criterion.label_similarity is jaccard_similarity

    def test_only_the_encoder_has_keys_of_a_model(self) -> None:
        task = make_task(mask_mode='token')
        keys = [k for k in task.state_dict() if 'model.' in k]
        assert keys
        assert all(k.startswith('model.') and k.count('model.') == 1 for k in keys)
        assert {k[6:] for k in keys} == task.model.state_dict().keys()


class Constant(nn.Module):
    """A view that shows which image it was drawn from."""

    def forward(self, image: Tensor) -> Tensor:
        return image[..., :32, :32]


class TestViews:
    @pytest.mark.parametrize('layout', ['channels', 'time'])
    @pytest.mark.parametrize('seasons', ['same', 'different'])
    def test_labels_belong_to_their_season(self, layout: str, seasons: str) -> None:
        task = make_task(seasons=seasons, augmentations=Constant())
        times = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(64, 3, 4, 32, 32)
        rows = torch.arange(64.0).view(-1, 1, 1, 1, 1)
        image = times + 10 * rows
        batch = {
            'image': image.flatten(1, 2) if layout == 'channels' else image,
            'label': F.one_hot(torch.arange(3)).expand(64, 3, 3),
        }
        torch.manual_seed(0)
        (first, second), (label, key_label) = task.draw_views(batch)
        for view, chosen in ((first, label), (second, key_label)):
            assert chosen is not None
            assert torch.equal(view[:, 0, 0, 0] % 10, chosen.argmax(1).float())
            assert torch.equal(view[:, 0, 0, 0] // 10, torch.arange(64.0))
            assert set(chosen.argmax(1).tolist()) == {0, 1, 2}
        same = first[:, 0, 0, 0] == second[:, 0, 0, 0]
        assert same.all() if seasons == 'same' else not same.any()

    def test_one_label_for_all_seasons(self) -> None:
        task = make_task(augmentations=Constant())
        batch = make_batch(seasons=2)
        _, (label, key_label) = task.draw_views(batch)
        assert label is not None
        assert torch.equal(label, batch['label'])
        assert key_label is not None
        assert torch.equal(key_label, batch['label'])

    def test_no_label_needed_without_the_soft_term(self) -> None:
        task = make_task(soft_weight=0)
        batch = make_batch()
        del batch['label']
        _, labels = task.draw_views(batch)
        assert labels == (None, None)

    @pytest.mark.parametrize(
        ('change', 'match'),
        [
            (
                {'image': torch.rand(4, 5, 32, 32)},
                r'in_channels = 4, got \(4, 5, 32, 32\)',
            ),
            ({'image': torch.rand(4, 2, 3, 32, 32)}, r'got \(4, 2, 3, 32, 32\)'),
            ({'image': torch.rand(1, 4, 32, 32)}, 'at least 2, got a batch of 1'),
            (
                {'label': None},
                r"key 'label' .*\['image', 'label'\].*WorldCoverMultiLabel",
            ),
            ({'label': torch.ones(4)}, r'multi-labels: set num_classes'),
            ({'label': torch.ones(3, 5)}, r'B = 4 and T = 1, got \(3, 5\)'),
            ({'label': torch.ones(4, 2, 5)}, r'T = 1, got \(4, 2, 5\)'),
            ({'label': -torch.ones(4, 5)}, 'finite and >= 0, got values from -1'),
            ({'label': torch.full((4, 5), math.nan)}, 'finite and >= 0, got .* nan'),
        ],
    )
    def test_bad_batch(self, change: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_task().training_step({**make_batch(), **change}, 0)

    def test_view_of_another_size(self) -> None:
        task = make_task(augmentations=RandomView(48))
        match = r'\(4, 4, 32, 32\), got \(4, 4, 48, 48\)'
        with pytest.raises(ValueError, match=match):
            task.training_step(make_batch(), 0)

    def test_missing_keys_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"key 'image', got \['label'\]"):
            make_task().training_step({'label': torch.ones(4, 5)}, 0)
        with pytest.raises(ValueError, match=r"key 'label' .* got \['image', 'mask'\]"):
            make_task().training_step(
                {'image': torch.rand(4, 4, 32, 32), 'mask': torch.zeros(4, 32, 32)}, 0
            )


class TestTrainingStep:
    def test_is_moco_v3_in_one_direction_without_labels_and_mask(self) -> None:
        task = make_task(soft_weight=0, mask_ratio=0, augmentations=Constant())
        batch = make_batch(8)
        loss = task.training_step(batch, 0)
        query = task.predictor(task.projector(task.model(batch['image'])))
        key = task.teacher_projector(task.teacher(batch['image']))
        logits = F.normalize(query) @ F.normalize(key).T / 0.2
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(8)))

    def test_only_the_trainable_branch_is_masked(self) -> None:
        task = make_task(mask_mode='pixel', augmentations=Constant())
        seen: dict[str, Tensor] = {}
        for name in ('model', 'teacher'):
            task.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: seen.update({name: args[0]})
            )
        batch = make_batch()
        task.training_step(batch, 0)
        assert torch.equal(seen['teacher'], batch['image'])
        assert (seen['model'] == 0).float().mean() == 0.75  # 1 of 4 patches is seen

    def test_symmetric_averages_both_directions(self) -> None:
        task = make_task(mask_ratio=0, symmetric=True)
        batch = make_batch(8)
        loss = task.training_step(batch, 0)
        with task.step_rng(0):
            views, labels = task.draw_views(batch)
        one, *_ = task.compare_views(views, labels)
        two, *_ = task.compare_views(views[::-1], labels[::-1])
        weight = torch.tensor([1, 30])
        torch.testing.assert_close(loss, ((one + two) * weight).sum() / 2)

    @pytest.mark.parametrize('mode', ['drop', 'token', 'pixel'])
    @pytest.mark.parametrize('model', ['test_vit', 'resnet18'])
    def test_gradients(self, model: str, mode: Any) -> None:
        if model == 'resnet18' and mode != 'pixel':
            pytest.skip('only Vision Transformers have tokens')
        task = make_task(model=model, mask_mode=mode)
        task.training_step(make_batch(), 0).backward()
        for name, parameter in task.named_parameters():
            if 'teacher' in name:
                assert parameter.grad is None
            else:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all()

    def test_all_labels_unknown(self, tmp_path: Path) -> None:
        class Unknown(Scenes):
            def __getitem__(self, index: int) -> dict[str, Tensor]:
                sample = super().__getitem__(index)
                return {**sample, 'label': sample['label'] * 0}

        trainer = make_trainer(tmp_path, max_epochs=1)
        loader = torch.utils.data.DataLoader(Unknown(), batch_size=4)
        trainer.fit(make_task(), loader)
        metrics = trainer.callback_metrics
        assert metrics['train_unknown_share'] == 1
        assert metrics['train_loss_soft'] == 0
        assert metrics['train_loss'].isfinite()

    def test_what_is_logged(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.fit(make_task(soft_weight=2), make_loader())
        metrics = trainer.callback_metrics
        assert metrics.keys() == {
            'train_loss',
            'train_loss_contrast',
            'train_loss_contrast_chance',
            'train_loss_soft',
            'train_loss_soft_chance',
            'train_loss_soft_floor',
            'train_soft_explained',
            'train_label_correlation',
            'schedule/soft_weight',
            'train_feature_std',
            'train_unknown_share',
            'schedule/lr',
            'schedule/momentum',
        }
        total = metrics['train_loss_contrast'] + 2 * metrics['train_loss_soft']
        torch.testing.assert_close(metrics['train_loss'], total)
        assert metrics['train_loss_contrast_chance'] == pytest.approx(math.log(4))
        assert metrics['schedule/soft_weight'] == 2
        bar = trainer.progress_bar_metrics
        parts = {'train_loss_contrast', 'train_loss_soft', 'train_feature_std'}
        assert bar.keys() == {'train_loss', *parts}

    def test_loss_falls(self, tmp_path: Path) -> None:
        losses: list[float] = []

        class Recorder(SoftConTask):
            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                loss = super().training_step(*args, **kwargs)
                losses.append(loss.item())
                return loss

        dims = {'hidden_dim': 32, 'output_dim': 16}
        views = Constant()
        task = make_task(**dims, lr=0.2, mask_ratio=0.25, augmentations=views)
        task.__class__ = Recorder
        loader = torch.utils.data.DataLoader(Scenes(32), batch_size=8)
        make_trainer(tmp_path, max_epochs=14).fit(task, loader)
        assert sum(losses[-4:]) < 0.75 * sum(losses[:4])


class TestPredict:
    def test_features_of_the_exported_encoder(self) -> None:
        task = make_task().eval()
        batch = make_batch()
        features = task.predict_step(batch, 0)
        torch.testing.assert_close(features, task.model(batch['image']))
        assert features.shape == (4, 64)

    def test_seasons_are_averaged(self) -> None:
        task = make_task().eval()
        batch = make_batch(seasons=2)
        expected = (task(batch['image'][:, :4]) + task(batch['image'][:, 4:])) / 2
        torch.testing.assert_close(task.predict_step(batch, 0), expected)

    def test_image_is_not_covered_by_patches(self) -> None:
        with pytest.raises(
            ValueError, match=r'image size must be a multiple .* 40 x 32'
        ):
            make_task()(torch.rand(2, 4, 40, 32))
