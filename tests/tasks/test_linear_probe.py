# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import copy
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchgeo_softcon import LinearProbeTask, ResNet50_Weights, ViTSmall16_Weights
from torchgeo_softcon._compat import HAS_TASKS, BaseTask, get_weight
from torchgeo_softcon.bands import SENTINEL2_SUBSETS
from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.models.features import last_block_features

from ..callbacks.helpers import PatchesDataModule
from ..models.helpers import WeightsFolder
from .helpers import make_trainer

TASKS = import_module(BaseTask.__module__.rpartition('.')[0])


def make_probe(**kwargs: Any) -> LinearProbeTask:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {'model': 'test_vit', 'in_channels': 4, 'size': 32}
    if kwargs.get('task') != 'multilabel':
        defaults['num_classes'] = 3
    return LinearProbeTask(**{**defaults, **kwargs})


def fit(task: LinearProbeTask, root: Path, kind: str = 'multiclass', **kw: Any) -> Any:
    trainer = make_trainer(root, **kw)
    data: Any = PatchesDataModule(kind=kind)
    # No places, which no loader can stack, and labels as those of TorchGeo's data
    data.collate_fn = lambda samples: {
        'image': torch.stack([sample['image'] for sample in samples]),
        'label': torch.stack([sample['label'] for sample in samples]).long(),
    }
    trainer.fit(task, data)
    return trainer


class TestFeatures:
    def test_four_blocks_of_vision_transformers(self) -> None:
        task = make_probe().eval()
        image = torch.rand(2, 4, 32, 32)
        expected = last_block_features(task.model, image, 4)
        assert torch.equal(task.features(image), expected)
        assert torch.equal(task(image), task.head(expected))
        assert make_probe(last_blocks=1, average_patches=True).head.in_features == 128

    def test_pooled_features_of_others(self) -> None:
        task = make_probe(model='resnet18')
        image = torch.rand(2, 4, 32, 32)
        assert torch.equal(task.features(image), task.model(image))

    def test_classifier_starts_small(self) -> None:
        head = make_probe(num_classes=200).head
        assert float(head.weight.std()) == pytest.approx(0.01, rel=0.05)
        assert not head.bias.any()


