# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Continual pretraining: what keeps an encoder from losing what it starts from."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self, TypeAlias, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._compat import BaseTask
from ..models.checkpoints import Branch
from ..models.encoders import PRETRAINING
from ..models.input_layer import input_layer
from .optimizers import layer_scales

#: Running statistics that learn, or that stay.
BatchNorm: TypeAlias = Literal['train', 'frozen']


def _batch_norms(encoder: nn.Module) -> list[nn.Module]:
    """Return the batch norms of an encoder, also those with an activation, in order."""
    return [module for module in encoder.modules() if isinstance(module, _BatchNorm)]


class ContinualTask(BaseTask):
    """Base of pretraining tasks, with what keeps the start of an encoder."""

    #: Attributes with the encoders of the task. The one in *model* is exported.
    branches: Mapping[Branch, str] = MappingProxyType({'student': 'model'})

    #: Number of first steps in which the encoder stays as it is.
    _held_steps: int = 0

    #: Whether the input layer was drawn anew, for other bands than those of *weights*.
    new_input_layer: bool = False

    _chosen_batch_norm: bool = False

    def choose_batch_norm(self, encoder: nn.Module, pretrained: bool) -> None:
        """Freeze batch norm of a pretrained encoder, unless the task was told what to do."""
        self._chosen_batch_norm = self.hparams['batch_norm'] is None
        if self._chosen_batch_norm:
            # A run that goes on learns them as before
            fresh = pretrained and not self.hparams.get('continue_training')
            frozen = fresh and bool(_batch_norms(encoder))
            self.hparams['batch_norm'] = 'frozen' if frozen else 'train'

    def keep_as_before(self, checkpoint: Mapping[str, Any]) -> None:
        """Freeze what was frozen in a checkpoint, unless the task was told what to do."""
        note = checkpoint.get(PRETRAINING, {})
        self.new_input_layer = note.get('new_input_layer', False)
        if self._chosen_batch_norm:
            before = checkpoint.get('hyper_parameters', {}).get('batch_norm')
            self.hparams['batch_norm'] = before or 'train'
        self.train(self.training)

    def tell_frozen(self) -> None:
        """Say if batch norm stays frozen."""
        if self.hparams['batch_norm'] == 'frozen':
            rank_zero_info(
                'Batch norm keeps the running statistics of the weights it started from '
                "(batch_norm = 'frozen'). batch_norm = 'train' learns those of the views"
            )

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules, but for frozen batch norm of student and teacher."""
        super().train(mode)
        if mode and self.hparams['batch_norm'] == 'frozen':
            for name in self.branches.values():
                # The first one learns behind an input layer that was drawn anew, which its
                # statistics would not fit
                for module in _batch_norms(getattr(self, name))[self.new_input_layer :]:
                    module.eval()
        return self

    @property
    def trained_encoder(self) -> nn.Module:
        """The encoder that gradients reach."""
        return cast(nn.Module, getattr(self, self.branches['student']))

    def _input_parameters(self) -> set[nn.Parameter]:
        """Return the parameters of the input layer."""
        return set(input_layer(self.trained_encoder)[1].parameters())

    def lr_scales(self) -> dict[nn.Parameter, float]:
        """Return factors of the learning rate where they are not 1, by *layer_decay*."""
        decay = self.hparams['layer_decay']
        scales = layer_scales(self.trained_encoder, decay) if decay < 1 else {}
        if self.new_input_layer:
            scales |= dict.fromkeys(self._input_parameters(), 1.0)
        return scales

    def hold_gradients(self) -> None:
        """Take the gradients of the encoder away while heads and new input layers warm up."""
        if self.global_step >= self._held_steps:
            return
        new = self._input_parameters() if self.new_input_layer else ()
        for parameter in self.trained_encoder.parameters():
            if parameter not in new:
                # None and not zero, so that nothing decays it either
                parameter.grad = None

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Leave out gradients of an encoder that is held, and clip as the trainer says."""
        self.hold_gradients()
        if kwargs.get('gradient_clip_val') is not None:
            super().configure_gradient_clipping(*args, **kwargs)
