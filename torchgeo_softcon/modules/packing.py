# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoding of crops of several sizes at once, their tokens packed into one matrix."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .._checks import require
from .packed_blocks import (
    BACKENDS,
    Group,
    Layout,
    Rotations,
    Vit,
    can_use_varlen,
    concatenate,
    draw_drop_paths,
    make_layout,
    run_blocks,
)

CropBatching: TypeAlias = Literal['auto', 'packed', 'by_size']
PositionRule: TypeAlias = Literal['timm', 'dino']


def can_pack(encoder: nn.Module) -> bool:
    """Tell whether :func:`encode_crops` packs the tokens of all sizes for an encoder.

    Returns:
        True for Vision Transformers of timm's standard blocks that take any image size:
        ViT, DeiT, DINO and DINOv2, and those with rotary positions such as DINOv3 and
        EVA-02. False if one was compiled or has hooks, which are for calls of modules.
    """
    return (
        (type(encoder) is VisionTransformer or type(encoder) is Eva)
        and not any(map(_must_be_called, (encoder, *encoder.blocks)))
        and type(encoder.patch_embed) is PatchEmbed
        and encoder.dynamic_img_size
        and isinstance(encoder.patch_drop, nn.Identity | None)
        and all(
            type(block) in (Block, EvaBlock)
            and type(block.attn) in (Attention, EvaAttention, AttentionRope)
            and (block.attn.qkv is None or type(block.attn.qkv) is nn.Linear)
            and getattr(block.attn, 'gate', None) is None
            and block.attn.attn_drop.p == 0
            for block in cast(Any, encoder.blocks)
        )
    )


def _must_be_called(module: nn.Module) -> bool:
    """Tell whether a module does more than its ``forward`` when it is called."""
    forward = module._forward_hooks, module._forward_pre_hooks
    backward = module._backward_hooks, module._backward_pre_hooks
    return any((*forward, *backward)) or module._compiled_call_impl is not None


def encode_crops(
    encoder: nn.Module,
    crops: Sequence[Tensor],
    compiled: bool = False,
    batching: CropBatching = 'auto',
    position_rule: PositionRule = 'timm',
) -> Tensor:
    """Encode crops of several sizes, equal to one forward pass per crop.

    Vision Transformers, see :func:`can_pack`, get the tokens of all crops as one matrix:
    all layers but attention run once instead of once per size, and the last block
    computes only the class token if nothing else is read. Attention runs without padding
    or masks: once for all crops where :func:`.can_use_varlen` allows it, elsewhere once per
    size.

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
        position_rule: How learned positions are resampled for crops of another size, see
            :func:`position_matrix`. ``'dino'`` needs packed tokens.

    Returns:
        Features of shape (S, B, F), in the order of the crops.

    Raises:
        ValueError: If the crops differ in batch size, one is smaller than a patch, or an
            encoder that cannot be packed was asked to.
    """
    packed, name = batching != 'by_size' and can_pack(encoder), type(encoder).__name__
    require(
        packed or position_rule != 'dino',
        "position_rule='dino' needs a Vision Transformer whose crops are packed, got "
        f"{name} and batching={batching!r}. Use 'timm'",
    )
    require(
        packed or batching != 'packed',
        "batching='packed' needs a Vision Transformer of timm's standard blocks that "
        f"takes any image size, got {name}. Set it to 'auto'",
    )
    require(
        len({*map(len, crops)}) == 1,
        f'crops must be S >= 1 tensors of one batch size, got {[*map(len, crops)]}',
    )

    patch_embed = getattr(encoder, 'patch_embed', None)
    if isinstance(patch_embed, PatchEmbed):
        crops = [_cover(crop, patch_embed.patch_size) for crop in crops]
    sizes = groupby(crops, key=lambda crop: crop.shape[-2:])
    same_size = [concatenate(list(group)) for _, group in sizes]
    if packed:
        vit = cast(Vit, encoder)
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
        old = vit.patch_embed.grid_size
        matrix = _position_matrices(old, grids, device, position_rule)
        run = _compiled() if compiled else _encode_packed
        drop_paths = draw_drop_paths(vit, len(layout.first))
        tables = [rotation_table(vit, grid) for grid in grids]
        rotations = None if tables[0] is None else cast(list[Tensor], tables)
        with sdpa_kernel(BACKENDS) if layout.varlen else nullcontext():
            features = run(vit, same_size, layout, matrix, drop_paths, rotations)
    else:
        features = concatenate([encoder(images) for images in same_size])
    return features.unflatten(0, (len(crops), -1))


