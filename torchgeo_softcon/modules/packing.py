# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encodes crops of several sizes at once."""

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _Group(NamedTuple):
    """Sequences of one length, which lie side by side among the packed tokens."""

    number: int
    length: int


class _Layout(NamedTuple):
    """Where the sequences are among the packed tokens."""

    groups: tuple[_Group, ...]
    #: Sequence of every token, shape (T,).
    sequence: Tensor
    #: First token of every sequence, shape (N,).
    first: Tensor
    #: Resamples position embeddings to the patches of one sequence of each group, shape
    #: (sum of their numbers, positions).
    positions: Tensor


def can_pack(encoder: nn.Module) -> bool:
    """Whether :func:`encode_crops` packs the tokens of all sizes for an encoder.

    Args:
        encoder: A timm model.

    Returns:
        True for Vision Transformers of timm's standard blocks that take any image size
        and pool a token or an average: ViT, DeiT, DINO and DINOv2.
    """
    return (
        type(encoder) is VisionTransformer
        and type(encoder.patch_embed) is PatchEmbed
        and encoder.dynamic_img_size
        and encoder.pos_embed is not None
        and encoder.global_pool in ('token', 'avg')
        and encoder.attn_pool is None
        and isinstance(encoder.patch_drop, nn.Identity)
        and all(
            type(block) is Block
            and type(block.attn) is Attention
            and getattr(block.attn, 'gate', None) is None
            and block.attn.attn_drop.p == 0
            for block in encoder.blocks
        )
    )


