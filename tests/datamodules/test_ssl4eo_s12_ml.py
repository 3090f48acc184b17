# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.ssl4eo.archives import season, write_archive
from tests.tasks.helpers import make_task, make_trainer
from torchgeo_softcon.bands import SENTINEL2_SUBSETS, band_statistics
from torchgeo_softcon.datamodules import SSL4EOS12MLDataModule
from torchgeo_softcon.datasets import SSL4EOS12ML
from torchgeo_softcon.evaluation.samples import LabelledSamples
from torchgeo_softcon.ssl4eo.pack import pack

DAYS = ['20200604', '20200902']
PLACES = [f'{place:07}' for place in range(4)]


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four locations with two dates of Level-2A and Sentinel-1, with labels."""
    days = dict.fromkeys(PLACES, DAYS)
    root = write_archive(tmp_path_factory.mktemp('archive'), {'s2a': days, 's1': days})
    labels = {
        place: {season('s2a', day): [number, 4 + i] for i, day in enumerate(DAYS)}
        for number, place in enumerate(PLACES)
    }
    (root / 'labels.json').write_text(json.dumps(labels))
    return root


@pytest.fixture(scope='module')
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('packed')
    pack(root, out, labels=root / 'labels.json')
    return out


def make(root: Path, **kwargs: Any) -> SSL4EOS12MLDataModule:
    return SSL4EOS12MLDataModule(
        **{'root': str(root), 'split': 's2a', 'batch_size': 2, **kwargs}
    )


def first(datamodule: SSL4EOS12MLDataModule, split: str = 'train') -> dict[str, Any]:
    """The first batch, as a task gets it."""
    datamodule.setup({'train': 'fit', 'val': 'validate'}.get(split, split))
    batch = next(iter(getattr(datamodule, f'{split}_dataloader')()))
    batch = datamodule.on_after_batch_transfer(batch, 0)
    # The host does this with a trainer only
    return dict(datamodule.aug(batch))


class TestSSL4EOS12MLDataModule:
    def test_batches_are_the_scaled_images(self, packed: Path) -> None:
        datamodule = make(packed, seasons=2)
        batch = first(datamodule, 'val')
        assert batch['image'].shape == (2, 2, 12, 264, 264)
        assert batch['label'].shape == (2, 2, 9)
        dataset = SSL4EOS12ML(packed, 's2a', seasons=2)
        mean, std = torch.tensor(band_statistics(SENTINEL2_SUBSETS[12], 'L2A')).T
        for index in range(2):
            sample = dataset[index]
            expected = (sample['image'] - (mean - 2 * std)[:, None, None]) / (
                4 * std[:, None, None]
            )
            torch.testing.assert_close(
                batch['image'][index], expected.clamp(0, 1), atol=1e-6, rtol=0
            )
            assert torch.equal(batch['label'][index], sample['label'])

    def test_folders_and_packed_give_the_same(self, root: Path, packed: Path) -> None:
        labels = str(root / 'labels.json')
        ours, fast = (first(make(path, labels=labels)) for path in (root, packed))
        assert ours['image'].shape == (2, 12, 264, 264)
        assert ours['label'].shape == (2, 9)
        assert torch.equal(ours['image'], fast['image'])
        assert torch.equal(ours['label'], fast['label'])

    def test_value_range(self, packed: Path) -> None:
        image = first(make(packed, value_range=(0, 12000)), 'val')['image']
        expected = SSL4EOS12ML(packed, 's2a')[0]['image'][0] / 12000
        torch.testing.assert_close(image[0], expected)
        with pytest.raises(ValueError, match='value_range must be'):
            make(packed, value_range=(1, 0))

    def test_both_sensors(self, packed: Path) -> None:
        batch = first(make(packed, split=['s1', 's2a']))
        assert batch['image'].shape == (2, 14, 264, 264)
        assert 0.2 < batch['image'][:, :2].mean() < 0.8

    def test_missing_values_are_zero(self, packed: Path) -> None:
        datamodule = make(packed, split='s1')
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, -12.59])
        image = values.expand(1, 2, 1, 4)
        scaled = datamodule.aug({'image': image})['image']
        assert (scaled[..., :3] == 0).all()
        assert (scaled[..., 3] > 0).all()

    def test_predictions_are_of_all_images(self, packed: Path) -> None:
        datamodule = make(packed, seasons=2, batch_size=3)
        batch = first(datamodule, 'predict')
        assert batch['image'].shape == (3, 12, 264, 264)
        assert len(datamodule.predict_dataloader()) == 3

    def test_parts_share_no_location(self, packed: Path) -> None:
        datamodule = make(packed, val_fraction=0.25, batch_size=1)
        for stage in ('fit', 'test'):
            datamodule.setup(stage)
        names = [
            {getattr(datamodule, f'{part}_dataset').names(i)[0][:7] for i in range(4)}
            for part in ('train', 'val', 'test')
        ]
        assert [len(n) for n in names] == [2, 1, 1]
        assert len(set.union(*names)) == 4

    def test_probes_get_images(self, packed: Path) -> None:
        datamodule = make(packed)
        datamodule.setup('fit')
        samples = LabelledSamples.of_split(datamodule, 'val', 'probe')
        batch = next(iter(samples.batches()))
        assert batch['image'].shape == (2, 1, 12, 264, 264)
        assert samples.transform is not None
        assert samples.transform(batch)['image'].max() <= 1

    def test_pickle(self, packed: Path) -> None:
        datamodule = pickle.loads(pickle.dumps(make(packed)))
        assert first(datamodule)['image'].shape == (2, 12, 264, 264)

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'split': 's2'}, "got 's2'"),
            ({'batch_size': 0}, 'batch_size'),
            ({'val_fraction': 0.5}, 'val_fraction'),
        ],
    )
    def test_arguments(self, packed: Path, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make(packed, **options)


def test_resumed_training_is_that_of_a_whole_one(packed: Path, tmp_path: Path) -> None:
    def fit(**kwargs: Any) -> Any:
        task = make_task(in_channels=12, seasons='different')
        # Two batches in an epoch
        trainer = make_trainer(tmp_path, max_epochs=2, **kwargs)
        ckpt_path = None if kwargs else tmp_path / 'step=3.ckpt'
        trainer.fit(task, make(packed, seasons=2), ckpt_path=ckpt_path)
        return task.state_dict()

    callback = ModelCheckpoint(tmp_path, '{step}', every_n_train_steps=1, save_top_k=-1)
    whole = fit(callbacks=[callback], enable_checkpointing=True)
    resumed = fit()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
