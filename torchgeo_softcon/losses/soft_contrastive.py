# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SoftCon's loss: instance discrimination plus agreement with label similarities."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from lightly.utils import dist
from torch import Tensor, nn

from .._checks import check_choice, check_not_negative, check_positive, check_types

#: Maps labels of shape (B, K) and (N, K) to similarities in [0, 1] of shape (B, N).
LabelSimilarity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
SoftLoss: TypeAlias = Literal['bce', 'cross_entropy', 'mse']


class SoftContrastiveTerms(NamedTuple):
    """The two parts of the loss, both scalars."""

    #: InfoNCE between every query and its own key.
    contrast: Tensor

    #: Disagreement of embedding similarities with label similarities.
    soft: Tensor


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

#: Options of the terms, which the module keeps as attributes.
_OPTIONS = (
    'temperature',
    'soft_temperature',
    'soft_loss',
    'label_similarity',
    'gather_distributed',
)


def _check_options(soft_loss: str, label_similarity: str | LabelSimilarity) -> None:
    """Check the options that are names."""
    check_choice('soft_loss', soft_loss, get_args(SoftLoss))
    if isinstance(label_similarity, str):
        names = list(_SIMILARITIES)
        check_choice('label_similarity', label_similarity, names, 'a function')


def _gather(x: Tensor) -> Tensor:
    """Concatenate a tensor of all ranks, with gradient where it has one."""
    if not x.requires_grad:
        # lightly's gather is an autograd function, which needs none of this
        out = [torch.empty_like(x) for _ in range(dist.world_size())]
        torch.distributed.all_gather(out, x.contiguous())
        return torch.cat(out)
    return torch.cat(dist.gather(x))


def soft_contrastive_terms(
    query: Tensor,
    key: Tensor,
    label: Tensor | None,
    key_label: Tensor | None = None,
    *,
    temperature: float = 0.2,
    soft_temperature: float | None = None,
    soft_loss: SoftLoss = 'bce',
    label_similarity: Literal['cosine', 'jaccard'] | LabelSimilarity = 'cosine',
    gather_distributed: bool = False,
) -> SoftContrastiveTerms:
    r"""Compute both terms of :func:`soft_contrastive_loss`, to weight or log them apart.

    Takes the arguments of that function but the weight.

    Returns:
        The contrastive and the soft term, which is 0 if *label* is None.

    Raises:
        ValueError: If shapes disagree or an option is unknown.
    """
    _check_options(soft_loss, label_similarity)
    if query.ndim != 2 or query.shape != key.shape:
        raise ValueError(
            'query and key must have the same shape (B, D), got '
            f'{tuple(query.shape)} and {tuple(key.shape)}'
        )

    # bfloat16 resolves logits near 1 / temperature only to a few per cent, hence float32
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        query = F.normalize(query.to(dtype), dim=1)
        key = F.normalize(key.to(dtype), dim=1)
        distributed = gather_distributed and dist.world_size() > 1
        if distributed:
            key = _gather(key)
        cosine = query @ key.T  # (B, N)

        own = torch.arange(len(query), device=query.device)
        own = own + (dist.rank() * len(query) if distributed else 0)
        contrast = F.cross_entropy(cosine / temperature, own)
        if label is None:
            return SoftContrastiveTerms(contrast, cosine.new_zeros(()))

        label, key_label = _check_labels(query, label, key_label)
        label, key_label = label.to(dtype), key_label.to(dtype)
        if distributed:
            key_label = _gather(key_label)
        similarity = _compare_labels(label, key_label, label_similarity)
        # An all-zero label means unknown. Its pairs are left out, not called dissimilar.
        known = label.any(1)[:, None] & key_label.any(1)[None]
        soft = _soft_term(
            cosine,
            similarity.where(known, 0),
            known,
            soft_loss,
            temperature if soft_temperature is None else soft_temperature,
            distributed,
        )
    return SoftContrastiveTerms(contrast, soft)