def encode_crops(
    encoder: nn.Module, crops: Sequence[Tensor], compiled: bool = False
) -> Tensor:
    """Encode crops of several sizes, equal to one forward pass per crop.

    Vision Transformers, see :func:`can_pack`, get the tokens of all crops as one matrix.
    Layers that treat every token alike, which is all but attention, then run once instead
    of once per size; attention runs per size, without padding or masks. The last block
    computes only the class token if nothing else is read. Other encoders get one batch
    per size: batch norm normalises the crops of one size together, as in DINO.

    Crops that patches do not cover lose their last rows and columns, as in DINO.

    Args:
        encoder: A timm model that pools its features. Its forward hooks are not called
            if it is packed.
        crops: S crops of each of B images, each of shape (B, C, H, W) with its own size.
        compiled: Whether to run the packed forward pass with ``torch.compile``, as one
            graph. Other encoders are run as they are.

    Returns:
        Features of shape (S, B, F), in the order of the crops.

    Raises:
        ValueError: If the crops differ in batch size, or one is smaller than a patch.
    """
    batches = {len(crop) for crop in crops}
    if len(batches) != 1:
        raise ValueError(
            f'crops must be S >= 1 tensors of one batch size, got {[*map(len, crops)]}'
        )

    patch_embed = getattr(encoder, 'patch_embed', None)
    if isinstance(patch_embed, PatchEmbed):
        crops = [_cover(crop, patch_embed.patch_size) for crop in crops]
    sizes = groupby(crops, key=lambda crop: crop.shape[-2:])
    same_size = [torch.cat(list(group)) for _, group in sizes]
    if can_pack(encoder):
        vit = cast(VisionTransformer, encoder)
        rows, columns = vit.patch_embed.patch_size
        layout = _layout(
            tuple(len(images) for images in same_size),
            tuple((i.shape[2] // rows, i.shape[3] // columns) for i in same_size),
            vit.num_prefix_tokens,
            vit.patch_embed.grid_size,
            same_size[0].device,
        )
        run = _compiled() if compiled else _encode_packed
        features = run(vit, same_size, layout)
    else:
        features = torch.cat([encoder(images) for images in same_size])
    return features.unflatten(0, (len(crops), -1))


def _cover(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut off what whole patches do not cover, as a strided convolution does."""
    height, width = image.shape[-2:]
    if height < patch[0] or width < patch[1]:
        raise ValueError(
            f'a crop of {height} x {width} pixels is smaller than a patch of {patch[0]} '
            f'x {patch[1]} pixels. Choose larger sizes'
        )
    return image[..., : height - height % patch[0], : width - width % patch[1]]


def position_matrix(
    old: tuple[int, int], new: tuple[int, int], device: torch.device
) -> Tensor:
    """Matrix that resamples position embeddings to another grid.

    Resampling is linear, so it is what timm's function makes of unit vectors. A matrix
    serves all sizes with one product, and its backward pass is deterministic on a GPU,
    where that of bicubic interpolation is not.

    Args:
        old: Rows and columns of the grid of the embeddings.
        new: Rows and columns of the grid of the patches.
        device: Device of the matrix.

    Returns:
        Weights of shape (new positions, old positions).
    """
    unit = torch.eye(old[0] * old[1], device=device)[None]
    return resample_abs_pos_embed(
        unit, new_size=list(new), old_size=list(old), num_prefix_tokens=0
    )[0]


@functools.lru_cache(maxsize=32)
def _layout(
    numbers: tuple[int, ...],
    grids: tuple[tuple[int, int], ...],
    prefix: int,
    native: tuple[int, int],
    device: torch.device,
) -> _Layout:
    """Layout of batches of images, made once, as it comes from the host.

    Args:
        numbers: Number of images of each batch.
        grids: Rows and columns of patches of each batch.
        prefix: Number of tokens before the patches.
        native: Rows and columns of the position embedding.
        device: Device of the tensors.

    Returns:
        The layout.
    """
    groups = tuple(
        _Group(number, rows * columns + prefix)
        for number, (rows, columns) in zip(numbers, grids, strict=True)
    )
    # A first call may come from prediction, and the second from training
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        lengths = torch.tensor([g.length for g in groups for _ in range(g.number)])
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        first = lengths.cumsum(0) - lengths
        positions = torch.cat([position_matrix(native, g, device) for g in grids])
        return _Layout(groups, sequence.to(device), first.to(device), positions)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The packed forward pass as one graph for each layout, up to PyTorch's limit."""
    return torch.compile(_encode_packed, dynamic=False)


def _embed(vit: VisionTransformer, images: Sequence[Tensor], layout: _Layout) -> Tensor:
    """Tokens with positions, of shape (T, F), one batch of images after the other."""
    patch_embed = vit.patch_embed
    height, width = patch_embed.patch_size
    patches = []
    for image in images:
        split = image.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        patches.append(split.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1))
    weight, bias = patch_embed.proj.weight, patch_embed.proj.bias
    tokens = patch_embed.norm(F.linear(torch.cat(patches), weight.flatten(1), bias))

    prefix: list[Tensor] = [p for p in (vit.cls_token, vit.reg_token) if p is not None]
    skip = 0 if vit.no_embed_class else vit.num_prefix_tokens
    pos_embed = cast(Tensor, vit.pos_embed)
    with torch.autocast(tokens.device.type, enabled=False):
        positions = layout.positions.to(pos_embed) @ pos_embed[0, skip:]
    counts = [group.length - vit.num_prefix_tokens for group in layout.groups]
    numbers = [group.number for group in layout.groups]
    if prefix:
        first = torch.cat(prefix, 1)  # (1, P, F)
        if skip:
            first = first + pos_embed[:, :skip]
        first = first.to(tokens.dtype)
    out = []
    for number, part, position in zip(
        numbers,
        tokens.split([n * count for n, count in zip(numbers, counts, strict=True)]),
        positions.to(tokens.dtype).split(counts),
        strict=True,
    ):
        sequences = part.unflatten(0, (number, -1)) + position
        if prefix:
            sequences = torch.cat([first.expand(number, -1, -1), sequences], 1)
        out.append(sequences.flatten(0, 1))
    return vit.norm_pre(vit.pos_drop(torch.cat(out)))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of shape (B, n, H * d) of (B, H, n, d) queries."""
    dtype = q.dtype
    if q.device.type == 'cpu' and dtype == torch.bfloat16 and k.shape[2] <= 512:
        # The backward pass in bfloat16 is slower than in float32 on a CPU
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2).to(dtype)


def _attention(attn: Attention, x: Tensor, groups: Sequence[_Group]) -> Tensor:
    """Multi-head attention within every sequence, of (T, F) tokens."""
    heads = (3, attn.num_heads, attn.head_dim)
    # Split, not sliced: the backward pass is one concatenation
    parts = attn.qkv(x).split([g.number * g.length for g in groups])
    out = []
    for part, group in zip(parts, groups, strict=True):
        qkv = part.unflatten(0, group).unflatten(2, heads)  # (B, n, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = _attend(attn.q_norm(q), attn.k_norm(k), v)
        out.append(attended.flatten(0, 1))
    return attn.proj_drop(attn.proj(attn.norm(torch.cat(out))))


def _class_attention(
    attn: Attention, x: Tensor, first: Tensor, groups: Sequence[_Group]
) -> Tensor:
    """Attention of the first token of every sequence alone, of shape (N, F)."""
    width = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    biases = (None, None) if bias is None else bias.split([width, 2 * width])
    weights = weight.split([width, 2 * width])
    heads = (attn.num_heads, attn.head_dim)
    query = F.linear(x[first], weights[0], biases[0])
    queries = query.split([g.number for g in groups])
    parts = F.linear(x, weights[1], biases[1]).split(
        [g.number * g.length for g in groups]
    )
    out = []
    for query, part, group in zip(queries, parts, groups, strict=True):
        q = query.unflatten(1, (1, *heads)).transpose(1, 2)  # (B, H, 1, d)
        kv = part.unflatten(0, group).unflatten(2, (2, *heads))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = _attend(attn.q_norm(q), attn.k_norm(k), v)
        out.append(attended.flatten(0, 1))
    return attn.proj_drop(attn.proj(attn.norm(torch.cat(out))))


def _drop_path(module: nn.Module, x: Tensor, sequence: Tensor, count: int) -> Tensor:
    """Stochastic depth per sequence: timm's DropPath for packed tokens."""
    rate = getattr(module, 'drop_prob', 0.0)
    if rate == 0 or not module.training:
        return x
    keep = x.new_empty(count).bernoulli_(1 - rate)
    if getattr(module, 'scale_by_keep', True):
        keep /= 1 - rate
    return x * keep[sequence, None]


def _block(block: Block, x: Tensor, layout: _Layout) -> Tensor:
    """One transformer block on (T, F) tokens."""
    count = len(layout.first)

    def drop(module: nn.Module, x: Tensor) -> Tensor:
        return _drop_path(module, x, layout.sequence, count)

    y = _attention(cast(Attention, block.attn), block.norm1(x), layout.groups)
    x = x + drop(block.drop_path1, block.ls1(y))
    return x + drop(block.drop_path2, block.ls2(block.mlp(block.norm2(x))))


def _class_block(block: Block, x: Tensor, layout: _Layout) -> Tensor:
    """One transformer block of which only the class tokens are read, shape (N, F)."""
    count = len(layout.first)
    each = torch.arange(count, device=x.device)

    def drop(module: nn.Module, x: Tensor) -> Tensor:
        return _drop_path(module, x, each, count)

    y = _class_attention(
        cast(Attention, block.attn), block.norm1(x), layout.first, layout.groups
    )
    x = x[layout.first] + drop(block.drop_path1, block.ls1(y))
    return x + drop(block.drop_path2, block.ls2(block.mlp(block.norm2(x))))


def _encode_packed(
    vit: VisionTransformer, images: Sequence[Tensor], layout: _Layout
) -> Tensor:
    """Features of shape (N, F) of batches of images of different sizes."""
    x = _embed(vit, images, layout)
    token = vit.global_pool == 'token'
    blocks = [cast(Block, block) for block in vit.blocks]
    for i, block in enumerate(blocks):
        step = _class_block if token and i == len(blocks) - 1 else _block
        if vit.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(step, block, x, layout, use_reentrant=False)
        else:
            x = step(block, x, layout)
    x = vit.norm(x)
    if token:
        return vit.head_drop(vit.fc_norm(x))
    groups = layout.groups
    parts = x.split([g.number * g.length for g in groups])
    return torch.cat(
        [
            vit.forward_head(part.unflatten(0, group), pre_logits=True)
            for part, group in zip(parts, groups, strict=True)
        ]
    )
