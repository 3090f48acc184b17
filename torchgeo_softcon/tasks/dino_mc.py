# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""DINO-MC: self-distillation with local crops of several sizes."""

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from lightly.utils.debug import std_of_l2_normalized
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from .._checks import (
    check_counts,
    check_not_negative,
    check_positive,
    check_types,
    require,
)
from .._compat import Sample, WeightsEnum
from ..losses import DINOLoss, SoftLabelLoss
from ..models.loading import default_drop_path_rate, feature_size, nearest_vit
from ..modules.ema import copy_buffers, make_teacher
from ..modules.heads import DINOHead
from ..modules.packing import CropBatching, PositionRule, can_pack, encode_crops
from ..transforms import MultiCropView
from .guard import is_chance, plateau_message
from .label_guidance import LabelGuidedTask, LabelPairs
from .optimizers import clip_each_gradient, cosine_warmup
from .training_file import go_on, load_networks

#: Optimizer steps in a row with a loss of log(output_dim) after which a run is called
#: collapsed, and how close to it the loss must be.
_PLATEAU_STEPS, _PLATEAU_WIDTH = 200, 1e-3

#: Options of which these need an encoder that takes all crops at once.
_AT_ONCE = {'crop_batching': 'packed', 'compile_encoder': True, 'position_rule': 'dino'}


