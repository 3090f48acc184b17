# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Conversions of parameters between layouts, patch sizes and image sizes.

Pure functions: each takes a state dict and returns a new one.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from .._checks import check_counts
from .input_layer import select_bands

_PATCHES = 'patch_embed.proj.weight'

#: Input layers of Vision Transformers and timm's Swin, ResNets, and torchvision's Swin.
_INPUT_LAYERS = (_PATCHES, 'conv1.weight', 'features.0.0.weight')

#: LayerScale, and the layer in front of it.
_LAYER_SCALE = re.compile(r'(.*)\.ls([12])\.gamma')
_SCALED = {'1': 'attn.proj', '2': 'mlp.fc2'}

#: Classifiers, and the mask token that a DINOv2 encoder has only for its training.
_NOT_ENCODER = re.compile(r'(head|fc|head_dist|fc_norm|classifier)\.|mask_token$')

#: Starts of the names of torchvision's Swin Transformer, and what timm calls them. In
#: torchvision, all stages and the patch merging between them are one list; in timm, patch
#: merging is at the start of a stage.
_SWIN = {
    'features.0.0.': 'patch_embed.proj.',
    'features.0.2.': 'patch_embed.norm.',
    **{f'features.{2 * i + 1}.': f'layers.{i}.blocks.' for i in range(4)},
    **{f'features.{2 * i}.': f'layers.{i}.downsample.' for i in range(1, 4)},
    'norm.': 'norm.',
}


def is_head(name: str) -> bool:
    """Whether a parameter is no part of the encoder: a classifier, or a mask token."""
    return _NOT_ENCODER.match(name) is not None


