# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The images that a report shows."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from .._compat import Sample
from ..datamodules.normalization import match_images
from ..datamodules.protocol import (
    dataset_bands,
    dataset_product,
    offer_of,
    without_transforms,
)
from ..evaluation.features import prepare
from ..evaluation.footprints import number_places, sample_centres, sample_places
from ..evaluation.loop import batch_transform, encode_batches
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
_KEPT = 7


@dataclass
class Gallery:
    """Some images with all that a report needs to know of them."""

    split: str
    bands: Sequence[str] | None
    show: Display
    features: Tensor  # (N, F)
    statistics: Tensor  # (N, 2 C), mean and standard deviation of each band
    labels: Tensor | None  # class indices (N,) or multi-labels (N, K)
    thumbnails: list[Array]  # colours of all images
    samples: list[Sample]  # the first ones, as the datamodule gives them
    masks: list[Tensor] | None  # land cover of *samples*, codes of shape (H, W)
    product: LandCoverProduct = WORLDCOVER  # of the codes
    places: list[str] | None = None  # of all images
    centres: list[tuple[float, float]] | None = None  # of all, longitude and latitude
    trained_on: bool = False  # whether the ground is that of the training

    @property
    def apart(self) -> Tensor:
        """Whether images are of different places, (N, N): no image is with itself."""
        numbers = number_places(self.places or [*map(str, range(len(self.features)))])
        return numbers[:, None] != numbers

    def labelled(self) -> 'Gallery':
        """Return the part whose labels are known. The first samples are the same."""
        if self.labels is None or self.labels.ndim == 1:
            return self
        known = self.labels.any(1)
        numbers = known.nonzero()[:, 0].tolist()
        return replace(
            self,
            features=self.features[known],
            statistics=self.statistics[known],
            labels=self.labels[known],
            thumbnails=[self.thumbnails[i] for i in numbers],
            places=self.places and [self.places[i] for i in numbers],
        )


@torch.no_grad()
def collect(
    encoder: Encoder,
    datamodule: LightningDataModule,
    split: str | None = None,
    count: int = 200,
) -> Gallery:
    """Read and encode at most *count* images, chosen at random, always the same.

    By default of the first of the splits 'val', 'test', 'predict' and 'train' that has
    50 images, or else of the largest.
    """
    split, dataset, indices = _split(datamodule, split, count)
    if len(indices) < 2:
        raise ValueError(
            f'a report needs at least 2 images, the {split} split has fewer'
        )
    match_images(datamodule, encoder.bands, encoder.unit_range)
    torch.manual_seed(0)
    chosen = [indices[i] for i in torch.randperm(len(indices))[:count]]
    read: list[Sample] = []

    def collate(samples: list[Sample]) -> Sample:
        read.extend(samples[: _KEPT - len(read)])
        keys = [key for key in ('image', 'label') if all(key in s for s in samples)]
        return {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in keys}

    columns: dict[str, list[Tensor]] = defaultdict(list)
    kept: list[Sample] = []
    for batch, images, found in encode_batches(
        encoder.model,
        DataLoader(dataset, _BATCH, sampler=chosen, collate_fn=collate),
        batch_transform(datamodule),
        encoder.in_channels,
        encoder.size,
    ):
        first, _ = prepare(images, encoder.in_channels, None, first=True)
        if max(first.shape[-2:]) > _THUMBNAIL:
            side = (_THUMBNAIL, _THUMBNAIL)
            first = F.interpolate(first, side, mode='bilinear', antialias=True)
        columns['pictures'].append(first)
        moments = torch.cat([first.mean((2, 3)), first.std((2, 3))], 1)
        columns['statistics'].append(moments)
        columns['features'].append(next(iter(found.values())))
        if 'label' in batch:
            columns['labels'].append(check_label(batch['label'], f'{split} split'))
        pairs = zip(read[len(kept) :], images, strict=False)
        kept += [{**sample, 'image': image} for sample, image in pairs]

    values = {name: torch.cat(column) for name, column in columns.items()}
    labels, features = values.get('labels'), values['features']
    bands = dataset_bands(dataset)
    show = Display(values['pictures'], bands)
    return Gallery(
        split,
        bands,
        show,
        features,
        values['statistics'].nan_to_num(),
        labels if labels is not None and len(labels) == len(features) else None,
        [show(image) for image in values['pictures']],
        kept,
        _masks(dataset, chosen[:_KEPT], kept),
        dataset_product(dataset) or WORLDCOVER,
        sample_places(dataset, chosen),
        sample_centres(dataset, chosen),
        split == 'train' or offer_of(datamodule).shares_ground,
    )


def _split(
    datamodule: LightningDataModule, split: str | None, count: int
) -> tuple[str, Any, list[Any]]:
    """Set up the first split that has enough images, or else the largest."""
    best: tuple[str, Any, list[Any]] = ('', None, [])
    for name in ('val', 'test', 'predict', 'train') if split is None else (split,):
        torch.manual_seed(0)  # for samplers that draw
        try:
            dataset, indices = split_samples(datamodule, set_up(datamodule, name))
        except ValueError:
            if split is not None:
                raise
            continue
        if len(indices) > len(best[2]):
            best = (name, dataset, indices)
        if len(indices) >= min(count, _ENOUGH):
            break
    return best


def _masks(
    dataset: Any, indices: Sequence[Any], samples: Sequence[Sample]
) -> list[Tensor] | None:
    """Return the masks of samples, which transforms may have replaced by a label."""
    if not all('mask' in sample for sample in samples):
        plain = without_transforms(dataset)
        samples = [plain[index] for index in indices]
    if not all('mask' in sample for sample in samples):
        return None
    return [sample['mask'].squeeze() for sample in samples]
