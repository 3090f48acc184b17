# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torchgeo.datamodules import (
    BigEarthNetDataModule,
    EuroSATDataModule,
    SSL4EOS12DataModule,
)

from torchgeo_softcon._compat import HAS_TASKS, BaseTask
from torchgeo_softcon.callbacks import UnitRange
from torchgeo_softcon.datamodules.normalization import match_images
from torchgeo_softcon.models.encoders import open_encoder
from torchgeo_softcon.transforms import ToUnitRange

from ..datamodules.host_data import make_bigearthnet, make_eurosat, make_ssl4eo_s12
from ..tasks.helpers import make_trainer
from .helpers import PatchesDataModule

TASKS = import_module(BaseTask.__module__.rpartition('.')[0])


def seen(datamodule: Any, bands: Any = None, split: str = 'train') -> Tensor:
    """The first images as the datamodule gives them to a task."""
    trainer: Any = SimpleNamespace(datamodule=datamodule)
    datamodule.setup('fit')
    UnitRange(bands).setup(trainer, None, 'fit')  # type: ignore[arg-type]
    stages = ('training', 'validating', 'sanity_checking', 'testing', 'predicting')
    modes = dict.fromkeys(stages, False)
    modes['training' if split == 'train' else 'validating'] = True
    datamodule.trainer = SimpleNamespace(**modes)
    dataset = datamodule.dataset or getattr(datamodule, f'{split}_dataset')
    torch.manual_seed(0)
    batch = {'image': dataset[0]['image'][None]}
    image: Tensor = datamodule.on_after_batch_transfer(batch, 0)['image']
    return image[0]


@pytest.fixture(scope='module')
def eurosat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_eurosat(tmp_path_factory.mktemp('eurosat'), 2, 1)


class TestNumbers:
    """What reaches the encoder is what SoftCon's authors have trained on."""

    @pytest.mark.parametrize('split', ['train', 'val'])
    def test_eurosat(self, split: str, eurosat: Path) -> None:
        datamodule: Any = EuroSATDataModule(root=eurosat)
        image = seen(datamodule, split=split)
        raw = getattr(datamodule, f'{split}_dataset')[0]['image']
        expected = ToUnitRange.of(datamodule.train_dataset.bands)(raw)
        torch.testing.assert_close(image, expected)
        # By hand: B8A is the last band of EuroSAT
        by_hand = (raw[12] - (2581.0 - 2 * 1345.9)) / (4 * 1345.9)
        torch.testing.assert_close(image[12], by_hand.clamp(0, 1))

    def test_chosen_bands(self, eurosat: Path) -> None:
        datamodule: Any = EuroSATDataModule(root=eurosat, bands=('B04', 'B03', 'B02'))
        image = seen(datamodule)
        raw = datamodule.train_dataset[0]['image']
        torch.testing.assert_close(image, ToUnitRange.of(['B4', 'B3', 'B2'])(raw))

    @pytest.mark.parametrize('bands', ['s1', 's2', 'all'])
    def test_bigearthnet(self, bands: str, tmp_path: Path) -> None:
        datamodule: Any = BigEarthNetDataModule(
            root=make_bigearthnet(tmp_path, 2, 1), bands=bands
        )
        image = seen(datamodule)
        raw = datamodule.train_dataset[0]['image']
        numbers = ('1', '2', '3', '4', '5', '6', '7', '8', '8A', '9', '11', '12')
        names = [f'B{number}' for number in numbers]
        # TorchGeo sorts files by name: VH before VV, although it says otherwise
        radar = ['VH', 'VV']
        if bands != 's2':
            assert raw[0].mean() < raw[1].mean()
        names = {'s1': radar, 's2': names, 'all': radar + names}[bands]
        torch.testing.assert_close(image, ToUnitRange.of(names, 'L2A')(raw))

    def test_seasons_of_radar(self, tmp_path: Path) -> None:
        """TorchGeo divides dB by 10,000."""
        datamodule: Any = SSL4EOS12DataModule(
            root=make_ssl4eo_s12(tmp_path, 's1', 1), split='s1', seasons=2
        )
        image = seen(datamodule)
        assert image.shape == (4, 264, 264)
        assert image.mean((1, 2)) == pytest.approx(torch.full((4,), 0.5), abs=0.02)
        assert image.std((1, 2)) == pytest.approx(torch.full((4,), 0.25), abs=0.02)

    def test_own_datamodules_are_left(self) -> None:
        datamodule: Any = PatchesDataModule()
        datamodule.mean, datamodule.std = torch.tensor(0), torch.tensor(1)
        image = seen(datamodule)
        assert torch.equal(image, datamodule.train_dataset[0]['image'])


