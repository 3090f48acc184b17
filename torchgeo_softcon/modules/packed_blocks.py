# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Transformer blocks for sequences of several lengths, packed into one matrix."""

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, noop_context_fn

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10, or built without it
    varlen_attn = None  # type: ignore[assignment]

#: Vision Transformers whose blocks are run here, the second with rotary positions (DINOv3,
#: EVA-02, ...), their blocks, and the attention in these.
Vit: TypeAlias = VisionTransformer | Eva
AnyBlock: TypeAlias = Block | EvaBlock
AnyAttention: TypeAlias = Attention | EvaAttention | AttentionRope

#: Rotary positions of the sequences of each length n, as timm's ``rope`` gives them, but of
#: all tokens, for the tokens' axis before the heads': (1 or blocks, n, 1 or heads, 2 * d), or
#: (1 or blocks, number, n, 1 or heads, 2 * d) if sequences differ.
Rotations: TypeAlias = Sequence[Tensor]

#: Without cuDNN's, which takes the single queries of the last block for decoding.
BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,  # in float32
    SDPBackend.MATH,
]


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

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Split packed tokens (T, ...) into (number, length, ...) of each group."""
        # Not sliced: the backward pass is one concatenation for all sizes
        same_length = x.split([group.number * group.length for group in self.groups])
        groups = zip(same_length, self.groups, strict=True)
        return [tokens.unflatten(0, group) for tokens, group in groups]


# A first call may come from prediction, others from training
@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def make_layout(
    groups: tuple[Group, ...], device: torch.device, varlen: bool
) -> Layout:
    """Make the layout of sequences, once, as it comes from the host."""
    lengths = torch.tensor([g.length for g in groups for _ in range(g.number)])
    each = torch.arange(len(lengths) + 1, dtype=torch.int32)
    total = sum(group.number * group.length for group in groups)
    sequence = each[:-1].repeat_interleave(lengths, output_size=total)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    tensors = (sequence, ends[:-1], ends, each)
    sequence, first, ends, each = (x.to(device) for x in tensors)
    return Layout(groups, sequence, first, ends, each, varlen)


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along the first axis, without a copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def can_use_varlen(vit: Vit, device: torch.device) -> bool:
    """Whether attention can run once for sequences of all lengths, in half precision.

    That needs PyTorch 2.10, an NVIDIA GPU of compute capability 8.0 (Ampere), and heads
    whose width is a multiple of 8 and at most 256.
    """
    if varlen_attn is None or device.type != 'cuda' or torch.version.hip is not None:
        return False
    widths = {block.attn.head_dim for block in cast(Any, vit.blocks)}
    return torch.cuda.get_device_capability(device) >= (8, 0) and all(
        width % 8 == 0 and width <= 256 for width in widths
    )


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention (B, m, H, d) of (B, m, H, d) queries to (B, n, H, d) keys."""
    dtype = v.dtype
    upcast = v.device.type == 'cpu' and dtype == torch.bfloat16 and v.shape[1] <= 512
    if upcast:
        # The backward pass in bfloat16 is slower than in float32 on a CPU
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Autocast would undo it
    with torch.autocast('cpu', enabled=False) if upcast else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).to(dtype)


def _attend_sequences(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, class_only: bool
) -> Tensor:
    """Attend within every sequence, from (T, H, d) queries to (T, H, d) keys and values.

    With *class_only*, queries (N, H, d) are those of the first tokens. Returns (T, H * d)
    or (N, H * d).
    """
    if layout.varlen and v.dtype in (torch.float16, torch.bfloat16):
        # Norms of queries and keys are float32 under autocast
        q, k = q.to(v.dtype), k.to(v.dtype)
        longest = max(group.length for group in layout.groups)
        ends, most = (layout.each, 1) if class_only else (layout.ends, longest)
        # Keyword arguments differ between versions of PyTorch
        packed = varlen_attn(q, k, v, ends, layout.ends, most, longest)
        return cast(Tensor, packed).flatten(1)

    if class_only:
        queries = [
            x[:, None] for x in q.split([group.number for group in layout.groups])
        ]
    else:
        queries = layout.unpack(q)
    groups = zip(queries, layout.unpack(k), layout.unpack(v), strict=True)
    out = [_attend(*group).flatten(0, 1) for group in groups]
    return concatenate(out).flatten(1)