class DINOMCTask(LabelGuidedTask):
    """DINO-MC and DINO-TP: self-distillation with local crops of several sizes.

    A student encodes two global and several local crops of every image, each local crop
    of a size of its own. It learns to assign each of them to prototypes as a teacher,
    its moving average (EMA), assigns the other global crops. The encoder that is
    exported, and that :meth:`forward` uses, is the teacher's.

    ``views='temporal'`` is DINO-TP: three global crops and the local crops show
    different seasons of a place.

    The defaults are those of the paper's code where it could be read,
    https://github.com/WennyXY/DINO-MC/tree/4f8e519. Different are, on purpose: seasons
    are drawn anew in every epoch and without repetition, the teacher of a Swin has no
    stochastic depth, the loss is always computed in float32, and the teacher temperature
    warms up per step. For small data and short runs, ``examples/dino_mc_small.yaml`` has
    fewer prototypes (*output_dim*), a lower *momentum* and a higher *lr*.

    With *soft_weight*, labels guide it as they guide SoftCon: the similarities of student
    and teacher, global crops in the bottleneck of the head, agree with those of labels.

    If you use this task in your research, please cite the following papers:

    * https://arxiv.org/abs/2303.06670
    * https://arxiv.org/abs/2104.14294
    """

    reference = 'arXiv 2303.06670'
    branches = MappingProxyType({'teacher': 'model', 'student': 'student'})

    plateau: Tensor
    teacher_head: Any
    _idle: Tensor
    #: Sides of the crops in pixels, as far as they are known.
    _sizes: tuple[int, ...]
    _temperature_steps: int = 0
    _frozen_steps: int = 0

    def __init__(
        self,
        model: str = 'vit_small_patch8_224',
        weights: WeightsEnum | bool | str | None = None,
        continue_training: bool = False,
        in_channels: int = 3,
        size: int = 224,
        local_sizes: Sequence[int] = (184, 164, 144, 124, 104, 84),
        num_local_crops: int | None = None,
        views: Literal['multi_crop', 'temporal'] = 'multi_crop',
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.32),
        value_range: tuple[float, float] | None = None,
        drop_path_rate: float | None = None,
        output_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 1,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature_epochs: float = 0,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        momentum_final: float = 1.0,
        teacher_statistics: Literal['own', 'student'] = 'own',
        soft_weight: float | Literal['auto'] = 0.0,
        soft_options: dict[str, Any] | None = None,
        lr: float = 5e-4,
        lr_final: float = 1e-6,
        weight_decay: float = 0.04,
        weight_decay_final: float = 0.4,
        warmup_epochs: float = 10,
        clip_grad: float | None = 3.0,
        compile_encoder: bool = False,
        crop_batching: CropBatching = 'auto',
        position_rule: PositionRule = 'timm',
        augmentations: nn.Module | None = None,
        **options: Any,
    ) -> None:
        """Initialize a new DINOMCTask instance.

        Args:
            model: Name of a timm model that pools its features and takes images of any
                size.
            weights: Initial weights of both encoders, see :class:`.PretrainingTask`.
            continue_training: Whether to go on where the training file of the authors of
                DINO-MC (or DINO) in *weights* stopped: with both encoders, heads, centre,
                optimizer and epoch. The data and the batch size should be those of then.
                Checkpoints of this task go on with Lightning's ``--ckpt_path`` instead.
            in_channels: Number of bands of one image.
            size: Side of the global crops in pixels.
            local_sizes: Sides of the local crops in pixels. What patches do not cover is
                cut off. Crops larger than the images magnify them.
            num_local_crops: Number of local crops. Of more *local_sizes*, the last ones
                are taken. Defaults to one crop of each size.
            views: ``'multi_crop'`` (DINO-MC) or ``'temporal'`` (DINO-TP), see
                :class:`~torchgeo_softcon.transforms.MultiCropView`.
            global_scale: Range of the global crops' share of the image's area.
            local_scale: Range of the local crops' share of the image's area.
            value_range: Smallest and largest value that images can have, such as (0, 1).
                Given for 3 bands, colours change as in the paper. None clips nothing.
            drop_path_rate: Stochastic depth rate of the student. Defaults to
                :func:`~torchgeo_softcon.models.loading.default_drop_path_rate`. The teacher has none.
            output_dim: Number of prototypes K.
            hidden_dim: Width of the head.
            bottleneck_dim: Number of features that the prototypes are compared with.
            norm_last_layer: Whether to keep the norms of the prototypes at 1.
            freeze_last_layer: Number of first epochs in which the prototypes stay as
                they are, at most one half of the run.
            student_temperature: Temperature of the student.
            teacher_temperature: Temperature of the teacher after its warm-up.
            warmup_teacher_temperature: Temperature of the teacher at the start.
            teacher_temperature_epochs: Epochs of linear warm-up between the two.
            center_momentum: Share of the old centre in the new one.
            momentum: EMA momentum at the start.
            momentum_final: EMA momentum at the end, of a cosine.
            teacher_statistics: Running statistics of the teacher's batch norm: its own, of
                global crops (the paper's code), or those of the student, of all crops.
            soft_weight: Weight of the soft term. With 0, labels are not needed; else they
                are the mean over seasons of a place. ``'auto'``: see *soft_ratio*.
            soft_options: Arguments of :class:`~torchgeo_softcon.losses.SoftLabelLoss`, such
                as *soft_loss* or *temperature*. Images of all ranks are compared.
            lr: Peak learning rate per 256 images of an optimizer step, over all ranks and
                accumulated batches.
            lr_final: Learning rate at the end, as it is.
            weight_decay: Weight decay at the start, but of one-dimensional parameters.
            weight_decay_final: Weight decay at the end, of a cosine.
            warmup_epochs: Epochs of linear warm-up of the learning rate.
            clip_grad: Largest norm of each gradient, parameter by parameter. Not used if
                the trainer clips (*gradient_clip_val*, the norm of all together).
            compile_encoder: Whether to use ``torch.compile`` (Vision Transformers only).
            crop_batching: ``'auto'``, ``'packed'`` or ``'by_size'``, see
                :func:`~torchgeo_softcon.modules.encode_crops`.
            position_rule: How learned positions of Vision Transformers are resampled for
                crops of other sizes: ``'timm'``, as the exported encoder does, or
                ``'dino'``, the rule of the paper's code, see
                :func:`~torchgeo_softcon.modules.packing.position_matrix`.
            augmentations: Module that turns a batch (B, C, H, W), or (B, T, C, H, W) of
                several seasons, into a list of crops, the 2 (``'temporal'``: 3) that the
                teacher sees first. Defaults to
                :class:`~torchgeo_softcon.transforms.MultiCropView`.
            **options: Options of all tasks, see :class:`.PretrainingTask` and
                :class:`.LabelGuidedTask`.

        Raises:
            ValueError: If arguments are out of range or do not fit each other.
        """
        check_types(DINOMCTask.__init__, locals())
        check_counts(size=size, bottleneck_dim=bottleneck_dim)
        check_positive(
            teacher_temperature=teacher_temperature,
            warmup_teacher_temperature=warmup_teacher_temperature,
            clip_grad=clip_grad,
        )
        check_not_negative(
            freeze_last_layer=freeze_last_layer,
            teacher_temperature_epochs=teacher_temperature_epochs,
            weight_decay_final=weight_decay_final,
        )

        if augmentations is None:
            augmentations = MultiCropView(
                size,
                local_sizes,
                num_local_crops,
                views,
                global_scale=global_scale,
                local_scale=local_scale,
                value_range=value_range,
            )
        known = isinstance(augmentations, MultiCropView)
        self._sizes = cast(Any, augmentations).sizes if known else (size,)
        super().__init__(weights, augmentations, **options)

    @property
    def method(self) -> str:  # type: ignore[override]
        """Name of the method, by *views*."""
        return 'DINO-TP' if self.hparams['views'] == 'temporal' else 'DINO-MC'

    def configure_losses(self) -> None:
        """Initialize the loss criterion."""
        super().configure_losses()
        self.criterion = DINOLoss(
            self.hparams['output_dim'],
            self.hparams['student_temperature'],
            self.hparams['center_momentum'],
        )
        if self.uses_labels:
            options: dict[str, Any] = {
                'label_similarity': self.label_similarity,
                'gather_distributed': True,
                **(self.hparams['soft_options'] or {}),
            }
            self.criterion.add_module('soft', SoftLabelLoss(**options))
        if self.hparams['continue_training'] and self.weights:
            load_networks(self, self.weights)
        # Optimizer steps in a row in which the loss was that of no opinion
        self.register_buffer('plateau', torch.zeros((), dtype=torch.long))

    def configure_models(self) -> None:
        """Initialize student and teacher, each an encoder and a head."""
        rate = self.hparams['drop_path_rate']
        if rate is None:
            rate = default_drop_path_rate(self.hparams['model'])
        self.student = self.create_encoder(rate)
        self.head = DINOHead(
            self.feature_size,
            self.hparams['hidden_dim'],
            self.hparams['bottleneck_dim'],
            self.hparams['output_dim'],
            self.hparams['norm_last_layer'],
        )
        self.model = self.make_encoder_teacher(self.student)
        self.teacher_head = make_teacher(self.head)
        self.momentum = self.hparams['momentum'], self.hparams['momentum_final']
        model = self.hparams['model']
        for name, value in _AT_ONCE.items():
            if self.hparams[name] != value:
                continue
            if not can_pack(self.student):
                raise ValueError(
                    f'{name} = {value!r} needs a Vision Transformer that takes all crops at '
                    f'once, got {model!r}. Leave it out, or use a model such as '
                    f'{nearest_vit(model)}'
                )
            require(
                self.hparams['crop_batching'] != 'by_size',
                f"{name} needs all crops at once, got crop_batching = 'by_size'. Set that "
                "to 'auto'",
            )

    def encode(self, encoder: nn.Module, crops: Sequence[Tensor]) -> Tensor:
        """Encode crops: features (S, B, F)."""
        options = self.hparams['crop_batching'], self.hparams['position_rule']
        compiled = self.hparams['compile_encoder']
        return encode_crops(encoder, crops, compiled, *options)

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

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder and head, each with its teacher."""
        return [(self.student, self.model), (self.head, self.teacher_head)]

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of an optimizer step: a cosine over the run."""
        limits = self.hparams['weight_decay'], self.hparams['weight_decay_final']
        return cosine_warmup(step, self.total_steps, *limits)

    def teacher_temperature_at(self, step: int) -> float:
        """Return the temperature of the teacher at a step: a line, then a constant."""
        start = self.hparams['warmup_teacher_temperature']
        final = self.hparams['teacher_temperature']
        steps = self._temperature_steps
        return cosine_warmup(step, self.total_steps, final, final, steps, start)

    def schedules(self) -> dict[str, float]:
        """Return what the schedules say at this step, to be logged."""
        return {
            **super().schedules(),
            'weight_decay': self.weight_decay_at(self.global_step),
            'teacher_temperature': self.teacher_temperature_at(self.global_step),
        }

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the schedules, see the base class."""
        optimizers = super().configure_optimizers()
        self._temperature_steps = self.warmup_steps('teacher_temperature_epochs')
        self._frozen_steps = self.warmup_steps('freeze_last_layer')
        # A run that is resumed has all of it in its own checkpoint
        if self.hparams['continue_training'] and self.trainer.ckpt_path is None:
            go_on(self, self.weights, optimizers)
        return optimizers

    def hold_gradients(self) -> None:
        """Leave the prototypes alone in the first steps, too."""
        super().hold_gradients()
        # Both: an epoch may be of unknown length, or the run of one epoch
        epochs = self.hparams['freeze_last_layer']
        if self.global_step < self._frozen_steps and self.current_epoch < epochs:
            # None and not zero, so that nothing decays them either
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip as the trainer says, else each gradient by itself."""
        super().configure_gradient_clipping(*args, **kwargs)
        limit = self.hparams['clip_grad']
        if kwargs.get('gradient_clip_val') is None and limit is not None:
            clip_each_gradient(self.parameters(), limit)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then move the teacher and its centre."""
        # The others are not decayed
        for group in self.trainer.optimizers[0].param_groups[::2]:
            group['weight_decay'] = self.weight_decay_at(self.global_step)
        super().optimizer_step(*args, **kwargs)
        if self.hparams['teacher_statistics'] == 'student':
            copy_buffers(self.student, self.model)
        self.criterion.update_center()
        self.plateau = torch.where(self._idle, self.plateau + 1, 0)

    @property
    def num_global(self) -> int:
        """Number of crops that the teacher sees."""
        return 3 if self.hparams['views'] == 'temporal' else 2

    def draw_crops(self, batch: Sample) -> list[Tensor]:
        """Draw the crops (B, C, h, w) of every image, those that the teacher sees first."""
        temporal = self.hparams['views'] == 'temporal'
        image = self.read_image(batch, temporal)
        require(
            image.shape[1] > 1 or not temporal,
            "views='temporal' needs at least two seasons of every place, got "
            f"batch['image'] of shape {tuple(batch['image'].shape)} with in_channels = "
            f"{self.hparams['in_channels']}. Choose views='multi_crop' for it",
        )
        crops = self.augmentations(image[:, 0] if image.shape[1] == 1 else image)
        got = len(crops) if isinstance(crops, Sequence) else type(crops).__name__
        require(
            isinstance(crops, Sequence) and len(crops) >= self.num_global,
            f'augmentations must give a list of at least {self.num_global} crops, got {got}',
        )
        return [crop.to(self.dtype) for crop in crops]

    def draw_for_report(self, batch: Sample) -> list[tuple[str, Tensor]]:
        """Return all crops, see the base class."""
        return [
            (f'{"global" if i < self.num_global else "local"}, {x.shape[-1]} px', x)
            for i, x in enumerate(self.draw_crops(batch))
        ]

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

    def training_step(
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Compute the training loss of a batch with *image* (B, C, H, W).

        Or of several seasons, of which ``views='multi_crop'`` draws one.
        """
        with self.step_rng(batch_idx):
            crops = self.draw_crops(batch)
            features = self.encode(self.student, crops)  # (S, B, F)
        logits = self.assign(self.head, features)
        with torch.no_grad():
            teacher_features = self.encode(self.model, crops[: self.num_global])
            targets = self.assign(self.teacher_head, teacher_features)
        temperature = self.teacher_temperature_at(self.global_step)
        loss = cast(Tensor, self.criterion(logits, targets, temperature))
        prototypes = self.hparams['output_dim']
        self._idle = is_chance(loss.detach(), prototypes, _PLATEAU_WIDTH)
        values = {
            # Much smaller than 1 / sqrt(F): all images look alike to the encoder
            'train_feature_std': std_of_l2_normalized(teacher_features[0].float())
        }
        if self.uses_labels:
            pairs = self.pair_crops(batch, features, teacher_features)
            values |= self.beside_chance('train_loss_dino', loss, prototypes)
            soft = torch.stack([self.soft_criterion(*pair) for pair in pairs]).mean()
            loss = self.add_soft(loss, soft, features, pairs[0], values)
        self.watch_step(loss, batch)
        self.log_step({'train_loss': loss, **values}, len(crops[0]))
        return loss

    def on_train_epoch_end(self) -> None:
        """Check all losses of the epoch, and warn once if they have stayed at log(K)."""
        super().on_train_epoch_end()
        if not hasattr(self, '_told') and int(self.plateau) >= _PLATEAU_STEPS:
            self._told = True
            prototypes = self.hparams['output_dim']
            value = f'log(output_dim) = {math.log(prototypes):.3f}'
            rank_zero_warn(plateau_message(value, prototypes, int(self.plateau)))
