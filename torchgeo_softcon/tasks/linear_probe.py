# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Linear evaluation of a frozen encoder."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics.classification import MultilabelAveragePrecision

from .._checks import check_counts, check_positive, check_types, require
from .._compat import ClassificationTask, Sample, WeightsEnum
from ..models import create_encoder, load_encoder
from ..models.convert import choose_bands
from ..models.encoders import initial_weights
from ..models.features import last_block_features
from ..models.input_layer import input_layer
from ..models.loading import (
    check_patches,
    has_class_token,
    load_positions,
    save_positions,
)
from ..transforms import RandomView
from ..transforms.views import center_view
from .optimizers import with_schedule
from .runs import peak_lr, run_length


class LinearProbeTask(ClassificationTask):
    """Linear classifier on the features of a frozen encoder, as in the papers.

    The linear evaluation of DINO, which DINO-MC and the authors of SoftCon use: SGD with
    momentum 0.9 and a cosine schedule, no weight decay, 100 epochs of random crops and
    flips; tests are on the centre of the image.
    https://github.com/facebookresearch/dino/blob/main/eval_linear.py
    https://github.com/zhu-xlab/SSL4EO-S12/blob/1dc0c83/src/benchmark/transfer_classification/linear_BE_dino.py

    TorchGeo's own classification task with ``freeze_backbone: true`` differs: it sees the
    last block only, lets the statistics of batch norms drift, and uses AdamW.

    Logged are its metrics, and for multi-labels average precision:
    ``val_MeanAveragePrecision`` over classes (macro) and ``val_OverallAveragePrecision``
    (micro). The papers report the latter, averaged over batches.

    If you use this task in your research, please cite the following paper:

    * https://arxiv.org/abs/2104.14294
    """

    model: nn.Module

    def __init__(
        self,
        model: str = 'vit_small_patch16_224',
        weights: WeightsEnum | bool | str | None = None,
        in_channels: int = 13,
        bands: Sequence[str] | None = None,
        task: Literal['binary', 'multiclass', 'multilabel'] = 'multiclass',
        num_classes: int | None = None,
        num_labels: int | None = None,
        last_blocks: int | None = None,
        average_patches: bool = False,
        size: int = 224,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        lr: float = 1e-3,
    ) -> None:
        """Initialize a new LinearProbeTask instance.

        Args:
            model: Name of the timm model.
            weights: Weights of the encoder: an enum or its name, the path of a
                checkpoint, or True for the weights that *model* stands for.
            in_channels: Number of bands of the images.
            bands: Their names, in the order of the channels, if they are not those of
                *weights*: chosen by name from weight enums, and from checkpoints of tasks
                with *bands*.
            task: One of 'binary', 'multiclass', or 'multilabel'.
            num_classes: Number of classes (only for ``task='multiclass'``).
            num_labels: Number of labels (only for ``task='multilabel'``).
            last_blocks: Number of blocks whose class tokens are used, see
                :func:`~torchgeo_softcon.models.features.last_block_features`. Defaults
                to 4 for Vision Transformers, as DINO does for ViT-Small (1 for
                ViT-Base), and to the pooled features of other encoders.
            average_patches: Whether to append the mean patch token of the last block, as
                DINO does for ViT-Base. Only for encoders with class tokens.
            size: Side of the images that the encoder sees, in pixels.
            crop_scale: Range of the share of the image's area that random crops show.
                The authors of SSL4EO-S12 use (0.8, 1) for multi-labels of ResNets.
            lr: Learning rate per 256 images (1e-3 in the code of the papers). Try several.

        Raises:
            ValueError: If arguments are out of range or do not fit each other.
        """
        check_types(LinearProbeTask.__init__, locals())
        check_counts(in_channels=in_channels, size=size)
        check_positive(lr=lr)
        got = in_channels if bands is None else len(bands)
        require(
            got == in_channels,
            f'bands must name all in_channels = {in_channels} bands, got {got}',
        )
        super().__init__(
            model,
            weights,
            in_channels,
            task=task,
            num_classes=num_classes,
            num_labels=num_labels,
            lr=lr,
        )
        self.augmentations = RandomView(
            size,
            crop_scale,
            jitter_probability=0,
            grey_probability=0,
            blur_probability=0,
        )

    def configure_models(self) -> None:
        """Initialize the encoder, and the linear classifier."""
        hparams = self.hparams
        # The command line saves the arguments of this class alone
        for name, parameter in inspect.signature(ClassificationTask).parameters.items():
            hparams.setdefault(name, parameter.default)
        # For several labels, the same as MultiLabelSoftMarginLoss of the papers
        hparams['loss'] = 'ce' if hparams['task'] == 'multiclass' else 'bce'
        channels, size = hparams['in_channels'], hparams['size']
        self.model = create_encoder(hparams['model'], channels, size=size)
        check_patches(self.model, (size, size), 'size')
        if self.weights:
            state_dict = self._read_weights()
            name = f'{input_layer(self.model)[0]}.weight'
            if name in state_dict and state_dict[name].shape[1] != channels:
                raise ValueError(
                    f'in_channels must be {state_dict[name].shape[1]}, the number of bands '
                    f'of weights, got {channels}: the input layer of a frozen encoder '
                    'cannot be a random one. Name the bands of the images (for weights '
                    'of this package), or choose a model with weights for them'
                )
            load_encoder(self.model, state_dict)
        self.model.requires_grad_(False).eval()

        blocks = hparams['last_blocks']
        plain = not has_class_token(self.model)
        #: Number of blocks whose class tokens are used, None for pooled features.
        self.blocks = blocks if plain else 4 if blocks is None else blocks
        require(
            self.blocks is not None or not hparams['average_patches'],
            'average_patches needs a Vision Transformer with a class token, got '
            f'{hparams["model"]!r}. Leave it out for other encoders',
        )
        classes = hparams['num_classes'] or hparams['num_labels'] or 1
        width = self.features(torch.zeros(1, channels, size, size)).shape[1]
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def _read_weights(self) -> dict[str, Tensor]:
        """Read the parameters of the encoder, for the bands of the images."""
        weights: Any = self.weights
        model, channels, bands = (
            self.hparams[name] for name in ('model', 'in_channels', 'bands')
        )
        encoder = initial_weights(weights, model, channels, bands)
        if weights is True or bands is None:
            return encoder.state_dict
        require(
            encoder.bands,
            f'weights = {weights} do not tell their bands, so bands cannot be chosen from '
            'them. Leave bands out, and give images the bands of the weights in their order',
        )
        return choose_bands(encoder.state_dict, cast(Any, encoder.bands), bands)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let TorchGeo open the encoder, see :func:`.save_positions`."""
        save_positions(checkpoint, self.model, self.hparams['model'])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take positions as they are, see :func:`.load_positions`."""
        load_positions(checkpoint, {'model': self.model})

    def configure_metrics(self) -> None:
        """Initialize the performance metrics."""
        super().configure_metrics()
        if self.hparams['task'] == 'multilabel':
            labels = self.hparams['num_labels']
            average: dict[str, Any] = {
                'MeanAveragePrecision': MultilabelAveragePrecision(labels, 'macro'),
                'OverallAveragePrecision': MultilabelAveragePrecision(labels, 'micro'),
            }
            for metrics in (self.val_metrics, self.test_metrics):
                metrics.add_metrics(copy.deepcopy(average))

    def configure_optimizers(self) -> Any:
        """Return SGD on the classifier, and a cosine to zero, per step."""
        total, _ = run_length(self.trainer)
        lr = peak_lr(self.hparams['lr'], self.trainer)
        return with_schedule(SGD(self.head.parameters(), lr=lr, momentum=0.9), total)

    def train(self, mode: bool = True) -> 'LinearProbeTask':
        """Set the mode of the classifier. The encoder stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, C, H, W) that the classifier sees."""
        if self.blocks is None:
            return cast(Tensor, self.model(image))
        average = self.hparams['average_patches']
        return last_block_features(self.model, image, self.blocks, average)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (B, K) of classes of images (B, C, H, W)."""
        return cast(Tensor, self.head(self.features(x)))

    def training_step(
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Compute the loss of random crops of a batch with *image* and *label*."""
        batch = {**batch, 'image': self.augmentations(batch['image']).to(self.dtype)}
        return super().training_step(batch, batch_idx, dataloader_idx)

    def validation_step(self, batch: Sample, *args: Any) -> None:
        """Compute metrics on the centre of images."""
        super().validation_step(self._centred(batch), *args)

    def test_step(self, batch: Sample, *args: Any) -> None:
        """Compute metrics on the centre of images."""
        super().test_step(self._centred(batch), *args)

    def predict_step(self, batch: Sample, *args: Any) -> Tensor:
        """Return the probabilities (B, K) of classes on the centre of images."""
        return super().predict_step(self._centred(batch), *args)

    def _centred(self, batch: Sample) -> Sample:
        return {**batch, 'image': center_view(batch['image'], self.hparams['size'])}
