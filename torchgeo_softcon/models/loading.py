# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders from timm, for any number of bands and any image size."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .checkpoints import require_shapes
from .convert import drop_head
from .input_layer import InputLayerInit, adapt_input_weight, input_layer
from .timm_models import timm_name


def create_encoder(
    model: str,
    in_channels: int = 3,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """Create a timm model that pools its features and takes images of any size.

    Vision Transformers resample their position embedding in every forward pass, so that
    the parameters are those of timm's own model of that name and size, and other tools
    can load them.

    Args:
        model: Name of a timm model.
        in_channels: Number of bands.
        pretrained: Whether to load timm's weights.
        drop_path_rate: Stochastic depth rate of the last block.

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
    swin = is_model_in_modules(name, 'swin_transformer')
    if drop_path_rate or swin:  # where timm's default is not 0
        kwargs['drop_path_rate'] = drop_path_rate
    if is_model_in_modules(name, ('vision_transformer', 'deit', 'eva')):
        kwargs['dynamic_img_size'] = True
    elif swin:
        kwargs['strict_img_size'] = False
    return timm.create_model(
        model, pretrained=pretrained, in_chans=in_channels, num_classes=0, **kwargs
    )


def is_vit(model: nn.Module) -> bool:
    """Whether a model is a plain Vision Transformer: patches that can be dropped.

    Args:
        model: A timm model.

    Returns:
        True for timm's ``VisionTransformer`` with a patch embedding (ViT, DeiT, DINOv2),
        False for hybrids with a convolutional stem and for other families.
    """
    return isinstance(model, VisionTransformer) and isinstance(
        model.patch_embed, PatchEmbed
    )


def feature_size(encoder: nn.Module, in_channels: int, size: int) -> int:
    """Number of features of an encoder, found out by using it once.

    timm's ``num_features`` is not the width of the output for models with layers between
    pooling and classifier.

    Args:
        encoder: A model made by :func:`create_encoder`.
        in_channels: Number of bands.
        size: Side of the images in pixels.

    Returns:
        The number F of (B, F) features.

    Raises:
        ValueError: If the encoder does not make (B, F) features of such images.
    """
    training = encoder.training
    try:
        with torch.no_grad():
            out = encoder.eval()(torch.zeros(1, in_channels, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f'model {type(encoder).__name__} does not take images of size {size} x '
            f'{size}: {error}. Choose another size or another model'
        ) from error
    finally:
        encoder.train(training)
    if out.ndim != 2:
        raise ValueError(
            f'model {type(encoder).__name__} must pool its features to (B, F), got '
            f'{tuple(out.shape)}'
        )
    return int(out.shape[1])


def read_pretrained(
    model: str, in_channels: int, bands: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Read the weights that the name of a model stands for.

    Args:
        model: Name of a timm model.
        in_channels: Number of bands.
        bands: Their names.

    Returns:
        A state dict: of this package's models for those bands, of timm's own for RGB.
    """
    if timm_name(model) == model.split('/')[-1].split('.')[0]:
        return dict(create_encoder(model, pretrained=True).state_dict())
    created = timm.create_model(
        model, pretrained=True, in_chans=in_channels, bands=bands, num_classes=0
    )
    return dict(created.state_dict())


def load_encoder(
    encoder: nn.Module,
    state_dict: Mapping[str, Tensor],
    in_layer_init: InputLayerInit = 'random',
    bands: Sequence[str] | None = None,
) -> None:
    """Load pretrained parameters into an encoder, strictly.

    Classifiers are left out. The position embedding of a Vision Transformer is
    resampled to the encoder's grid. If the number of bands differs, the input layer is
    adapted by :func:`~torchgeo_softcon.models.input_layer.adapt_input_weight`.

    Args:
        encoder: A model made by :func:`create_encoder`.
        state_dict: Parameters in timm's layout.
        in_layer_init: Rule for an input layer with another number of bands.
        bands: Names of the encoder's bands.

    Raises:
        ValueError: If the parameters belong to another architecture, or the input layer
            cannot be adapted.
    """
    own = encoder.state_dict()
    encoder_only = drop_head(state_dict)
    loaded = {k: v for k, v in state_dict.items() if k in own or k in encoder_only}
    name, layer = input_layer(encoder)
    key = f'{name}.weight'
    if key in loaded and loaded[key].shape[1] != layer.in_channels:
        loaded[key] = adapt_input_weight(
            loaded[key], layer.in_channels, in_layer_init, bands
        )
    positions = own.get('pos_embed')
    if positions is not None and 'pos_embed' in loaded:
        vit = cast(VisionTransformer, encoder)
        if loaded['pos_embed'].shape != positions.shape:
            loaded['pos_embed'] = resample_abs_pos_embed(
                loaded['pos_embed'],
                new_size=list(vit.patch_embed.grid_size),
                num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens,
            )

    require_shapes(
        loaded,
        {k: tuple(v.shape) for k, v in own.items()},
        f'weights are of another architecture than {type(encoder).__name__}',
        'Choose the model that the weights were made for',
    )
    encoder.load_state_dict(loaded)
