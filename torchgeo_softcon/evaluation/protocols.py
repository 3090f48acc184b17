# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Frozen features as papers and benchmarks evaluate them, for comparable figures."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor

from .._checks import check_choice
from ..models.encoders import Encoder
from ..transforms.views import center_view
from .evaluate import encode_splits, open_splits
from .features import resize
from .probes import evaluate, knn_scores

#: Names of the protocols, see :func:`evaluate_protocol`.
Protocol = Literal['softcon', 'dino', 'torchgeo-bench', 'copernicus-bench']

#: Strengths of the logistic regression to choose from, and resamples of the bootstrap.
#: https://github.com/torchgeo/torchgeo-bench (0.4, conf/config.yaml)
_STRENGTHS = np.logspace(-6, 4, 40)
_RESAMPLES = 200


class _Steps(NamedTuple):
    """Steps of a protocol. Features are the encoder's own where it lacks those of a name."""

    linear: str  # features of the linear classifier
    k: int | None  # number of neighbours, None for no k-NN
    neighbours: str  # features of the neighbours
    vote: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    view: Callable[[Tensor, int], Tensor]  # brings images to the size of the encoder


def evaluate_protocol(
    encoder: Encoder,
    datamodule: LightningDataModule,
    protocol: Protocol,
    size: int | None = None,
    seed: int = 0,
    device: str | torch.device = 'cpu',
) -> dict[str, float]:
    """Evaluate frozen features on the test split by a published protocol.

    All fit a logistic regression by L-BFGS, whose strength the validation split chooses
    and which is fitted again to both splits, as torchgeo-bench does. (Its optimum is what
    the papers approach by gradient descent.) Scores are the accuracy, or the micro average
    precision of multi-labels, with a bootstrap interval of 95 %.

    * ``'softcon'``: class tokens of the last four blocks of a ViT, pooled features of
      others; resize and centre crop
    * ``'dino'``: the same, and 20 neighbours by cosine with weights, of the class token
    * ``'torchgeo-bench'``: the encoder's own features, and 5 neighbours by Euclidean
      distance with one vote each; images resized to 224 pixels, without antialiasing
    * ``'copernicus-bench'``: the same of the mean of the patch tokens, with antialiasing

    Images without a label are left out; torchgeo-bench itself counts them as negatives.

    Args:
        encoder: The encoder.
        datamodule: Labelled data with training, validation and test splits.
        protocol: Its name.
        size: Side of the images in pixels. Defaults to that of the training, or 224.
        seed: Seed of the bootstrap.
        device: Where to compute features.

    Returns:
        Scores by names such as ``knn5_accuracy``, ``knn5_accuracy_low`` and
        ``knn5_accuracy_high``, ``linear_accuracy``, ..., and ``linear_c``.
    """
    check_choice('protocol', protocol, [*_PROTOCOLS])
    steps = _PROTOCOLS[protocol]
    samples = open_splits(encoder, datamodule, 'train', 'val', 'test')
    features, values = encode_splits(encoder, samples, size, device, steps.view)
    train, val, test = features.values()
    own = next(iter(train.features))
    if steps.k is not None:
        name = steps.neighbours if steps.neighbours in train.features else own
        labels = train.labels if train.labels.ndim == 2 else F.one_hot(train.labels)
        k = min(steps.k, len(labels))
        scores = steps.vote(test.features[name], train.features[name], labels, k)
        values |= _rate(f'knn{steps.k}', scores, test.labels, seed)
    name = steps.linear if steps.linear in train.features else own
    strength = choose_strength(
        train.features[name], train.labels, val.features[name], val.labels
    )
    both = torch.cat([train.features[name], val.features[name]])
    labels = torch.cat([train.labels, val.labels])
    scores = logistic_scores(test.features[name], both, labels, strength, 4000)
    values |= _rate('linear', scores, test.labels, seed)
    return {**values, 'linear_c': strength}


