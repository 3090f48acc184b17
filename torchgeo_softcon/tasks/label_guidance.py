# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The part of a pretraining task that land-cover labels guide."""

import math
from typing import Any, Literal, TypeAlias, cast

import torch
from lightly.utils import dist
from torch import Tensor, nn

from .._checks import check_counts, check_positive, check_types, require
from .._compat import Sample, WeightsEnum
from ..losses import SoftLabelLoss
from ..losses.soft_labels import LabelSimilarity
from .base import PretrainingTask
from .guard import label_message, read_at_once

#: Queries and keys (B, D) that the soft term compares, and their labels (B, K).
LabelPairs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

#: Optimizer steps between two measurements of ``soft_weight='auto'``, and the share of a
#: new one in the (geometric) moving average: one batch tells it to some tens of per cent.
_AUTO_EVERY, _AUTO_SHARE = 10, 0.1


class LabelGuidedTask(PretrainingTask):
    """Base of tasks whose loss may have a soft term that compares labels.

    A subclass has the argument *soft_weight*, and keeps the term in *criterion* as *soft*
    where :attr:`uses_labels` says so.
    """

    criterion: Any
    label_similarity: Any
    auto_weight: Tensor

    def __init__(
        self,
        weights: WeightsEnum | bool | str | None = None,
        augmentations: nn.Module | None = None,
        label_similarity: Literal['cosine', 'jaccard'] | LabelSimilarity = 'cosine',
        soft_ratio: float = 1.0,
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        """Initialize a new LabelGuidedTask instance.

        Args:
            weights: Initial weights.
            augmentations: Module that draws views.
            label_similarity: Similarity of two labels, ``'cosine'`` as in SoftCon,
                ``'jaccard'``, or a function of labels (B, K) and (N, K) to (B, N).
            soft_ratio: Ratio of the gradients for ``soft_weight='auto'``: that of the soft
                term at the features to that of the other, as measured every 10 steps, a
                backward pass through the heads.
            num_classes: If the labels of the data are class indices (B,), the number of
                classes: they become one-hot, negative ones unknown.
            **options: Options of :class:`.PretrainingTask`.
        """
        check_types(LabelGuidedTask.__init__, locals())
        check_positive(soft_ratio=soft_ratio)
        check_counts(num_classes=num_classes)
        self.label_similarity = label_similarity
        if callable(label_similarity):
            # A function in a checkpoint could not be loaded safely
            self.ignore = (*self.ignore, 'label_similarity')
        super().__init__(weights, augmentations, **options)

    @property
    def soft_criterion(self) -> SoftLabelLoss:
        """The soft term, without its weight."""
        return cast(SoftLabelLoss, self.criterion.soft)

    @property
    def uses_labels(self) -> bool:
        """Whether batches must have labels."""
        return self.hparams['soft_weight'] != 0

    @property
    def fixed_weight(self) -> float:
        """Weight of the soft term if it is a number, 1 if it is found while training."""
        weight = self.hparams['soft_weight']
        return 1.0 if weight == 'auto' else weight

    def configure_losses(self) -> None:
        """Check the weight of the soft term, and make room for one that is found."""
        weight = self.hparams['soft_weight']
        require(
            weight == 'auto' or weight >= 0,
            f"soft_weight must be >= 0 or 'auto', got {weight!r}",
        )
        if weight == 'auto':
            self.register_buffer('auto_weight', torch.zeros(()))

    def unsaved(self) -> dict[str, str]:
        """Return augmentations, and the similarity of labels, which may be a function."""
        compare: Any = self.label_similarity
        name = getattr(compare, '__qualname__', str(compare))
        return {**super().unsaved(), 'label_similarity': name}

    def read_label(self, batch: Sample, image: Tensor) -> Tensor | None:
        """Return labels (B, T, K) of images (B, T, C, H, W), None if none are needed.

        Raises:
            ValueError: If *label* is missing, is not (B, K) or (B, T, K), or has invalid
                values. (For these on a CUDA device, see :class:`.NonFiniteGuard`.)
        """
        if not self.uses_labels:
            return None
        label = batch.get('label')
        if label is None:
            raise ValueError(
                "batch must have the key 'label' (multi-labels) because soft_weight = "
                f'{self.hparams["soft_weight"]} > 0, got {sorted(batch)}. Give the '
                'dataset transforms=torchgeo_softcon.transforms.WorldCoverMultiLabel(), '
                'or set soft_weight to 0'
            )
        size, seasons = image.shape[:2]
        classes = self.hparams['num_classes']
        if classes is not None:
            label = self._one_hot(label, (size, seasons), classes)
        if label.ndim == 2 and len(label) == size:
            label = label[:, None].expand(-1, seasons, -1)
        require(
            label.ndim == 3 and label.shape[:2] == (size, seasons),
            f"batch['label'] must have the shape (B, K) or (B, T, K) with B = {size} and T "
            f'= {seasons}, got {tuple(label.shape)}. Class indices are not multi-labels: '
            'set num_classes to make them one-hot',
        )
        if read_at_once(label) and not (label.isfinite() & (label >= 0)).all():
            raise ValueError(label_message(float(label.min()), float(label.max())))
        return label.float()

    @staticmethod
    def _one_hot(label: Tensor, shape: tuple[int, int], classes: int) -> Tensor:
        """Turn class indices (B,) or (B, T) into labels; negative ones mean unknown."""
        whole = not (label.is_floating_point() or label.dtype == torch.bool)
        require(
            whole and label.shape in (shape, shape[:1]),
            f"batch['label'] must be class indices of shape (B,) or (B, T) = {shape} "
            f'because num_classes = {classes}, got {label.dtype} of shape '
            f'{tuple(label.shape)}. Leave out num_classes for multi-labels',
        )
        if read_at_once(label) and (label >= classes).any():
            raise ValueError(
                f"batch['label'] must be class indices below num_classes = {classes}, got "
                f'{int(label.max())}'
            )
        return (label[..., None] == torch.arange(classes, device=label.device)).float()

    def weigh_soft(self, main: Tensor, soft: Tensor, features: Tensor) -> Tensor:
        """Return the weight of the soft term, a scalar without gradient.

        ``soft_weight='auto'`` is found by the lengths of the gradients of both terms at the
        features of the encoder, of any shape, without waiting for the device.
        """
        if self.hparams['soft_weight'] != 'auto':
            return torch.full_like(soft.detach(), self.fixed_weight)
        if self.global_step % _AUTO_EVERY == 0 and features.requires_grad:
            gradients = [
                torch.autograd.grad(term, features, retain_graph=True)[0]
                for term in (main, soft)
            ]
            squares = torch.stack([g.float().square().sum() for g in gradients])
            if dist.world_size() > 1:
                torch.distributed.all_reduce(squares)
            length, soft_length = squares.sqrt()
            found = (self.hparams['soft_ratio'] * length / soft_length).log()
            before = self.auto_weight.log()
            # Zero, whose logarithm is infinite, is before the first one
            log = before.lerp(found, _AUTO_SHARE).where(before.isfinite(), found)
            # Not from a batch without labels
            self.auto_weight.copy_(log.exp().where(found.isfinite(), self.auto_weight))
        return self.auto_weight.clone()

    @staticmethod
    def beside_chance(name: str, loss: Tensor, candidates: int) -> dict[str, Tensor]:
        """Name a cross entropy for the log, and what guessing among candidates gives."""
        return {
            name: loss,
            f'{name}_chance': torch.full_like(loss, math.log(candidates)),
        }

    def watch_step(self, loss: Tensor, batch: Sample) -> None:
        """Let the guard see a loss, its images, and the multi-labels if they are used."""
        # Class indices may be negative
        used = self.uses_labels and self.hparams['num_classes'] is None
        label = batch.get('label') if used else None
        self.guard.watch(self.global_step, loss, batch['image'], label)

    def add_soft(
        self,
        main: Tensor,
        soft: Tensor,
        features: Tensor,
        pairs: LabelPairs | None,
        values: dict[str, Tensor],
    ) -> Tensor:
        """Add the soft term to a loss, and what labels of *pairs* did to *values* to log."""
        weight = self.weigh_soft(main, soft, features)
        if pairs is not None:
            agreement = self.soft_criterion.agreement(*pairs)
            values |= {
                'train_loss_soft': soft,
                'train_loss_soft_chance': agreement.chance,
                'train_loss_soft_floor': agreement.floor,
                'train_soft_explained': agreement.explained,
                'train_label_correlation': agreement.correlation,
                'train_unknown_share': (~pairs[2].any(1)).float().mean(),
                'schedule/soft_weight': weight,
            }
        return main + weight * soft

    def label_pairs(self, batch: Sample, batch_idx: int) -> LabelPairs:
        """Return what the soft term of a step compares, for :class:`.LabelControl`."""
        raise NotImplementedError
