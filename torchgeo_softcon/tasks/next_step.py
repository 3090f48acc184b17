# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""How to go on from a pretrained encoder."""

import shlex
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from .._compat import finetune_command
from ..models import is_vit
from ..models.loading import native_grid


def tell_next_step(task: Any) -> None:
    """Say where the encoder of a run is, and the command that fine-tunes it."""
    callback = task.trainer.checkpoint_callback
    path = getattr(callback, 'best_model_path', '')
    path = path or getattr(callback, 'last_model_path', '')
    if not path:
        return
    rank_zero_info(f'The pretrained encoder is in {path}')
    if not isinstance(list(task.model.children())[-1], nn.Identity):
        # The host's loader knows classifiers of one layer only
        rank_zero_info(
            'TorchGeo does not open checkpoints of this family of models. Export it '
            f'with:\n  torchgeo-softcon export {shlex.quote(path)} --format timm\n'
            'and load the file into a task: '
            'task.model.load_state_dict(torch.load(FILE), strict=False)'
        )
        return
    datamodule = getattr(task.trainer, 'datamodule', None)
    options = getattr(datamodule, 'finetune_options', None)
    name, size = task.hparams['model'], None
    if is_vit(task.model):  # which the host builds for one image size
        size = native_grid(name)[0] * task.model.patch_embed.patch_size[0]
    command = finetune_command(
        name,
        path,
        task.hparams['in_channels'],
        None if options is None else options(size),
    )
    rank_zero_info(f'Fine-tune from it with:\n  {command}')
