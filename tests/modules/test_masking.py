# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.modules.masking import (
    SiameseMasking,
    encode_visible,
    mask_pixels,
    masked_patches,
    random_visible,
)


def make_vit(name: str = 'test_vit', **kwargs: Any) -> Any:
    torch.manual_seed(0)
    vit = timm.create_model(
        name, num_classes=0, in_chans=4, depth=2, dynamic_img_size=True, **kwargs
    ).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return vit


class TestRandomVisible:
    @pytest.mark.parametrize(
        ('ratio', 'keep'), [(0.0, 256), (0.5, 128), (0.6, 102), (0.7, 76), (0.75, 64)]
    )
    def test_count_is_the_same_for_all(self, ratio: float, keep: int) -> None:
        visible = random_visible(8, 256, ratio, 'cpu')
        assert visible.shape == (8, keep)
        assert all(len(set(row.tolist())) == keep for row in visible)
        assert (visible.diff(dim=1) > 0).all()

    def test_uniform_and_per_sample(self) -> None:
        torch.manual_seed(0)
        visible = random_visible(2000, 16, 0.75, 'cpu')
        assert not torch.equal(visible[0], visible[1])
        share = torch.bincount(visible.flatten(), minlength=16) / 2000
        torch.testing.assert_close(share, torch.full((16,), 0.25), rtol=0, atol=0.04)

    def test_something_stays_visible(self) -> None:
        assert random_visible(2, 4, 0.99, 'cpu').shape == (2, 1)


class TestEncodeVisible:
    @pytest.mark.parametrize(
        ('name', 'kwargs'),
        [
            ('test_vit', {}),
            ('test_vit', {'reg_tokens': 2}),
            ('test_vit', {'no_embed_class': True, 'pre_norm': True}),
            (
                'test_vit',
                {'class_token': False, 'global_pool': 'avg', 'fc_norm': False},
            ),
            ('vit_small_patch14_dinov2', {'img_size': 224}),
        ],
    )
    @pytest.mark.parametrize('cells', [(4, 4), (3, 5)])
    def test_all_visible_is_the_plain_forward(
        self, name: str, kwargs: dict[str, Any], cells: tuple[int, int]
    ) -> None:
        vit = make_vit(name, **kwargs)
        patch = vit.patch_embed.patch_size[0]
        image = torch.randn(2, 4, cells[0] * patch, cells[1] * patch)
        visible = torch.arange(cells[0] * cells[1]).expand(2, -1)
        torch.testing.assert_close(
            encode_visible(vit, image, visible), vit(image), rtol=1e-4, atol=2e-5
        )

    def test_equals_dropping_tokens_inside(self) -> None:
        vit = make_vit()
        image = torch.randn(3, 4, 64, 64)
        visible = random_visible(3, 16, 0.5, 'cpu')
        tokens = vit._pos_embed(vit.patch_embed(image))
        kept = torch.stack(
            [torch.cat([t[:1], t[1:][i]]) for t, i in zip(tokens, visible, strict=True)]
        )
        expected = vit.norm(vit.blocks(kept))[:, 0]
        torch.testing.assert_close(
            encode_visible(vit, image, visible), expected, rtol=1e-4, atol=2e-5
        )

    def test_masked_patches_are_not_looked_at(self) -> None:
        vit = make_vit()
        image = torch.randn(2, 4, 64, 64)
        visible = random_visible(2, 16, 0.5, 'cpu')
        masked = masked_patches(visible, 16)
        spoilt = image + 1e6 * (1 - mask_pixels(torch.ones_like(image), masked, 16))
        assert torch.equal(
            encode_visible(vit, image, visible), encode_visible(vit, spoilt, visible)
        )

    def test_gradients_reach_what_the_plain_forward_reaches(self) -> None:
        vit = make_vit()
        image = torch.randn(2, 4, 64, 64)
        vit(image).sum().backward()
        expected = {n: p.grad for n, p in vit.named_parameters()}
        vit.zero_grad(set_to_none=True)
        visible = torch.arange(16).expand(2, -1)
        encode_visible(vit, image, visible).sum().backward()
        for name, parameter in vit.named_parameters():
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-3, atol=1e-4
            )

    def test_activation_checkpointing(self) -> None:
        vit = make_vit()
        image = torch.randn(2, 4, 64, 64)
        visible = random_visible(2, 16, 0.5, 'cpu')
        expected = encode_visible(vit, image, visible)
        vit.set_grad_checkpointing()
        calls: list[Any] = []
        vit.blocks[0].norm1.register_forward_pre_hook(lambda *args: calls.append(args))
        actual = encode_visible(vit, image, visible)
        actual.sum().backward()
        assert len(calls) == 2  # again during the backward pass
        torch.testing.assert_close(actual, expected)


