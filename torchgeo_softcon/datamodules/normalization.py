# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Bands and values of the images of a datamodule of TorchGeo."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import kornia.augmentation as K
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from ..bands import SENTINEL1_BANDS, SENTINEL2_SUBSETS, Level, normalize_band_names
from ..transforms import ToUnitRange
from .protocol import SPLITS, dataset_bands, offer_of

#: What TorchGeo's BigEarthNet means by its bands. It reads files in the order of their
#: names, so that VH comes before VV.
BAND_SETS = {
    's1': SENTINEL1_BANDS[::-1],
    's2': SENTINEL2_SUBSETS[12],
    'all': (*SENTINEL1_BANDS[::-1], *SENTINEL2_SUBSETS[12]),
}

#: Datasets of TorchGeo whose Sentinel-2 is of Level-2A, at least for these splits.
_LEVEL_2A: dict[str, tuple[str, ...] | None] = {
    'BigEarthNet': None,
    'BigEarthNetV2': None,
    'SeasonalContrastS2': None,
    'SSL4EOS12': ('s2a',),
}


class _UnitRange(K.IntensityAugmentationBase2D):  # type: ignore[misc]
    """:class:`.ToUnitRange` as a part of kornia's sequences."""

    def __init__(self, unit: ToUnitRange) -> None:
        super().__init__(p=1, same_on_batch=True, keepdim=True)
        self.unit = unit

    def apply_transform(
        self,
        input: Tensor,
        params: dict[str, Tensor],
        flags: dict[str, Any],
        transform: Tensor | None = None,
    ) -> Tensor:
        # Seasons are stacked in channels
        bands = input.unflatten(1, (-1, len(self.unit.low)))
        return self.unit(bands).flatten(1, 2)


def use_unit_range(
    datamodule: LightningDataModule,
    bands: Sequence[str] | None = None,
    level: Level | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Let a datamodule of TorchGeo scale its images to [0, 1] as SoftCon's authors do.

    Datamodules of TorchGeo scale each in its own way. Their last step, of all splits, is
    replaced by :class:`.ToUnitRange`; random crops and flips stay. Datasets must give
    digital numbers of Sentinel-2 or dB of Sentinel-1. Datamodules of this package have
    images in [0, 1] already, and are left as they are.

    Args:
        datamodule: The datamodule, set up.
        bands: Names of the bands of its images. Defaults to those that its dataset has.
        level: Processing level of Sentinel-2, see :func:`image_level` for the default.
        statistics: Mean and standard deviation of each band, instead of those of
            SSL4EO-S12.
    """
    offer = offer_of(datamodule)
    if offer.mean is not None and offer.std is not None:
        mean, std = (torch.as_tensor(value) for value in (offer.mean, offer.std))
        if (mean == 0).all() and (std == 1).all():  # as in datamodules of this package
            return
    found, name = _normalizations(datamodule), type(datamodule).__name__
    if not any(found):
        raise ValueError(
            f'{name} has no normalization (kornia.augmentation.Normalize) that could be '
            'replaced. Scale its images by transforms of the dataset: '
            'torchgeo_softcon.ToUnitRange'
        )
    if max(map(len, found)) > 1:
        raise ValueError(
            f'{name} normalizes images in several steps, so they are not digital numbers '
            'or dB, which unit_range is for. Leave it out'
        )
    bands = bands or image_bands(datamodule)
    if statistics is not None:
        unit = ToUnitRange(*statistics)
    elif bands is None:
        raise ValueError(
            f'{name} does not tell its bands. Set bands, such as [B4, B3, B2]'
        )
    else:
        unit = ToUnitRange.of(bands, level or image_level(datamodule, bands))
    for parent, child in chain(*found):
        setattr(parent, child, _UnitRange(unit))
    # TorchGeo's tasks undo the normalization by these to plot images
    plain: Any = datamodule
    plain.mean, plain.std = unit.low, unit.extent


def _normalizations(
    datamodule: LightningDataModule,
) -> list[list[tuple[nn.Module, str]]]:
    """Return the normalizations in each sequence of a datamodule, as parent and name."""
    offer = offer_of(datamodule)
    names = ('aug', *(f'{split}_aug' for split in SPLITS))
    return [
        [
            (parent, name)
            for parent in sequence.modules()
            for name, child in parent.named_children()
            if isinstance(child, K.Normalize | _UnitRange)
        ]
        for sequence in (getattr(offer, name) for name in names)
        if isinstance(sequence, nn.Module)
    ]


def _datasets(datamodule: LightningDataModule) -> list[Any]:
    offer = offer_of(datamodule)
    names = (*(f'{split}_dataset' for split in SPLITS), 'dataset')
    return [getattr(offer, name) for name in names]


def image_bands(datamodule: LightningDataModule) -> tuple[str, ...] | None:
    """Return the names of the bands of the images of a datamodule, in their order.

    None if its dataset does not tell them, or if they are of an unknown sensor.
    """
    for dataset in _datasets(datamodule):
        bands = dataset_bands(dataset)
        if isinstance(bands, str) and bands in BAND_SETS:
            return BAND_SETS[bands]
        if isinstance(bands, list | tuple) and all(isinstance(b, str) for b in bands):
            with suppress(ValueError):
                return normalize_band_names(bands)
    return None


def image_level(datamodule: LightningDataModule, bands: Sequence[str]) -> Level:
    """Return the processing level of the Sentinel-2 images of a datamodule."""
    levels = [dataset_level(dataset, bands) for dataset in _datasets(datamodule)]
    return 'L2A' if 'L2A' in levels else 'L1C'


def dataset_level(dataset: Any, bands: Sequence[str]) -> Level:
    """Return the processing level of the Sentinel-2 images of a dataset.

    By its name and split, and L2A for all bands of Sentinel-2 but B10.
    """
    splits = _LEVEL_2A.get(type(dataset).__name__, ())
    if splits is None or getattr(dataset, 'split', None) in splits:
        return 'L2A'
    all_but_b10 = {*bands} >= {*SENTINEL2_SUBSETS[12]} and 'B10' not in bands
    return 'L2A' if all_but_b10 else 'L1C'


def match_images(
    datamodule: LightningDataModule,
    bands: Sequence[str] | None,
    unit_range: bool | None,
) -> None:
    """Let a datamodule, set up, give the *bands* that an encoder expects.

    If *unit_range*, they are scaled by :func:`use_unit_range`. None is for unknown, with
    a warning if the datamodule normalizes images.
    """
    found = image_bands(datamodule)
    if found is not None and bands is not None:
        with suppress(ValueError):  # of an unknown sensor
            bands = normalize_band_names(bands)
        if tuple(bands) != found:
            raise ValueError(
                f'bands of the images must be those of the encoder, {tuple(bands)}, got '
                f'{found}. Choose and order the bands of the dataset, or for weights of '
                'this package, give bands = those of the images'
            )
    if unit_range:
        use_unit_range(datamodule, found or bands)
    elif unit_range is None and any(_normalizations(datamodule)):
        warnings.warn(
            f'the values that the encoder was trained on are not known: images come as '
            f'{type(datamodule).__name__} normalizes them. Set unit_range to True for an '
            'encoder of images in [0, 1] as SoftCon scales them, else to False',
            UserWarning,
            stacklevel=2,
        )
