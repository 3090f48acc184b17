# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from typing import Any

import pytest
import timm
import torch
from timm.models import adapt_input_conv
from torch import nn

from torchgeo_softcon.bands import SENTINEL1_BANDS, SENTINEL2_BANDS
from torchgeo_softcon.models import create_encoder, load_encoder
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


NORMALIZATION = (0.43, 0.411, 0.296), (0.213, 0.156, 0.143)
MEAN, STD = (torch.tensor(v, dtype=torch.double)[:, None, None] for v in NORMALIZATION)
TINY: dict[str, Any] = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'img_size': 32}
TINY |= {'num_classes': 0, 'patch_size': 8}


def make_model(name: str) -> Any:
    """A model whose parameters and statistics are all random."""
    torch.manual_seed(0)
    model: Any
    if name == 'clip':  # no bias, and registers without position
        model = timm.models.VisionTransformer(
            **TINY, pre_norm=True, reg_tokens=2, no_embed_class=True
        )
    elif name == 'perception':
        model = timm.models.Eva(**TINY, use_pre_transformer_norm=True)
    else:
        model = create_encoder(name)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand_like(value)
            value.copy_(noise + 0.5 if 'var' in key else value + 0.1 * noise)
    return model.eval()


@pytest.mark.parametrize(
    'name',
    ['test_vit', 'clip', 'perception', 'test_convnext', 'vit_small_patch16_dinov3'],
)
def test_rgb_takes_images_as_they_are(name: str) -> None:
    model = make_model(name).double()
    image = torch.rand(2, 3, 32, 32, dtype=torch.double)
    with torch.no_grad():
        expected = model((image - MEAN) / STD)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        load_encoder(model, state, 'rgb', normalization=NORMALIZATION)
        torch.testing.assert_close(model(image), expected)
        # By names, in another order
        load_encoder(model, state, 'rgb', ('B2', 'B3', 'B4'), NORMALIZATION)
        torch.testing.assert_close(model(image.flip(1)), expected)


@pytest.mark.parametrize('name', ['test_resnet', 'test_efficientnet'])
def test_rgb_of_a_convolution_differs_at_the_border_only(name: str) -> None:
    model = make_model(name)
    maps: list[Any] = []
    norm = next(m for m in model.modules() if hasattr(m, 'running_mean'))
    norm.register_forward_hook(lambda module, inputs, out: maps.append(out.detach()))
    image = torch.rand(2, 3, 64, 64)
    model(((image - MEAN) / STD).float())
    load_encoder(model, dict(model.state_dict()), 'rgb', None, NORMALIZATION)
    model(image)
    theirs, ours = maps
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(ours[inner], theirs[inner], rtol=1e-4, atol=1e-5)
    assert (ours - theirs).abs().max() > 0.1


def test_grey_photographs_keep_their_features_in_all_bands() -> None:
    model, encoder = make_model('test_vit'), create_encoder('test_vit', 13).eval()
    grey = torch.rand(2, 1, 160, 160)
    load_encoder(encoder, model.state_dict(), 'rgb', SENTINEL2_BANDS, NORMALIZATION)
    expected = model(((grey - MEAN) / STD).float())
    # All other bands weigh the mean of colours, which a grey image does not tell apart
    torch.testing.assert_close(
        encoder(grey.expand(-1, 13, -1, -1)), expected, rtol=1e-4, atol=1e-4
    )


def test_rgb_without_a_place_for_the_mean() -> None:
    model = create_encoder('resnetv2_50x1_bit')
    with pytest.raises(ValueError, match=r"'rgb' cannot fold .* ResNetV2.*'random'"):
        load_encoder(model, model.state_dict(), 'rgb', None, NORMALIZATION)


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
