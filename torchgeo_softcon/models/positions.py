# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Position embeddings of Vision Transformers for images of other sizes."""

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import timm
from torch import Tensor, nn

from .checkpoints import on_meta
from .loading import is_vit, resample_grid

#: Entry of a checkpoint, see :func:`save_positions`.
POSITIONS = 'positions'


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
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        side = math.isqrt(positions.shape[1] - prefix)
        if side != vit.patch_embed.grid_size[0]:
            vit.set_input_size(side * vit.patch_embed.patch_size[0])


def save_positions(checkpoint: dict[str, Any], vit: nn.Module, model: str) -> None:
    """Let TorchGeo open a checkpoint of an encoder that was built for another size.

    The position embedding in the state dict becomes that of the size that timm, and so
    TorchGeo, builds *model* for. An entry has it as it is, for :func:`load_positions` and
    :func:`read_encoder`.
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
    """Take positions as they are from a checkpoint, and build encoders for their size.

    *encoders* are attributes of the task. Older checkpoints have the size of timm.
    """
    state = checkpoint['state_dict']
    if POSITIONS in checkpoint:
        state['model.pos_embed'] = checkpoint[POSITIONS]
    for name, encoder in encoders.items():
        match_grid(encoder, state.get(f'{name}.pos_embed'))
