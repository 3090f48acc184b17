# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from pathlib import Path
from typing import Any

import pytest
import torch

from torchgeo_softcon import BigEarthNetV2DataModule
from torchgeo_softcon.bands import SENTINEL2_SUBSETS
from torchgeo_softcon.datamodules.normalization import image_bands, use_unit_range

from .host_data import make_bigearthnet_v2


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bigearthnet_v2(tmp_path_factory.mktemp('data') / 'v2')


@pytest.mark.parametrize(
    ('bands', 'names'),
    [
        ('s1', ('VH', 'VV')),
        ('s2', SENTINEL2_SUBSETS[12]),
        ('all', ('VH', 'VV', *SENTINEL2_SUBSETS[12])),
    ],
)
def test_batches(bands: str, names: tuple[str, ...], root: Path) -> None:
    data = BigEarthNetV2DataModule(4, 0, root=root, bands=bands)
    for stage, split, count in (
        ('fit', 'train', 4),
        ('fit', 'val', 2),
        ('test', 'test', 2),
    ):
        data.setup(stage)
        loader: Any = getattr(data, f'{split}_dataloader')()
        batch = next(iter(loader))
        assert {*batch} == {'image', 'label'}
        assert batch['label'].sum() == 3 * count / 2
        image = batch['image']
        assert image.shape == (count, len(names), 120, 120)
        # In the range of the pretraining: made around the mean
        assert 0 <= image.min() < image.max() <= 1
        assert (image.mean((0, 2, 3)) - 0.5).abs().max() < 0.45
        assert torch.equal(data.aug({'image': image.clone()})['image'], image)
    assert image_bands(data) == names
    use_unit_range(data)  # which it has already


def test_other_bands(root: Path) -> None:
    with pytest.raises(ValueError, match=r"bands must be 's1', .*got 'rgb'"):
        BigEarthNetV2DataModule(root=root, bands='rgb')
