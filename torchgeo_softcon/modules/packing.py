# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoding of crops of several sizes at once, their tokens packed into one matrix."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.layers.attention import Attention
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from .packed_blocks import (
    BACKENDS,
    Group,
    Layout,
    can_use_varlen,
    concatenate,
    draw_drop_paths,
    make_layout,
    run_blocks,
)

CropBatching: TypeAlias = Literal['auto', 'packed', 'by_size']


def can_pack(encoder: nn.Module) -> bool:
    """Tell whether :func:`encode_crops` packs the tokens of all sizes for an encoder.

    Returns:
        True for Vision Transformers of timm's standard blocks that take any image size
        and pool a token or an average: ViT, DeiT, DINO and DINOv2. False if the encoder
        or a block was compiled or has hooks: these are for calls of the modules.
    """
    return (
        type(encoder) is VisionTransformer
        and not any(map(_must_be_called, (encoder, *encoder.blocks)))
        and type(encoder.patch_embed) is PatchEmbed
        and encoder.dynamic_img_size
        and encoder.pos_embed is not None
        and encoder.global_pool in ('token', 'avg')
        and encoder.attn_pool is None
        and isinstance(encoder.patch_drop, nn.Identity)
        and all(
            type(block) is Block
            and type(block.attn) is Attention
            and type(block.attn.qkv) is nn.Linear
            and getattr(block.attn, 'gate', None) is None
            and block.attn.attn_drop.p == 0
            for block in encoder.blocks
        )
    )


def _must_be_called(module: nn.Module) -> bool:
    """Tell whether a module does more than its ``forward`` when it is called."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or getattr(module, '_compiled_call_impl', None) is not None


def encode_crops(
    encoder: nn.Module,
    crops: Sequence[Tensor],
    compiled: bool = False,
    batching: CropBatching = 'auto',
) -> Tensor:
    """Encode crops of several sizes, equal to one forward pass per crop.

    With ``batching='auto'``, Vision Transformers, see :func:`can_pack`, get the tokens of
    all crops as one matrix. Layers that treat every token alike, which is all but
    attention, then run once instead of once per size. The last block computes only the
    class token if nothing else is read. Attention runs without padding or masks: in half
    precision on a GPU that has it (see
    :func:`~torchgeo_softcon.modules.packed_blocks.can_use_varlen`) once for all crops with
    ``torch.nn.attention.varlen``, elsewhere once per size.

    Other encoders get one batch per size: batch norm normalises the crops of one size
    together, as in DINO.

    Crops that patches do not cover lose their last rows and columns, as in DINO.

    Args:
        encoder: A timm model that pools its features.
        crops: S crops of each of B images, each of shape (B, C, H, W) with its own size.
        compiled: Whether to run the packed forward pass with ``torch.compile``, as one
            graph. Other encoders are run as they are.
        batching: ``'auto'`` as above, which was the fastest wherever it was measured,
            ``'packed'`` the same with attention once per size everywhere, ``'by_size'``
            one batch per size for all encoders.

    Returns:
        Features of shape (S, B, F), in the order of the crops.

    Raises:
        ValueError: If the crops differ in batch size, one is smaller than a patch, or an
            encoder that cannot be packed was asked to.
    """
    packed = batching != 'by_size' and can_pack(encoder)
    if batching == 'packed' and not packed:
        raise ValueError(
            "batching='packed' needs a Vision Transformer of timm's standard blocks that "
            f"takes any image size, got {type(encoder).__name__}. Set it to 'auto'"
        )
    batches = {len(crop) for crop in crops}
    if len(batches) != 1:
        raise ValueError(
            f'crops must be S >= 1 tensors of one batch size, got {[*map(len, crops)]}'
        )

    patch_embed = getattr(encoder, 'patch_embed', None)
    if isinstance(patch_embed, PatchEmbed):
        crops = [_cover(crop, patch_embed.patch_size) for crop in crops]
    sizes = groupby(crops, key=lambda crop: crop.shape[-2:])
    same_size = [concatenate(list(group)) for _, group in sizes]
    if packed:
        vit = cast(VisionTransformer, encoder)
        rows, columns = vit.patch_embed.patch_size
        grids = tuple((i.shape[2] // rows, i.shape[3] // columns) for i in same_size)
        device = same_size[0].device
        layout = make_layout(
            tuple(
                Group(len(images), math.prod(grid) + vit.num_prefix_tokens)
                for images, grid in zip(same_size, grids, strict=True)
            ),
            device,
            # Of one length, there is nothing to win
            batching == 'auto' and len(grids) > 1 and can_use_varlen(vit, device),
        )
        matrix = _position_matrices(vit.patch_embed.grid_size, grids, device)
        run = _compiled() if compiled else _encode_packed
        drop_paths = draw_drop_paths(vit, len(layout.first))
        with sdpa_kernel(BACKENDS) if layout.varlen else nullcontext():
            features = run(vit, same_size, layout, matrix, drop_paths)
    else:
        features = concatenate([encoder(images) for images in same_size])
    return features.unflatten(0, (len(crops), -1))


def encode_tokens(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """Encode tokens with positions (B, N, F), to pooled features (B, F).

    Runs the blocks and the head of a Vision Transformer. The last block computes only the
    class token if nothing else is read.
    """
    tokens = vit.norm_pre(tokens)
    if can_pack(vit):
        layout = make_layout((Group(*tokens.shape[:2]),), tokens.device, False)
        drop_paths = draw_drop_paths(vit, len(tokens))
        return run_blocks(vit, tokens.flatten(0, 1), layout, drop_paths)
    if vit.grad_checkpointing and torch.is_grad_enabled():
        tokens = checkpoint_seq(vit.blocks, tokens)
    else:
        tokens = vit.blocks(tokens)
    return vit.forward_head(vit.norm(tokens), pre_logits=True)


def _cover(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut off what whole patches do not cover, as a strided convolution does."""
    height, width = image.shape[-2:]
    if height < patch[0] or width < patch[1]:
        raise ValueError(
            f'crops must have at least the {patch[0]} x {patch[1]} pixels of a patch, got '
            f'{height} x {width}'
        )
    return image[..., : height - height % patch[0], : width - width % patch[1]]


