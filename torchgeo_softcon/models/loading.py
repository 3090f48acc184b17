# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders from timm, for any number of bands and any image size."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .checkpoints import require_shapes
from .convert import drop_head
from .input_layer import (
    InputLayerInit,
    Normalization,
    adapt_input_weight,
    fold_normalization,
    input_layer,
)
from .timm_models import timm_name

#: Modules of timm with Vision Transformers, and with Swin Transformers.
_VITS = ('vision_transformer', 'deit', 'eva')
#: Models in these modules that are no plain Vision Transformers, or are for tests.
_NOT_PLAIN = re.compile(r'_r\d*_|_resnet|distilled|_resmlp|^test_')
_SWIN = ('swin_transformer', 'swin_transformer_v2', 'swin_transformer_v2_cr')


def create_encoder(
    model: str,
    in_channels: int = 3,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
    size: int | None = None,
) -> nn.Module:
    """Create a timm model that pools its features and takes images of any size.

    Vision Transformers have the position embedding of one size, and resample it in the
    forward pass for images of another.

    Args:
        model: Name of a timm model.
        in_channels: Number of bands.
        pretrained: Whether to load timm's weights.
        drop_path_rate: Stochastic depth rate of the last block.
        size: Side of the images in pixels that the position embedding of a Vision
            Transformer is for. Defaults to that of timm's model of the name.

    Returns:
        A model from (B, C, H, W) to (B, F).

    Raises:
        ValueError: If timm has no model of that name.
    """
    name = timm_name(model)
    if ':' not in model and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f', did you mean {", ".join(close)}?' if close else '.'
        raise ValueError(f'model must be the name of a timm model, got {model!r}{hint}')

    kwargs: dict[str, Any] = {}
    swin = is_model_in_modules(name, _SWIN)
    if drop_path_rate or swin:  # where timm's default is not 0
        kwargs['drop_path_rate'] = drop_path_rate
    if is_model_in_modules(name, _VITS):
        kwargs['dynamic_img_size'] = True
        if size is not None:
            kwargs['img_size'] = size
    elif swin:
        kwargs['strict_img_size'] = False
    return timm.create_model(
        model, pretrained=pretrained, in_chans=in_channels, num_classes=0, **kwargs
    )


def is_vit(model: nn.Module) -> bool:
    """Whether a timm model is a plain Vision Transformer: patches that can be dropped.

    Such as ViT, DeiT and DINOv2, and with rotary positions DINOv3, EVA-02 and Perception
    Encoder, but not hybrids with a convolutional stem.
    """
    return isinstance(model, VisionTransformer | Eva) and isinstance(
        model.patch_embed, PatchEmbed
    )


def nearest_vit(model: str) -> str:
    """Return the name of the plain Vision Transformer of timm that is most like a model's."""
    name = timm_name(model)
    listed = [n for module in _VITS for n in timm.list_models(module=module)]
    known = [n for n in listed if not _NOT_PLAIN.search(n)]
    return [*difflib.get_close_matches(name, known, n=1), 'vit_small_patch16_224'][0]


def has_class_token(model: nn.Module) -> bool:
    """Whether a timm model is a Vision Transformer with a class token."""
    return isinstance(model, VisionTransformer | Eva) and model.cls_token is not None


def resample_grid(vit: nn.Module, positions: Tensor, grid: Sequence[int]) -> Tensor:
    """Resample a position embedding of a Vision Transformer to other rows and columns."""
    model = cast(VisionTransformer, vit)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    return resample_abs_pos_embed(
        positions, new_size=list(grid), num_prefix_tokens=prefix
    )


def default_drop_path_rate(model: str) -> float:
    """Return the stochastic depth rate of the student in DINO-MC.

    0.1 for Vision Transformers, an option of DINO, and 0.2 for Swin, where the paper's
    code leaves torchvision's default.
    """
    rates = {_VITS: 0.1, _SWIN: 0.2}
    name = timm_name(model)
    return next((r for m, r in rates.items() if is_model_in_modules(name, m)), 0.0)