def majority_scores(
    queries: Tensor, bank: Tensor, labels: Tensor, k: int = 5
) -> Tensor:
    """Return the share of the *k* nearest features that have each class, (Q, K).

    By Euclidean distance; shapes are those of :func:`.knn_scores`.
    """
    nearest = [
        torch.cdist(chunk, bank).topk(k, largest=False).indices
        for chunk in queries.float().split(1024)
    ]
    return labels.float()[torch.cat(nearest)].mean(1)


def logistic_scores(
    queries: Tensor, bank: Tensor, labels: Tensor, strength: float, steps: int = 2000
) -> Tensor:
    r"""Return the probabilities of a logistic regression, (Q, K).

    It minimizes the mean cross-entropy (over classes, too, of multi-labels) plus
    :math:`\lVert W \rVert^2 / (2 C n)` by L-BFGS, from 0: scikit-learn's objective.

    Args:
        queries: Features of shape (Q, F).
        bank: Features of shape (N, F).
        labels: Class indices (N,), or multi-hot labels (N, K).
        strength: Inverse penalty :math:`C`.
        steps: Most iterations.
    """
    multi = labels.ndim == 2
    classes = labels.shape[1] if multi else int(labels.max()) + 1
    # Features may come from inference mode, and gradients need others
    bank, labels = bank.clone(), labels.clone()
    with torch.enable_grad():
        linear = torch.nn.Linear(bank.shape[1], classes)
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        penalty = 0.5 / strength / (labels.numel() if multi else len(labels))
        optimizer = torch.optim.LBFGS(
            linear.parameters(),
            max_iter=steps,
            history_size=10,
            line_search_fn='strong_wolfe',
            tolerance_grad=1e-7,
            tolerance_change=1e-7,
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            logits = linear(bank)
            if multi:
                loss = F.binary_cross_entropy_with_logits(logits, labels.float())
            else:
                loss = F.cross_entropy(logits, labels)
            loss = loss + penalty * linear.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        logits = linear(queries)
    return logits.sigmoid() if multi else logits.softmax(1)


def choose_strength(
    bank: Tensor, labels: Tensor, queries: Tensor, answers: Tensor
) -> float:
    """Return the strength of a logistic regression that finds most *answers*."""
    best, chosen = -1.0, None
    for strength in _STRENGTHS:
        scores = logistic_scores(queries, bank, labels, float(strength))
        score = evaluate(scores, answers, 'micro') if scores.isfinite().all() else -1
        if score > best:
            best, chosen = score, float(strength)
    if chosen is None:
        raise ValueError('no logistic regression of the features has finite scores')
    return chosen


def _rate(name: str, scores: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Rate scores, with the bounds of an interval of 95 % by bootstrap."""
    name += '_micro_map' if labels.ndim == 2 else '_accuracy'
    count = len(labels)
    drawn = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
    if labels.ndim == 1:
        # Of classes with the same votes, the first
        right = np.argmax(scores.numpy(), 1) == labels.numpy()
        value, values = float(right.mean()), right[drawn].mean(1).tolist()
    else:
        value = evaluate(scores, labels, 'micro')
        values = [
            evaluate(scores[chosen], labels[chosen], 'micro')
            for chosen in torch.from_numpy(drawn)
            if labels[chosen].any()
        ]
    low, high = np.percentile(values, (2.5, 97.5))
    return {name: value, f'{name}_low': float(low), f'{name}_high': float(high)}


_PROTOCOLS: dict[Protocol, _Steps] = {
    # Class tokens of the last four blocks; no k-NN in the paper
    'softcon': _Steps('blocks', None, '', knn_scores, center_view),
    'dino': _Steps('blocks', 20, 'cls', knn_scores, center_view),
    'torchgeo-bench': _Steps(
        '', 5, '', majority_scores, partial(resize, antialias=False)
    ),
    'copernicus-bench': _Steps('mean', 5, 'mean', majority_scores, resize),
}