def position_matrix(
    old: tuple[int, int], new: tuple[int, int], device: torch.device
) -> Tensor:
    """Make the matrix (new, old) that resamples position embeddings between grids.

    Resampling is linear, so it is what timm's function makes of unit vectors. A matrix
    serves all sizes with one product, and its backward pass is deterministic on a GPU,
    where that of bicubic interpolation is not.
    """
    unit = torch.eye(old[0] * old[1], dtype=torch.float32, device=device)[None]
    return resample_abs_pos_embed(
        unit, new_size=list(new), old_size=list(old), num_prefix_tokens=0
    )[0]


@functools.lru_cache(maxsize=32)
def _position_matrices(
    old: tuple[int, int], grids: tuple[tuple[int, int], ...], device: torch.device
) -> Tensor:
    """Stack matrices of :func:`position_matrix`, one for each grid, made once."""
    # A first call may come from prediction, and the second from training
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        return torch.cat([position_matrix(old, grid, device) for grid in grids])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Compile the packed forward pass, one graph for each layout, up to PyTorch's limit."""
    return torch.compile(_encode_packed, dynamic=False)


def split_patches(image: Tensor, size: Sequence[int]) -> Tensor:
    """Look at images (B, C, H, W) as patches, shape (B, rows, columns, C, h, w)."""
    patches = image.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))
    return patches.permute(0, 2, 4, 1, 3, 5)


def embed_patches(vit: VisionTransformer, patches: Tensor) -> Tensor:
    """Embed flat patches (..., C * h * w) as a linear layer, equal to the convolution."""
    projection = vit.patch_embed.proj
    tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)
    return cast(Tensor, vit.patch_embed.norm(tokens))


def _embed(
    vit: VisionTransformer, images: Sequence[Tensor], layout: Layout, matrix: Tensor
) -> Tensor:
    """Return tokens with positions, shape (T, F), one batch of images after the other."""
    size = vit.patch_embed.patch_size
    patches = [split_patches(image, size).flatten(0, 2).flatten(1) for image in images]
    tokens = embed_patches(vit, concatenate(patches))

    prefix: list[Tensor] = [p for p in (vit.cls_token, vit.reg_token) if p is not None]
    skip = 0 if vit.no_embed_class else vit.num_prefix_tokens
    pos_embed = cast(Tensor, vit.pos_embed)
    with torch.autocast(tokens.device.type, enabled=False):
        positions = matrix.to(pos_embed) @ pos_embed[0, skip:]
    counts = [group.length - vit.num_prefix_tokens for group in layout.groups]
    numbers = [group.number for group in layout.groups]
    if prefix:
        first = torch.cat(prefix, 1)  # (1, P, F)
        if skip:
            first = first + pos_embed[:, :skip]
    # Under autocast, patches are half as wide, and tokens float32 from here on, as in timm
    out = []
    for number, same_size, position in zip(
        numbers,
        tokens.split([n * count for n, count in zip(numbers, counts, strict=True)]),
        positions.split(counts),
        strict=True,
    ):
        sequences = same_size.unflatten(0, (number, -1)) + position
        if prefix:
            sequences = torch.cat([first.expand(number, -1, -1), sequences], 1)
        out.append(sequences.flatten(0, 1))
    return vit.norm_pre(vit.pos_drop(concatenate(out)))


def _encode_packed(
    vit: VisionTransformer,
    images: Sequence[Tensor],
    layout: Layout,
    matrix: Tensor,
    drop_paths: Tensor | None,
) -> Tensor:
    """Return features (N, F) of batches of images of different sizes."""
    return run_blocks(vit, _embed(vit, images, layout, matrix), layout, drop_paths)
