# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Input layers for any number of bands."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..bands import normalize_band_names, rgb_indices

#: What Sentinel-2 calls the colours of a photograph.
_COLOURS = {'R': 'B4', 'G': 'B3', 'B': 'B2'}

InputLayerInit = Literal['random', 'rgb', 'timm']


def input_layer(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """Find the convolution that sees the image."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module
    raise ValueError(f'model must start with a convolution, got {type(model).__name__}')


def adapt_input_weight(
    weight: Tensor,
    in_channels: int,
    init: InputLayerInit = 'random',
    bands: Sequence[str] | None = None,
) -> Tensor:
    """Adapt the weight of a pretrained input layer to another number of bands.

    * ``'random'``: drawn anew by PyTorch's rule for convolutions. This is SoftCon's
      choice: only the input layer starts from scratch, the rest is pretrained.
    * ``'rgb'``: red, green and blue of the pretrained layer go to the bands of those
      names, all other bands get their mean, and everything is scaled by 3 / *C* so that
      the sum over bands keeps its size.
    * ``'timm'``: channel *j* copies pretrained channel *j* modulo 3, as
      ``timm.create_model(..., pretrained=True, in_chans=C)`` does. Knows no band names:
      in the order of Sentinel-2, B1 gets the weights of red.

    Args:
        weight: Pretrained weight of shape (F, 3, H, W), red first.
        in_channels: Number of bands *C*.
        init: Rule to follow.
        bands: Names of the *C* bands, in the order of the images' channels. Needed by
            ``'rgb'``.

    Returns:
        A weight of shape (F, C, H, W).

    Raises:
        ValueError: If an argument does not fit the rule.
    """
    features, channels, *kernel = weight.shape
    if init == 'random':
        new = weight.new_empty(features, in_channels, *kernel)
        nn.init.kaiming_uniform_(new, a=math.sqrt(5))  # as nn.Conv2d does
        return new
    if channels != 3:
        raise ValueError(
            f'in_layer_init={init!r} needs pretrained weights for 3 bands, got {channels}'
            " bands. Use in_layer_init='random'"
        )
    if init == 'timm':
        return torch.as_tensor(adapt_input_conv(in_channels, weight))
    if init != 'rgb':
        raise ValueError(
            f"in_layer_init must be 'random', 'rgb' or 'timm', got {init!r}"
        )
    if bands is None:
        raise ValueError(
            "in_layer_init='rgb' needs bands, the names of the channels, got None"
        )
    if len(bands) != in_channels:
        raise ValueError(
            f'bands must have one name per channel, got {len(bands)} names for '
            f'{in_channels} channels'
        )

    indices = list(rgb_indices(normalize_band_names(bands)))
    new = weight.mean(1, keepdim=True).repeat(1, in_channels, 1, 1)
    new[:, indices] = weight
    return new * (3 / in_channels)


def select_bands(weight: Tensor, names: Sequence[str], bands: Sequence[str]) -> Tensor:
    """Keep some bands of a pretrained input layer, by name and in any order.

    The layer then does what it did before with 0 in all other bands. Nothing is scaled.

    Args:
        weight: Pretrained weight of shape (F, N, H, W).
        names: Names of the N bands that it was trained with.
        bands: Names of the C bands to keep, in the order of the images' channels. ``R``,
            ``G`` and ``B`` are also understood for Sentinel-2.

    Returns:
        A weight of shape (F, C, H, W).

    Raises:
        ValueError: If a band is unknown, occurs twice, or is not one of *names*.
    """
    known = normalize_band_names(names)
    if len(known) != weight.shape[1]:
        raise ValueError(
            f'names must have one name per channel, got {len(known)} names for '
            f'{weight.shape[1]} channels'
        )
    if not bands:
        raise ValueError('bands must have at least one name, got none')
    chosen = [
        _COLOURS.get(band, band) if band not in known else band
        for band in normalize_band_names(bands)
    ]
    missing = [band for band in chosen if band not in known]
    if missing:
        raise ValueError(
            f'bands must be among those of the weights, {", ".join(known)}, but '
            f'{", ".join(missing)} {"is" if len(missing) == 1 else "are"} not. Leave '
            'them out, or choose other weights'
        )
    if len(set(chosen)) != len(chosen):
        raise ValueError(f'bands must be unique, got {tuple(bands)}')
    return weight[:, [known.index(band) for band in chosen]]
