# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretrained ResNets in TorchGeo's tasks of detection."""

import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from .._checks import check_types, require
from ..models.encoders import find_weights


class LoadBackbone(Callback):
    """Start object detection and instance segmentation from a ResNet of this package.

    These tasks of TorchGeo take torchvision's weights only, and build torchvision's
    ResNets, whose parameters have the names of timm's.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: torchgeo_softcon.callbacks.LoadBackbone
              init_args:
                weights: ResNet50_Weights.SENTINEL2_SOFTCON
        model:
          class_path: ObjectDetection  # ObjectDetectionTask before TorchGeo 0.10
          init_args:
            backbone: resnet50
            in_channels: 13
    """

    def __init__(
        self, weights: str | os.PathLike[str], bands: Sequence[str] | None = None
    ) -> None:
        """Initialize a new LoadBackbone instance.

        Args:
            weights: Name of a weight enum member, or path of a checkpoint.
            bands: Names of the bands of the images, chosen from those of weights of this
                package. Defaults to all.
        """
        check_types(LoadBackbone.__init__, locals())
        self.weights, self.bands = os.fspath(weights), bands

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the parameters, before a checkpoint to resume from is.

        Raises:
            ValueError: If the task has no such backbone, or the parameters do not fit it.
        """
        if stage != 'fit':
            return
        model: Any = getattr(pl_module, 'model', None)
        body: Any = getattr(getattr(model, 'backbone', None), 'body', None)
        name = type(pl_module).__name__
        require(
            body is not None,
            'LoadBackbone is for tasks of object detection and instance segmentation, '
            f'got {name}. Others take weights themselves',
        )
        found = find_weights(self.weights, self.bands).state_dict
        own = body.state_dict()
        for key, value in own.items():
            if not key.endswith('num_batches_tracked'):
                got = f'of {tuple(found[key].shape)}' if key in found else 'missing'
                require(
                    key in found and found[key].shape == value.shape,
                    f'weights {self.weights} do not fit the backbone of {name}: {key} of '
                    f'shape {tuple(value.shape)} is {got}. Choose weights of the same '
                    'ResNet, and its number of bands as in_channels',
                )
        state = {key: found[key] for key in own if key in found}
        body.load_state_dict(state, strict=False)
        rank_zero_info(f'The backbone starts from {self.weights}')