def rotation_table(vit: Vit, grid: tuple[int, int]) -> Tensor | None:
    """Return the rotary positions of all tokens of an image, None of a model without any.

    Sines and cosines of shape (1, N, 1, 2 * d), or (blocks, N, heads, 2 * d) if each block
    has its own. The class token and registers are not rotated.
    """
    rope = getattr(vit, 'rope', None)
    if rope is None:
        return None
    weight = vit.patch_embed.proj.weight
    if getattr(rope, 'aug_active', False) or any(True for _ in rope.parameters()):
        return _rotation_table(rope, grid, vit.num_prefix_tokens)  # drawn, or learned
    key = grid, vit.num_prefix_tokens, weight.device, weight.dtype
    return _fixed_rotations(rope, *key)


def _rotation_table(rope: nn.Module, grid: tuple[int, int], prefix: int) -> Tensor:
    """Make the table of :func:`rotation_table`."""
    table: Tensor = cast(Any, rope).get_embed(shape=list(grid))
    # (L, 2 * d), or (blocks, heads, L, 2 * d)
    table = table[None, :, None] if table.ndim == 2 else table.transpose(1, 2)
    still = table.new_zeros(len(table), prefix, *table.shape[2:])
    still[..., still.shape[-1] // 2 :] = 1
    return torch.cat([still, table], 1)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _fixed_rotations(
    rope: nn.Module,
    grid: tuple[int, int],
    prefix: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Make a table that changes only with the device and the dtype, once."""
    with torch.autocast(device.type, enabled=False):
        return _rotation_table(rope, grid, prefix)


def encode_tokens(vit: Vit, tokens: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Run blocks and head on tokens with positions (B, N, F), to pooled features (B, F).

    *rotation* are their rotary positions, see :func:`rotation_table`, of shape
    (1 or blocks, N, ...) or (1 or blocks, B, N, ...).
    """
    tokens = vit.norm_pre(tokens)
    if can_pack(vit):
        layout = make_layout((Group(*tokens.shape[:2]),), tokens.device, False)
        drop_paths = draw_drop_paths(vit, len(tokens))
        rotations = None if rotation is None else [rotation]
        return run_blocks(vit, tokens.flatten(0, 1), layout, drop_paths, rotations)
    # timm has heads before tokens, and none of the class token and registers
    ropes: Sequence[Tensor | None] = [None]
    if rotation is not None:
        ropes = rotation[..., vit.num_prefix_tokens :, :, :].transpose(-3, -2).unbind()
    for i, block in enumerate(vit.blocks):
        rope = ropes[i % len(ropes)]
        options: dict[str, Any] = {} if rope is None else {'rope': rope}
        if vit.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, use_reentrant=False, **options)
        else:
            tokens = block(tokens, **options)
    return vit.forward_head(vit.norm(tokens), pre_logits=True)


def _cover(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut off what whole patches do not cover, as a strided convolution does."""
    height, width = image.shape[-2:]
    require(
        height >= patch[0] and width >= patch[1],
        f'crops must have at least the {patch[0]} x {patch[1]} pixels of a patch, got '
        f'{height} x {width}',
    )
    return image[..., : height - height % patch[0], : width - width % patch[1]]


def position_matrix(
    old: tuple[int, int],
    new: tuple[int, int],
    device: torch.device,
    rule: PositionRule = 'timm',
) -> Tensor:
    """Make the matrix (new, old) that resamples position embeddings between grids.

    One product serves all sizes, and its backward pass is deterministic on a GPU, where
    that of bicubic interpolation is not.

    The rule ``'timm'`` is timm's function, bicubic with antialiasing. ``'dino'`` is that of
    DINO and DINO-MC: bicubic without, and with 0.1 cells more than there are, so that all
    positions are a little shifted. See ``interpolate_pos_encoding`` in
    https://github.com/facebookresearch/dino/blob/main/vision_transformer.py
    """
    unit = torch.eye(old[0] * old[1], dtype=torch.float32, device=device)
    if rule == 'timm' or old == new:
        return resample_abs_pos_embed(
            unit[None], new_size=list(new), old_size=list(old), num_prefix_tokens=0
        )[0]
    factors = [(size + 0.1) / before for size, before in zip(new, old, strict=True)]
    grid = unit.unflatten(1, (1, *old))
    return F.interpolate(grid, scale_factor=factors, mode='bicubic').flatten(1).T


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _position_matrices(
    old: tuple[int, int],
    grids: tuple[tuple[int, int], ...],
    device: torch.device,
    rule: PositionRule,
) -> Tensor:
    """Stack matrices of :func:`position_matrix`, one for each grid, made once."""
    with torch.autocast(device.type, enabled=False):
        return torch.cat([position_matrix(old, grid, device, rule) for grid in grids])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Compile the packed forward pass, one graph for each layout, up to PyTorch's limit."""
    return torch.compile(_encode_packed, dynamic=False)


def split_patches(image: Tensor, size: Sequence[int]) -> Tensor:
    """Look at images (B, C, H, W) as patches, shape (B, rows, columns, C, h, w)."""
    patches = image.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))
    return patches.permute(0, 2, 4, 1, 3, 5)