def test_random_augmentations_stay(eurosat: Path) -> None:
    kornia = import_module('kornia.augmentation')
    datamodule: Any = EuroSATDataModule(root=eurosat)
    datamodule.train_aug = kornia.AugmentationSequential(
        kornia.Normalize(datamodule.mean, datamodule.std),
        kornia.RandomHorizontalFlip(p=1),
        data_keys=None,
        keepdim=True,
    )
    image = seen(datamodule)
    raw = datamodule.train_dataset[0]['image']
    expected = ToUnitRange.of(datamodule.train_dataset.bands)(raw)
    torch.testing.assert_close(image, expected.flip(-1))


def test_the_run_remembers(eurosat: Path, tmp_path: Path) -> None:
    """Embeddings and evaluations of the run are of the same values."""
    task = getattr(TASKS, 'Classification' if HAS_TASKS else 'ClassificationTask')
    for callbacks, expected in (([UnitRange()], True), ([], None)):
        trainer = make_trainer(tmp_path, max_epochs=1, callbacks=callbacks)
        trainer.fit(
            task(model='test_resnet', in_channels=13, num_classes=10),
            EuroSATDataModule(root=eurosat, batch_size=10),
        )
        trainer.save_checkpoint(tmp_path / 'run.ckpt')
        assert open_encoder(tmp_path / 'run.ckpt').unit_range is expected


def test_an_encoder_that_does_not_tell(eurosat: Path) -> None:
    datamodule: Any = EuroSATDataModule(root=eurosat)
    datamodule.setup('fit')
    with pytest.warns(UserWarning, match='as EuroSATDataModule normalizes them'):
        match_images(datamodule, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        match_images(datamodule, None, False)
        match_images(PatchesDataModule(), None, None)  # not normalized


class TestBadInput:
    def test_no_datamodule(self) -> None:
        trainer: Any = SimpleNamespace()
        with pytest.raises(ValueError, match='has data loaders only'):
            UnitRange().setup(trainer, None, 'fit')  # type: ignore[arg-type]

    def test_unknown_bands(self) -> None:
        kornia = import_module('kornia.augmentation')
        datamodule: Any = PatchesDataModule()
        normalize = kornia.Normalize(torch.tensor(0), torch.tensor(255))
        datamodule.aug = nn.Sequential(normalize)
        with pytest.raises(
            ValueError, match=r'PatchesDataModule does not tell its bands'
        ):
            seen(datamodule)

    def test_several_steps(self) -> None:
        """SeasonalContrastS2DataModule: 8-bit images, whatever they mean."""
        kornia = import_module('kornia.augmentation')
        datamodule: Any = PatchesDataModule()
        datamodule.aug = kornia.AugmentationSequential(
            kornia.Normalize(torch.tensor(0), torch.tensor(255)),
            kornia.Normalize(torch.tensor(0.4), torch.tensor(0.2)),
            data_keys=None,
            keepdim=True,
        )
        with pytest.raises(ValueError, match='normalizes images in several steps'):
            seen(datamodule, ['B2', 'B3', 'B4', 'B8'])

    def test_no_normalization(self) -> None:
        with pytest.raises(ValueError, match=r'no normalization .*ToUnitRange'):
            seen(PatchesDataModule(), ['B2', 'B3', 'B4', 'B8'])

    def test_a_datamodule_of_lightning(self) -> None:
        """Which has neither mean nor std."""
        trainer: Any = SimpleNamespace(datamodule=LightningDataModule())
        message = r'LightningDataModule has no normalization .*ToUnitRange'
        with pytest.raises(ValueError, match=message):
            UnitRange().setup(trainer, None, 'fit')  # type: ignore[arg-type]