def check_patches(encoder: nn.Module, size: tuple[int, ...], name: str) -> None:
    """Raise a ValueError unless whole patches of an encoder cover an image (H, W)."""
    if not is_vit(encoder):
        return
    patch = cast(Any, encoder).patch_embed.patch_size
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(
            f'{name} must be a multiple of the patch size {patch[0]} of the model, got '
            f'{size[0]} x {size[1]}. The nearest one is '
            f'{max(1, round(size[0] / patch[0])) * patch[0]}'
        )


def feature_size(
    encoder: nn.Module,
    in_channels: int,
    size: int,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> int:
    """Find the number of features of an encoder, by using it once.

    timm's ``num_features`` is not the width of the output for models with layers between
    pooling and classifier.

    Args:
        encoder: A model made by :func:`create_encoder`.
        in_channels: Number of bands.
        size: Side of the images in pixels.
        encode: How the encoder is used, if it is not simply called.

    Returns:
        The number F of (B, F) features.

    Raises:
        ValueError: If the encoder does not make (B, F) features of such images.
    """
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            out = (encode or encoder)(torch.zeros(1, in_channels, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        cfg = cast(Any, encoder).pretrained_cfg
        name, native = cfg['architecture'], cfg['input_size'][-1]
        reason = (
            f'timm builds it for {native}, and other sizes do not fit its layers. Make all '
            f'sizes {native}, or choose a model for any size, such as {nearest_vit(name)}'
        )
        if isinstance(error, ValueError):  # ours, which says what is wrong
            reason = f'{error}. Change the sizes'
        raise ValueError(
            f'model {name} does not take images of {size} x {size} pixels: {reason}'
        ) from error
    finally:
        encoder.train(training)
    if out.ndim != 2:
        raise ValueError(
            f'model {type(encoder).__name__} must pool its features to (B, F), got '
            f'{tuple(out.shape)}'
        )
    return int(out.shape[1])


def load_encoder(
    encoder: nn.Module,
    state_dict: Mapping[str, Tensor],
    in_layer_init: InputLayerInit = 'random',
    bands: Sequence[str] | None = None,
    normalization: Normalization | None = None,
) -> None:
    """Load pretrained parameters into an encoder, strictly.

    Classifiers are left out. The position embedding of a Vision Transformer is
    resampled to the encoder's grid. If the number of bands differs, the input layer is
    adapted by :func:`~torchgeo_softcon.models.input_layer.adapt_input_weight`; by its
    ``'rgb'``, RGB weights with a *normalization* always are.

    Args:
        encoder: A model made by :func:`create_encoder`.
        state_dict: Parameters in timm's layout.
        in_layer_init: Rule for an input layer with another number of bands.
        bands: Names of the encoder's bands.
        normalization: Mean and standard deviation that the parameters are for, None if
            they are for images as they are, or that is not known.

    Raises:
        ValueError: If the parameters belong to another architecture, or the input layer
            cannot be adapted.
    """
    own = encoder.state_dict()
    encoder_only = drop_head(state_dict)
    loaded = {k: v for k, v in state_dict.items() if k in own or k in encoder_only}
    name, layer = input_layer(encoder)
    key = f'{name}.weight'
    if key in loaded:
        normalized = in_layer_init == 'rgb' and normalization is not None
        if normalized:
            mean_std = cast(Normalization, normalization)
            loaded = fold_normalization(encoder, loaded, mean_std)
        named = normalized and bands is not None
        if loaded[key].shape[1] != layer.in_channels or named:
            loaded[key] = adapt_input_weight(
                loaded[key], layer.in_channels, in_layer_init, bands
            )
    key = 'pos_embed'
    if key in own and key in loaded and loaded[key].shape != own[key].shape:
        grid = cast(VisionTransformer, encoder).patch_embed.grid_size
        loaded[key] = resample_grid(encoder, loaded[key], grid)
    require_shapes(
        loaded,
        {k: tuple(v.shape) for k, v in own.items()},
        f'weights are of another architecture than {type(encoder).__name__}',
        'Choose the model that the weights were made for',
    )
    encoder.load_state_dict(loaded)