class TestTraining:
    @pytest.mark.parametrize('model', ['test_vit', 'resnet18'])
    def test_encoder_is_frozen(self, model: str, tmp_path: Path) -> None:
        """Batch statistics included, which drift in TorchGeo's own linear probe."""
        task = make_probe(model=model)
        before = copy.deepcopy(task.state_dict())
        fit(task, tmp_path, max_epochs=1)
        assert not any(module.training for module in task.model.modules())
        for key, value in task.state_dict().items():
            assert torch.equal(value, before[key]) != key.startswith('head.'), key

    def test_optimizer_of_the_papers(self, tmp_path: Path) -> None:
        class Rates(Callback):
            seen: list[float] = []  # noqa: RUF012

            def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
                self.seen.append(trainer.optimizers[0].param_groups[0]['lr'])

        trainer = fit(make_probe(lr=0.1), tmp_path, callbacks=[Rates()], max_epochs=2)
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, torch.optim.SGD)
        (group,) = optimizer.param_groups
        assert (group['momentum'], group['weight_decay']) == (0.9, 0)
        assert sum(p.numel() for p in group['params']) == 3 * 256 + 3
        # Four images per step, six steps per epoch
        assert Rates.seen[0] == pytest.approx(0.1 * 4 / 256)
        assert Rates.seen[6] == pytest.approx(0.05 * 4 / 256)
        assert group['lr'] == pytest.approx(0, abs=1e-9)

    def test_run_without_end(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r'trainer\.max_epochs = -1 .* Set one'):
            fit(make_probe(), tmp_path, max_epochs=-1)

    def test_batch_size_that_is_not_known(self, tmp_path: Path) -> None:
        batch = {'image': torch.rand(4, 4, 32, 32), 'label': torch.zeros(4).long()}
        batches: Any = [batch] * 2
        trainer = make_trainer(tmp_path, max_epochs=1)
        with pytest.warns(UserWarning, match='batch size cannot be read .* as it is'):
            trainer.fit(make_probe(lr=0.1), DataLoader(batches, batch_size=None))
        assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.1]

    def test_learns_what_is_easy(self, tmp_path: Path) -> None:
        trainer = fit(make_probe(lr=20, crop_scale=(0.5, 1)), tmp_path, max_epochs=20)
        assert trainer.callback_metrics['val_OverallAccuracy'] > 0.9

    def test_multilabels(self, tmp_path: Path) -> None:
        task = make_probe(task='multilabel', num_labels=3, lr=20)
        trainer = fit(task, tmp_path, 'multilabel', max_epochs=5)
        for name in ('Mean', 'Overall'):
            value = float(trainer.callback_metrics[f'val_{name}AveragePrecision'])
            assert 0.5 < value <= 1
        # As MultiLabelSoftMarginLoss of the papers
        scores, label = torch.randn(4, 3), torch.tensor([[0.0, 1, 1]] * 4)
        expected = nn.MultiLabelSoftMarginLoss()(scores, label)
        torch.testing.assert_close(task.criterion(scores, label), expected)

    def test_sees_crops_in_training_and_the_centre_in_tests(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = make_probe(size=16)
        seen: list[Tensor] = []

        def features(image: Tensor) -> Tensor:
            seen.append(image)
            return image.new_zeros(len(image), 256)

        monkeypatch.setattr(task, 'features', features)
        batch = {'image': torch.rand(4, 4, 32, 32), 'label': torch.zeros(4).long()}
        for step in ('training_step', 'training_step', 'predict_step', 'predict_step'):
            getattr(task, step)(batch, 0)
        first, second, third, fourth = seen
        assert {x.shape for x in seen} == {(4, 4, 16, 16)}
        assert not torch.equal(first, second)
        assert torch.equal(third, fourth)
        assert batch['image'].shape[-1] == 32


class TestWeights:
    @pytest.fixture(autouse=True)
    def files(
        self, weights_folder: WeightsFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights_folder.use(monkeypatch)

    def test_bands_by_name(self) -> None:
        """EuroSAT has B8A last, BigEarthNet has no B10."""
        member = ViTSmall16_Weights.SENTINEL2_SOFTCON
        whole = member.get_state_dict()['patch_embed.proj.weight']
        bands = [*SENTINEL2_SUBSETS[12][::-1]]
        for weights in (member, str(member)):
            task = make_probe(
                model='vit_small_patch16_224',
                weights=weights,
                in_channels=12,
                bands=bands,
                last_blocks=1,
            )
            loaded = task.model.state_dict()['patch_embed.proj.weight']
            for i, band in enumerate(bands):
                index = SENTINEL2_SUBSETS[13].index(band)
                assert torch.equal(loaded[:, i], whole[:, index])

    @pytest.mark.parametrize('host', [False, True])
    def test_bands_by_name_of_others(
        self, host: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Checkpoints, and weights of TorchGeo."""
        weights: Any = tmp_path / 'run.ckpt'
        state = create_encoder('resnet18', 3).state_dict()
        bands = ['B2', 'B3', 'B4']
        hparams = {'model': 'resnet18', 'bands': bands}
        if host:
            weights = 'ResNet18_Weights.SENTINEL2_RGB_MOCO'
            bands = list(get_weight(weights).meta['bands'])
            monkeypatch.setattr(
                'torchvision.models.WeightsEnum.get_state_dict', lambda *a, **k: state
            )
        else:
            content = {'state_dict': state, 'hyper_parameters': hparams}
            torch.save(content, weights)
        options = {'model': 'resnet18', 'in_channels': 3, 'weights': str(weights)}
        task = make_probe(**options, bands=bands[::-1])
        loaded = task.model.state_dict()['conv1.weight']
        assert torch.equal(loaded, state['conv1.weight'].flip(1))
        with pytest.raises(ValueError, match='bands must be among those of'):
            make_probe(**options, bands=['B2', 'B3', 'B8'])

    def test_bands_of_weights_that_do_not_tell(self, tmp_path: Path) -> None:
        torch.save(create_encoder('resnet18', 3).state_dict(), tmp_path / 'a.pth')
        with pytest.raises(ValueError, match='do not tell their bands'):
            make_probe(
                model='resnet18',
                in_channels=3,
                weights=str(tmp_path / 'a.pth'),
                bands=['B2', 'B3', 'B4'],
            )

    def test_weights_of_a_model_of_ours(self) -> None:
        task = make_probe(
            model='softcon_resnet50', weights=True, in_channels=12, num_classes=2
        )
        state = ResNet50_Weights.SENTINEL2_SOFTCON.get_state_dict(
            bands=SENTINEL2_SUBSETS[12]
        )
        for key, value in task.model.state_dict().items():
            assert torch.equal(value, state[key])

    def test_no_random_input_layer(self) -> None:
        match = r'in_channels must be 13, .*frozen encoder cannot be a random one'
        with pytest.raises(ValueError, match=match):
            make_probe(
                model='resnet50',
                weights='ResNet50_Weights.SENTINEL2_SOFTCON',
                in_channels=12,
            )

    def test_checkpoint_of_a_run(self, tmp_path: Path) -> None:
        task = make_probe()
        trainer = fit(task, tmp_path, max_epochs=1)
        trainer.save_checkpoint(tmp_path / 'run.ckpt')
        again = LinearProbeTask.load_from_checkpoint(
            tmp_path / 'run.ckpt', weights_only=True
        )
        image = torch.rand(2, 4, 32, 32)
        assert torch.equal(again.eval()(image), task.eval()(image))
        host = getattr(TASKS, 'Classification' if HAS_TASKS else 'ClassificationTask')
        other = host(
            model='test_vit',
            weights=str(tmp_path / 'run.ckpt'),
            in_channels=4,
            num_classes=9,
        )
        for key, value in task.model.state_dict().items():
            if key != 'pos_embed':  # for the size that TorchGeo builds the model for
                assert torch.equal(other.model.state_dict()[key], value)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ({'size': 0}, 'size must be at least 1, got 0'),
        ({'in_channels': 0}, 'in_channels must be at least 1, got 0'),
        ({'lr': 0}, 'lr must be > 0, got 0'),
        ({'lr': math.nan}, 'lr must be finite, got nan'),
        ({'bands': ['B2']}, 'bands must name all in_channels = 4 bands, got 1'),
        ({'model': 'resnet18', 'last_blocks': 4}, 'with a class token, got ResNet'),
        ({'last_blocks': 9}, 'from 1 to 6'),
        (
            {'model': 'resnet18', 'average_patches': True},
            "average_patches needs .* with a class token, got 'resnet18'",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_probe(**options)
