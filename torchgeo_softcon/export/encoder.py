# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders for other patch sizes and image sizes, under names that timm knows."""

import re
from collections.abc import Mapping
from dataclasses import replace

import timm
from torch import Tensor

from ..models.checkpoints import check_architecture
from ..models.convert import fresh, resample_positions, to_patch_size
from ..models.encoders import Encoder
from ..models.loading import native_grid, resample_grid
from ..models.timm_models import timm_name

_PATCHES = 'patch_embed.proj.weight'


def convert_encoder(
    encoder: Encoder, patch_size: int | None = None, img_size: int | None = None
) -> Encoder:
    """Convert a Vision Transformer to another patch size or image size.

    Args:
        encoder: The encoder.
        patch_size: Side of the patches in pixels, see
            :func:`~torchgeo_softcon.models.convert.to_patch_size`.
        img_size: Side of the images in pixels that the encoder is built for. Defaults to
            224 with another patch size, else to what it was.
    """
    state = encoder.state_dict
    if patch_size is not None or img_size is not None:
        if 'pos_embed' not in state or _PATCHES not in state:
            raise ValueError(
                'patch_size and img_size are for Vision Transformers with a position '
                f'embedding, got {encoder.name}. Leave them out'
            )
        old = state[_PATCHES].shape[-1]
        patch = old if patch_size is None else patch_size
        size = patch if img_size is None else img_size
        if patch < 1 or size < patch or size % patch:
            raise ValueError(
                f'img_size must be a multiple of patch_size = {patch}, got {img_size}'
            )
        if patch != old:
            state = to_patch_size(state, patch, (img_size or 224) // patch)
        elif img_size is not None:
            state = resample_positions(state, img_size // patch)
    name, options = _find_model(encoder.name or '', state)
    return replace(encoder, name=name, state_dict=fresh(state), options=options)


def at_native_size(encoder: Encoder) -> Encoder:
    """Resample positions to the image size that timm builds the model for."""
    grid = native_grid(encoder.name or '')
    positions = resample_grid(encoder.model, encoder.state_dict['pos_embed'], grid)
    state = {**encoder.state_dict, 'pos_embed': positions}
    return replace(encoder, state_dict=state, options={})


def _find_model(
    model: str, state_dict: Mapping[str, Tensor]
) -> tuple[str, dict[str, int]]:
    """Find a timm model that has these parameters, and the options to build it with."""
    name = model.split('/')[-1].partition('.')[0]
    layer = next(v for v in state_dict.values() if v.ndim == 4)
    options: list[dict[str, int]] = [{}]
    names = [name]
    if _PATCHES in state_dict and 'pos_embed' in state_dict:
        patch = layer.shape[-1]
        grid = round((state_dict['pos_embed'].shape[1] - 1) ** 0.5)
        names = [
            re.sub(r'_patch\d+', f'_patch{patch}', n) for n in (name, timm_name(name))
        ]
        # Models without LayerScale or for other sizes, and ours, which take any size
        for side in (224, 256):
            names += [re.sub(r'_(dinov2|\d+)$', f'_{side}', n) for n in names[:2]]
        names += [f'softcon_{n}' for n in names if not n.startswith('softcon_')]
        options.append({'img_size': patch * grid})
    for option in options:
        for candidate in filter(timm.is_model, names):
            try:
                size = option.get('img_size')
                check_architecture(state_dict, candidate, layer.shape[1], size)
            except ValueError:
                continue
            return candidate, option
    raise ValueError(
        f'timm has no model for the result, tried {", ".join(dict.fromkeys(names))}. '
        'Choose another patch_size or img_size'
    )