def _check_labels(
    query: Tensor, label: Tensor, key_label: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the shapes of labels and fill in those of the keys."""
    key_label = label if key_label is None else key_label
    if label.ndim != 2 or len(label) != len(query) or key_label.shape != label.shape:
        raise ValueError(
            f'label and key_label must both have the shape (B, K) with B = '
            f'{len(query)}, got {tuple(label.shape)} and {tuple(key_label.shape)}'
        )
    return label, key_label


def _compare_labels(
    label: Tensor, key_label: Tensor, similarity: str | LabelSimilarity
) -> Tensor:
    """Return the target similarities, shape (B, N)."""
    if isinstance(similarity, str):
        similarity = _SIMILARITIES[similarity]
    target = similarity(label, key_label)
    if target.shape != (len(label), len(key_label)):
        raise ValueError(
            f'label_similarity must return the shape {(len(label), len(key_label))}, '
            f'got {tuple(target.shape)}'
        )
    return target.to(label.dtype)


def _soft_term(
    cosine: Tensor,
    target: Tensor,
    known: Tensor,
    soft_loss: SoftLoss,
    temperature: float,
    distributed: bool,
) -> Tensor:
    """Return the mean disagreement over known pairs, or rows for cross entropy."""
    counted = known
    if soft_loss == 'bce':
        logits = cosine / temperature
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction='none')
    elif soft_loss == 'mse':
        losses = (cosine - target).square()
    else:
        # The lowest finite number, because the softmax of a row of -inf is NaN
        logits = (cosine / temperature).where(known, torch.finfo(cosine.dtype).min)
        shares = target / target.sum(1, keepdim=True).clamp_min(1e-12)
        losses = -shares * F.log_softmax(logits, dim=1)
        counted = known.any(1)

    count = counted.sum().to(cosine.dtype)
    if distributed:
        # Ranks may know different numbers of labels. With the mean count, the average
        # over ranks that DDP takes is the mean over all pairs of the whole batch.
        torch.distributed.all_reduce(count)
        count = count / dist.world_size()
    return losses.where(known, 0).sum() / count.clamp_min(1e-12)


def soft_contrastive_loss(
    query: Tensor,
    key: Tensor,
    label: Tensor | None,
    key_label: Tensor | None = None,
    *,
    temperature: float = 0.2,
    soft_temperature: float | None = None,
    soft_weight: float = 1.0,
    soft_loss: SoftLoss = 'bce',
    label_similarity: Literal['cosine', 'jaccard'] | LabelSimilarity = 'cosine',
    gather_distributed: bool = False,
) -> Tensor:
    r"""Compute SoftCon's loss: contrastive, with soft targets from multi-labels.

    With unit vectors :math:`q_i` and :math:`k_j`, and :math:`s_{ij} \in [0, 1]` the
    similarity of the labels of image :math:`i` and image :math:`j`:

    .. math::

        \mathcal{L} = -\frac{1}{B} \sum_i
        \log \frac{\exp(q_i^\top k_i / \tau)}{\sum_j \exp(q_i^\top k_j / \tau)}
        + \lambda \, \frac{1}{|P|} \sum_{(i, j) \in P}
        \ell\left(q_i^\top k_j, s_{ij}\right)

    :math:`P` holds the pairs whose labels are both known: an all-zero label means
    *unknown*. The diagonal is part of it.

    The figure in the authors' repository shows the two terms and the label similarities
    in [0, 1]; that the latter are cosines is stated by others who describe the paper.
    The pretraining code was never released, and the form of :math:`\ell`,
    :math:`\lambda` and both temperatures could not be recovered. ``'bce'`` is our
    choice: its targets are probabilities as the label similarities are. 0.2 is the
    temperature of the same authors' MoCo runs on SSL4EO-S12. Because it is a mean over
    pairs, the soft term weighs less the larger the batch: with random embeddings
    (D = 256, 11 classes), its gradient has 9 % of the norm of the contrastive one for
    B = 16 and 3 % for B = 128 (``'cross_entropy'``: 27 % and 9 %). At
    :math:`\lambda = 1`, the default of this function, training hardly notices it.
    :class:`~torchgeo_softcon.SoftConTask` has a default of 30.

    * ``'bce'``: binary cross entropy between :math:`s_{ij}` and the sigmoid of
      :math:`q_i^\top k_j / \tau_s`,
    * ``'cross_entropy'``: cross entropy between the softmax over the known keys and
      :math:`s_{ij}` scaled to a sum of 1 per row, averaged over rows. It is InfoNCE
      if no two images share a label,
    * ``'mse'``: :math:`(q_i^\top k_j - s_{ij})^2`, without temperature.

    Under distributed training with ``gather_distributed=True``, the average of the
    losses (and gradients) of all ranks is that of the whole batch. All ranks must have
    batches of one size.

    If you use this loss in your research, please cite the following paper:

    * https://arxiv.org/abs/2405.20462

    Args:
        query: Embeddings of the trainable branch, shape (B, D), of any length.
        key: Embeddings of the EMA branch, shape (B, D), usually detached.
        label: Non-negative multi-hot labels or class fractions of the queries, shape
            (B, K). May be None if *soft_weight* is 0.
        key_label: Labels of the keys, shape (B, K), if those are other images, such as
            another season. Defaults to *label*.
        temperature: Temperature :math:`\tau` of the contrastive term.
        soft_temperature: Temperature :math:`\tau_s` of the soft term. Defaults to
            *temperature*.
        soft_weight: Weight :math:`\lambda` of the soft term. With 0, this is InfoNCE.
        soft_loss: Form :math:`\ell` of the soft term.
        label_similarity: ``'cosine'``, ``'jaccard'``, or a function from labels of
            shape (B, K) and (N, K) to similarities in [0, 1] of shape (B, N).
        gather_distributed: Compare with the keys of all ranks.

    Returns:
        Scalar loss, computed in float32 (float64 for float64 input) with autocast off.

    Raises:
        ValueError: If shapes disagree, an option is unknown, or *label* is missing.
    """
    if label is None and soft_weight > 0:
        raise ValueError(f'label must be given if soft_weight > 0, got {soft_weight}')

    terms = soft_contrastive_terms(
        query,
        key,
        label if soft_weight else None,
        key_label,
        temperature=temperature,
        soft_temperature=soft_temperature,
        soft_loss=soft_loss,
        label_similarity=label_similarity,
        gather_distributed=gather_distributed,
    )
    return terms.contrast + soft_weight * terms.soft


class SoftContrastiveLoss(nn.Module):
    """Module form of :func:`soft_contrastive_loss`, with its options checked once.

    If you use this loss in your research, please cite the following paper:

    * https://arxiv.org/abs/2405.20462
    """

    def __init__(
        self,
        temperature: float = 0.2,
        soft_temperature: float | None = None,
        soft_weight: float = 1.0,
        soft_loss: SoftLoss = 'bce',
        label_similarity: Literal['cosine', 'jaccard'] | LabelSimilarity = 'cosine',
        gather_distributed: bool = False,
    ) -> None:
        """Initialize a new SoftContrastiveLoss instance.

        Args:
            temperature: Temperature of the contrastive term.
            soft_temperature: Temperature of the soft term, *temperature* if None.
            soft_weight: Weight of the soft term.
            soft_loss: Form of the soft term.
            label_similarity: Similarity of two labels, a name or a function.
            gather_distributed: Compare with the keys of all ranks.

        Raises:
            ValueError: If an option is out of range or unknown.
        """
        check_types(SoftContrastiveLoss.__init__, locals())
        check_positive(temperature=temperature, soft_temperature=soft_temperature)
        check_not_negative(soft_weight=soft_weight)
        _check_options(soft_loss, label_similarity)

        super().__init__()
        self.soft_weight = soft_weight
        self.temperature = temperature
        self.soft_temperature = soft_temperature
        self.soft_loss: SoftLoss = soft_loss
        self.label_similarity = label_similarity
        self.gather_distributed = gather_distributed

    def _options(self) -> dict[str, Any]:
        """Return the options of :func:`soft_contrastive_terms`."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def terms(
        self,
        query: Tensor,
        key: Tensor,
        label: Tensor | None = None,
        key_label: Tensor | None = None,
    ) -> SoftContrastiveTerms:
        """Compute both terms without their weight: :func:`soft_contrastive_terms`."""
        label = label if self.soft_weight else None
        return soft_contrastive_terms(query, key, label, key_label, **self._options())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        label: Tensor | None = None,
        key_label: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss, see :func:`soft_contrastive_loss`."""
        return soft_contrastive_loss(
            query,
            key,
            label,
            key_label,
            soft_weight=self.soft_weight,
            **self._options(),
        )
