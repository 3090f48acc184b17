# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The images that a report shows."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from .._compat import Sample
from ..datamodules.normalization import match_images
from ..evaluation.embed import set_up
from ..evaluation.features import encode, prepare
from ..evaluation.samples import check_label, split_samples
from ..landcover import LandCoverProduct
from ..landcover.products import WORLDCOVER
from ..models.encoders import Encoder
from .pictures import Array, Display

#: Images that are encoded at a time.
_BATCH = 32

#: Side in pixels that images are shown with at most.
_THUMBNAIL = 96

#: Images that a held-out split must have not to be passed over for a larger one.
_ENOUGH = 50

#: Images that are kept as they are.
_KEPT = 10


@dataclass
class Gallery:
    """Some images with all that a report needs to know of them.

    Attributes:
        split: Which part of the data they are from.
        bands: Names of the bands, if they are known.
        show: How images are shown.
        features: Features of shape (N, F).
        labels: Class indices of shape (N,), multi-labels of shape (N, K), or None.
        thumbnails: Colours of all images.
        samples: The first of the samples, as the datamodule gives them.
        masks: Land cover of *samples*, codes of shape (H, W), or None.
        product: Land-cover product that the codes are of.
    """

    split: str
    bands: Sequence[str] | None
    show: Display
    features: Tensor
    labels: Tensor | None
    thumbnails: list[Array]
    samples: list[Sample]
    masks: list[Tensor] | None
    product: LandCoverProduct

    def labelled(self) -> tuple[Tensor, Tensor | None, list[Array]]:
        """Features, labels and thumbnails of the images whose label is known."""
        if self.labels is None or self.labels.ndim == 1:
            return self.features, self.labels, self.thumbnails
        known = self.labels.any(1)
        shown = [t for t, k in zip(self.thumbnails, known, strict=True) if k]
        return self.features[known], self.labels[known], shown


@torch.no_grad()
def collect(
    encoder: Encoder,
    datamodule: LightningDataModule,
    split: str | None = None,
    count: int = 200,
) -> Gallery:
    """Read and encode some images.

    Args:
        encoder: The encoder.
        datamodule: A TorchGeo datamodule.
        split: Either 'val', 'predict', 'test' or 'train'. By default, the first of them
            that has 50 images, or else the largest.
        count: Number of images, chosen at random, always the same.

    Returns:
        The images.

    Raises:
        ValueError: If there are fewer than two images.
    """
    split, dataset, indices = _split(datamodule, split, count)
    if len(indices) < 2:
        raise ValueError(
            f'a report needs at least 2 images, the {split} split has fewer'
        )
    match_images(datamodule, encoder.bands, encoder.unit_range)
    torch.manual_seed(0)
    chosen = [indices[i] for i in torch.randperm(len(indices))[:count]]
    aug: Any = getattr(datamodule, 'val_aug', None) or getattr(datamodule, 'aug', None)

    bands = getattr(dataset, 'bands', None) or getattr(
        getattr(dataset, 'scenes', None), 'bands', None
    )
    kept: list[Sample] = []
    small: list[Tensor] = []
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, len(chosen), _BATCH):
        samples = [dataset[i] for i in chosen[start : start + _BATCH]]
        images = torch.stack([sample['image'] for sample in samples]).float()
        if aug is not None:
            images = aug({'image': images})['image']
        if all('label' in sample for sample in samples):
            label = torch.stack([torch.as_tensor(s['label']) for s in samples])
            labels.append(check_label(label, f'{split} split'))
        for sample, image in zip(samples, images, strict=True):
            if len(kept) < _KEPT:
                kept.append({**sample, 'image': image})
        pixels, seasons = prepare(images, encoder.in_channels, encoder.size)
        pooled = next(iter(encode(encoder.model, pixels).values()))
        features.append(pooled.unflatten(0, (-1, seasons)).mean(1))
        first, _ = prepare(images, encoder.in_channels, None, first=True)
        small.append(_shrink(first))

    pictures = torch.cat(small)
    show = Display(pictures, bands)
    known = len(labels) == len(features)
    return Gallery(
        split,
        bands,
        show,
        torch.cat(features),
        torch.cat(labels) if known else None,
        [show(image) for image in pictures],
        kept,
        _masks(dataset, chosen[:_KEPT], kept),
        _product(dataset),
    )


def _product(dataset: Any) -> LandCoverProduct:
    """Return the land-cover product of a dataset, or of one that it is made of."""
    inner = [getattr(dataset, 'scenes', None), *getattr(dataset, 'datasets', ())]
    for one in (dataset, *inner):
        product = getattr(one, 'product', None)
        if isinstance(product, LandCoverProduct):
            return product
    return WORLDCOVER


def _split(
    datamodule: LightningDataModule, split: str | None, count: int
) -> tuple[str, Any, list[Any]]:
    """The first split that has enough images, or else the largest."""
    best: tuple[str, Any, list[Any]] = ('', None, [])
    for name in ('val', 'test', 'predict', 'train') if split is None else (split,):
        torch.manual_seed(0)  # for samplers that draw
        try:
            found = set_up(datamodule, name)
            dataset, indices = split_samples(datamodule, found)
        except ValueError:
            if split is not None:
                raise
            continue
        if len(indices) > len(best[2]):
            best = (found, dataset, indices)
        if len(indices) >= min(count, _ENOUGH):
            break
    return best


def _shrink(images: Tensor) -> Tensor:
    if max(images.shape[-2:]) <= _THUMBNAIL:
        return images
    return F.interpolate(
        images, (_THUMBNAIL, _THUMBNAIL), mode='bilinear', antialias=True
    )


def _masks(
    dataset: Any, indices: Sequence[Any], samples: Sequence[Sample]
) -> list[Tensor] | None:
    """Land cover under some samples, which transforms may have replaced by a label."""
    if all('mask' in sample for sample in samples):
        masks = [sample['mask'] for sample in samples]
    else:
        raw = copy.copy(dataset)
        inner = getattr(raw, 'scenes', None)
        if inner is not None:
            raw.scenes = copy.copy(inner)
        owner = raw if inner is None else raw.scenes
        if not hasattr(owner, 'transforms'):
            return None
        owner.transforms = nn.Identity()
        found = [raw[index] for index in indices]
        if not all('mask' in sample for sample in found):
            return None
        masks = [sample['mask'] for sample in found]
    return [mask.squeeze() for mask in masks]
