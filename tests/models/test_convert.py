# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor

from torchgeo_softcon.bands import SENTINEL2_BANDS, SENTINEL2_SUBSETS
from torchgeo_softcon.models.convert import (
    choose_bands,
    drop_head,
    fold_layer_scale,
    fresh,
    resample_positions,
    swin_to_timm,
    to_patch_size,
)

from .helpers import randomize, torchvision_backbone, vit_shapes, vit_tokens


def small_vit(channels: int = 2, grid: int = 8) -> dict[str, Tensor]:
    return randomize(vit_shapes(96, 14, channels, grid, True, depth=3))


def patchwise(image: Tensor, old: int, new: int) -> Tensor:
    """Resize every patch of an image on its own."""
    batch, channels, height, width = image.shape
    patches = F.unfold(image, old, stride=old).transpose(1, 2)
    patches = F.interpolate(
        patches.reshape(-1, channels, old, old),
        size=(new, new),
        mode='bicubic',
        antialias=True,
    )
    patches = patches.reshape(batch, -1, channels * new * new).transpose(1, 2)
    size = (height // old * new, width // old * new)
    return F.fold(patches, size, new, stride=new)


class TestFoldLayerScale:
    @pytest.mark.parametrize('gamma', [1e-5, 1e-2, None])
    @pytest.mark.parametrize(
        ('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.float64, 1e-12)]
    )
    def test_all_tokens_are_equal(
        self, gamma: float | None, dtype: torch.dtype, tolerance: float
    ) -> None:
        state = {k: v.to(dtype) for k, v in small_vit().items()}
        if gamma is not None:
            state |= {
                k: torch.full_like(v, gamma) for k, v in state.items() if 'gamma' in k
            }
        folded = fold_layer_scale(state)
        assert not any('gamma' in key for key in folded)
        image = torch.randn(2, 2, 112, 112, dtype=dtype)
        torch.testing.assert_close(
            vit_tokens(folded, image), vit_tokens(state, image), rtol=0, atol=tolerance
        )
        assert vit_tokens(state, image).abs().max() > 1

    def test_nothing_to_fold(self) -> None:
        state = {'blocks.0.attn.proj.weight': torch.ones(2, 2)}
        assert fold_layer_scale(state) == state

    def test_other_layout(self) -> None:
        state = {'layers.0.ls1.gamma': torch.ones(2)}
        with pytest.raises(ValueError, match=r'layers\.0\.ls1\.gamma but not layers'):
            fold_layer_scale(state)


class TestToPatchSize:
    def test_tokens_of_resized_patches_are_equal(self) -> None:
        kernel = small_vit()['patch_embed.proj.weight']
        new = to_patch_size(small_vit(), 16, 8)['patch_embed.proj.weight']
        patches = torch.randn(64, 2, 14, 14)
        large = F.interpolate(patches, (16, 16), mode='bicubic', antialias=True)
        torch.testing.assert_close(
            F.conv2d(large, new), F.conv2d(patches, kernel), rtol=1e-5, atol=1e-5
        )

    def test_features_of_a_patchwise_resized_image_are_equal(self) -> None:
        state = small_vit()
        image = torch.randn(2, 2, 112, 112)
        large = patchwise(image, 14, 16)
        assert large.shape[-1] == 128
        actual = vit_tokens(to_patch_size(state, 16, 8), large)
        torch.testing.assert_close(actual, vit_tokens(state, image), rtol=0, atol=1e-4)

    def test_native_size_is_the_original_at_seven_eighths(self) -> None:
        # Patch 16 at S pixels is patch 14 at S * 14 / 16, on an image whose patches are
        # brought down by the pseudo-inverse of the upsampling
        state = small_vit()
        image = torch.randn(2, 2, 112, 112)
        unit = torch.eye(196).reshape(196, 1, 14, 14)
        up = F.interpolate(unit, (16, 16), mode='bicubic', antialias=True)
        down = torch.linalg.pinv(up.reshape(196, 256).double()).float()
        patches = F.unfold(image, 16, stride=16).transpose(1, 2)
        patches = (patches.reshape(-1, 256) @ down).reshape(2, 49, 392)
        small = F.fold(patches.transpose(1, 2), (98, 98), 14, stride=14)
        actual = vit_tokens(to_patch_size(state, 16, 7), image)
        expected = vit_tokens(resample_positions(state, 7), small)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)

    def test_smooth_images_at_256_pixels(self) -> None:
        # Features of random networks are alike for all images, hence the subtraction
        torch.manual_seed(0)
        state = randomize(vit_shapes(96, 14, 2, 16, True, depth=3))
        image = F.interpolate(torch.rand(32, 2, 48, 48), (224, 224), mode='bicubic')
        large = F.interpolate(image, (256, 256), mode='bicubic', antialias=True)
        new = to_patch_size(state, 16, 16)
        assert torch.equal(new['pos_embed'], state['pos_embed'])
        features = [vit_tokens(s, x)[:, 0] for s, x in ((state, image), (new, large))]
        first, second = (f - f.mean(0) for f in features)
        assert F.cosine_similarity(first, second).min() > 0.999
        # What zeros around the old kernel would give
        new['patch_embed.proj.weight'] = F.pad(
            state['patch_embed.proj.weight'], (1, 1, 1, 1)
        )
        padded = vit_tokens(new, large)[:, 0]
        assert F.cosine_similarity(first, padded - padded.mean(0)).min() < 0.999

    def test_layout_is_that_of_plain_vit(self) -> None:
        state = randomize(vit_shapes(384, 14, 13, 16, True))
        new = to_patch_size(state)
        model = timm.create_model('vit_small_patch16_224', in_chans=13, num_classes=0)
        model.load_state_dict(new)
        expected = resample_patch_embed(
            state['patch_embed.proj.weight'], [16, 16], 'bicubic', True
        )
        assert torch.equal(new['patch_embed.proj.weight'], expected)

    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [({'patch_size': 0}, 'patch_size must be'), ({'grid': 0}, 'grid must be')],
    )
    def test_bad_argument(self, kwargs: dict[str, int], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            to_patch_size(small_vit(), **kwargs)

    def test_other_architecture(self) -> None:
        with pytest.raises(ValueError, match=r"Vision Transformer.*'conv1.weight'"):
            to_patch_size({'conv1.weight': torch.ones(1, 1, 1, 1)})
        with pytest.raises(ValueError, match=r'grid \* grid, D\), got \(1, 12, 96\)'):
            resample_positions({'pos_embed': torch.ones(1, 12, 96)}, 4)


class TestSwin:
    def test_features_are_equal(self) -> None:
        reference = torchvision_backbone('swin_t')
        model = timm.create_model('swin_tiny_patch4_window7_224', num_classes=0).eval()
        model.load_state_dict(swin_to_timm(reference.state_dict()))
        image = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            actual, expected = model(image), reference(image)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        assert expected.abs().max() > 0.1

    def test_other_architecture(self) -> None:
        with pytest.raises(ValueError, match=r"torchvision's Swin .* got conv1"):
            swin_to_timm({'conv1.weight': torch.ones(1)})


class TestChooseBands:
    @pytest.mark.parametrize('count', [12, 10, 4, 3])
    @pytest.mark.parametrize('key', ['patch_embed.proj.weight', 'conv1.weight'])
    def test_by_name(self, count: int, key: str) -> None:
        state = {key: torch.randn(4, 13, 7, 7), 'b': torch.ones(1)}
        bands = SENTINEL2_SUBSETS[count]
        new = choose_bands(state, SENTINEL2_BANDS, bands)
        for i, band in enumerate(bands):
            expected = state[key][:, SENTINEL2_BANDS.index(band)]
            assert torch.equal(new[key][:, i], expected)
        assert new['b'] is state['b']
        assert state[key].shape[1] == 13

    def test_image_without_the_other_bands(self) -> None:
        weight = torch.randn(4, 13, 7, 7)
        bands = ('B8A', 'B2', 'B12')
        new = choose_bands({'conv1.weight': weight}, SENTINEL2_BANDS, bands)
        image = torch.randn(1, 3, 7, 7)
        whole = torch.zeros(1, 13, 7, 7)
        for i, band in enumerate(bands):
            whole[:, SENTINEL2_BANDS.index(band)] = image[:, i]
        torch.testing.assert_close(
            F.conv2d(image, new['conv1.weight']), F.conv2d(whole, weight)
        )

    @pytest.mark.parametrize(
        ('bands', 'match'),
        [
            (['B2', 'VV'], 'among those of the weights.*but VV is not'),
            (['B2', 'B13'], "unknown name 'B13'"),
            (['B2', 'B02'], 'must be unique'),
            (['R', 'B4'], 'must be unique'),
            ([], 'at least one name'),
        ],
    )
    def test_bad_names(self, bands: list[str], match: str) -> None:
        state = {'conv1.weight': torch.randn(4, 13, 7, 7)}
        with pytest.raises(ValueError, match=match):
            choose_bands(state, SENTINEL2_BANDS, bands)

    def test_colours_are_understood(self) -> None:
        state = {'conv1.weight': torch.randn(4, 13, 7, 7)}
        new = choose_bands(state, SENTINEL2_BANDS, ['red', 'green', 'blue'])
        assert torch.equal(new['conv1.weight'], state['conv1.weight'][:, [3, 2, 1]])

    def test_no_input_layer(self) -> None:
        with pytest.raises(ValueError, match=re.escape('conv1.weight')):
            choose_bands({'a': torch.ones(1)}, SENTINEL2_BANDS, ['B2'])


def test_drop_head() -> None:
    keys = [
        'head.weight',
        'fc.bias',
        'mask_token',
        'fc_norm.weight',
        'blocks.0.mlp.fc1.w',
    ]
    state = {k: torch.ones(1) for k in keys}
    assert [*drop_head(state)] == ['blocks.0.mlp.fc1.w']


def test_fresh() -> None:
    state = {'a': torch.ones(1).expand(3, 4), 'b': torch.ones(2, requires_grad=True)}
    new = fresh(state)
    assert new['a'].is_contiguous()
    assert new['a'].untyped_storage().nbytes() == 48
    new['b'].mul_(2)
    assert state['b'].sum() == 2
