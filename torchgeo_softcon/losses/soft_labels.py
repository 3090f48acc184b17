# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The soft term: embeddings are as similar as their labels."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from lightly.utils import dist
from torch import Tensor, nn

from .._checks import check_positive, check_types, require

#: Maps labels of shape (B, K) and (N, K) to similarities in [0, 1] of shape (B, N).
LabelSimilarity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
SoftLoss: TypeAlias = Literal['bce', 'cross_entropy', 'mse', 'correlation']
SoftBias: TypeAlias = Literal['none', 'batch', 'learned']
SoftReduction: TypeAlias = Literal['pairs', 'rows']

#: Forms of the soft term that a bias, or a temperature of the targets, is for.
_BIASED: dict[str, tuple[str, ...]] = {'batch': ('bce', 'mse'), 'learned': ('bce',)}

#: Images of a batch whose similarities are ranked: sorting all pairs of 4,096 is slow.
_RANKED = 256

#: Steps of Newton's method towards the bias of a batch. It doubles its digits in each.
_NEWTON_STEPS = 10


class LabelAgreement(NamedTuple):
    """How far embeddings of a batch agree with labels, scalars without gradient."""

    #: Spearman's rank correlation of both similarities over pairs of different images.
    correlation: Tensor

    #: Share of the soft term that is explained: 0 for the best constant, 1 at the floor.
    explained: Tensor

    #: Soft term of the best constant similarity.
    chance: Tensor

    #: Soft term of similarities that are those of the labels.
    floor: Tensor


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compute the cosine similarity between label vectors.

    Args:
        first: Multi-hot labels or class fractions of shape (B, K).
        second: Labels of shape (N, K).

    Returns:
        Similarities of shape (B, N), in [0, 1] for non-negative labels. All-zero labels
        give 0.
    """
    return (F.normalize(first, dim=1) @ F.normalize(second, dim=1).T).clamp(max=1)


def jaccard_similarity(first: Tensor, second: Tensor) -> Tensor:
    r"""Compute the intersection over union of label vectors.

    .. math::

        J(y, y') = \frac{\sum_k \min(y_k, y'_k)}{\sum_k \max(y_k, y'_k)}

    Args:
        first: Multi-hot labels or class fractions of shape (B, K).
        second: Labels of shape (N, K).

    Returns:
        Similarities of shape (B, N), in [0, 1] for non-negative labels. Two all-zero
        labels give 0.
    """
    intersection = torch.minimum(first[:, None], second[None]).sum(-1)
    union = torch.maximum(first[:, None], second[None]).sum(-1)
    return intersection / union.clamp_min(torch.finfo(first.dtype).tiny)


_SIMILARITIES: dict[str, LabelSimilarity] = {
    'cosine': cosine_similarity,
    'jaccard': jaccard_similarity,
}


def gather(x: Tensor) -> Tensor:
    """Concatenate a tensor of all ranks, with gradient where it has one."""
    return torch.cat(dist.gather(x.contiguous()))


def _add_up(x: Tensor, distributed: bool) -> Tensor:
    """Sum a tensor over ranks.

    Its gradient is that of the rank's own part times the number of ranks, so that the
    average over ranks, which DDP takes, is that of the whole.
    """
    if not distributed:
        return x
    total = x.detach().clone()
    torch.distributed.all_reduce(total)
    return total + dist.world_size() * (x - x.detach())


def compare_embeddings(
    query: Tensor, key: Tensor, gather_distributed: bool
) -> tuple[Tensor, Tensor]:
    """Compare queries with the keys of all ranks, or of their own.

    Returns:
        Cosines (B, N), in float32 or float64, and the index of the own key of each query
        (B,). Call it with autocast off.
    """
    if query.ndim != 2 or query.shape != key.shape:
        raise ValueError(
            'query and key must have the same shape (B, D), got '
            f'{tuple(query.shape)} and {tuple(key.shape)}'
        )
    # bfloat16 resolves logits near 1 / temperature only to a few per cent, hence float32
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query = F.normalize(query.to(dtype), dim=1)
    key = F.normalize(key.to(dtype), dim=1)
    own = torch.arange(len(query), device=query.device)
    if gather_distributed and dist.world_size() > 1:
        key, own = gather(key), own + dist.rank() * len(query)
    return query @ key.T, own


def compare_labels(
    label: Tensor,
    key_label: Tensor | None,
    cosine: Tensor,
    similarity: str | LabelSimilarity,
) -> tuple[Tensor, Tensor]:
    """Compare labels as *cosine* (B, N) compares embeddings.

    Returns:
        Similarities (B, N), 0 where not known, and whether both labels are known (B, N).
        An all-zero label means unknown. Its pairs are left out, not called dissimilar.
    """
    key_label = label if key_label is None else key_label
    if label.ndim != 2 or len(label) != len(cosine) or key_label.shape != label.shape:
        raise ValueError(
            f'label and key_label must both have the shape (B, K) with B = '
            f'{len(cosine)}, got {tuple(label.shape)} and {tuple(key_label.shape)}'
        )
    label, key_label = label.to(cosine.dtype), key_label.to(cosine.dtype)
    if cosine.shape[1] != len(key_label):
        key_label = gather(key_label)
    if isinstance(similarity, str):
        similarity = _SIMILARITIES[similarity]
    target = similarity(label, key_label)
    if target.shape != cosine.shape:
        raise ValueError(
            f'label_similarity must return the shape {tuple(cosine.shape)}, '
            f'got {tuple(target.shape)}'
        )
    known = label.any(1)[:, None] & key_label.any(1)[None]
    return target.to(cosine.dtype).where(known, 0), known


def _batch_bias(
    logits: Tensor, target: Tensor, known: Tensor, distributed: bool
) -> Tensor:
    """Find the bias of least binary cross entropy of known pairs.

    With it, the mean probability is the mean target: Newton's method within an interval
    that holds the solution, halved where a step would leave it.
    """
    logits = logits.detach()
    if distributed:
        # (B, N, 3): all pairs of all ranks, for a bias that is the same on each
        stacked = gather(torch.stack([logits, target, known.to(logits)], -1))
        logits, target, known = stacked.unbind(-1)
        known = known > 0
    count = known.sum().clamp_min(1)
    mean = (target.sum() / count).clamp(1e-6, 1 - 1e-6)
    level = mean.logit()
    logits = logits.where(known, 0)
    low, high = level - logits.max(), level - logits.min()
    bias = level - logits.sum() / count
    for _ in range(_NEWTON_STEPS):
        share = (logits + bias).sigmoid().where(known, 0)
        gap = share.sum() / count - mean
        slope = (share * (1 - share)).sum() / count
        low, high = low.where(gap > 0, bias), high.where(gap <= 0, bias)
        step = bias - gap / slope.clamp_min(torch.finfo(slope.dtype).tiny)
        inside = (step > low) & (step < high)
        bias = step.where(inside, (low + high) / 2)
    return bias


def _entropy(share: Tensor) -> Tensor:
    """Return the entropy of probabilities of one of two events, elementwise."""
    share = share.clamp(0, 1)
    return torch.special.entr(share) + torch.special.entr(1 - share)


def _pearson(
    first: Tensor, second: Tensor, counted: Tensor, distributed: bool = False
) -> Tensor:
    """Correlate two tensors where *counted*; 0 if one of them does not vary."""

    def mean(*values: Tensor) -> Tensor:
        sums = [x.where(counted, 0).sum() for x in values]
        stacked = torch.stack([*sums, counted.sum().to(first)])
        total = _add_up(stacked, distributed)
        return total[:-1] / total[-1].clamp_min(1)

    # Moments about the means do not change with these, so they need no gradient
    a, b = mean(first, second).detach()
    x, y = first - a, second - b
    both, square, other = mean(x * y, x.square(), y.square())
    # Far above rounding, far below what varies
    return both / (square * other).clamp_min(torch.finfo(first.dtype).eps).sqrt()


def _ranks(values: Tensor, counted: Tensor) -> Tensor:
    """Rank values among those *counted*, equal ones by the mean of their ranks."""
    flat = values.where(counted, math.inf).flatten()
    ordered = flat.sort().values
    low = torch.searchsorted(ordered, flat)
    high = torch.searchsorted(ordered, flat, right=True)
    return ((low + high).to(values.dtype) / 2).view_as(values)


class SoftLabelLoss(nn.Module):
    r"""Disagreement of similarities of embeddings with those of labels.

    With :math:`c_{ij}` the cosine of query :math:`i` and key :math:`j`, and
    :math:`s_{ij} \in [0, 1]` the similarity of their labels, over all pairs whose labels
    are both known (an all-zero label means *unknown*). *soft_loss* is one of

    * ``'bce'``: binary cross entropy of :math:`s_{ij}` and the sigmoid of
      :math:`c_{ij} / \tau_s + b`,
    * ``'mse'``: :math:`(c_{ij} + b - s_{ij})^2`, without temperature,
    * ``'cross_entropy'``: cross entropy between the softmax of :math:`c_{ij} / \tau_s`
      over the known keys and :math:`s_{ij}` scaled to a sum of 1 per row, averaged over
      rows. InfoNCE if no two images share a label. Of many keys that share some label,
      the own image gets next to nothing (0.7 % of 256): *target_temperature* sharpens,
    * ``'correlation'``: one minus Pearson's correlation of :math:`c_{ij}` and
      :math:`s_{ij}` over pairs of different images. Has neither level nor scale.

    *soft_bias* is the bias :math:`b`, for the level of similarities, which labels do not
    tell. With ``'none'``, 0, as the paper draws it, half of the gradient of ``'bce'``
    at the start pulls all images towards one level. With ``'batch'``, it is the bias of
    least loss for the batch, so that the gradient sums to zero over pairs and knows
    nothing but differences of labels (``'mse'``: both similarities minus their means).
    ``'learned'`` makes scale and bias parameters, as in SigLIP
    (https://arxiv.org/abs/2303.15343), which AdamW moves by about the learning rate.

    *soft_reduction* is the mean over ``'pairs'``, with which a gradient becomes smaller
    the larger the batch, or ``'rows'``, the sum over keys averaged over queries: N times
    as much for N keys, whatever the batch.
    """

    def __init__(
        self,
        temperature: float = 0.2,
        soft_loss: SoftLoss = 'bce',
        label_similarity: Literal['cosine', 'jaccard'] | LabelSimilarity = 'cosine',
        soft_bias: SoftBias = 'none',
        soft_reduction: SoftReduction = 'pairs',
        target_temperature: float | None = None,
        gather_distributed: bool = False,
    ) -> None:
        """Initialize a new SoftLabelLoss instance.

        Args:
            temperature: Temperature of the similarities of embeddings, at the start if it
                is learned.
            soft_loss: Form of the term.
            label_similarity: ``'cosine'``, ``'jaccard'``, or a function from labels (B, K)
                and (N, K) to similarities (B, N).
            soft_bias: Bias of the similarities of embeddings.
            soft_reduction: Mean over pairs, or over rows of sums.
            target_temperature: Temperature of the targets of ``'cross_entropy'``.
            gather_distributed: Whether to compare with the keys of all ranks. Losses are
                then those of the whole batch, and so are averages of gradients over ranks.

        Raises:
            ValueError: If options are unknown, out of range or do not fit each other.
        """
        check_types(SoftLabelLoss.__init__, locals())
        check_positive(temperature=temperature, target_temperature=target_temperature)
        forms = _BIASED.get(soft_bias, (soft_loss,))
        require(
            soft_loss in forms,
            f'soft_bias = {soft_bias!r} is for soft_loss = {forms}, got {soft_loss!r}',
        )
        require(
            target_temperature is None or soft_loss == 'cross_entropy',
            f"target_temperature is for soft_loss = 'cross_entropy', got {soft_loss!r}",
        )
        super().__init__()
        self.temperature = temperature
        self.soft_loss = soft_loss
        self.label_similarity = label_similarity
        self.soft_bias = soft_bias
        self.soft_reduction = soft_reduction
        self.target_temperature = target_temperature
        self.gather_distributed = gather_distributed
        if soft_bias == 'learned':
            self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
            self.bias = nn.Parameter(torch.zeros(()))

    def forward(
        self, query: Tensor, key: Tensor, label: Tensor, key_label: Tensor | None = None
    ) -> Tensor:
        """Compute the loss.

        Args:
            query: Embeddings of the trainable branch, shape (B, D), of any length.
            key: Embeddings of the EMA branch, shape (B, D), usually detached.
            label: Non-negative multi-hot labels or class fractions, shape (B, K). Fractions
                spread the similarities more.
            key_label: Labels of the keys, shape (B, K). Defaults to *label*.

        Returns:
            Scalar loss, in float32 (float64 for float64 input) with autocast off.

        Raises:
            ValueError: If shapes disagree.
        """
        distributed = self.gather_distributed and dist.world_size() > 1
        with torch.autocast(query.device.type, enabled=False):
            cosine, own = compare_embeddings(query, key, distributed)
            pairs = compare_labels(label, key_label, cosine, self.label_similarity)
            return self._terms(cosine, *pairs, own, distributed)[0]

    @torch.no_grad()
    def agreement(
        self, query: Tensor, key: Tensor, label: Tensor, key_label: Tensor | None = None
    ) -> LabelAgreement:
        """Measure the agreement on the first 256 images of a rank.

        Takes the arguments of :meth:`forward`. Does not wait for the device.
        """
        part = slice(_RANKED)
        other = None if key_label is None else key_label[part]
        with torch.autocast(query.device.type, enabled=False):
            cosine, own = compare_embeddings(query[part], key[part], False)
            target, known = compare_labels(
                label[part], other, cosine, self.label_similarity
            )
            loss, chance, floor = self._terms(cosine, target, known, own)
            # Contrast alone makes an image similar to itself
            counted = known & ~torch.eye(len(own), dtype=torch.bool, device=own.device)
            # What is equal is equal, whatever the rounding of a processor says
            equal = cosine.round(decimals=5), target.round(decimals=4)
            ranks = [_ranks(x, counted) for x in equal]
            correlation = _pearson(ranks[0], ranks[1], counted)
        reach = chance - floor
        explained = ((chance - loss) / reach).where(reach > 1e-6, 0)
        return LabelAgreement(correlation, explained, chance, floor)

    def _terms(
        self,
        cosine: Tensor,
        target: Tensor,
        known: Tensor,
        own: Tensor,
        distributed: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the term over known pairs, of the best constant, and of the labels."""
        if self.soft_loss == 'correlation':
            keys = torch.arange(cosine.shape[1], device=own.device)
            others = known & (own[:, None] != keys)
            loss = 1 - _pearson(cosine, target, others, distributed)
            # Without a single pair, there is nothing to agree with
            loss = loss * _add_up(others.any().to(loss), distributed).clamp(max=1)
            return loss, torch.ones_like(loss), torch.zeros_like(loss)

        counted = known
        mean = target.sum() / known.sum().clamp_min(1)
        if self.soft_loss == 'bce':
            logits = cosine / self.temperature
            if self.soft_bias == 'learned':
                logits = cosine * self.log_scale.exp() + self.bias
            elif self.soft_bias == 'batch':
                logits = logits + _batch_bias(logits, target, known, distributed)
            losses = F.binary_cross_entropy_with_logits(
                logits, target, reduction='none'
            )
            chance, floor = _entropy(mean).expand_as(target), _entropy(target)
        elif self.soft_loss == 'mse':
            gap = cosine - target
            if self.soft_bias == 'batch':
                parts = torch.stack([gap.where(known, 0).sum(), known.sum().to(gap)])
                total, count = _add_up(parts.detach(), distributed)
                gap = gap - total / count.clamp_min(1)
            losses, chance = gap.square(), (target - mean).square()
            floor = torch.zeros_like(target)
        else:
            # The lowest finite number, because the softmax of a row of -inf is NaN
            lowest = torch.finfo(cosine.dtype).min
            logits = (cosine / self.temperature).where(known, lowest)
            if self.target_temperature is None:
                shares = target / target.sum(1, keepdim=True).clamp_min(1e-12)
            else:
                scaled = target / self.target_temperature
                shares = scaled.where(known, lowest).softmax(1)
            losses = -shares * F.log_softmax(logits, dim=1)
            chance = shares * known.sum(1, keepdim=True).clamp_min(1).log()
            floor = torch.special.entr(shares)
        if self.soft_loss == 'cross_entropy' or self.soft_reduction == 'rows':
            counted = known.any(1)

        sums = [x.where(known, 0).sum() for x in (losses, chance, floor)]
        # Ranks may know different numbers of labels
        parts = torch.stack([*sums, counted.sum().to(losses)])
        loss, best, least, count = _add_up(parts, distributed)
        count = count.clamp_min(1e-12)
        return loss / count, best / count, least / count


def soft_label_loss(
    query: Tensor,
    key: Tensor,
    label: Tensor,
    key_label: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute :class:`SoftLabelLoss`, whose arguments are the *options*."""
    loss: Tensor = SoftLabelLoss(**options)(query, key, label, key_label)
    return loss
