# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The one way from samples to features, labels and scores."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from .._compat import BaseDataModule, Sample
from ..datamodules.protocol import eval_transform, offer_of
from .features import encode, prepare, resize
from .footprints import assign_folds
from .probes import evaluate, knn_scores, linear_scores, score_spread

Transform = Callable[[Sample], Sample]

#: Parts of the cross-validation of samples that have no queries of their own.
FOLDS = 4


def batch_transform(
    datamodule: LightningDataModule, stage: RunningStage = RunningStage.VALIDATING
) -> Transform | None:
    """Return what a datamodule does to a batch on the device in a stage of a trainer.

    Its hook ``on_after_batch_transfer`` if it overrides that, else the transform that
    TorchGeo's hook would choose, of nothing but images: names of reference systems fail
    in it.
    """
    standard = (LightningDataModule, BaseDataModule)
    hook = type(datamodule).on_after_batch_transfer
    if hook not in [base.on_after_batch_transfer for base in standard]:
        return partial(_run_hook, datamodule, stage)
    aug = eval_transform(datamodule)
    if stage == RunningStage.PREDICTING:
        offer = offer_of(datamodule)
        aug = offer.aug if offer.predict_aug is None else offer.predict_aug
    if aug is None:
        return None
    return lambda batch: aug({'image': batch['image'].float()})


def make_runner(**options: Any) -> Trainer:
    """Return a trainer that writes nothing, for its device, precision and bar."""
    quiet = {'logger': False, 'enable_checkpointing': False, 'devices': 1}
    return Trainer(**{**quiet, **options})


def _run_hook(
    datamodule: LightningDataModule, stage: RunningStage, batch: Sample
) -> Sample:
    """Run the hook of a datamodule as a trainer does, whose stage TorchGeo's asks for."""
    if datamodule.trainer is None:
        datamodule.trainer = make_runner()
    state = datamodule.trainer.state
    before, state.stage = state.stage, stage
    try:
        hooked: Sample = datamodule.on_after_batch_transfer(batch, 0)
    finally:
        state.stage = before
    return hooked


class Encoded(NamedTuple):
    """A batch, and what an encoder makes of it."""

    batch: Sample  # as it was read, with what the datamodule has changed
    image: Tensor  # as the datamodule gives it to a task, shape (B, ...)
    features: dict[str, Tensor]  # float32 (B, F) by name, of several seasons their mean


