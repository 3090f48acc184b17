# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SoftCon: soft contrastive pretraining guided by land-cover multi-labels."""

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from lightly.utils.debug import std_of_l2_normalized
from torch import Tensor, nn

from .._checks import check_counts, check_types, require
from .._compat import Sample, WeightsEnum
from ..losses import SoftContrastiveLoss
from ..models import is_vit
from ..models.input_layer import InputLayerInit
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
from .base import PretrainingTask
from .guard import label_message, read_at_once
from .optimizers import OptimizerName


class SoftConTask(PretrainingTask):
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
        bands: Sequence[str] | None = None,
        in_layer_init: InputLayerInit = 'random',
        freeze_patch_embed: bool = False,
        size: int = 224,
        drop_path_rate: float = 0.0,
        mask_mode: MaskMode | None = None,
        mask_ratio: float = 0.5,
        mask_patch_size: int = 16,
        seasons: Literal['same', 'different'] = 'same',
        soft_weight: float = 30.0,
        soft_loss: Literal['bce', 'cross_entropy', 'mse'] = 'bce',
        label_similarity: Literal['cosine', 'jaccard']
        | Callable[[Tensor, Tensor], Tensor] = 'cosine',
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
        optimizer: OptimizerName = 'adamw',
        lr: float = 1.5e-4,
        weight_decay: float = 0.1,
        warmup_epochs: float = 10,
        grad_checkpointing: bool = False,
        channels_last: bool | None = None,
        augmentations: nn.Module | None = None,
    ) -> None:
        """Initialize a new SoftConTask instance.

        Args:
            model: Name of a timm model that pools its features. The defaults for "Vision
                Transformers" are for timm's class of that name (ViT, DeiT, DINOv2).
            weights: Initial weights: a weight enum or its name, True for timm's own (such
                as those of DINOv2), None or False for random ones, or the path of a
                checkpoint of a TorchGeo task or of a state dict.
            in_channels: Number of bands of one image.
            bands: Names of the bands in their order, for ``in_layer_init='rgb'``.
            in_layer_init: What to do if *weights* are for another number of bands, see
                :func:`~torchgeo_softcon.models.input_layer.adapt_input_weight`.
                ``'random'`` is the paper's choice.
            freeze_patch_embed: Whether to keep the input layer as it is. Not after
                ``in_layer_init='random'``.
            size: Side of the views in pixels, 224 in the authors' models.
            drop_path_rate: Stochastic depth of the trainable encoder.
            mask_mode: How to mask the trainable branch, see
                :class:`~torchgeo_softcon.modules.masking.SiameseMasking`. Defaults to
                ``'drop'`` for Vision Transformers and ``'pixel'`` for others.
            mask_ratio: Share of patches to mask. The paper's value is not known.
            mask_patch_size: Side of the patches of ``mask_mode='pixel'`` in pixels.
            seasons: If a sample has several seasons, whether both views show the
                ``'same'`` one, as in the authors' figure, or two ``'different'`` ones, as
                in their earlier MoCo runs.
            soft_weight: Weight of the soft term. With 0, labels are not needed. The
                paper's value is not known. At 1, the soft term does not show: its
                gradient is small, see
                :func:`~torchgeo_softcon.losses.soft_contrastive_loss`. At 30, both
                gradients start at about the same size for 128 images, and features tell
                land cover of unseen ground better in ``examples/study.py``, but not with
                144 images to train on (README).
            soft_loss: Form of the soft term, see
                :func:`~torchgeo_softcon.losses.soft_contrastive_loss`.
            label_similarity: Similarity of two labels, ``'cosine'`` as in the paper,
                ``'jaccard'``, or a function of labels (B, K) and (N, K) to (B, N).
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
            optimizer: ``'adamw'``, ``'sgd'`` or ``'lars'``. The same authors used AdamW
                for Vision Transformers and SGD for ResNets.
            lr: Peak learning rate per 256 images of an optimizer step, over all ranks and
                accumulated batches: 1.5e-4 for AdamW (MoCo v3), 0.03 for SGD (MoCo v2).
            weight_decay: Weight decay of all but one-dimensional parameters, 0.1 for
                AdamW and 1e-4 for SGD.
            warmup_epochs: Epochs of linear warm-up (10 in the same authors' MoCo v3).
            grad_checkpointing: Whether to compute activations of the trainable encoder
                again in the backward pass: the same results from less memory in more
                time, with a Trainer. Not for all models.
            channels_last: Whether parameters of encoders lie in memory with channels
                last, which is faster for convolutions. None: with more than one of
                them. Files do not show it; safetensors refuses to save a live encoder.
            augmentations: Module that draws views of *size* of a batch (B, C, H, W).
                Defaults to :class:`~torchgeo_softcon.transforms.RandomView`. Not saved
                in checkpoints.

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

        self.label_similarity = label_similarity
        if callable(label_similarity):
            # A function in a checkpoint could not be loaded safely
            self.ignore = (*self.ignore, 'label_similarity')
        super().__init__(
            weights, RandomView(size) if augmentations is None else augmentations
        )

    def configure_losses(self) -> None:
        """Initialize the loss criterion."""
        self.criterion = SoftContrastiveLoss(
            self.hparams['temperature'],
            self.hparams['soft_temperature'],
            self.hparams['soft_weight'],
            self.hparams['soft_loss'],
            self.label_similarity,
            self.hparams['gather_distributed'],
        )

    def configure_models(self) -> None:
        """Initialize the encoder, its teacher, the heads and the masking."""
        self.model = self.create_encoder(self.hparams['drop_path_rate'])
        vit, width = is_vit(self.model), self.feature_size
        hidden, out = self.hparams['hidden_dim'], self.hparams['output_dim']
        self.projector = mlp_head(width, hidden, out, self.hparams['projector_layers'])
        # As MoCo v3: no batch norm at the end of the predictor of a ResNet
        layers = self.hparams['predictor_layers']
        self.predictor = mlp_head(out, hidden, out, layers, vit)
        self.teacher = self.make_encoder_teacher(self.model)
        self.teacher_projector = make_teacher(self.projector)

        start, final = self.hparams['momentum'], self.hparams['momentum_final']
        if start is None:
            start = 0.99 if vit else 0.999
        if final is None:
            final = 1.0 if vit else start
        self.momentum = start, final

        mode: MaskMode = self.hparams['mask_mode'] or ('drop' if vit else 'pixel')
        if mode != 'pixel' and not vit:
            raise ValueError(
                f'mask_mode={mode!r} needs a Vision Transformer, got '
                f"{self.hparams['model']!r}. Use mask_mode='pixel'"
            )
        self.masking = SiameseMasking(
            mode, self.hparams['mask_ratio'], self.hparams['mask_patch_size'], width
        )

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder and projector, each with its teacher."""
        return [(self.model, self.teacher), (self.projector, self.teacher_projector)]

    def unsaved(self) -> dict[str, str]:
        """Return augmentations, and the function that compares labels if it is one."""
        name = getattr(
            self.label_similarity, '__qualname__', str(self.label_similarity)
        )
        return {**super().unsaved(), 'label_similarity': name}

    def draw_views(
        self, batch: Sample
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        """Draw two views (B, C, H, W) of every image, with their labels (B, K) or None."""
        different = self.hparams['seasons'] == 'different'
        image = self.read_image(batch, different)
        if len(image) < 2:
            raise ValueError(
                'SoftCon compares the images of a batch with each other and needs at '
                'least 2, got a batch of 1. Raise batch_size, and drop the last batch'
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

    def read_label(self, batch: Sample, image: Tensor) -> Tensor | None:
        """Return labels (B, T, K) of images (B, T, C, H, W), None if none are needed.

        Raises:
            ValueError: If *label* is missing, is not (B, K) or (B, T, K), or has invalid
                values. (For these on a CUDA device, see :class:`.NonFiniteGuard`.)
        """
        if self.hparams['soft_weight'] == 0:
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
        if label.ndim == 2 and len(label) == size:
            label = label[:, None].expand(-1, seasons, -1)
        if label.ndim != 3 or label.shape[:2] != (size, seasons):
            raise ValueError(
                f"batch['label'] must have the shape (B, K) or (B, T, K) with B = {size} "
                f'and T = {seasons}, got {tuple(label.shape)}. Class indices are not '
                'multi-labels: make them one-hot'
            )
        if read_at_once(label) and not (label.isfinite() & (label >= 0)).all():
            raise ValueError(label_message(float(label.min()), float(label.max())))
        return label.float()

    def training_step(
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Compute the training loss of a batch with *image* and, but for 0, *label*."""
        with self.step_rng(batch_idx):
            views, labels = self.draw_views(batch)
            terms, features = self.compare_views(views, labels)
            if self.hparams['symmetric']:
                reverse, _ = self.compare_views(views[::-1], labels[::-1])
                terms = (terms + reverse) / 2
        loss = terms[0] + self.hparams['soft_weight'] * terms[1]
        label = batch.get('label') if self.hparams['soft_weight'] > 0 else None
        self.guard.watch(self.global_step, loss, batch['image'], label)

        values = {
            'train_loss': loss,
            'train_loss_contrast': terms[0],
            'train_loss_soft': terms[1],
            # Much smaller than 1 / sqrt(F): all images look alike to the encoder
            'train_feature_std': std_of_l2_normalized(features.detach().float()),
        }
        if labels[0] is not None:
            values['train_unknown_share'] = (~labels[0].any(1)).float().mean()
        self.log_step(values, len(views[0]))
        return loss

    def compare_views(
        self, views: tuple[Tensor, Tensor], labels: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Compare masked first views with second views, each (B, C, H, W).

        Returns the contrastive and the soft term (2,), and first views' features (B, F).
        """
        features = self.masking(self.model, views[0])  # (B, F)
        query = self.predictor(self.projector(features))  # (B, D)
        with torch.no_grad():
            seen = encode_crops(self.teacher, [views[1]])[0]  # (B, F)
            key = self.teacher_projector(seen)  # (B, D)
        terms = self.criterion.terms(query, key, *labels)
        return torch.stack(terms), features
