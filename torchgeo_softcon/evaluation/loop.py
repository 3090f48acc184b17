# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The one way from samples to features, labels and scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import Sample
from .features import encode, prepare, resize
from .probes import evaluate, knn_scores, linear_scores


class Encoded(NamedTuple):
    """A batch, and what an encoder makes of it."""

    #: The batch as it was read.
    batch: Sample
    #: Images as the datamodule gives them to a task, shape (B, ...).
    image: Tensor
    #: float32 features of shape (B, F) by name, of several seasons their mean.
    features: dict[str, Tensor]


def encode_batches(
    encoder: nn.Module,
    batches: Iterable[Sample],
    transform: Callable[[Sample], Sample] | None,
    in_channels: int | None,
    size: int | None,
    device: str | torch.device = 'cpu',
    dtype: torch.dtype = torch.float32,
    view: Callable[[Tensor, int], Tensor] = resize,
    encode: Callable[[nn.Module, Tensor], dict[str, Tensor]] = encode,
) -> Iterator[Encoded]:
    """Move, transform, split into seasons and encode batches, in their order.

    Args:
        encoder: A timm model on *device*, or any module from (B, C, H, W) to (B, F).
        batches: Batches with *image* of shape (B, C, H, W), (B, T * C, H, W) or
            (B, T, C, H, W).
        transform: Function of a batch with nothing but *image*, on *device*, such as the
            normalization of a datamodule.
        in_channels: Number of bands C of the encoder, None if it is not known.
        size: Side of the images that the encoder sees in pixels, None for no change.
        device: Where to compute.
        dtype: Type of the images that the encoder sees.
        view: Brings images to *size*.
        encode: Gives features by name.

    Yields:
        The batches with their features.
    """
    for batch in batches:
        image = batch['image'].to(device).float()
        if transform is not None:
            image = transform({'image': image})['image']
        pixels, seasons = prepare(image, in_channels, size, view=view)
        features = encode(encoder, pixels.to(dtype))
        yield Encoded(
            batch,
            image,
            {
                name: value.float().unflatten(0, (-1, seasons)).mean(1)
                for name, value in features.items()
            },
        )


class LabelledFeatures(NamedTuple):
    """Features of images whose label is known."""

    #: Features of shape (N, F) by name.
    features: dict[str, Tensor]
    #: Class indices of shape (N,), or multi-hot labels of shape (N, K).
    labels: Tensor


def collect_labelled(
    encoded: Iterable[Encoded],
    name: str,
    device: str | torch.device,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> LabelledFeatures:
    """Keep the features and labels of all images but those with unknown (zero) labels.

    Args:
        encoded: From :func:`encode_batches`.
        name: What messages call the data.
        device: Where to keep features and labels.
        gather: Joins the values of all ranks.

    Returns:
        Features and labels.

    Raises:
        ValueError: If a feature is NaN or infinite.
    """
    batches = [
        {
            key: value.to(device)
            for key, value in {**e.features, '': e.batch['label']}.items()
        }
        for e in encoded
    ]
    values = {key: gather(torch.cat([b[key] for b in batches])) for key in batches[0]}
    labels = values.pop('')
    if labels.ndim == 2:
        known = labels.any(1)
        labels = labels[known]
        values = {key: value[known] for key, value in values.items()}
    for key, value in values.items():
        bad = int((~value.isfinite()).any(1).sum())
        if bad:
            raise ValueError(
                f'{bad} of {len(value)} features of the {name} ({key}) are NaN or '
                'infinite. Look for NaN pixels in the images, and in a training, lower lr '
                'if train_loss is not finite either'
            )
    return LabelledFeatures(values, labels)


class Score(NamedTuple):
    """How well one classifier finds the labels."""

    #: ``'chance'``, which knows the frequencies of the classes only, ``'knn'`` or
    #: ``'linear'``.
    method: str
    #: Number of neighbours of ``'knn'``.
    k: int | None
    #: Name of the features, none for ``'chance'``.
    feature: str
    #: ``'accuracy'``, or for multi-labels ``'map'`` or ``'micro_map'``.
    metric: str
    value: float


def score_probes(
    bank: LabelledFeatures,
    queries: LabelledFeatures,
    k: Sequence[int],
    temperature: float,
    linear: bool = True,
    micro: bool = True,
) -> Iterator[Score]:
    """Classify queries by the features and labels of a bank.

    By *k* nearest neighbours, by a *linear* classifier, and by chance, of all features.
    With *micro* also scored by the average precision over all pairs of an image and a
    class.
    """
    labels, answers = bank.labels, queries.labels
    multi = labels.ndim == 2
    hot = labels.float()
    if not multi:
        hot = F.one_hot(labels, int(max(labels.max(), answers.max())) + 1).float()

    predictions: list[tuple[str, int | None, str, Tensor]] = [
        ('chance', None, '', hot.mean(0).expand(len(answers), -1))
    ]
    for count in k:
        predictions += [
            (
                'knn',
                count,
                name,
                knn_scores(queries.features[name], value, hot, count, temperature),
            )
            for name, value in bank.features.items()
            if name != 'blocks'  # for linear classifiers, see last_block_features
        ]
    if linear:
        predictions += [
            ('linear', None, name, linear_scores(queries.features[name], value, hot))
            for name, value in bank.features.items()
        ]
    metric = 'map' if multi else 'accuracy'
    for method, neighbours, name, scores in predictions:
        yield Score(method, neighbours, name, metric, evaluate(scores, answers))
        if multi and micro:
            value = evaluate(scores, answers, 'micro')
            yield Score(method, neighbours, name, 'micro_map', value)
