# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretrained ResNets in TorchGeo's tasks of detection."""

import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from .._checks import check_types
from ..models.encoders import find_weights


class LoadBackbone(Callback):
    """Start object detection and instance segmentation from a ResNet of this package.

    These tasks of TorchGeo take torchvision's weights only, and build torchvision's
    ResNets, whose parameters have the names of timm's. (They build no other encoders.)

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
        body = getattr(getattr(model, 'backbone', None), 'body', None)
        if body is None:
            raise ValueError(
                'LoadBackbone is for tasks of object detection and instance segmentation, '
                f'got {type(pl_module).__name__}. Others take weights themselves'
            )
        found = find_weights(self.weights, self.bands).state_dict
        own = body.state_dict()
        wrong = [
            key
            for key, value in own.items()
            if not key.endswith('num_batches_tracked')
            and (key not in found or found[key].shape != value.shape)
        ]
        if wrong:
            key = wrong[0]
            shapes = [
                tuple(v.shape) for v in (own[key], found.get(key)) if v is not None
            ]
            raise ValueError(
                f'weights {self.weights} do not fit the backbone of '
                f'{type(pl_module).__name__}: {key} of shape {shapes[0]} '
                + (f'is of {shapes[1]}' if shapes[1:] else 'is missing')
                + '. Choose weights of the same ResNet, and its number of bands as '
                'in_channels'
            )
        body.load_state_dict(
            {key: found[key] for key in own if key in found}, strict=False
        )
        rank_zero_info(f'The backbone starts from {self.weights}')
