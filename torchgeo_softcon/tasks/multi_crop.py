# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Crops of several sizes in a task: drawing, encoding and pairing them."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._compat import Sample
from ..models.loading import feature_size
from ..modules.heads import DINOHead
from ..modules.packing import encode_crops
from .label_guidance import LabelGuidedTask, LabelPairs


class MultiCropTask(LabelGuidedTask):
    """Base of DINO-MC: several crops of every image, of which a teacher sees the first."""

    #: Encodes crops by an encoder: features (S, B, F).
    encode: Callable[[nn.Module, Sequence[Tensor]], Tensor]

    #: Sides of the crops in pixels, as far as they are known.
    _sizes: tuple[int, ...]

    #: Heads of student and teacher.
    head: DINOHead
    teacher_head: Any

    def try_sizes(self, encoder: nn.Module) -> int:
        """Return the number of features of an encoder, if it takes the sizes of all crops."""
        return [
            feature_size(
                encoder,
                self.hparams['in_channels'],
                size,
                lambda image: encode_crops(encoder, [image])[0],
            )
            for size in sorted(set(self._sizes))
        ][-1]

    def draw_crops(self, batch: Sample) -> list[Tensor]:
        """Draw the crops (B, C, h, w) of every image, those that the teacher sees first."""
        temporal = self.hparams['views'] == 'temporal'
        image = self.read_image(batch, temporal)
        if image.shape[1] == 1 and temporal:
            raise ValueError(
                "views='temporal' needs at least two seasons of every place, got "
                f"batch['image'] of shape {tuple(batch['image'].shape)} with in_channels "
                f"= {self.hparams['in_channels']}. Choose views='multi_crop' for it"
            )
        crops = self.augmentations(image[:, 0] if image.shape[1] == 1 else image)
        listed = isinstance(crops, Sequence)
        if not listed or len(crops) < self.num_global:
            got = len(crops) if listed else type(crops).__name__
            raise ValueError(
                f'augmentations must give a list of at least {self.num_global} crops, '
                f'got {got}'
            )
        return [crop.to(self.dtype) for crop in crops]

    def draw_for_report(self, batch: Sample) -> list[tuple[str, Tensor]]:
        """Return all crops, see the base class."""
        return [
            (f'{"global" if i < self.num_global else "local"}, {x.shape[-1]} px', x)
            for i, x in enumerate(self.draw_crops(batch))
        ]

    @property
    def num_global(self) -> int:
        """Number of crops that the teacher sees."""
        return 3 if self.hparams['views'] == 'temporal' else 2

    @staticmethod
    def assign(head: nn.Module, features: Tensor) -> Tensor:
        """Compare features (S, B, F) with the prototypes: logits (S, B, K)."""
        logits: Tensor = head(features.flatten(0, 1))
        return logits.unflatten(0, features.shape[:2])

    def pair_crops(
        self, batch: Sample, features: Tensor, teacher_features: Tensor
    ) -> list[LabelPairs]:
        """Pair each global crop of the student with the teacher's next one.

        In the bottleneck (B, D) of the heads, of features (S, B, F).
        """
        image = self.read_image(batch, self.hparams['views'] == 'temporal')
        label = cast(Tensor, self.read_label(batch, image)).mean(1)
        queries = self.head.embed(features[: self.num_global])
        with torch.no_grad():
            keys = self.teacher_head.embed(teacher_features).roll(-1, 0)
        return [(*pair, label, label) for pair in zip(queries, keys, strict=True)]

    def label_pairs(self, batch: Sample, batch_idx: int) -> LabelPairs:
        """Return what the soft term of a step compares first, see the base class."""
        with self.step_rng(batch_idx):
            crops = self.draw_crops(batch)[: self.num_global]
            (student, teacher), _ = self.ema_pairs()
            features = [self.encode(encoder, crops) for encoder in (student, teacher)]
        return self.pair_crops(batch, *features)[0]