def _project(
    attn: AnyAttention, x: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, keys and values (T, H, d) of tokens (T, F).

    With *first*, queries (N, H, d) of these tokens only.
    """
    seen = x if first is None else x.index_select(0, first)
    if attn.qkv is None:  # of keys and values, there may be fewer heads
        layers = ((attn.q_proj, seen), (attn.k_proj, x), (attn.v_proj, x))
        q, k, v = (layer(y).unflatten(1, (-1, attn.head_dim)) for layer, y in layers)
        return attn.q_norm(q), attn.k_norm(k), v
    weight: Tensor = attn.qkv.weight
    bias: Tensor | None = attn.qkv.bias
    if isinstance(attn, EvaAttention) and attn.q_bias is not None:
        biases_of_all = attn.q_bias, attn.k_bias, attn.v_bias
        bias = torch.cat(cast(tuple[Tensor, ...], biases_of_all))
    heads = (attn.num_heads, attn.head_dim)
    if first is None:
        # Unbound where it lies: to put the gradients together needs no second copy
        q, k, v = F.linear(x, weight, bias).unflatten(1, (3, *heads)).unbind(1)
    else:
        widths = [math.prod(heads), 2 * math.prod(heads)]
        biases = (None, None) if bias is None else bias.split(widths)
        weights = weight.split(widths)
        q = F.linear(seen, weights[0], biases[0]).unflatten(1, heads)
        k, v = F.linear(x, weights[1], biases[1]).unflatten(1, (2, *heads)).unbind(1)
    return attn.q_norm(q), attn.k_norm(k), v


def _rotate(x: Tensor, rotations: Rotations, layout: Layout, half: bool) -> Tensor:
    """Rotate queries or keys (T, H, d) by the positions of their tokens."""
    groups = zip(layout.unpack(x), rotations, strict=True)
    rotated = [apply_rot_embed_cat(*group, half).flatten(0, 1) for group in groups]
    return concatenate(rotated)


def _attention(
    attn: AnyAttention,
    x: Tensor,
    layout: Layout,
    class_only: bool,
    rotations: Rotations | None,
) -> Tensor:
    """Multi-head attention of tokens (T, F), or of the class tokens (N, F) to them."""
    q, k, v = _project(attn, x, layout.first if class_only else None)
    if rotations is not None:
        half = cast(bool, attn.rotate_half)
        k = _rotate(k, rotations, layout, half).to(v.dtype)
        if not class_only:  # which have no position
            q = _rotate(q, rotations, layout, half)
        q = q.to(v.dtype)
    groups = getattr(attn, 'num_kv_groups', 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = _attend_sequences(q, k, v, layout, class_only)
    return attn.proj_drop(attn.proj(attn.norm(out)))


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _drop_path_shares(
    rates: tuple[float, ...], scaled: tuple[bool, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the shares that stay and their divisors, (R, 1) each, made on the host."""
    share = 1 - torch.tensor(rates)[:, None]
    divisor = share.where(torch.tensor(scaled)[:, None], 1)
    return share.to(device), divisor.to(device)


def draw_drop_paths(vit: Vit, number: int) -> Tensor | None:
    """Draw the stochastic depth of N sequences, for all blocks at once.

    Returns factors (2 * blocks, N) for the attention and the MLP of each block, distributed
    as in timm's ``DropPath``, or None if there is nothing to drop.
    """
    modules: list[Any] = [m for b in vit.blocks for m in (b.drop_path1, b.drop_path2)]
    rates = tuple(getattr(m, 'drop_prob', 0.0) * m.training for m in modules)
    if not any(rates):
        return None
    scaled = tuple(getattr(m, 'scale_by_keep', True) for m in modules)
    device = vit.patch_embed.proj.weight.device
    share, divisor = _drop_path_shares(rates, scaled, device)
    return share.expand(-1, number).bernoulli() / divisor


def _scale(block: AnyBlock, branch: int, x: Tensor) -> Tensor:
    """Apply the LayerScale of the attention (branch 1) or the MLP (2), if there is one."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f'gamma_{branch}')
        return x if gamma is None else gamma * x
    return cast(Tensor, getattr(block, f'ls{branch}')(x))


def _run_block(
    block: AnyBlock,
    x: Tensor,
    layout: Layout,
    drop: Sequence[Tensor],
    class_only: bool,
    rotations: Rotations | None,
) -> Tensor:
    """Run one transformer block on tokens (T, F), or for their class tokens (N, F) only.

    *drop* has factors of stochastic depth of the attention and the MLP, each of shape
    (T, 1), or (N, 1) with *class_only*, or is empty.
    """
    attn = cast(AnyAttention, block.attn)
    y = _attention(attn, block.norm1(x), layout, class_only, rotations)
    y = _scale(block, 1, y)
    if class_only:
        x = x.index_select(0, layout.first)
    x = x + (y * drop[0] if drop else y)
    y = _scale(block, 2, block.mlp(block.norm2(x)))
    return x + (y * drop[1] if drop else y)


def _branch_dtype(vit: Vit, x: Tensor) -> torch.dtype:
    """Return the dtype that branches of blocks end with: of linear layers or scales."""
    kind = x.device.type
    scales = [getattr(b, 'gamma_1', getattr(b, 'ls1', None)) for b in vit.blocks]
    linear = all(scale is None or type(scale) is nn.Identity for scale in scales)
    if linear and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _same_backends() -> tuple[
    AbstractContextManager[None], AbstractContextManager[None]
]:
    """Contexts of blocks, and of computing them again, when that of the first is over."""
    return nullcontext(), sdpa_kernel(BACKENDS)


def run_blocks(
    vit: Vit,
    x: Tensor,
    layout: Layout,
    drop_paths: Tensor | None,
    rotations: Rotations | None = None,
) -> Tensor:
    """Run all blocks and the head on packed tokens (T, F), to pooled features (N, F).

    The last block computes only the class tokens if nothing else is read. *drop_paths* are
    the factors of :func:`draw_drop_paths`.
    """
    token = vit.global_pool == 'token'
    blocks = [cast(AnyBlock, block) for block in vit.blocks]
    of_tokens: Tensor | None = None
    if drop_paths is not None:
        # As wide as what they are multiplied with: the residuals, not their sum
        drop_paths = drop_paths.to(_branch_dtype(vit, x))
        of_tokens = drop_paths.index_select(1, layout.sequence)
    for i, block in enumerate(blocks):
        class_only = token and i == len(blocks) - 1
        factors = drop_paths if class_only else of_tokens
        drop = () if factors is None else factors[2 * i : 2 * i + 2, :, None].unbind()
        # One table serves all blocks, or each has its own
        own = rotations and [table[i % len(table)] for table in rotations]
        arguments = block, x, layout, drop, class_only, own
        if vit.grad_checkpointing and torch.is_grad_enabled():
            context = _same_backends if layout.varlen else noop_context_fn
            x = checkpoint(
                _run_block, *arguments, use_reentrant=False, context_fn=context
            )
        else:
            x = _run_block(*arguments)
    x = vit.norm(x)
    if token:
        return vit.head_drop(vit.fc_norm(x))
    groups = layout.unpack(x)
    return concatenate([vit.forward_head(group, pre_logits=True) for group in groups])
