# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The range of values that SoftCon's encoders were trained on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_types, require
from ..bands import Level, band_statistics, normalize_band_names


class ToUnitRange(nn.Module):
    r"""Scale bands to [0, 1] as SoftCon's authors do before pretraining.

    .. math::

        u = \operatorname{clip}\left(\frac{x - \mu + 2 \sigma}{4 \sigma}, 0, 1\right)

    TorchGeo's transforms of the same weights are z-scores instead. The authors also round
    to 8 bit. https://github.com/zhu-xlab/softcon#readme
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
        require(
            len(mean) == len(std) > 0,
            'mean and std must have one number for each band, got '
            f'{len(mean)} and {len(std)}',
        )
        require(min(std) > 0, f'std must be positive, got {tuple(std)}')
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
            level: Processing level of the images of Sentinel-2. With the statistics of
                Level-1C, a tenth of the values of Level-2A would be clipped.

        Raises:
            ValueError: If *bands* is empty, or a name is unknown or has no statistics.
        """
        names = normalize_band_names(bands)
        require(names, 'bands must have at least one name, got none')
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
        require(
            sample.ndim > 2 and sample.shape[-3] == len(self.low),
            f'image must have {len(self.low)} channels, shape (..., {len(self.low)}, H, W), '
            f'got {tuple(sample.shape)}. Choose those bands of it',
        )
        low, extent = (
            x.view(-1, 1, 1).to(sample.device) for x in (self.low, self.extent)
        )
        return ((sample - low) / extent).clamp(0, 1)
