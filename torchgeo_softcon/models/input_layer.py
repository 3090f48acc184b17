# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Input layers for any number of bands."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .._checks import check_choice, require
from ..bands import normalize_band_names, rgb_indices

#: What Sentinel-2 calls the colours of a photograph.
COLOURS = {'R': 'B4', 'G': 'B3', 'B': 'B2'}

InputLayerInit = Literal['random', 'rgb', 'timm']

#: Mean and standard deviation of each band by which images in [0, 1] are normalized.
Normalization: TypeAlias = tuple[Sequence[float], Sequence[float]]


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
    """Adapt the weight (F, 3, H, W) of a pretrained input layer to *C* bands.

    * ``'random'``: drawn anew by PyTorch's rule for convolutions, SoftCon's choice.
    * ``'rgb'``: red, green and blue of the pretrained layer go to the bands of those
      names, all other bands get their mean, and everything is scaled by 3 / *C* so that
      the sum over bands keeps its size. Images are in [0, 1], whatever normalization the
      weights were trained with, see :func:`fold_normalization`.
    * ``'timm'``: as ``timm.create_model(..., pretrained=True, in_chans=C)`` does, band
      *j* copies pretrained band *j* modulo 3: of Sentinel-2, B1 gets the weights of red.

    Args:
        weight: Pretrained weight, red first.
        in_channels: Number of bands *C*.
        init: Rule to follow.
        bands: Names of the *C* bands in the order of the channels, for ``'rgb'``.
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
    check_choice('in_layer_init', init, get_args(InputLayerInit))
    if bands is None:
        raise ValueError(
            "in_layer_init='rgb' needs bands, the names of the channels, got None"
        )
    _check_names('bands', bands, in_channels)
    indices = list(rgb_indices(normalize_band_names(bands)))
    new = weight.mean(1, keepdim=True).repeat(1, in_channels, 1, 1)
    new[:, indices] = weight
    return new * (3 / in_channels)


def fold_normalization(
    model: nn.Module, state_dict: Mapping[str, Tensor], normalization: Normalization
) -> dict[str, Tensor]:
    r"""Let the input layer of pretrained weights see images that are not normalized.

    :math:`W (x - \mu) / \sigma + b = W' x + b'` with :math:`W' = W / \sigma` and
    :math:`b' = b - \sum W' \mu`. Layers without bias leave :math:`b'` to what follows: to
    the running mean of batch norm, which is exact in evaluation mode and of no effect in
    training, or to the positions of patches.

    Exact for patches. Convolutions that pad by zeros see a black border where that of the
    pretrained model had the mean colour: the outermost values of the first feature map
    differ.

    Args:
        model: The encoder that the parameters are for.
        state_dict: Its parameters, with an input layer (F, C, k, k) of any C.
        normalization: Mean and standard deviation of the C bands.

    Raises:
        ValueError: If the model has no place for the mean.
    """
    name, layer = input_layer(model)
    weight = state_dict[f'{name}.weight']
    mean, std = (
        torch.as_tensor(values, dtype=torch.float64)[:, None, None]
        for values in normalization
    )
    scaled = weight.double() / std
    shift = -(scaled * mean).sum((1, 2, 3))  # (F,)
    place = _bias_place(model, name, layer)
    bias = state_dict.get(place)
    if bias is None:
        raise ValueError(
            "in_layer_init='rgb' cannot fold the normalization of the weights into "
            f'{type(model).__name__}: its input layer has no bias, and no batch norm '
            "behind it. Use in_layer_init='random', or a model such as resnet50"
        )
    moved = bias.double()
    if place == 'pos_embed':
        vit: Any = model
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        moved = torch.cat([moved[:, :prefix], moved[:, prefix:] + shift], 1)
    else:  # batch norm subtracts its mean
        moved = moved - shift if place.endswith('.running_mean') else moved + shift
    return {
        **state_dict,
        f'{name}.weight': scaled.to(weight.dtype),
        place: moved.to(bias.dtype),
    }


def _bias_place(model: nn.Module, name: str, layer: nn.Conv2d) -> str:
    """Return the parameter or buffer that a bias can go to, empty if there is none."""
    if isinstance(
        layer, StdConv2d | StdConv2dSame | ScaledStdConv2d | ScaledStdConv2dSame
    ):
        return ''  # does not convolve with its weight as it is
    if layer.bias is not None:
        return f'{name}.bias'
    modules = [n for n, m in model.named_modules() if m._parameters or m._buffers]
    following = modules[modules.index(name) + 1]
    if hasattr(model.get_submodule(following), 'running_mean'):
        return f'{following}.running_mean'
    plain = name == 'patch_embed.proj' and not following.startswith('patch_embed.')
    return 'pos_embed' if plain else ''


def _check_names(option: str, names: Sequence[str], channels: int) -> None:
    """Raise a ValueError unless there is one name per channel."""
    count = f'got {len(names)} names for {channels} channels'
    require(len(names) == channels, f'{option} must have one name per channel, {count}')


def select_bands(weight: Tensor, names: Sequence[str], bands: Sequence[str]) -> Tensor:
    """Keep some *bands* of the *names* of an input layer (F, C, H, W), in their order.

    The layer then does what it did before with 0 in all other bands. Nothing is scaled.
    ``R``, ``G`` and ``B`` are also understood for Sentinel-2.
    """
    known = normalize_band_names(names)
    _check_names('names', known, weight.shape[1])
    require(bands, 'bands must have at least one name, got none')
    names = normalize_band_names(bands)
    chosen = [band if band in known else COLOURS.get(band, band) for band in names]
    missing = [band for band in chosen if band not in known]
    if missing:
        raise ValueError(
            f'bands must be among those of the weights, {", ".join(known)}, but '
            f'{", ".join(missing)} {"is" if len(missing) == 1 else "are"} not. Leave '
            'them out, or choose other weights'
        )
    require(len({*chosen}) == len(chosen), f'bands must be unique, got {tuple(bands)}')
    return weight[:, [known.index(band) for band in chosen]]
