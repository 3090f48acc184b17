# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchgeo.models
from torchvision.models._api import WeightsEnum

from torchgeo_softcon.bands import SENTINEL1_BANDS, SENTINEL2_BANDS
from torchgeo_softcon.models import (
    ResNet50_Weights,
    ViTBase14_DINOv2_Weights,
    ViTSmall14_DINOv2_Weights,
)

ENUMS: tuple[Any, ...] = (
    ResNet50_Weights,
    ViTBase14_DINOv2_Weights,
    ViTSmall14_DINOv2_Weights,
)


@pytest.mark.parametrize('weights', [m for e in ENUMS for m in e], ids=str)
class TestSoftConWeights:
    def test_file_and_meta_are_those_of_the_host(self, weights: WeightsEnum) -> None:
        host = getattr(torchgeo.models, type(weights).__name__)
        name = weights.name.replace('2_', '2_ALL_').replace('1_', '1_GRD_')
        assert weights.url == host[name].url
        for key, value in host[name].meta.items():
            if key != 'bands':
                assert weights.meta[key] == value
        assert weights.meta['value_range'] == (0, 1)
        assert weights.meta['license'] == 'Apache-2.0'
        bands = SENTINEL1_BANDS if '1' in weights.name[:9] else SENTINEL2_BANDS
        assert weights.meta['bands'] == bands
        assert weights.meta['in_chans'] == len(bands)

    def test_found_by_name(self, weights: WeightsEnum) -> None:
        assert torchgeo.models.get_weight(str(weights)) is weights

    def test_transform_is_the_hosts_scaled_to_the_unit_range(
        self, weights: WeightsEnum
    ) -> None:
        host = getattr(torchgeo.models, type(weights).__name__)
        name = weights.name.replace('2_', '2_ALL_').replace('1_', '1_GRD_')
        mean, std = (
            torch.tensor(getattr(host[name].transforms[-1], k)).view(-1, 1, 1)
            for k in ('mean', 'std')
        )
        image = mean + 2.5 * std * torch.randn(len(mean), 264, 264)
        score = host[name].transforms({'image': image.clone()})['image']
        unit = weights.transforms({'image': image})['image']
        assert unit.shape == (len(mean), 224, 224)
        torch.testing.assert_close(unit, ((score + 2) / 4).clamp(0, 1))
        assert unit.min() == 0
        assert unit.max() == 1


def test_loads_into_timm_and_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    state = timm.create_model('resnet50', in_chans=13, num_classes=0).state_dict()
    torch.save(state, tmp_path / 'rn50.pth')
    weights = ResNet50_Weights.SENTINEL2_SOFTCON
    local: Any = weights.value
    monkeypatch.setattr(local, 'url', (tmp_path / 'rn50.pth').as_uri())
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    loaded = weights.get_state_dict(progress=False, weights_only=True)
    timm.create_model('resnet50', in_chans=13, num_classes=0).load_state_dict(loaded)
    model = torchgeo.models.resnet50(weights=weights)
    assert torch.equal(model.state_dict()['conv1.weight'], state['conv1.weight'])