class TestMaskPixels:
    @pytest.mark.parametrize('size', [(32, 32), (30, 45)])
    def test_zeroes_whole_patches_and_nothing_else(self, size: tuple[int, int]) -> None:
        image = torch.rand(3, 2, *size) + 1
        rows, columns = -(-size[0] // 16), -(-size[1] // 16)
        visible = random_visible(3, rows * columns, 0.5, 'cpu')
        out = mask_pixels(image, masked_patches(visible, rows * columns), 16)
        for b in range(3):
            for y in range(rows):
                for x in range(columns):
                    rows_, columns_ = (slice(16 * i, 16 * i + 16) for i in (y, x))
                    area = (b, slice(None), rows_, columns_)
                    if y * columns + x in visible[b]:
                        assert torch.equal(out[area], image[area])
                    else:
                        assert not out[area].any()


class Recorder(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        self.image = image
        return image.mean((2, 3))


class TestSiameseMasking:
    @pytest.mark.parametrize('mode', ['drop', 'token', 'pixel'])
    def test_ratio_zero_is_the_plain_forward(self, mode: Any) -> None:
        vit = make_vit()
        image = torch.randn(2, 4, 64, 64)
        masking = SiameseMasking(mode, 0, embed_dim=64)
        torch.testing.assert_close(masking(vit, image), vit(image))
        assert not list(masking.parameters())

    def test_pixel_masks_the_share_of_any_encoder(self) -> None:
        encoder = Recorder()
        SiameseMasking('pixel', 0.75, patch_size=8)(encoder, torch.ones(2, 3, 64, 64))
        assert encoder.image.mean() == 0.25
        assert torch.equal(encoder.image[:, :1].expand(-1, 3, -1, -1), encoder.image)

    def test_drop_sees_a_part_only(self) -> None:
        vit = make_vit()
        seen = []
        vit.blocks[0].norm1.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        SiameseMasking('drop', 0.75)(vit, torch.randn(2, 4, 64, 64))
        assert seen == [(2 * (1 + 4), 64)]

    def test_token_replaces_before_the_positions(self) -> None:
        vit = make_vit()
        image = torch.randn(2, 4, 64, 64)
        masking = SiameseMasking('token', 0.5, embed_dim=64)
        torch.manual_seed(1)
        actual = masking(vit, image)
        torch.manual_seed(1)
        visible = random_visible(2, 16, 0.5, 'cpu')
        tokens = vit.patch_embed(image)
        for b in range(2):
            for i in set(range(16)) - set(visible[b].tolist()):
                tokens[b, i // 4, i % 4] = masking.mask_token[0, 0]
        expected = vit.norm(vit.blocks(vit._pos_embed(tokens)))[:, 0]
        torch.testing.assert_close(actual, expected)
        actual.sum().backward()
        assert masking.mask_token.grad is not None

    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'mode': 'black'}, "mode must be .* got 'black'"),
            ({'ratio': 1.0}, r'ratio must be in \[0, 1\), got 1.0'),
            ({'patch_size': 0}, 'patch_size must be at least 1, got 0'),
            ({'mode': 'token'}, "embed_dim must be given for mode='token'"),
        ],
    )
    def test_bad_option(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            SiameseMasking(**kwargs)

    def test_works_on_encoders_as_tasks_make_them(self) -> None:
        vit = create_encoder('test_vit', 2)
        features = SiameseMasking('drop', 0.5)(vit, torch.randn(2, 2, 96, 96))
        assert features.shape == (2, 64)
