# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Resizing of images to the size that a model takes."""

import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from .._checks import check_types, require
from ..models.encoders import own_weights

#: What tells positions in an image, in TorchGeo and in torchvision.
_POSITIONS = ('mask', 'masks', 'bbox', 'bbox_xyxy', 'boxes', 'keypoints')


class ResizeInput(Callback):
    """Resize ``batch['image']`` on its way into any task of whole images.

    EuroSAT's tiles have 64 pixels, those of BigEarthNet 120. The papers evaluate their
    encoders at 224 pixels, as ``examples/eurosat_finetune.yaml`` does, and timm's Vision
    Transformers refuse other sizes than the one they are built for.
    """

    def __init__(self, size: int | None = None) -> None:
        """Initialize a new ResizeInput instance.

        Args:
            size: Side of the square images in pixels. Defaults to the one that the model
                is built for.

        Raises:
            ValueError: If the size is not positive.
        """
        check_types(ResizeInput.__init__, locals())
        require(
            size is None or size > 0, f'size must be a number of pixels, got {size}'
        )
        self.size = size
        self._target: tuple[int, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the size of the images.

        Raises:
            ValueError: If the model takes another size only, or *size* has no default.
        """
        fixed = fixed_size(pl_module)
        self._target = fixed if self.size is None else (self.size, self.size)
        require(
            self._target,
            f'size must be given to ResizeInput: the model of '
            f'{type(pl_module).__name__} has no input size of its own',
        )
        require(
            fixed in (None, self._target),
            f'size must be {fixed}, the size that the model is built for, or be left '
            f'out, got {self.size}',
        )

    def _resize(self, batch: Any) -> None:
        """Resize the images of a mini-batch in place."""
        if self._target is None or _shape(batch) in (None, self._target):
            return
        image: Tensor = batch['image']
        kept = [key for key in _POSITIONS if key in batch]
        if kept:
            raise ValueError(
                f'batch[{kept[0]!r}] would keep its size: ResizeInput is for tasks with '
                'labels of whole images. Resize both in the transforms of the dataset'
            )
        batch['image'] = TF.resize(image, list(self._target))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any
    ) -> None:
        """Resize the images in *batch*, of shape (..., C, H, W).

        Raises:
            ValueError: If the mini-batch has masks or boxes as well.
        """
        self._resize(batch)

    # They have the number of a data loader, too
    on_validation_batch_start = on_train_batch_start  # type: ignore[assignment]
    on_test_batch_start = on_train_batch_start  # type: ignore[assignment]
    on_predict_batch_start = on_train_batch_start  # type: ignore[assignment]


class ResizeForWeights(ResizeInput):
    """A :class:`ResizeInput` that acts only where a task would fail without it.

    The plugin adds it to every trainer of TorchGeo's tasks. It acts, and says so, on tasks
    that start from weights of this package or from a checkpoint, in a model that refuses
    the size of the images.
    """

    def __init__(self) -> None:
        """Initialize a new ResizeForWeights instance."""
        super().__init__()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether there may be something to do."""
        self._target = fixed_size(pl_module) if has_our_weights(pl_module) else None
        self._reported = False

    def _resize(self, batch: Any) -> None:
        """Resize the images of a mini-batch in place, and say so once."""
        before = _shape(batch)
        super()._resize(batch)
        after = _shape(batch)
        if before != after and not self._reported:
            self._reported = True
            rank_zero_info(
                f'torchgeo-softcon resizes the images of {before} pixels to {after}, the '
                'only size that this model takes. The models softcon_* and dinomc_* of '
                'timm take any size'
            )


def fixed_size(task: LightningModule) -> tuple[int, int] | None:
    """Return the only height and width that the model of a task takes, None for any."""
    embed = getattr(getattr(task, 'model', None), 'patch_embed', None)
    size = getattr(embed, 'img_size', None)
    strict = getattr(embed, 'strict_img_size', False)
    return (int(size[0]), int(size[1])) if size and strict else None


def has_our_weights(task: LightningModule) -> bool:
    """Tell whether the *weights* of a task are ours: an enum or its name, or a file."""
    weights = getattr(task, 'weights', None)
    file = isinstance(weights, str) and os.path.isfile(weights)
    return file or own_weights(weights) is not None


def _shape(batch: Any) -> tuple[int, ...] | None:
    """Return the height and width of the images of a mini-batch, if it has any."""
    image = batch.get('image') if isinstance(batch, dict) else None
    return tuple(image.shape[-2:]) if isinstance(image, Tensor) else None
