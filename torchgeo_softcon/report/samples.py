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
from torch.utils.data import DataLoader

from .._compat import Sample
from ..datamodules.normalization import match_images
from ..datamodules.protocol import dataset_bands, eval_transform
from ..evaluation.features import prepare
from ..evaluation.loop import encode_batches
from ..evaluation.samples import check_label, set_up, split_samples
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
    product: LandCoverProduct = WORLDCOVER

    def labelled(self) -> tuple[Tensor, Tensor | None, list[Array]]:
        """Return features, labels and thumbnails of the images whose label is known."""
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
    bands = dataset_bands(dataset)
    small: list[Tensor] = []
    features: list[Tensor] = []
    labels: list[Tensor] = []
    kept: list[Sample] = []
    loader = DataLoader(dataset, _BATCH, sampler=chosen, collate_fn=_collate)
    for batch, images, found in encode_batches(
        encoder.model,
        loader,
        eval_transform(datamodule),
        encoder.in_channels,
        encoder.size,
    ):
        first, _ = prepare(images, encoder.in_channels, None, first=True)
        small.append(_shrink(first))
        features.append(next(iter(found.values())))
        if 'label' in batch:
            labels.append(check_label(batch['label'], f'{split} split'))
        for sample, image in zip(batch['samples'], images, strict=True):
            kept.append({**sample, 'image': image})
        del kept[_KEPT:]

    pictures = torch.cat(small)
    show = Display(pictures, bands)
    return Gallery(
        split,
        bands,
        show,
        torch.cat(features),
        torch.cat(labels) if len(labels) == len(features) else None,
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


def _collate(samples: list[Sample]) -> Sample:
    """Stack images, and labels if all samples have one, and keep the samples."""
    keys = [key for key in ('image', 'label') if all(key in s for s in samples)]
    stacked = {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in keys}
    return {**stacked, 'samples': samples}


def _split(
    datamodule: LightningDataModule, split: str | None, count: int
) -> tuple[str, Any, list[Any]]:
    """Set up the first split that has enough images, or else the largest."""
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
    """Resize large images to thumbnails."""
    if max(images.shape[-2:]) <= _THUMBNAIL:
        return images
    return F.interpolate(
        images, (_THUMBNAIL, _THUMBNAIL), mode='bilinear', antialias=True
    )


def _masks(
    dataset: Any, indices: Sequence[Any], samples: Sequence[Sample]
) -> list[Tensor] | None:
    """Read masks under some samples, which transforms may have replaced by a label."""
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
