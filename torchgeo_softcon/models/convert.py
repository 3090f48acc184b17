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

#: Names of torchvision's Swin Transformer, and what timm calls them. In torchvision, all
#: stages and the patch merging between them are one list; in timm, patch merging is at
#: the start of a stage.
_SWIN = (
    (re.compile(r'features\.0\.0\.(.+)'), lambda m: f'patch_embed.proj.{m[1]}'),
    (re.compile(r'features\.0\.2\.(.+)'), lambda m: f'patch_embed.norm.{m[1]}'),
    (
        re.compile(r'features\.([1357])\.(.+)'),
        lambda m: (
            f'layers.{int(m[1]) // 2}.blocks.'
            + m[2].replace('.mlp.0.', '.mlp.fc1.').replace('.mlp.3.', '.mlp.fc2.')
        ),
    ),
    (
        re.compile(r'features\.([246])\.(.+)'),
        lambda m: f'layers.{int(m[1]) // 2}.downsample.{m[2]}',
    ),
    (re.compile(r'(norm\..+)'), lambda m: m[1]),
)


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
    same.

    Returns:
        Parameters with a *pos_embed* of shape (1, 1 + grid * grid, D).

    Raises:
        ValueError: If there is no position embedding, or it is not of a square grid.
    """
    positions = state_dict.get('pos_embed')
    if positions is None or math.isqrt(positions.shape[1] - 1) ** 2 != (
        positions.shape[1] - 1
    ):
        found = None if positions is None else tuple(positions.shape)
        raise ValueError(
            'state_dict must be of a Vision Transformer with pos_embed of shape '
            f'(1, 1 + grid * grid, D), got {found}'
        )
    check_counts(grid=grid)
    if positions.shape[1] != 1 + grid * grid:
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

    Raises:
        ValueError: If this is not a Vision Transformer.
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

    Args:
        state_dict: Parameters of ``torchvision.models.swin_t`` or a larger one.

    Raises:
        ValueError: If a name is not one of torchvision's.
    """
    result = {}
    for key, value in drop_head(state_dict).items():
        if key.endswith('.attn.relative_position_index'):  # a constant
            continue
        for pattern, rename in _SWIN:
            match = pattern.fullmatch(key)
            if match is not None:
                result[rename(match)] = value
                break
        else:
            raise ValueError(
                f"state_dict must be of torchvision's Swin Transformer, got {key}"
            )
    return result


def to_smp(state_dict: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """Convert parameters to the layout of an encoder of segmentation_models_pytorch.

    Encoders whose names start with ``tu-`` hold a timm model: all of it, with its
    classifier, for Vision Transformers (``DPT``), and its stages for others.

    Args:
        state_dict: Parameters in timm's layout.
        model: Name of the encoder without ``tu-``, that is of the timm model.

    Returns:
        Parameters for ``encoder.load_state_dict``, strictly. Classifiers are 0.

    Raises:
        ValueError: If the encoder needs other parameters.
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
        # Stages of a list have numbers, stages by name an underscore
        name = re.sub(r'^(layers|stages|blocks)_', r'\1.', key.removeprefix('model.'))
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
    """Let the input layer see some of its bands, by name and in any order.

    Returns:
        Parameters with another input layer, see
        :func:`~torchgeo_softcon.models.input_layer.select_bands`.

    Raises:
        ValueError: If a band is not one of *names*, or there is no input layer.
    """
    for key in _INPUT_LAYERS:
        if key in state_dict:
            return {**state_dict, key: select_bands(state_dict[key], names, bands)}
    raise ValueError(f'state_dict must have one of {_INPUT_LAYERS}')


def fresh(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy parameters: contiguous, on the CPU, and free of the file they came from."""
    return {
        k: v.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)
        for k, v in state_dict.items()
    }
