# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Features for linear evaluation."""

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require
from .loading import has_class_token


def last_block_features(
    encoder: nn.Module, image: Tensor, blocks: int = 4, average_patches: bool = False
) -> Tensor:
    """Return the class tokens of the last blocks of a Vision Transformer, side by side.

    DINO, and DINO-MC and SoftCon after it, fit linear classifiers to them: of ViT-Small,
    to those of the last four blocks; of ViT-Base, to that of the last block with the mean
    of its patch tokens. All tokens are normalized by the last layer norm.
    https://github.com/facebookresearch/dino/blob/main/eval_linear.py

    Args:
        encoder: A Vision Transformer of timm with a class token.
        image: Images of shape (B, C, H, W).
        blocks: Number of blocks, the last one comes last.
        average_patches: Whether to append the mean patch token of the last block.

    Returns:
        Features of shape (B, blocks * F), or (B, (blocks + 1) * F).
    """
    require(
        has_class_token(encoder),
        'blocks are for Vision Transformers with a class token, got '
        f'{type(encoder).__name__}. Leave them out for other encoders',
    )
    vit: Any = encoder
    number = len(vit.blocks)
    require(
        1 <= blocks <= number,
        f'blocks must be from 1 to {number}, those of the encoder, got {blocks}',
    )
    layers = vit.forward_intermediates(
        image,
        blocks,
        return_prefix_tokens=True,
        norm=True,
        output_fmt='NLC',
        intermediates_only=True,
    )  # per block: patch tokens (B, N, F), class token and registers (B, P, F)
    tokens = [prefix[:, 0] for _, prefix in layers]
    if average_patches:
        tokens.append(layers[-1][0].mean(1))
    return torch.cat(tokens, 1)
