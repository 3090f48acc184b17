# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Transformer blocks for sequences of several lengths, packed into one matrix."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10, or built without it
    varlen_attn = None  # type: ignore[assignment]


class Group(NamedTuple):
    """Sequences of one length, which lie side by side among the packed tokens."""

    number: int
    length: int


class Layout(NamedTuple):
    """Where the N sequences are among the T packed tokens."""

    groups: tuple[Group, ...]
    #: Sequence of every token, shape (T,), int32.
    sequence: Tensor
    #: First token of every sequence, shape (N,), int32.
    first: Tensor
    #: Where sequences end if they have all their tokens, shape (N + 1,), int32, from 0.
    ends: Tensor
    #: The same of sequences of one token each.
    each: Tensor
    #: Whether attention may run once for all sequences.
    varlen: bool


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along the first axis, without a copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def can_use_varlen(vit: VisionTransformer, device: torch.device) -> bool:
    """Whether attention can run once for sequences of all lengths.

    Args:
        vit: A Vision Transformer.
        device: Device of the tokens.

    Returns:
        True with PyTorch 2.10 or newer, on an NVIDIA GPU of compute capability 8.0
        (Ampere) or newer, for heads whose width is a multiple of 8 and at most 256. Then,
        tokens in float16 or bfloat16, as under autocast, use it, others do not.
    """
    if varlen_attn is None or device.type != 'cuda' or torch.version.hip is not None:
        return False
    widths = {cast(Attention, block.attn).head_dim for block in vit.blocks}
    return torch.cuda.get_device_capability(device) >= (8, 0) and all(
        width % 8 == 0 and width <= 256 for width in widths
    )


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of shape (B, m, H, d) of (B, m, H, d) queries to (B, n, H, d) keys."""
    dtype = v.dtype
    upcast = v.device.type == 'cpu' and dtype == torch.bfloat16 and v.shape[1] <= 512
    if upcast:
        # The backward pass in bfloat16 is slower than in float32 on a CPU
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if upcast:
        # Autocast would undo it
        with torch.autocast('cpu', enabled=False):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).to(dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, first_only: bool = False
) -> Tensor:
    """Attention within every sequence.

    Args:
        q: Queries of shape (T, H, d), or (N, H, d) of the first tokens alone.
        k: Keys of shape (T, H, d).
        v: Values of shape (T, H, d).
        layout: Where the sequences are.
        first_only: Whether the queries are those of the first tokens.

    Returns:
        Sums of values of shape (T, H * d) or (N, H * d).
    """
    if layout.varlen and v.dtype in (torch.float16, torch.bfloat16):
        # Norms of queries and keys are float32 under autocast
        q, k = q.to(v.dtype), k.to(v.dtype)
        longest = max(group.length for group in layout.groups)
        ends, most = (layout.each, 1) if first_only else (layout.ends, longest)
        # Keyword arguments differ between versions of PyTorch
        packed = varlen_attn(q, k, v, ends, layout.ends, most, longest)
        return cast(Tensor, packed).flatten(1)

    # Split, not sliced: the backward pass is one concatenation for all sizes
    numbers = [group.number for group in layout.groups]
    tokens = [group.number * group.length for group in layout.groups]
    queries = q.split(numbers if first_only else tokens)
    keys, values = k.split(tokens), v.split(tokens)
    parts = zip(numbers, queries, keys, values, strict=True)
    out = [
        _attend(*(x.unflatten(0, (number, -1)) for x in part)).flatten(0, 1)
        for number, *part in parts
    ]
    return concatenate(out).flatten(1)


def _attention(attn: Attention, x: Tensor, layout: Layout) -> Tensor:
    """Multi-head attention within every sequence, of (T, F) tokens."""
    # Unbound where it lies: to put the gradients together needs no second copy
    q, k, v = attn.qkv(x).unflatten(1, (3, attn.num_heads, attn.head_dim)).unbind(1)
    out = attend(attn.q_norm(q), attn.k_norm(k), v, layout)
    return attn.proj_drop(attn.proj(attn.norm(out)))


def _class_attention(attn: Attention, x: Tensor, layout: Layout) -> Tensor:
    """Attention of the first token of every sequence alone, of shape (N, F)."""
    width = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    biases = (None, None) if bias is None else bias.split([width, 2 * width])
    weights = weight.split([width, 2 * width])
    heads = (attn.num_heads, attn.head_dim)
    first = x.index_select(0, layout.first)
    q = F.linear(first, weights[0], biases[0]).unflatten(1, heads)
    k, v = F.linear(x, weights[1], biases[1]).unflatten(1, (2, *heads)).unbind(1)
    out = attend(attn.q_norm(q), attn.k_norm(k), v, layout, first_only=True)
    return attn.proj_drop(attn.proj(attn.norm(out)))


@functools.lru_cache(maxsize=32)
def _shares(
    rates: tuple[float, ...], scaled: tuple[bool, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Shares that stay, and what they are divided by, made once as on the host.

    Args:
        rates: Rates at which sequences are dropped.
        scaled: Whether those that stay make up for them.
        device: Device of the tensors.

    Returns:
        Two tensors of shape (R, 1).
    """
    with torch.inference_mode(False):
        share = 1 - torch.tensor(rates)[:, None]
        divisor = share.where(torch.tensor(scaled)[:, None], 1)
        return share.to(device), divisor.to(device)


