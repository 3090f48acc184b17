# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretrained weights of SoftCon, with the input range they were trained on."""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision.transforms.v2 as T
from torch import Tensor, nn

from .._compat import Weights, WeightsEnum, host_weights
from ..bands import BAND_STATISTICS, SENTINEL1_BANDS, SENTINEL2_BANDS


class ToUnitRange(nn.Module):
    r"""Scale bands to [0, 1] as SoftCon's authors do before pretraining.

    .. math::

        u = \operatorname{clip}\left(\frac{x - \mu + 2 \sigma}{4 \sigma}, 0, 1\right)

    The authors round to 8 bit in between, which this does not.
    https://github.com/zhu-xlab/softcon#readme

    .. versionadded:: 0.1
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Initialize a new ToUnitRange instance.

        Args:
            mean: Mean of each band.
            std: Standard deviation of each band.
        """
        super().__init__()
        self.register_buffer('low', torch.tensor(mean) - 2 * torch.tensor(std))
        self.register_buffer('extent', 4 * torch.tensor(std))
        self.low: Tensor
        self.extent: Tensor

    def forward(self, sample: Any) -> Any:
        """Scale an image, or the image of a sample.

        Args:
            sample: Images of shape (..., C, H, W), or a sample with such an *image*.

        Returns:
            The same with float images in [0, 1].
        """
        if isinstance(sample, dict):
            return {**sample, 'image': self(sample['image'])}
        low, extent = (
            x.view(-1, 1, 1).to(sample.device) for x in (self.low, self.extent)
        )
        return ((sample - low) / extent).clamp(0, 1)


def _softcon(enum: str, sensor: str) -> Weights:
    """Weights that the host has, with transforms to the range of the pretraining.

    The host's transforms of the same weights are z-scores.
    """
    host = host_weights(enum, f'{sensor}_SOFTCON')
    bands = SENTINEL1_BANDS if sensor == 'SENTINEL1_GRD' else SENTINEL2_BANDS
    mean, std = zip(*(BAND_STATISTICS[band] for band in bands), strict=True)
    meta = {
        'img_size': 224,
        **host.meta,
        'bands': bands,
        # https://github.com/zhu-xlab/softcon/blob/main/LICENSE
        'license': 'Apache-2.0',
        'value_range': (0, 1),
    }
    transforms = nn.Sequential(
        T.Resize((256, 256)), T.CenterCrop(224), ToUnitRange(mean, std)
    )
    return Weights(url=host.url, transforms=transforms, meta=meta)


class ResNet50_Weights(WeightsEnum):
    """ResNet-50 weights of SoftCon, the files that TorchGeo hosts.

    For timm's *resnet50*. Digital numbers (Sentinel-2) or dB (Sentinel-1) in, see
    *transforms*.

    If you use these weights in your research, please cite the following paper:

    * https://arxiv.org/abs/2405.20462

    .. versionadded:: 0.1
    """

    SENTINEL2_SOFTCON = _softcon('ResNet50_Weights', 'SENTINEL2_ALL')
    SENTINEL1_SOFTCON = _softcon('ResNet50_Weights', 'SENTINEL1_GRD')


class ViTSmall14_DINOv2_Weights(WeightsEnum):
    """ViT-S/14 weights of SoftCon, the files that TorchGeo hosts.

    For timm's *vit_small_patch14_dinov2* with ``img_size=224``. See
    :class:`ResNet50_Weights`.

    .. versionadded:: 0.1
    """

    SENTINEL2_SOFTCON = _softcon('ViTSmall14_DINOv2_Weights', 'SENTINEL2_ALL')
    SENTINEL1_SOFTCON = _softcon('ViTSmall14_DINOv2_Weights', 'SENTINEL1_GRD')


class ViTBase14_DINOv2_Weights(WeightsEnum):
    """ViT-B/14 weights of SoftCon, the files that TorchGeo hosts.

    For timm's *vit_base_patch14_dinov2* with ``img_size=224``. See
    :class:`ResNet50_Weights`.

    .. versionadded:: 0.1
    """

    SENTINEL2_SOFTCON = _softcon('ViTBase14_DINOv2_Weights', 'SENTINEL2_ALL')
    SENTINEL1_SOFTCON = _softcon('ViTBase14_DINOv2_Weights', 'SENTINEL1_GRD')
