# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The encoder class for torchgeo-bench. Needs torchgeo-bench, and is imported by it."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torchgeo_bench.models.interface import BenchModel

from .._checks import require
from ..bands import SENTINEL2_BANDS, normalize_band_names
from ..models.encoders import open_encoder
from ..transforms.unit_range import ToUnitRange
from .features import encode, poolings

#: Band names of torchgeo-bench in the order of Sentinel-2.
_NAMES = (
    *('coastal', 'blue', 'green', 'red', 'rededge1', 'rededge2', 'rededge3', 'nir'),
    *('nirnarrow', 'watervapor', 'cirrus', 'swir1', 'swir2'),
)
_ALIASES = {
    **dict(zip(_NAMES, SENTINEL2_BANDS, strict=True)),
    'coastalaerosol': 'B1',
    'rededge4': 'B8A',
    'watervapour': 'B9',
    'swircirrus': 'B10',
}

#: Reflectance of Sentinel-2 in digital numbers, where a dataset has it in [0, 1].
_DIGITAL = 10_000

#: Largest reflectance of a band that is not in digital numbers.
_MOST = 10


class SoftConBenchModel(BenchModel):  # type: ignore[misc]
    """An encoder of this package in torchgeo-bench: published weights or a checkpoint.

    The ``_target_`` of a file in torchgeo-bench's ``conf/model``.
    """

    def __init__(
        self,
        bands: list[Any],
        weights: str | None = None,
        checkpoint: str | None = None,
        pooling: str | None = None,
        normalization: str = 'model_native',
        **options: Any,
    ) -> None:
        """Initialize a new SoftConBenchModel instance.

        Args:
            bands: The ``BandSpec`` of each band, from torchgeo-bench. Of published weights,
                the bands are chosen that they name.
            weights: Name of a weight enum member.
            checkpoint: Path of a checkpoint of a pretraining task, in place of *weights*.
            pooling: One of :func:`.poolings`, by default the encoder's own.
            normalization: ``'model_native'`` scales bands as in the pretraining, others are
                torchgeo-bench's.
            **options: Ignored, as by torchgeo-bench.
        """
        native = normalization == 'model_native'
        super().__init__(bands, 'identity' if native else normalization, **options)
        names = band_names(bands)
        encoder = open_encoder(checkpoint, weights, bands=names)
        self.backbone = encoder.model
        known = poolings(encoder.model)
        self.pooling = pooling or known[0]
        require(
            self.pooling in known, f'pooling must be one of {known}, got {pooling!r}'
        )
        self.unit_range = None
        self.factor = 1.0
        if native and encoder.unit_range and names is not None:
            self.unit_range = ToUnitRange.of(names)
            optical = {*names} <= {*SENTINEL2_BANDS}
            if optical and max(band.max for band in bands) <= _MOST:
                self.factor = _DIGITAL

    def _forward_patch_features(self, images: Tensor) -> Tensor:
        """Return features (B, F) of images (B, C, H, W)."""
        if self.unit_range is not None:
            images = self.unit_range({'image': images * self.factor})['image']
        return encode(self.backbone, images.to(torch.float32))[self.pooling]


def band_names(bands: list[Any]) -> tuple[str, ...] | None:
    """Return our names of torchgeo-bench's bands, None if one is unknown."""
    names = []
    for band in bands:
        name = str(band.name).strip().lower().replace(' ', '').replace('_', '')
        names.append(_ALIASES.get(name, name))
    with suppress(ValueError):
        return normalize_band_names(names)
    return None
