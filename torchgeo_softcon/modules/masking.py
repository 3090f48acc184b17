# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Siamese masking: the trainable branch sees only a part of its view."""

from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_counts, require
from .packed_blocks import Vit
from .packing import (
    embed_patches,
    encode_crops,
    encode_tokens,
    rotation_table,
    split_patches,
)

MaskMode: TypeAlias = Literal['drop', 'token', 'pixel']


def random_visible(
    batch_size: int, num_patches: int, ratio: float, device: torch.device | str
) -> Tensor:
    """Draw the patches that stay visible, uniformly and per sample.

    Returns:
        Indices of max(1, int(L * (1 - ratio))) patches in ascending order, shape (B, N).
    """
    keep = max(1, int(num_patches * (1 - ratio)))
    order = torch.rand(batch_size, num_patches, device=device).argsort(dim=1)
    return order[:, :keep].sort(dim=1).values


def masked_patches(visible: Tensor, num_patches: int) -> Tensor:
    """Turn indices of visible patches (B, N) into a mask (B, L), True where masked."""
    mask = visible.new_ones(len(visible), num_patches, dtype=torch.bool)
    return mask.scatter_(1, visible, False)


def mask_pixels(image: Tensor, masked: Tensor, patch_size: int) -> Tensor:
    """Set whole patches of images (B, C, H, W) to zero.

    *masked* has True for these, row by row, shape (B, L) with
    L = ceil(H / patch_size) * ceil(W / patch_size).
    """
    height, width = image.shape[-2:]
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    grid = masked.view(-1, 1, rows, columns)
    grid = grid.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return image.masked_fill(grid[..., :height, :width], 0)


def _add_positions(vit: Vit, tokens: Tensor) -> Tensor:
    """Add class token, registers and learned positions to patches (B, H, W, F)."""
    added = vit._pos_embed(tokens)
    # With rotary positions, which do not know of the class token, beside them
    return added[0] if isinstance(added, tuple) else added


def encode_visible(vit: Vit, image: Tensor, visible: Tensor) -> Tensor:
    """Encode the visible patches (B, N) of images; the others are never computed.

    *vit* is built with ``dynamic_img_size=True``, images (B, C, H, W) have whole patches.
    Returns pooled features (B, F), those of the whole image if all patches are visible.
    """
    patches = split_patches(image, vit.patch_embed.patch_size)
    grid, shape = (patches.shape[1], patches.shape[2]), patches.shape[3:]
    index = visible[..., None, None, None].expand(-1, -1, *shape)
    patches = patches.flatten(1, 2).gather(1, index).flatten(2)  # (B, N, C * h * w)
    embedded = embed_patches(vit, patches)  # (B, N, F)

    # The positions (and the class token with its own) are what an image of zeros gets
    count = vit.num_prefix_tokens
    positions = _add_positions(vit, embedded.new_zeros(1, *grid, vit.embed_dim))
    prefix, positions = positions.tensor_split([count], dim=1)
    embedded = embedded + positions[0, visible]
    tokens = torch.cat([prefix.expand(len(embedded), -1, -1), embedded], dim=1)
    rotation = rotation_table(vit, grid)
    if rotation is not None:
        first = torch.arange(count, device=visible.device).expand(len(visible), -1)
        rotation = rotation[:, torch.cat([first, visible + count], 1)]
    return encode_tokens(vit, tokens, rotation)


class SiameseMasking(nn.Module):
    """Encoding of images of which a random share of patches is masked.

    The figure in the authors' repository shows black patches on the trainable branch
    only. That tokens are dropped is what others infer; the mask ratio is not known.
    """

    def __init__(
        self,
        mode: MaskMode = 'drop',
        ratio: float = 0.5,
        patch_size: int = 16,
        embed_dim: int | None = None,
    ) -> None:
        """Initialize a new SiameseMasking instance.

        Args:
            mode: ``'drop'`` never computes the masked tokens and ``'token'`` replaces
                them by a learned token before the positions are added (as DINOv2 does),
                both for Vision Transformers. ``'pixel'`` sets patches of the image to
                zero, for any encoder.
            ratio: Share of patches to mask. With 0, images are encoded as they are.
            patch_size: Side of a masked patch in pixels. Only used by ``'pixel'``.
            embed_dim: Width of the tokens. Only used, and needed, by ``'token'``.

        Raises:
            ValueError: If an option is out of range or missing.
        """
        check_choice('mode', mode, get_args(MaskMode))
        require(0 <= ratio < 1, f'ratio must be in [0, 1), got {ratio}')
        check_counts(patch_size=patch_size)
        needed = mode == 'token' and embed_dim is None
        require(not needed, "embed_dim must be given for mode='token'")

        super().__init__()
        self.mode = mode
        self.ratio = ratio
        self.patch_size = patch_size
        if mode == 'token' and ratio > 0:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, cast(int, embed_dim)))
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, encoder: nn.Module, image: Tensor) -> Tensor:
        """Encode randomly masked images to features of shape (B, F)."""
        if self.ratio == 0:
            return encode_crops(encoder, [image])[0]

        patch_size = self.patch_size
        if self.mode != 'pixel':
            patch_size = cast(Vit, encoder).patch_embed.patch_size[0]
        rows, columns = (-(-size // patch_size) for size in image.shape[-2:])
        visible = random_visible(len(image), rows * columns, self.ratio, image.device)
        if self.mode == 'drop':
            return encode_visible(cast(Vit, encoder), image, visible)

        masked = masked_patches(visible, rows * columns)
        if self.mode == 'pixel':
            return encode_crops(encoder, [mask_pixels(image, masked, patch_size)])[0]

        vit = cast(Vit, encoder)
        tokens = vit.patch_embed(image)  # (B, H, W, F)
        masked = masked.view(*tokens.shape[:-1], 1)
        tokens = torch.where(masked, self.mask_token.to(tokens.dtype), tokens)
        rotation = rotation_table(vit, (rows, columns))
        return encode_tokens(vit, _add_positions(vit, tokens), rotation)