def drop_head(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what is not part of the encoder: classifiers and the mask token."""
    return {k: v for k, v in state_dict.items() if not is_head(k)}


def has_layer_scale(keys: Iterable[str]) -> bool:
    """Whether LayerScale is among the names of parameters, see `fold_layer_scale`."""
    return any(_LAYER_SCALE.fullmatch(key) for key in keys)


def fold_layer_scale(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""Multiply LayerScale into the layer before it, for networks that have none.

    :math:`\gamma \odot (W x + b) = (\operatorname{diag}(\gamma) W) x + \gamma \odot b`,
    so the function stays the same but for rounding. The training does not: weight decay
    and learning rate no longer apply to :math:`\gamma` alone.
    """
    result = dict(state_dict)
    for key, gamma in state_dict.items():
        match = _LAYER_SCALE.fullmatch(key)
        if match is None:
            continue
        layer = f'{match[1]}.{_SCALED[match[2]]}'
        if f'{layer}.weight' not in result:
            raise ValueError(
                f'state_dict has {key} but not {layer}.weight, so it is not a Vision '
                "Transformer in timm's layout"
            )
        result[f'{layer}.weight'] = result[f'{layer}.weight'] * gamma[:, None]
        if f'{layer}.bias' in result:
            result[f'{layer}.bias'] = result[f'{layer}.bias'] * gamma
        del result[key]
    return result


def resample_positions(
    state_dict: Mapping[str, Tensor], grid: int
) -> dict[str, Tensor]:
    """Resample the position embedding of a Vision Transformer to another grid.

    Bicubic with antialiasing, as timm does. An approximation, unless the grid is the
    same. *pos_embed* gets the shape (1, 1 + grid * grid, D).
    """
    positions = state_dict.get('pos_embed')
    count = 0 if positions is None else positions.shape[1] - 1
    if positions is None or math.isqrt(count) ** 2 != count:
        found = None if positions is None else tuple(positions.shape)
        raise ValueError(
            'state_dict must be of a Vision Transformer with pos_embed of shape '
            f'(1, 1 + grid * grid, D), got {found}'
        )
    check_counts(grid=grid)
    if count != grid * grid:
        positions = resample_abs_pos_embed(positions, [grid, grid])
    return {**state_dict, 'pos_embed': positions}


def to_patch_size(
    state_dict: Mapping[str, Tensor], patch_size: int = 16, grid: int | None = 14
) -> dict[str, Tensor]:
    """Convert a Vision Transformer to another patch size, and to plain ViT.

    Exact: LayerScale is folded, see :func:`fold_layer_scale`; and each resized patch gets
    the token that the original patch got, as the kernel is resized with the
    pseudo-inverse of the bicubic (antialiased) upsampling of patches.

    Approximate: resizing a whole image mixes pixels across the borders of patches, and
    a grid of another size needs other position embeddings.

    For SoftCon's patch 14 at 224 pixels (a grid of 16) this means, for patch 16:

    * ``grid=16``, images of 256 pixels: the same features. With random networks and
      smooth images, the cosine to the features of patch 14 is 1.0000, even after
      subtraction of the mean feature.
    * ``grid=14``, images of 224 pixels, what *vit_small_patch16_224* is built for: the
      features of patch 14 at 196 pixels (= 224 * 14 / 16; equal to 1e-5 on images resized
      patch by patch). As good as that model, with fewer tokens.

    https://arxiv.org/abs/2212.08013, section 3.4

    Args:
        state_dict: Parameters in timm's layout.
        patch_size: New side of the patches in pixels.
        grid: New number of patches along each side, None to keep it.
    """
    if _PATCHES not in state_dict or 'pos_embed' not in state_dict:
        raise ValueError(
            f'patch_size needs a Vision Transformer with {_PATCHES} and pos_embed, got '
            f'{[*state_dict][:3]}'
        )
    check_counts(patch_size=patch_size)
    result = fold_layer_scale(drop_head(state_dict))
    result[_PATCHES] = resample_patch_embed(
        result[_PATCHES], [patch_size, patch_size], 'bicubic', True
    )
    return result if grid is None else resample_positions(result, grid)


def swin_to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert torchvision's Swin Transformer to timm's layout.

    Equal at 224 pixels. For other sizes, the two shift windows differently.
    """
    result = {}
    for key, value in drop_head(state_dict).items():
        if key.endswith('.attn.relative_position_index'):  # a constant
            continue
        start = next((start for start in _SWIN if key.startswith(start)), None)
        if start is None:
            raise ValueError(
                f"state_dict must be of torchvision's Swin Transformer, got {key}"
            )
        name = _SWIN[start] + key.removeprefix(start)
        name = name.replace('.mlp.0.', '.mlp.fc1.').replace('.mlp.3.', '.mlp.fc2.')
        result[name] = value
    return result


def plain_name(name: str) -> str:
    """Return timm's name of a parameter of a model that is wrapped for its features.

    The model is in ``model``, and stages of a list are attributes with an underscore.
    """
    return re.sub(r'^(layers|stages|blocks)_', r'\1.', name.removeprefix('model.'))


def to_smp(state_dict: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """Convert parameters to the layout of an encoder of segmentation_models_pytorch.

    Encoders whose names start with ``tu-`` hold a timm model, here called *model*: all of
    it, with its classifier, for Vision Transformers (``DPT``), and its stages for others.
    Classifiers are 0.
    """
    from segmentation_models_pytorch.encoders import TimmUniversalEncoder, encoders
    from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder

    if model in encoders:  # those that smp has of its own, such as resnet50
        return drop_head(state_dict)
    channels = next(v for v in state_dict.values() if v.ndim == 4).shape[1]
    encoder_class = (
        TimmViTEncoder if 'pos_embed' in state_dict else TimmUniversalEncoder
    )
    encoder = encoder_class(model, pretrained=False, in_channels=channels)
    result = {}
    for key, value in encoder.state_dict().items():
        name = plain_name(key)
        if name in state_dict and state_dict[name].shape == value.shape:
            result[key] = state_dict[name]
        elif is_head(name):
            result[key] = torch.zeros_like(value)
        else:
            raise ValueError(
                f'the encoder tu-{model} needs {name} of shape {tuple(value.shape)}, which '
                'the state dict does not have'
            )
    return result


def is_torchvision_swin(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether parameters are of torchvision's Swin Transformer."""
    return 'features.0.0.weight' in state_dict


def choose_bands(
    state_dict: Mapping[str, Tensor], names: Sequence[str], bands: Sequence[str]
) -> dict[str, Tensor]:
    """Let the input layer see some of its bands, see :func:`.select_bands`."""
    for key in _INPUT_LAYERS:
        if key in state_dict:
            return {**state_dict, key: select_bands(state_dict[key], names, bands)}
    raise ValueError(f'state_dict must have one of {_INPUT_LAYERS}')


def fresh(
    state_dict: Mapping[str, Tensor], device: torch.device | str = 'cpu'
) -> dict[str, Tensor]:
    """Copy parameters: contiguous, on a device, and free of the file they came from."""
    return {
        k: v.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        for k, v in state_dict.items()
    }