def embed_patches(vit: Vit, patches: Tensor) -> Tensor:
    """Embed flat patches (..., C * h * w) as a linear layer, equal to the convolution."""
    projection = vit.patch_embed.proj
    tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)
    return cast(Tensor, vit.patch_embed.norm(tokens))


def _embed(
    vit: Vit, images: Sequence[Tensor], layout: Layout, matrix: Tensor
) -> Tensor:
    """Return tokens with positions, shape (T, F), one batch of images after the other."""
    size = vit.patch_embed.patch_size
    patches = [split_patches(image, size).flatten(0, 2).flatten(1) for image in images]
    tokens = embed_patches(vit, concatenate(patches))

    prefix: list[Tensor] = [p for p in (vit.cls_token, vit.reg_token) if p is not None]
    skip = 0 if vit.no_embed_class else vit.num_prefix_tokens
    pos_embed = vit.pos_embed
    counts = [group.length - vit.num_prefix_tokens for group in layout.groups]
    numbers = [group.number for group in layout.groups]
    if prefix:
        first = torch.cat(prefix, 1)  # (1, P, F)
        if skip and pos_embed is not None:
            first = first + pos_embed[:, :skip]
    positions: Sequence[Tensor] = ()
    if pos_embed is not None:
        with torch.autocast(tokens.device.type, enabled=False):
            positions = (matrix.to(pos_embed) @ pos_embed[0, skip:]).split(counts)
    # Under autocast, patches are half as wide, and tokens float32 from here on, as in timm
    out = []
    parts = tokens.split([n * count for n, count in zip(numbers, counts, strict=True)])
    for i, (number, same_size) in enumerate(zip(numbers, parts, strict=True)):
        sequences = same_size.unflatten(0, (number, -1))
        if positions:
            sequences = sequences + positions[i]
        if prefix:
            sequences = torch.cat([first.expand(number, -1, -1), sequences], 1)
        out.append(sequences.flatten(0, 1))
    return vit.norm_pre(vit.pos_drop(concatenate(out)))


def _encode_packed(
    vit: Vit,
    images: Sequence[Tensor],
    layout: Layout,
    matrix: Tensor,
    drop_paths: Tensor | None,
    rotations: Rotations | None,
) -> Tensor:
    """Return features (N, F) of batches of images of different sizes."""
    tokens = _embed(vit, images, layout, matrix)
    return run_blocks(vit, tokens, layout, drop_paths, rotations)
