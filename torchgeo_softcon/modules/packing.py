# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encodes crops of several sizes at once."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.layers.attention import Attention
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, noop_context_fn

from .packed_blocks import (
    Group,
    Layout,
    can_use_varlen,
    class_block,
    concatenate,
    draw_drop_paths,
    token_block,
)

#: Attention of all crops at once is FlashAttention's. PyTorch 2.15 would prefer cuDNN's on
#: Hopper, which takes single queries, those of the last block, for decoding: not tried.
_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,  # in float32
    SDPBackend.MATH,
]

CropBatching = Literal['auto', 'packed', 'by_size']


def can_pack(encoder: nn.Module) -> bool:
    """Whether :func:`encode_crops` packs the tokens of all sizes for an encoder.

    Args:
        encoder: A timm model.

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
    """Whether a module does more than its ``forward`` when it is called."""
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
        layout = _layout(
            tuple(
                Group(len(images), math.prod(grid) + vit.num_prefix_tokens)
                for images, grid in zip(same_size, grids, strict=True)
            ),
            device,
            # Of one length, there is nothing to win
            batching == 'auto' and len(grids) > 1 and can_use_varlen(vit, device),
        )
        positions = _positions(vit.patch_embed.grid_size, grids, device)
        run = _compiled() if compiled else _encode_packed
        drop_paths = draw_drop_paths(vit, len(layout.first))
        with sdpa_kernel(_BACKENDS) if layout.varlen else nullcontext():
            features = run(vit, same_size, layout, positions, drop_paths)
    else:
        features = concatenate([encoder(images) for images in same_size])
    return features.unflatten(0, (len(crops), -1))


def encode_tokens(vit: VisionTransformer, tokens: Tensor) -> Tensor:
    """Encode sequences of tokens, as the blocks and the head of a Vision Transformer do.

    The last block computes only the class token if nothing else is read.

    Args:
        vit: A timm model.
        tokens: Tokens with their positions, shape (B, N, F).

    Returns:
        Pooled features of shape (B, F).
    """
    tokens = vit.norm_pre(tokens)
    if can_pack(vit):
        layout = _layout((Group(*tokens.shape[:2]),), tokens.device, False)
        drop_paths = draw_drop_paths(vit, len(tokens))
        return _run_blocks(vit, tokens.flatten(0, 1), layout, drop_paths)
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
    unit = torch.eye(old[0] * old[1], dtype=torch.float32, device=device)[None]
    return resample_abs_pos_embed(
        unit, new_size=list(new), old_size=list(old), num_prefix_tokens=0
    )[0]


@functools.lru_cache(maxsize=32)
def _positions(
    native: tuple[int, int], grids: tuple[tuple[int, int], ...], device: torch.device
) -> Tensor:
    """Matrices of :func:`position_matrix` of several grids, made once.

    Args:
        native: Rows and columns of the position embedding.
        grids: Rows and columns of patches.
        device: Device of the matrix.

    Returns:
        Weights of shape (sum of the numbers of patches, positions).
    """
    # A first call may come from prediction, and the second from training
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        return torch.cat([position_matrix(native, grid, device) for grid in grids])


@functools.lru_cache(maxsize=32)
def _layout(groups: tuple[Group, ...], device: torch.device, varlen: bool) -> Layout:
    """Layout of sequences, made once, as it comes from the host.

    Args:
        groups: Sequences of one length each.
        device: Device of the tensors.
        varlen: Whether attention may run once for all sequences.

    Returns:
        The layout.
    """
    # See _positions
    with torch.inference_mode(False):
        lengths = torch.tensor([g.length for g in groups for _ in range(g.number)])
        each = torch.arange(len(lengths) + 1, dtype=torch.int32)
        total = sum(group.number * group.length for group in groups)
        sequence = each[:-1].repeat_interleave(lengths, output_size=total)
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        return Layout(
            groups,
            sequence.to(device),
            ends[:-1].to(device),
            ends.to(device),
            each.to(device),
            varlen,
        )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """The packed forward pass as one graph for each layout, up to PyTorch's limit."""
    return torch.compile(_encode_packed, dynamic=False)


def _embed(
    vit: VisionTransformer, images: Sequence[Tensor], layout: Layout, matrix: Tensor
) -> Tensor:
    """Tokens with positions, of shape (T, F), one batch of images after the other."""
    patch_embed = vit.patch_embed
    height, width = patch_embed.patch_size
    patches = []
    for image in images:
        split = image.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        patches.append(split.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1))
    weight, bias = patch_embed.proj.weight, patch_embed.proj.bias
    tokens = patch_embed.norm(F.linear(concatenate(patches), weight.flatten(1), bias))

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
    for number, part, position in zip(
        numbers,
        tokens.split([n * count for n, count in zip(numbers, counts, strict=True)]),
        positions.split(counts),
        strict=True,
    ):
        sequences = part.unflatten(0, (number, -1)) + position
        if prefix:
            sequences = torch.cat([first.expand(number, -1, -1), sequences], 1)
        out.append(sequences.flatten(0, 1))
    return vit.norm_pre(vit.pos_drop(concatenate(out)))


def _branch_dtype(vit: VisionTransformer, x: Tensor) -> torch.dtype:
    """Dtype that the branches of blocks end with: that of linear layers, or of scales."""
    kind = x.device.type
    linear = all(type(cast(Block, block).ls1) is nn.Identity for block in vit.blocks)
    if linear and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _encode_packed(
    vit: VisionTransformer,
    images: Sequence[Tensor],
    layout: Layout,
    positions: Tensor,
    drop_paths: Tensor | None,
) -> Tensor:
    """Features of shape (N, F) of batches of images of different sizes."""
    return _run_blocks(vit, _embed(vit, images, layout, positions), layout, drop_paths)


def _same_backends() -> tuple[
    AbstractContextManager[None], AbstractContextManager[None]
]:
    """Contexts of blocks, and of computing them again, when that of the first is over."""
    return nullcontext(), sdpa_kernel(_BACKENDS)


def _run_blocks(
    vit: VisionTransformer, x: Tensor, layout: Layout, drop_paths: Tensor | None
) -> Tensor:
    """Features of shape (N, F) of tokens of shape (T, F)."""
    token = vit.global_pool == 'token'
    blocks = [cast(Block, block) for block in vit.blocks]
    of_tokens: Tensor | None = None
    if drop_paths is not None:
        # As wide as what they are multiplied with: the residuals, not their sum
        drop_paths = drop_paths.to(_branch_dtype(vit, x))
        of_tokens = drop_paths.index_select(1, layout.sequence)
    for i, block in enumerate(blocks):
        last = token and i == len(blocks) - 1
        factors = drop_paths if last else of_tokens
        drop = () if factors is None else factors[2 * i : 2 * i + 2, :, None].unbind()
        step = class_block if last else token_block
        if vit.grad_checkpointing and torch.is_grad_enabled():
            context = _same_backends if layout.varlen else noop_context_fn
            x = checkpoint(
                step, block, x, layout, drop, use_reentrant=False, context_fn=context
            )
        else:
            x = step(block, x, layout, drop)
    x = vit.norm(x)
    if token:
        return vit.head_drop(vit.fc_norm(x))
    groups = layout.groups
    parts = x.split([g.number * g.length for g in groups])
    return concatenate(
        [
            vit.forward_head(part.unflatten(0, group), pre_logits=True)
            for part, group in zip(parts, groups, strict=True)
        ]
    )
