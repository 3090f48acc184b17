# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Crops of several sizes in a task: drawing, encoding and pairing them."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from .._compat import Sample
from ..models.loading import feature_size
from ..modules.packing import encode_crops
from .label_guidance import LabelGuidedTask, LabelPairs


class MultiCropTask(LabelGuidedTask):
    """Base of DINO-MC: several crops of every image, of which a teacher sees the first."""

    #: Encodes crops by an encoder: features (S, B, F).
    encode: Callable[[nn.Module, Sequence[Tensor]], Tensor]

    #: Sides of the crops in pixels, as far as they are known.
    _sizes: tuple[int, ...]

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
    def assign(head: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (S, B, K) of features (S, B, F), and what has them (S, B, D)."""
        compared: Tensor = head.embed(features.flatten(0, 1))
        logits: Tensor = head.last_layer(compared)
        shape = features.shape[:2]
        return logits.unflatten(0, shape), compared.unflatten(0, shape)

    def pair_crops(
        self, batch: Sample, student: Tensor, teacher: Tensor
    ) -> list[LabelPairs]:
        """Pair each global crop of the student (B, D) with the teacher's next one."""
        image = self.read_image(batch, self.hparams['views'] == 'temporal')
        label = cast(Tensor, self.read_label(batch, image)).mean(1)
        pairs = zip(student, teacher.roll(-1, 0), strict=False)
        return [(query, key, label, label) for query, key in pairs]

    def label_pairs(self, batch: Sample, batch_idx: int) -> LabelPairs:
        """Return what the soft term of a step compares first, see the base class."""
        with self.step_rng(batch_idx):
            crops = self.draw_crops(batch)[: self.num_global]
            student, teacher = [
                self.assign(head, self.encode(encoder, crops))[1]
                for encoder, head in zip(*self.ema_pairs(), strict=True)
            ]
        return self.pair_crops(batch, student, teacher)[0]
