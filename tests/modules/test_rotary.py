# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Vision Transformers with rotary positions, against timm's own forward pass."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from torchgeo_softcon.modules.masking import (
    SiameseMasking,
    encode_visible,
    masked_patches,
    random_visible,
)
from torchgeo_softcon.modules.packing import can_pack, encode_crops

#: One of each kind in timm: what is there in attention, MLP, pooling and rotation.
MODELS: dict[str, dict[str, Any]] = {
    'vit_small_patch16_dinov3': {},
    'vit_small_patch16_dinov3_qkvb': {'global_pool': 'token'},
    'vit_small_plus_patch16_dinov3': {},  # SwiGLU
    'vit_small_patch16_lingbot': {},
    'eva02_tiny_patch14_224': {},
    'eva02_base_patch16_clip_224': {},  # queries, keys and values apart, more norms
    'eva_giant_patch14_224': {},  # learned positions alone
    'eva02_enormous_patch14_clip_224': {},  # norms behind layers
    'vit_small_patch16_rope_224': {},
    'vit_small_patch16_rope_ape_224': {},
    'vit_small_patch16_rope_mixed_224': {},  # each block and head has its own
    'vit_small_patch16_rope_mixed_ape_224': {},
    'vit_medium_patch16_rope_reg1_gap_256': {},  # no class token
    'vit_pe_core_tiny_patch16_384': {},  # attention pools
    'vit_pe_spatial_tiny_patch16_512': {},
    'vit_base_patch16_sapiens2': {'num_kv_heads': (2, 1)},  # fewer keys than queries
}


def make(name: str) -> Any:
    """A small member, whose parameters are all random, in double precision."""
    torch.manual_seed(0)
    small: dict[str, Any] = {'depth': 2, 'embed_dim': 32, 'num_heads': 2, 'in_chans': 3}
    if 'pe_core' in name:
        small['attn_pool_num_heads'] = 2
    vit = timm.create_model(
        name,
        num_classes=0,
        img_size=112,
        dynamic_img_size=True,
        **small,
        **MODELS[name],
    )
    for parameter in vit.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return vit.double().eval()


def images(vit: Any, *cells: int) -> Tensor:
    patch = vit.patch_embed.patch_size[0]
    shape = (2, 3, *(patch * cell for cell in cells))
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).double()


def assert_same(
    vit: Any, actual: Tensor, expected: Tensor, tolerance: float = 1e-12
) -> None:
    """The same features, and the same gradients."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(expected)
    parameters = [*vit.parameters()]
    ours, theirs = (
        torch.autograd.grad(features, parameters, direction, allow_unused=True)
        for features in (actual, expected)
    )
    for mine, other in zip(ours, theirs, strict=True):
        if other is not None:
            assert (mine - other).norm() <= 100 * tolerance * (other.norm() + 1)


@pytest.mark.parametrize('hooked', [False, True], ids=['packed', 'called'])
@pytest.mark.parametrize('name', MODELS)
def test_dropped_patches_are_those_that_attention_masks(
    name: str, hooked: bool
) -> None:
    vit = make(name)
    if hooked:  # so that blocks have to be called
        vit.blocks[0].register_forward_hook(lambda *args: None)
    assert can_pack(vit) == (not hooked and 'enormous' not in name)
    image, prefix = images(vit, 4, 5), vit.num_prefix_tokens
    visible = random_visible(2, 20, 0.5, 'cpu')
    kept = torch.cat([torch.arange(prefix).expand(2, -1), visible + prefix], 1)
    mask = torch.zeros(2, 1, 1, 20 + prefix, dtype=torch.bool)
    mask = mask.scatter(3, kept[:, None, None], True)
    tokens = vit.forward_features(image, attn_mask=mask.expand(-1, -1, 20 + prefix, -1))
    tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
    expected = vit.forward_head(tokens, pre_logits=True)
    assert_same(vit, encode_visible(vit, image, visible), expected)


@pytest.mark.parametrize('name', MODELS)
def test_mask_token_replaces_patches(name: str) -> None:
    vit = make(name)
    image = images(vit, 4, 5)
    masking = SiameseMasking('token', 0.5, embed_dim=32).double()
    torch.manual_seed(1)
    masked = masked_patches(random_visible(2, 20, 0.5, 'cpu'), 20).view(2, 4, 5, 1)
    handle = vit.patch_embed.register_forward_hook(
        lambda module, args, out: torch.where(masked, masking.mask_token, out)
    )
    expected = vit(image)
    handle.remove()
    torch.manual_seed(1)
    assert_same(vit, masking(vit, image), expected)


@pytest.mark.parametrize('name', MODELS)
def test_packed_crops_are_one_forward_pass_per_crop(name: str) -> None:
    vit = make(name)
    crops = [images(vit, *cells) for cells in ((4, 4), (4, 4), (3, 3), (2, 2), (1, 1))]
    expected = torch.stack([vit(crop) for crop in crops])
    # timm resamples learned positions, and learned rotations, in single precision
    learned = vit.pos_embed is not None or 'mixed' in name
    tolerance = 1e-6 if learned else 1e-12
    assert_same(vit, encode_crops(vit, crops), expected, tolerance)


def test_activation_checkpointing() -> None:
    vit = make('vit_small_patch16_rope_mixed_224')
    crops = [images(vit, 4, 4), images(vit, 2, 2)]
    expected = encode_crops(vit, crops)
    vit.set_grad_checkpointing()
    assert_same(vit, encode_crops(vit, crops), expected, 1e-9)


def test_rotations_of_another_device_or_precision_are_made_anew() -> None:
    vit = make('vit_small_patch16_dinov3')
    image = images(vit, 3, 3)
    with torch.inference_mode():
        encode_crops(vit, [image])
    encode_crops(vit, [image])[0].sum().backward()  # not of tensors without gradients
    vit.float()
    assert encode_crops(vit, [image.float()]).dtype == torch.float32
