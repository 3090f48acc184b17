# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SoftCon: soft contrastive pretraining guided by land-cover multi-labels."""

import math
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from lightly.utils import dist
from lightly.utils.debug import std_of_l2_normalized
from torch import Tensor, nn

from .._checks import check_counts, check_types, require
from .._compat import Sample, WeightsEnum
from ..losses import SoftContrastiveLoss
from ..losses.soft_labels import SoftBias, SoftLoss, SoftReduction
from ..models import is_vit
from ..models.loading import nearest_vit
from ..modules.ema import make_teacher
from ..modules.heads import mlp_head
from ..modules.masking import (
    MaskMode,
    SiameseMasking,
    mask_pixels,
    masked_patches,
    random_visible,
)
from ..modules.packing import encode_crops
from ..transforms import RandomView
from .label_guidance import LabelGuidedTask, LabelPairs


class SoftConTask(LabelGuidedTask):
    """SoftCon: multi-label guided soft contrastive learning.

    Two views of every image are encoded, one by the trainable encoder, which sees only
    a part of its view (Siamese masking), one by an encoder whose parameters are a moving
    average (EMA) of the trainable one. The loss asks every image to recognise its own
    second view among those of the batch, and the similarities between all images to
    agree with the similarities of their land-cover labels.

    The pretraining code of the paper was never released, and the paper's public
    descriptions do not tell all of it. Established are the two branches, the masking of
    the trainable branch, the two terms of the loss, the cosine similarity of labels,
    the random input layer in continual pretraining, inputs in [0, 1] and 100 epochs.
    Chosen here, for reasons given with the arguments: the form and weight of the soft
    term, temperatures, mask ratio, momentum, heads, optimizer, and augmentations.

    If you use this task in your research, please cite the following paper:

    * https://arxiv.org/abs/2405.20462
    """

    method = 'SoftCon'
    reference = 'arXiv 2405.20462'
    branches = MappingProxyType({'student': 'model', 'teacher': 'teacher'})

    def __init__(
        self,
        model: str = 'resnet50',
        weights: WeightsEnum | bool | str | None = None,
        in_channels: int = 13,
        size: int = 224,
        drop_path_rate: float = 0.0,
        mask_mode: MaskMode | None = None,
        mask_ratio: float = 0.7,
        mask_patch_size: int = 16,
        seasons: Literal['same', 'different'] = 'same',
        soft_weight: float | Literal['auto'] = 30.0,
        soft_loss: SoftLoss = 'bce',
        soft_bias: SoftBias = 'none',
        soft_reduction: SoftReduction = 'pairs',
        soft_projector: bool = False,
        target_temperature: float | None = None,
        same_label_weight: float = 1.0,
        temperature: float = 0.2,
        soft_temperature: float | None = None,
        symmetric: bool = False,
        gather_distributed: bool = True,
        momentum: float | None = None,
        momentum_final: float | None = None,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        projector_layers: int = 3,
        predictor_layers: int = 2,
        lr: float = 1.5e-4,
        weight_decay: float = 0.1,
        warmup_epochs: float = 10,
        augmentations: nn.Module | None = None,
        **options: Any,
    ) -> None:
        """Initialize a new SoftConTask instance.

        Args:
            model: Name of a timm model that pools its features. The defaults for "Vision
                Transformers" are for ViT, DeiT and DINOv2, and those with rotary positions
                such as DINOv3 and EVA-02 (the table in ``examples/README.md`` has all).
            weights: Initial weights, see :class:`.PretrainingTask`.
            in_channels: Number of bands of one image.
            size: Side of the views in pixels, 224 in the authors' models.
            drop_path_rate: Stochastic depth of the trainable encoder.
            mask_mode: How to mask the trainable branch, see
                :class:`~torchgeo_softcon.modules.masking.SiameseMasking`. Defaults to
                ``'drop'`` for Vision Transformers and ``'pixel'`` for others.
            mask_ratio: Share of patches to mask. The authors' figure masks 138 of 14 x 14
                patches, and their MAE masks 0.7, too; the paper's value is not known.
            mask_patch_size: Side of the patches of ``mask_mode='pixel'`` in pixels.
            seasons: If a sample has several seasons, whether both views show the
                ``'same'`` one, as in the authors' figure, or two ``'different'`` ones, as
                in their earlier MoCo runs.
            soft_weight: Weight of the soft term. With 0, labels are not needed. The
                paper's value is not known. At 30, both gradients start at about the same
                size for 128 images, see
                :func:`~torchgeo_softcon.losses.soft_contrastive_loss`. ``'auto'`` finds it
                while training, for any batch size, see *soft_ratio*.
            soft_loss: Form of the soft term, see
                :class:`~torchgeo_softcon.losses.SoftLabelLoss`, as for the next two.
                :data:`~torchgeo_softcon.losses.PRESETS` has the options of known forms.
            soft_bias: Bias of similarities. With ``'batch'``, only differences of labels
                have a gradient, at no cost.
            soft_reduction: Mean over ``'pairs'``, or over ``'rows'`` of sums, for weights
                that do not depend on the batch size (0.2 is 30 over 128 images).
            soft_projector: Whether the soft term has a projector and a predictor of its
                own, so that both terms need not agree on one embedding. Costs another
                pass through heads.
            target_temperature: Temperature of the targets of ``'cross_entropy'``, such as
                0.1. Defaults to label similarities in proportion.
            same_label_weight: Weight of other images with the same labels among the keys
                of the contrastive term, 0 to leave them out.
            temperature: Temperature of the contrastive term, 0.2 in the same authors'
                MoCo runs.
            soft_temperature: Temperature of the soft term. Defaults to *temperature*.
            symmetric: Whether to also exchange the views and average. The authors'
                figure shows one direction.
            gather_distributed: Whether images are compared with those of all ranks.
            momentum: EMA momentum at the start. Defaults to 0.99 for Vision
                Transformers (MoCo v3) and 0.999 for others (MoCo v2).
            momentum_final: EMA momentum at the end of a cosine. Defaults to 1 for
                Vision Transformers and to *momentum*, a constant, for others.
            hidden_dim: Width of the heads (4096 in MoCo v3).
            output_dim: Size of the embeddings (256 in MoCo v3).
            projector_layers: Number of layers of the projector (3 in MoCo v3).
            predictor_layers: Number of layers of the predictor (2 in MoCo v3).
            lr: Peak learning rate per 256 images of an optimizer step, over all ranks and
                accumulated batches: 1.5e-4 for AdamW (MoCo v3), 0.03 for SGD (MoCo v2).
            weight_decay: Weight decay of all but one-dimensional parameters, 0.1 for
                AdamW and 1e-4 for SGD.
            warmup_epochs: Epochs of linear warm-up (10 in the same authors' MoCo v3).
            augmentations: Module that draws views of *size* of a batch (B, C, H, W).
                Defaults to :class:`~torchgeo_softcon.transforms.RandomView`.
            **options: Options of all tasks, see :class:`.PretrainingTask` and
                :class:`.LabelGuidedTask`.

        Raises:
            ValueError: If arguments are out of range or do not fit each other.
        """
        check_types(SoftConTask.__init__, locals())
        check_counts(
            mask_patch_size=mask_patch_size,
            projector_layers=projector_layers,
            predictor_layers=predictor_layers,
        )
        require(0 <= mask_ratio < 1, f'mask_ratio must be in [0, 1), got {mask_ratio}')
        if augmentations is None:
            augmentations = RandomView(size)
        super().__init__(weights, augmentations, **options)

    def configure_losses(self) -> None:
        """Initialize the loss criterion."""
        super().configure_losses()
        names = (
            *('temperature', 'soft_temperature', 'soft_loss', 'gather_distributed'),
            *('soft_bias', 'soft_reduction', 'target_temperature', 'same_label_weight'),
        )
        self.criterion = SoftContrastiveLoss(
            soft_weight=self.fixed_weight,
            label_similarity=self.label_similarity,
            **{name: self.hparams[name] for name in names},
        )

    @property
    def uses_labels(self) -> bool:
        """Whether batches must have labels."""
        return super().uses_labels or self.hparams['same_label_weight'] < 1

    def configure_models(self) -> None:
        """Initialize the encoder, its teacher, the heads and the masking."""
        self.model = self.create_encoder(self.hparams['drop_path_rate'])
        vit, width = is_vit(self.model), self.feature_size
        hidden, out = self.hparams['hidden_dim'], self.hparams['output_dim']
        depth = self.hparams['projector_layers']
        self.projector = mlp_head(width, hidden, out, depth)
        # As MoCo v3: no batch norm at the end of the predictor of a ResNet
        layers = self.hparams['predictor_layers']
        self.predictor = mlp_head(out, hidden, out, layers, vit)
        self.teacher = self.make_encoder_teacher(self.model)
        self.teacher_projector = make_teacher(self.projector)
        if self.hparams['soft_projector']:
            self.soft_projector = mlp_head(width, hidden, out, depth)
            self.soft_predictor = mlp_head(out, hidden, out, layers, vit)
            self.teacher_soft_projector = make_teacher(self.soft_projector)

        start, final = self.hparams['momentum'], self.hparams['momentum_final']
        if start is None:
            start = 0.99 if vit else 0.999
        if final is None:
            final = 1.0 if vit else start
        self.momentum = start, final

        mode: MaskMode = self.hparams['mask_mode'] or ('drop' if vit else 'pixel')
        if mode != 'pixel' and not vit:
            name = self.hparams['model']
            raise ValueError(
                f'mask_mode={mode!r} needs a Vision Transformer whose patches can be left '
                f"out, got {name!r}. Use mask_mode='pixel', or a model such as "
                f'{nearest_vit(name)}'
            )
        self.masking = SiameseMasking(
            mode, self.hparams['mask_ratio'], self.hparams['mask_patch_size'], width
        )

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder and projectors, each with its teacher."""
        pairs: list[tuple[nn.Module, nn.Module]]
        pairs = [(self.model, self.teacher), (self.projector, self.teacher_projector)]
        if self.hparams['soft_projector']:
            pairs.append((self.soft_projector, self.teacher_soft_projector))
        return pairs

    def draw_views(
        self, batch: Sample
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        """Draw two views (B, C, H, W) of every image, with their labels (B, K) or None."""
        different = self.hparams['seasons'] == 'different'
        image = self.read_image(batch, different)
        require(
            len(image) > 1,
            'SoftCon compares the images of a batch with each other and needs at least 2, '
            'got a batch of 1. Raise batch_size, and drop the last batch',
        )
        label = self.read_label(batch, image)
        (size, seasons), device = image.shape[:2], image.device
        rows = torch.arange(size, device=device)
        first = second = torch.randint(seasons, (size,), device=device)
        if different and seasons > 1:
            second = first + torch.randint(1, seasons, (size,), device=device)
            second = second % seasons

        def draw(season: Tensor) -> tuple[Tensor, Tensor | None]:
            # Without seasons there is nothing to pick, and no need for a copy
            chosen = image[:, 0] if seasons == 1 else image[rows, season]
            known = None if label is None else label[rows, season]
            return self.augment(chosen), known

        (view, known), (other_view, other_known) = draw(first), draw(second)
        return (view, other_view), (known, other_known)

    def draw_for_report(self, batch: Sample) -> list[tuple[str, Tensor]]:
        """Return the view that is masked and that of the teacher, see the base class."""
        (first, second), _ = self.draw_views(batch)
        title = f'trained, {self.masking.ratio:.0%} masked'
        return [(title, self.mask_view(first)), ('teacher', second)]

    def mask_view(self, view: Tensor) -> Tensor:
        """Mask views of shape (B, C, H, W) as in training, but by NaN."""
        ratio, size = self.masking.ratio, self.masking.patch_size
        if ratio == 0:
            return view
        if self.masking.mode != 'pixel':
            size = self.model.patch_embed.patch_size[0]
        count = math.prod(-(-side // size) for side in view.shape[-2:])
        masked = masked_patches(
            random_visible(len(view), count, ratio, view.device), count
        )
        hidden = mask_pixels(torch.ones_like(view), masked, size) == 0
        return view.masked_fill(hidden, math.nan)

    def training_step(
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Compute the training loss of a batch with *image* and, but for 0, *label*."""
        with self.step_rng(batch_idx):
            views, labels = self.draw_views(batch)
            terms, features, compared = self.compare_views(views, labels)
            if self.hparams['symmetric']:
                reverse = self.compare_views(views[::-1], labels[::-1])[0]
                terms = (terms + reverse) / 2
        ranks = dist.world_size() if self.hparams['gather_distributed'] else 1
        values = {
            **self.beside_chance(
                'train_loss_contrast', terms[0], ranks * len(features)
            ),
            # Much smaller than 1 / sqrt(F): all images look alike to the encoder
            'train_feature_std': std_of_l2_normalized(features.detach().float()),
        }
        known = None if labels[0] is None else cast(LabelPairs, (*compared, *labels))
        loss = self.add_soft(terms[0], terms[1], features, known, values)
        self.watch_step(loss, batch)
        self.log_step({'train_loss': loss, **values}, len(views[0]))
        return loss

    def compare_views(
        self, views: tuple[Tensor, Tensor], labels: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Compare masked first views with second views, each (B, C, H, W).

        Returns the contrastive and the soft term (2,), first views' features (B, F), and
        the embeddings (B, D) that the soft term compares.
        """
        features = self.masking(self.model, views[0])  # (B, F)
        query = self.predictor(self.projector(features))  # (B, D)
        with torch.no_grad():
            seen = encode_crops(self.teacher, [views[1]])[0]  # (B, F)
            key = self.teacher_projector(seen)  # (B, D)
        soft = query, key
        if self.hparams['soft_projector']:
            with torch.no_grad():
                soft_key = self.teacher_soft_projector(seen)
            soft = self.soft_predictor(self.soft_projector(features)), soft_key
        terms = self.criterion.terms(query, key, *labels, soft)
        return torch.stack(terms), features, soft

    def label_pairs(self, batch: Sample, batch_idx: int) -> LabelPairs:
        """Return what the soft term of a step compares, see the base class."""
        with self.step_rng(batch_idx):
            views, labels = self.draw_views(batch)
            _, _, soft = self.compare_views(views, labels)
        return cast(LabelPairs, (*soft, *labels))