def draw_drop_paths(vit: VisionTransformer, number: int) -> Tensor | None:
    """Draw the stochastic depth of every sequence, for all blocks at once.

    Args:
        vit: A Vision Transformer.
        number: Number of sequences N.

    Returns:
        Factors of shape (2 * blocks, N) for the attention and the MLP of each block, of
        the distribution of timm's ``DropPath``. None if there is nothing to drop.
    """
    modules: list[Any] = [m for b in vit.blocks for m in (b.drop_path1, b.drop_path2)]
    rates = tuple(getattr(m, 'drop_prob', 0.0) * m.training for m in modules)
    if not any(rates):
        return None
    scaled = tuple(getattr(m, 'scale_by_keep', True) for m in modules)
    share, divisor = _shares(rates, scaled, vit.patch_embed.proj.weight.device)
    return share.expand(-1, number).bernoulli() / divisor


def token_block(
    block: Block, x: Tensor, layout: Layout, drop: Sequence[Tensor]
) -> Tensor:
    """One transformer block on packed tokens.

    Args:
        block: The block.
        x: Tokens of shape (T, F).
        layout: Where the sequences are.
        drop: Factors of stochastic depth of the attention and the MLP, each of shape
            (T, 1), or empty.

    Returns:
        Tokens of shape (T, F).
    """
    y = block.ls1(_attention(cast(Attention, block.attn), block.norm1(x), layout))
    return _add_both(block, x, y, drop)


def class_block(
    block: Block, x: Tensor, layout: Layout, drop: Sequence[Tensor]
) -> Tensor:
    """One transformer block of which only the class tokens are read.

    Args:
        block: The block.
        x: Tokens of shape (T, F).
        layout: Where the sequences are.
        drop: Factors of stochastic depth as above, each of shape (N, 1), or empty.

    Returns:
        Class tokens of shape (N, F).
    """
    attn = cast(Attention, block.attn)
    y = block.ls1(_class_attention(attn, block.norm1(x), layout))
    return _add_both(block, x.index_select(0, layout.first), y, drop)


def _add_both(block: Block, x: Tensor, y: Tensor, drop: Sequence[Tensor]) -> Tensor:
    """Add what attention gave, then what the MLP makes of the sum."""
    x = x + (y * drop[0] if drop else y)
    y = block.ls2(block.mlp(block.norm2(x)))
    return x + (y * drop[1] if drop else y)
