# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""How well frozen features tell labels: weighted k-NN and a linear probe."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

#: Queries whose similarities are held at a time.
_CHUNK = 1024

#: Penalties of the linear probe to choose from, in units of the variance of a feature.
_PENALTIES = tuple(10.0**exponent for exponent in range(-4, 5))


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    r"""Votes of the nearest neighbours of some features.

    The *k* features of the bank with the largest cosine similarity :math:`s_j` vote with
    weights proportional to :math:`\exp(s_j / \tau)`. The weights of a query sum to 1, so
    that scores of different queries can be compared. The class with the highest score
    is that of `lightly's knn_predict
    <https://docs.lightly.ai/self-supervised-learning/lightly.utils.html>`__. The
    defaults are among those of the DINO-MC and DINO code (k of 5, 10, 20 and more),
    https://github.com/facebookresearch/dino/blob/main/eval_knn.py.

    Args:
        queries: Features of shape (Q, F).
        bank: Features of shape (N, F).
        labels: Of the bank: multi-hot or one-hot, shape (N, K).
        k: Number of neighbours, at most N.
        temperature: Temperature :math:`\tau` of the weights.

    Returns:
        Scores in [0, 1] of shape (Q, K).

    Raises:
        ValueError: If *k* is larger than the bank.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(
            f'k must be from 1 to the number of labelled samples in the bank, '
            f'{len(bank)}, got {k}. Lower k, or give more labelled samples'
        )
    bank, labels = F.normalize(bank.float()), labels.float()
    scores = []
    for chunk in F.normalize(queries.float()).split(_CHUNK):
        similarity, index = (chunk @ bank.T).topk(k)  # (B, k)
        weight = (similarity / temperature).softmax(1)
        scores.append((weight[..., None] * labels[index]).sum(1))
    return torch.cat(scores)


def linear_scores(queries: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    """Scores of a linear classifier that is fitted to a bank of features.

    A ridge regression of the labels, in closed form: unlike logistic regression by
    gradient descent, it has nothing to tune, and is the same on every machine. Its
    penalty has the smallest leave-one-out error, in closed form, too. It ranks encoders
    as the longer procedures of the papers do, but its figures are not comparable.

    Shapes are those of :func:`knn_scores`. Scores are about 1 for a class that is there
    and 0 for one that is not.
    """
    # float64: the smallest penalty is far below the precision of float32
    bank, queries, target = bank.double(), queries.double(), labels.double()
    mean, std = bank.mean(0), bank.std(0, correction=0).clamp_min(1e-12)
    bank, queries = (bank - mean) / std, (queries - mean) / std
    offset = target.mean(0)

    left, values, right = torch.linalg.svd(bank, full_matrices=False)
    projected = left.T @ (target - offset)  # (R, K)
    best, weight = float('inf'), torch.empty(0)
    for penalty in _PENALTIES:
        shrink = values**2 / (values**2 + penalty * len(bank))  # (R,)
        residual = target - offset - left @ (shrink[:, None] * projected)
        # Share of a sample in its own prediction; 1 / N is that of the offset
        leverage = (left**2 @ shrink + 1 / len(bank)).clamp_max(1 - 1e-9)
        error = float((residual / (1 - leverage)[:, None]).square().mean())
        if error < best:
            best = error
            solution = (shrink / values.clamp_min(1e-12))[:, None] * projected
            weight = right.T @ solution  # (F, K)
    return (queries @ weight + offset).float()


def score_spread(
    scores: Tensor, labels: Tensor, places: Tensor, draws: int = 200
) -> float:
    """Estimate how much a score of :func:`evaluate` depends on the places of the queries.

    The standard deviation over bootstrap samples of places, as queries of one place are
    alike (cluster bootstrap, B. Efron and R. Tibshirani, An introduction to the
    bootstrap, 1993). The bank stays the same. NaN if all queries are of one place.

    Args:
        scores: Scores (Q, K).
        labels: Class indices (Q,), or multi-hot labels (Q, K).
        places: Number of the place of each query, from 0, shape (Q,).
        draws: Number of bootstrap samples.
    """
    scores, labels, places = scores.cpu(), labels.cpu(), places.cpu()
    count = int(places.max()) + 1
    there = torch.bincount(places, minlength=count) > 0
    if there.sum() < 2:
        return float('nan')
    generator = torch.Generator().manual_seed(0)
    chosen = there.float().expand(draws, -1)
    chosen = chosen.multinomial(int(there.sum()), True, generator=generator)
    weights = F.one_hot(chosen, count).sum(1)[:, places].double()  # (draws, Q)
    if labels.ndim == 1:
        right = (scores.argmax(1) == labels).double()
        return float(((weights @ right) / weights.sum(1)).std())
    precisions = []
    for score, label in zip(scores.T, labels.T, strict=True):
        order = score.argsort(descending=True)
        weight = weights[:, order]
        found = weight * label[order]
        precision = found.cumsum(1) / weight.cumsum(1).clamp_min(1)
        # NaN for a class that these places do not have
        precisions.append((precision * found).sum(1) / found.sum(1))
    return float(torch.stack(precisions).nanmean(0).std())


def evaluate(
    scores: Tensor, labels: Tensor, average: Literal['macro', 'micro'] = 'macro'
) -> float:
    """Rate scores (Q, K) by the metric that fits the labels.

    Accuracy of class indices (Q,), or average precision of multi-hot labels (Q, K):
    *macro* over the classes that some but not all queries have (mAP), *micro* over all
    pairs of a query and a class.
    """
    if labels.ndim == 1:
        return float((scores.argmax(1) == labels).float().mean())
    told_apart = (labels.amax(0) > 0) & (labels.amin(0) == 0)
    if not told_apart.any():
        raise ValueError(
            'labels must have a class that some but not all queries have, got '
            f'{len(labels)} queries with the same classes. Give more queries'
        )
    if average == 'macro':
        scores, labels = scores[:, told_apart], labels[:, told_apart]
    if labels.shape[1] == 1:  # torchmetrics wants at least two
        scores, labels = scores.expand(-1, 2), labels.expand(-1, 2)
    # torchmetrics takes scores outside of [0, 1] for logits, and saturates them
    scores = scores - scores.amin()
    precision = multilabel_average_precision(
        scores / scores.amax().clamp_min(1e-12),
        labels.long(),
        num_labels=labels.shape[1],
        average=average,
    )
    return float(precision)
