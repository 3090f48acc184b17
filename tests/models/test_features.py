# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from typing import Any

import pytest
import torch

from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.models.features import last_block_features


@pytest.mark.parametrize('blocks', [1, 4])
@pytest.mark.parametrize('average', [False, True])
def test_blocks_one_by_one(blocks: int, average: bool) -> None:
    """DINO's way: every block in turn, the last norm after each of the last ones."""
    vit: Any = create_encoder('test_vit', 4).eval()
    image = torch.rand(2, 4, 48, 48)
    tokens = vit._pos_embed(vit.patch_embed(image))
    outputs = []
    for block in vit.blocks:
        tokens = block(tokens)
        outputs.append(vit.norm(tokens))
    parts = [output[:, 0] for output in outputs[-blocks:]]
    if average:
        parts.append(outputs[-1][:, 1:].mean(1))
    actual = last_block_features(vit, image, blocks, average)
    torch.testing.assert_close(actual, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)


def test_last_block_is_what_the_encoder_gives() -> None:
    vit = create_encoder('test_vit', 4).eval()
    image = torch.rand(2, 4, 32, 32)
    torch.testing.assert_close(last_block_features(vit, image, 1), vit(image))


def test_bad_input() -> None:
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match='with a class token, got ResNet'):
        last_block_features(create_encoder('resnet18'), image)
    for blocks in (0, 7):
        with pytest.raises(ValueError, match=f'from 1 to 6, .* got {blocks}'):
            last_block_features(create_encoder('test_vit'), image, blocks)
