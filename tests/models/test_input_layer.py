# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from typing import Any

import pytest
import timm
import torch
from timm.models import adapt_input_conv
from torch import nn

from torchgeo_softcon.bands import SENTINEL1_BANDS, SENTINEL2_BANDS
from torchgeo_softcon.models.input_layer import adapt_input_weight, input_layer

L2A = tuple(b for b in SENTINEL2_BANDS if b != 'B10')


@pytest.mark.parametrize('channels', [2, 4, 10, 12, 13])
def test_timm_is_timms_rule(channels: int) -> None:
    weight = torch.randn(8, 3, 4, 4)
    assert torch.equal(
        adapt_input_weight(weight, channels, 'timm'),
        adapt_input_conv(channels, weight.clone()),
    )


@pytest.mark.parametrize(
    ('bands', 'slots'),
    [
        (SENTINEL2_BANDS, (3, 2, 1)),
        (L2A, (3, 2, 1)),
        (('B02', 'B03', 'B04', 'B08'), (2, 1, 0)),
        (('B12', 'B8A', 'B4', 'B5', 'B3', 'B2'), (2, 4, 5)),
    ],
)
def test_rgb_goes_to_the_bands_of_that_name(
    bands: tuple[str, ...], slots: tuple[int, int, int]
) -> None:
    weight = torch.randn(8, 3, 4, 4)
    new = adapt_input_weight(weight, len(bands), 'rgb', bands)
    scale = 3 / len(bands)
    for i in range(len(bands)):
        expected = weight[:, slots.index(i)] if i in slots else weight.mean(1)
        torch.testing.assert_close(new[:, i], expected * scale)
    # An image whose bands are all alike gives what the grey photograph gave
    torch.testing.assert_close(new.sum(1), weight.sum(1), rtol=1e-4, atol=1e-5)


def test_random_is_pytorchs_rule() -> None:
    weight = torch.randn(64, 3, 16, 16)
    torch.manual_seed(0)
    new = adapt_input_weight(weight, 13, 'random')
    torch.manual_seed(0)
    assert torch.equal(new, nn.Conv2d(13, 64, 16, bias=False).weight)


def test_weight_is_not_modified() -> None:
    weight = torch.randn(8, 3, 4, 4)
    before = weight.clone()
    for init in ('random', 'rgb', 'timm'):
        adapt_input_weight(weight, 13, init, SENTINEL2_BANDS)  # type: ignore[arg-type]
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ('channels', 'kwargs', 'match'),
    [
        (13, {'init': 'rgb'}, 'needs bands, the names of the channels, got None'),
        (12, {'init': 'rgb', 'bands': SENTINEL2_BANDS}, '13 names for 12 channels'),
        (2, {'init': 'rgb', 'bands': SENTINEL1_BANDS}, 'red, green and blue'),
        (13, {'init': 'mean'}, "in_layer_init must be .* got 'mean'"),
    ],
)
def test_bad_argument(channels: int, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        adapt_input_weight(torch.randn(8, 3, 4, 4), channels, **kwargs)


def test_other_than_rgb_can_only_be_replaced() -> None:
    weight = torch.randn(8, 13, 4, 4)
    assert adapt_input_weight(weight, 12, 'random').shape == (8, 12, 4, 4)
    with pytest.raises(ValueError, match='for 3 bands, got 13 bands'):
        adapt_input_weight(weight, 12, 'timm')


@pytest.mark.parametrize(
    ('model', 'name'),
    [
        ('resnet18', 'conv1'),
        ('vit_tiny_patch16_224', 'patch_embed.proj'),
        ('resnet10t', 'conv1.0'),
    ],
)
def test_input_layer(model: str, name: str) -> None:
    found, layer = input_layer(timm.create_model(model, in_chans=5))
    assert found == name
    assert layer.in_channels == 5


def test_no_input_layer() -> None:
    with pytest.raises(ValueError, match='start with a convolution, got Linear'):
        input_layer(nn.Linear(2, 2))
