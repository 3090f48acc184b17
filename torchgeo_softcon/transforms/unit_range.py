# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The range of values that SoftCon's encoders were trained on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_types
from ..bands import Level, band_statistics, normalize_band_names


class ToUnitRange(nn.Module):
    r"""Scale bands to [0, 1] as SoftCon's authors do before pretraining.

    .. math::

        u = \operatorname{clip}\left(\frac{x - \mu + 2 \sigma}{4 \sigma}, 0, 1\right)

    TorchGeo's transforms of the same weights are z-scores :math:`z = (x - \mu) / \sigma`.
    The two differ by :math:`u = \operatorname{clip}((z + 2) / 4, 0, 1)`. The authors round
    to 8 bit in between, which neither does.
    https://github.com/zhu-xlab/softcon#readme
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Initialize a new ToUnitRange instance.

        Args:
            mean: Mean of each band.
            std: Standard deviation of each band.

        Raises:
            ValueError: If there are not as many of both, or a deviation is not positive.
        """
        check_types(ToUnitRange.__init__, locals())
        super().__init__()
        if len(mean) != len(std) or not len(mean):
            raise ValueError(
                'mean and std must have one number for each band, got '
                f'{len(mean)} and {len(std)}'
            )
        if not all(value > 0 for value in std):
            raise ValueError(f'std must be positive, got {tuple(std)}')
        self.register_buffer('low', torch.tensor(mean) - 2 * torch.tensor(std))
        self.register_buffer('extent', 4 * torch.tensor(std))
        self.low: Tensor
        self.extent: Tensor

    @classmethod
    def of(cls, bands: Sequence[str], level: Level = 'L1C') -> 'ToUnitRange':
        """Make the transform for some bands, with the statistics of SSL4EO-S12.

        Args:
            bands: Bands of Sentinel-2 (digital numbers) or Sentinel-1 (dB), in the order
                of the images' channels.
            level: Processing level of the images of Sentinel-2. Those of Level-2A are
                darker in blue and have other extremes: with the statistics of Level-1C,
                a tenth of their values would be clipped.

        Returns:
            A transform.

        Raises:
            ValueError: If *bands* is empty, or a name is unknown or has no statistics.
        """
        names = normalize_band_names(bands)
        if not names:
            raise ValueError('bands must have at least one name, got none')
        try:
            mean, std = zip(*band_statistics(names, level), strict=True)
        except ValueError as error:
            raise ValueError(
                f'{error}. Pass the mean and standard deviation of other bands to '
                'ToUnitRange'
            ) from error
        return cls(mean, std)

    @classmethod
    def between(cls, pairs: Sequence[tuple[float, float]]) -> 'ToUnitRange':
        """Make the transform that maps given values to 0 and 1.

        Args:
            pairs: The value that becomes 0 and the one that becomes 1, for each band.

        Returns:
            A transform.
        """
        return cls(
            [(low + high) / 2 for low, high in pairs],
            [(high - low) / 4 for low, high in pairs],
        )

    def forward(self, sample: Any) -> Any:
        """Scale an image, or the image of a sample.

        Args:
            sample: Images of shape (..., C, H, W), or a sample with such an *image*.

        Returns:
            The same with float images in [0, 1].

        Raises:
            ValueError: If the images have another number of channels.
        """
        if isinstance(sample, dict):
            return {**sample, 'image': self(sample['image'])}
        if sample.ndim < 3 or sample.shape[-3] != len(self.low):
            raise ValueError(
                f'image must have {len(self.low)} channels, shape (..., {len(self.low)}, '
                f'H, W), got {tuple(sample.shape)}. Choose those bands of it'
            )
        low = self.low.view(-1, 1, 1).to(sample.device)
        extent = self.extent.view(-1, 1, 1).to(sample.device)
        return ((sample - low) / extent).clamp(0, 1)
