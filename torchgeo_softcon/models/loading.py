# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders from timm, for any number of bands and any image size."""

import difflib
import functools
import math
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

from .._checks import require
from .checkpoints import on_meta, require_shapes
from .convert import drop_head
from .input_layer import (
    InputLayerInit,
    Normalization,
    adapt_input_weight,
    fold_normalization,
    input_layer,
)
from .timm_models import timm_name

#: Entry of a checkpoint, see :func:`save_positions`.
POSITIONS = 'positions'

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

    Vision Transformers resample their position embedding for images of another size than
    they are built for.

    Args:
        model: Name of a timm model.
        in_channels: Number of bands.
        pretrained: Whether to load timm's weights.
        drop_path_rate: Stochastic depth rate of the last block.
        size: Side of the images in pixels that the position embedding of a Vision
            Transformer is for. Defaults to that of the name.

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
    """Whether a timm model is a plain Vision Transformer, whose patches can be dropped.

    Those with rotary positions are (DINOv3, EVA-02, ...), hybrids with a convolutional
    stem are not.
    """
    return isinstance(model, VisionTransformer | Eva) and isinstance(
        model.patch_embed, PatchEmbed
    )


def nearest_vit(model: str) -> str:
    """Return the plain Vision Transformer of timm with the name most like a model's."""
    name = timm_name(model)
    listed = [n for module in _VITS for n in timm.list_models(module=module)]
    known = [n for n in listed if not _NOT_PLAIN.search(n)]
    return [*difflib.get_close_matches(name, known, n=1), 'vit_small_patch16_224'][0]


def has_class_token(model: nn.Module) -> bool:
    """Whether a timm model is a Vision Transformer with a class token."""
    return isinstance(model, VisionTransformer | Eva) and model.cls_token is not None


def resample_grid(vit: nn.Module, positions: Tensor, grid: Sequence[int]) -> Tensor:
    """Resample a position embedding of a Vision Transformer to other rows and columns."""
    prefix = _prefix_positions(vit)
    return resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=prefix)


def _prefix_positions(vit: Any) -> int:
    """Count the positions of the class token and registers."""
    return 0 if vit.no_embed_class else int(vit.num_prefix_tokens)


@functools.cache
def native_grid(model: str) -> tuple[int, int]:
    """Return the rows and columns of patches that timm builds a model of a name for."""
    created: Any = on_meta(lambda: timm.create_model(model, num_classes=0))
    rows, columns = created.patch_embed.grid_size
    return rows, columns


def match_grid(encoder: nn.Module, positions: Tensor | None) -> None:
    """Build a Vision Transformer for the grid that a position embedding has."""
    if is_vit(encoder) and positions is not None:
        vit: Any = encoder
        side = math.isqrt(positions.shape[1] - _prefix_positions(vit))
        if side != vit.patch_embed.grid_size[0]:
            vit.set_input_size(side * vit.patch_embed.patch_size[0])


def save_positions(checkpoint: dict[str, Any], vit: nn.Module, model: str) -> None:
    """Let TorchGeo open a checkpoint of an encoder that was built for another size.

    The position embedding in the state dict becomes that of the size that timm, and so
    TorchGeo, builds *model* for. An entry keeps the original.
    """
    positions = checkpoint['state_dict'].get('model.pos_embed')
    if is_vit(vit) and positions is not None:
        grid = native_grid(model)
        if grid != cast(Any, vit).patch_embed.grid_size:
            checkpoint[POSITIONS] = positions
            resampled = resample_grid(vit, positions, grid)
            checkpoint['state_dict']['model.pos_embed'] = resampled


def load_positions(
    checkpoint: Mapping[str, Any], encoders: Mapping[str, nn.Module]
) -> None:
    """Undo :func:`save_positions`, and build encoders for the size of their positions.

    *encoders* are attributes of the task. Older checkpoints have the size of timm.
    """
    state = checkpoint['state_dict']
    if POSITIONS in checkpoint:
        state['model.pos_embed'] = checkpoint[POSITIONS]
    for name, encoder in encoders.items():
        match_grid(encoder, state.get(f'{name}.pos_embed'))


def default_drop_path_rate(model: str) -> float:
    """Return the rate of the student in DINO-MC: DINO's, and torchvision's for Swin."""
    name = timm_name(model)
    if is_model_in_modules(name, _VITS):
        return 0.1
    return 0.2 if is_model_in_modules(name, _SWIN) else 0.0


def check_patches(encoder: nn.Module, size: tuple[int, ...], name: str) -> None:
    """Raise a ValueError unless whole patches of an encoder cover an image (H, W)."""
    if not is_vit(encoder):
        return
    side, width = cast(Any, encoder).patch_embed.patch_size
    require(
        size[0] % side == 0 and size[1] % width == 0,
        f'{name} must be a multiple of the patch size {side} of the model, got '
        f'{size[0]} x {size[1]}. The nearest one is {max(1, round(size[0] / side)) * side}',
    )


def feature_size(
    encoder: nn.Module,
    in_channels: int,
    size: int,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> int:
    """Find the number F of features (B, F) of an encoder, by using it once.

    timm's ``num_features`` leaves out layers between pooling and classifier.

    Args:
        encoder: A model made by :func:`create_encoder`.
        in_channels: Number of bands.
        size: Side of the images in pixels.
        encode: How the encoder is used, if it is not simply called.

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
    kind, shape = type(encoder).__name__, tuple(out.shape)
    require(
        out.ndim == 2, f'model {kind} must pool its features to (B, F), got {shape}'
    )
    return int(out.shape[1])


def load_encoder(
    encoder: nn.Module,
    state_dict: Mapping[str, Tensor],
    in_layer_init: InputLayerInit = 'random',
    bands: Sequence[str] | None = None,
    normalization: Normalization | None = None,
) -> None:
    """Load pretrained parameters into an encoder, strictly, but for classifiers.

    The position embedding of a Vision Transformer is resampled to the encoder's grid. If
    the number of bands differs, the input layer is adapted by
    :func:`~torchgeo_softcon.models.input_layer.adapt_input_weight`; by its ``'rgb'``, RGB
    weights with a *normalization* always are.

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
        named = False
        if in_layer_init == 'rgb' and normalization is not None:
            loaded = fold_normalization(encoder, loaded, normalization)
            named = bands is not None
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
        own,
        f'weights are of another architecture than {type(encoder).__name__}',
        'Choose the model that the weights were made for',
    )
    encoder.load_state_dict(loaded)