def encode_batches(
    encoder: nn.Module,
    batches: Iterable[Sample],
    transform: Transform | None,
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
        batches: Batches with *image* of the shapes of :func:`.prepare`.
        transform: Function of a batch on *device*, see :func:`batch_transform`.
        in_channels: See :func:`.prepare`, as for *size* and *view*.
        size: Side of the images that the encoder sees in pixels, None for no change.
        device: Where to compute.
        dtype: Type of the images that the encoder sees.
        view: Brings images to *size*.
        encode: Gives features by name.
    """
    for batch in batches:
        moved = {
            key: move_data_to_device(value, device)
            for key, value in batch.items()
            # Places are no data, as in TorchGeo 0.8
            if isinstance(value, Tensor) or key not in ('crs', 'bounds')
        }
        if transform is not None:
            moved = transform(moved)
            batch = {**batch, **moved}
        image = moved['image'].float()
        pixels, seasons = prepare(image, in_channels, size, view=view)
        features = {
            name: value.float().unflatten(0, (-1, seasons)).mean(1)
            for name, value in encode(encoder, pixels.to(dtype)).items()
        }
        yield Encoded(batch, image, features)


class LabelledFeatures(NamedTuple):
    """Features of images whose label is known."""

    features: dict[str, Tensor]  # (N, F) by name
    labels: Tensor  # class indices (N,), or multi-hot labels (N, K)
    places: Tensor  # number of the place of each image from 0, (N,)

    def only(self, chosen: Tensor) -> 'LabelledFeatures':
        """Return the images of a mask (N,)."""
        features = {name: value[chosen] for name, value in self.features.items()}
        return LabelledFeatures(features, self.labels[chosen], self.places[chosen])


def collect_labelled(
    encoded: Iterable[Encoded],
    name: str,
    device: str | torch.device,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
    places: Tensor | None = None,
) -> LabelledFeatures:
    """Keep the features and labels of all images but those with unknown (zero) labels.

    On *device*, of all ranks if *gather* joins their values. *places* numbers the place
    of each of all images, by default every image is a place of its own.
    """
    columns = defaultdict(list)
    for batch, _, features in encoded:
        for key, value in {**features, 'label': batch['label']}.items():
            columns[key].append(value.to(device))
    values = {key: gather(torch.cat(column)) for key, column in columns.items()}
    labels = values.pop('label')
    places = torch.arange(len(labels)) if places is None else places
    found = LabelledFeatures(values, labels, places.to(labels.device))
    if labels.ndim == 2:
        found = found.only(labels.any(1))
    for key, value in found.features.items():
        bad = int((~value.isfinite()).any(1).sum())
        if bad:
            raise ValueError(
                f'{bad} of {len(value)} features of the {name} ({key}) are NaN or '
                'infinite. Look for NaN pixels in the images, and in a training, lower lr '
                'if train_loss is not finite either'
            )
    return found


class Score(NamedTuple):
    """How well one classifier finds the labels."""

    method: str  # 'chance', 'knn' or 'linear'
    k: int | None  # number of neighbours
    feature: str  # name of the features, '' for 'chance'
    metric: str  # 'accuracy', or for multi-labels 'map' or 'micro_map'
    value: float
    spread: float = math.nan  # see score_spread, NaN if it is not estimated


def score_probes(
    bank: LabelledFeatures,
    queries: LabelledFeatures | None,
    k: Sequence[int],
    temperature: float,
    linear: bool = True,
    micro: bool = True,
) -> Iterator[Score]:
    """Classify queries by the features and labels of a bank.

    By *k* nearest neighbours, by a *linear* classifier, and by chance, which knows the
    frequencies of the classes only, of all features. With *micro* also scored by the
    average precision over all pairs of an image and a class.

    Without *queries*, those of the bank are divided by place into four parts, and each
    part is classified by the others.
    """
    splits = [(bank, queries)] if queries is not None else list(_folds(bank))
    answers = torch.cat([part.labels for _, part in splits])
    places = torch.cat([part.places for _, part in splits])
    multi = answers.ndim == 2
    classes = 0 if multi else int(max(bank.labels.max(), answers.max())) + 1

    def hot(part: LabelledFeatures) -> Tensor:
        return (part.labels if multi else F.one_hot(part.labels, classes)).float()

    def vote(classify: Callable[..., Tensor], name: str, *args: Any) -> Tensor:
        scores = [
            classify(part.features[name], rest.features[name], hot(rest), *args)
            for rest, part in splits
        ]
        return torch.cat(scores)

    def classify() -> Iterator[tuple[str, int | None, str, Tensor]]:
        yield 'chance', None, '', hot(bank).mean(0).expand(len(answers), -1)
        for count in k:
            for name in bank.features:
                if name != 'blocks':  # for linear classifiers, as in DINO
                    yield 'knn', count, name, vote(knn_scores, name, count, temperature)
        for name in bank.features if linear else ():
            yield 'linear', None, name, vote(linear_scores, name)

    for method, count, name, scores in classify():
        metric = 'map' if multi else 'accuracy'
        value, spread = evaluate(scores, answers), math.nan
        if method != 'chance':
            spread = score_spread(scores, answers, places)
        yield Score(method, count, name, metric, value, spread)
        if multi and micro:
            value = evaluate(scores, answers, 'micro')
            yield Score(method, count, name, 'micro_map', value)


def _folds(
    bank: LabelledFeatures,
) -> Iterator[tuple[LabelledFeatures, LabelledFeatures]]:
    """Divide by place: what is known, and what is asked for, of each part."""
    fold = assign_folds(bank.places, min(FOLDS, len(bank.places.unique())))
    for number in range(int(fold.max()) + 1):
        yield bank.only(fold != number), bank.only(fold == number)
