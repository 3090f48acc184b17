# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SoftCon's loss: instance discrimination plus agreement with label similarities."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import (
    check_fractions,
    check_not_negative,
    check_positive,
    check_types,
    require,
)
from .soft_labels import (
    LabelSimilarity,
    SoftLabelLoss,
    compare_embeddings,
    compare_labels,
)

#: Options of known forms of the loss, for :class:`SoftContrastiveLoss` and
#: :class:`.SoftConTask`: the paper's as far as it is known, with the weight of the task,
#: and that of ws-MulSupCon, which restates it.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        'softcon': {'temperature': 0.2, 'soft_loss': 'bce', 'soft_weight': 30.0},
        'ws_mulsupcon': {
            'temperature': 0.1,
            'soft_temperature': 1.0,
            'soft_loss': 'bce',
            'soft_weight': 0.1,
        },
    }
)


class SoftContrastiveTerms(NamedTuple):
    """The two parts of the loss, both scalars."""

    #: InfoNCE between every query and its own key.
    contrast: Tensor

    #: Disagreement of embedding similarities with label similarities.
    soft: Tensor


def soft_contrastive_loss(
    query: Tensor,
    key: Tensor,
    label: Tensor | None,
    key_label: Tensor | None = None,
    **options: Any,
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
    choice: its targets are probabilities as the label similarities are; ws-MulSupCon,
    which restates the loss, has the same form with other numbers
    (``PRESETS['ws_mulsupcon']``). 0.2 is the temperature of the same authors' MoCo runs on
    SSL4EO-S12. Because it is a mean over pairs, the soft term weighs less the larger the
    batch: with random embeddings (D = 256, 11 classes), its gradient has 9 % of the norm
    of the contrastive one for B = 16 and 3 % for B = 128 (``'cross_entropy'``: 27 % and
    9 %). At :math:`\lambda = 1`, the default of this function, training hardly notices it.
    :class:`~torchgeo_softcon.SoftConTask` has a default of 30. :class:`SoftLabelLoss` has
    other forms of :math:`\ell`.

    With ``gather_distributed=True``, the average of the losses (and gradients) of all
    ranks is that of the whole batch. All ranks must have batches of one size.

    If you use this loss in your research, please cite the following paper:

    * https://arxiv.org/abs/2405.20462

    Args:
        query: Embeddings of the trainable branch, shape (B, D), of any length.
        key: Embeddings of the EMA branch, shape (B, D), usually detached.
        label: Non-negative multi-hot labels or class fractions of the queries, shape
            (B, K). May be None if *soft_weight* is 0.
        key_label: Labels of the keys, shape (B, K), if those are other images, such as
            another season. Defaults to *label*.
        **options: Arguments of :class:`SoftContrastiveLoss`: *temperature* :math:`\tau`,
            *soft_temperature* :math:`\tau_s`, *soft_weight* :math:`\lambda` (with 0, this
            is InfoNCE), *same_label_weight*, and those of :class:`SoftLabelLoss`.

    Returns:
        Scalar loss, computed in float32 (float64 for float64 input) with autocast off.

    Raises:
        ValueError: If shapes disagree, an option is unknown, or *label* is missing.
    """
    loss: Tensor = SoftContrastiveLoss(**options)(query, key, label, key_label)
    return loss


def soft_contrastive_terms(
    query: Tensor,
    key: Tensor,
    label: Tensor | None,
    key_label: Tensor | None = None,
    **options: Any,
) -> SoftContrastiveTerms:
    """Compute both terms of :func:`soft_contrastive_loss`, to weight or log them apart.

    The soft term is 0 if *label* is None.
    """
    return SoftContrastiveLoss(**options).terms(query, key, label, key_label)


class SoftContrastiveLoss(nn.Module):
    """Module form of :func:`soft_contrastive_loss`, with its options checked once."""

    def __init__(
        self,
        temperature: float = 0.2,
        soft_temperature: float | None = None,
        soft_weight: float = 1.0,
        label_similarity: Literal['cosine', 'jaccard'] | LabelSimilarity = 'cosine',
        gather_distributed: bool = False,
        same_label_weight: float = 1.0,
        **options: Any,
    ) -> None:
        """Initialize a new SoftContrastiveLoss instance.

        Args:
            temperature: Temperature of the contrastive term.
            soft_temperature: Temperature of the soft term, *temperature* if None.
            soft_weight: Weight of the soft term.
            label_similarity: Similarity of two labels, a name or a function.
            gather_distributed: Compare with the keys of all ranks.
            same_label_weight: Weight of other images with exactly the labels of the query
                among the keys of the contrastive term, whose sum of exponentials they
                enter: 1 as in InfoNCE, 0 leaves them out. Around Delhi, 9 % of all pairs are
                such, which the two terms pull in opposite directions.
            **options: *soft_loss*, *soft_bias*, *soft_reduction* and *target_temperature*
                of :class:`SoftLabelLoss`.

        Raises:
            TypeError: If an option is unknown.
            ValueError: If an option is out of range.
        """
        check_types(SoftContrastiveLoss.__init__, locals())
        check_positive(temperature=temperature, soft_temperature=soft_temperature)
        check_not_negative(soft_weight=soft_weight)
        check_fractions(same_label_weight=same_label_weight)

        super().__init__()
        self.soft_weight = soft_weight
        self.temperature = temperature
        self.label_similarity = label_similarity
        self.gather_distributed = gather_distributed
        self.same_label_weight = same_label_weight
        #: The soft term, without its weight.
        self.soft = SoftLabelLoss(
            temperature if soft_temperature is None else soft_temperature,
            label_similarity=label_similarity,
            gather_distributed=gather_distributed,
            **options,
        )

    def terms(
        self,
        query: Tensor,
        key: Tensor,
        label: Tensor | None = None,
        key_label: Tensor | None = None,
        soft_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> SoftContrastiveTerms:
        """Compute both terms without their weight: :func:`soft_contrastive_terms`.

        The soft term compares *soft_embeddings* instead of *query* and *key*, if given.
        """
        contrast = self._contrast(query, key, label, key_label)
        soft = contrast.new_zeros(())
        if label is not None and self.soft_weight:
            soft = self.soft(*(soft_embeddings or (query, key)), label, key_label)
        return SoftContrastiveTerms(contrast, soft)

    def _contrast(
        self, query: Tensor, key: Tensor, label: Tensor | None, key_label: Tensor | None
    ) -> Tensor:
        """Compute InfoNCE, in which keys with the labels of the query may weigh less."""
        with torch.autocast(query.device.type, enabled=False):
            cosine, own = compare_embeddings(query, key, self.gather_distributed)
            logits = cosine / self.temperature
            weight = self.same_label_weight
            if weight < 1 and label is not None:
                target, _ = compare_labels(
                    label, key_label, cosine, self.label_similarity
                )
                # Up to rounding. Not those of the own key, nor unknown ones, which are 0
                same = (target > 1 - 1e-5).scatter(1, own[:, None], False)
                log = math.log(weight) if weight else -math.inf
                logits = (logits + log).where(same, logits)
            return F.cross_entropy(logits, own)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        label: Tensor | None = None,
        key_label: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss, see :func:`soft_contrastive_loss`."""
        require(
            label is not None or self.soft_weight == 0,
            f'label must be given if soft_weight > 0, got {self.soft_weight}',
        )
        terms = self.terms(query, key, label, key_label)
        return terms.contrast + self.soft_weight * terms.soft
