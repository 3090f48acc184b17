# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Shared parts of pretraining tasks: encoder, views, randomness, schedules, checkpoints."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from .._checks import (
    check_counts,
    check_fractions,
    check_not_negative,
    check_positive,
    check_types,
    require,
)
from .._compat import Sample, WeightsEnum, extend_host_tasks
from ..bands import normalize_band_names
from ..datamodules.protocol import offer_of, trainer_datamodule
from ..models import create_encoder, feature_size
from ..models.encoders import PRETRAINING, explain_misfit, initial_weights
from ..models.input_layer import InputLayerInit, input_layer
from ..models.loading import check_patches, load_positions, save_positions
from ..modules.ema import make_teacher, update_ema
from ..transforms.seasons import split_seasons
from .continual import BatchNorm, ContinualTask
from .guard import NonFiniteGuard
from .memory import (
    checkpoint_activations,
    contiguous,
    follow_parameters,
    paused_statistics,
    set_memory_format,
)
from .optimizers import (
    OptimizerName,
    cosine_warmup,
    create_optimizer,
    parameter_groups,
    with_schedule,
)
from .quiet import silence_adverts
from .runs import (
    count_epoch,
    peak_lr,
    require_even,
    run_length,
    save_once,
    tell_next_step,
    warn_of_lost_gradients,
)

extend_host_tasks(explain_misfit)

#: How the hyperparameters that tasks share are checked.
_CHECKS: dict[Callable[..., None], tuple[str, ...]] = {
    check_counts: ('in_channels', 'size', 'hidden_dim', 'output_dim'),
    check_fractions: ('momentum', 'momentum_final', 'layer_decay'),
    check_positive: ('lr', 'layer_decay'),
    check_not_negative: (
        *('weight_decay', 'warmup_epochs', 'lr_final', 'head_warmup_epochs'),
    ),
}

#: What the progress bar shows of a step.
_SHOWN = ('train_loss', 'train_loss_contrast', 'train_loss_soft', 'train_feature_std')


class PretrainingTask(ContinualTask):
    """Base of tasks that pretrain an encoder, with what they share.

    A new method is a subclass with the arguments *model*, *in_channels*, *size* and *lr*
    that builds ``self.model``, the encoder to export, in :meth:`configure_models` by
    :meth:`create_encoder`, and computes its loss in :meth:`training_step`. Checkpoints note
    what it declares, so that ``export``, ``embed``, ``evaluate`` and ``report`` know it.
    """

    #: Name of the method. A task of several may choose by its hyperparameters.
    method: str
    #: Paper of the method.
    reference: str | None = None
    #: Not saved as hyperparameters: a checkpoint holds plain values only, so that it
    #: opens safely and without this package.
    ignore: tuple[str, ...] = ('weights', 'augmentations')

    weights: WeightsEnum | bool | str | None
    augmentations: nn.Module
    rng_seed: Tensor

    #: EMA momentum at the start and at the end of the run.
    momentum: tuple[float, float] = 1.0, 1.0

    #: Number of optimizer steps of the run and of an epoch. A step without a trainer is
    #: one of a run of one step.
    total_steps: int = 1
    epoch_steps: int = 1

    def __init__(
        self,
        weights: WeightsEnum | bool | str | None = None,
        augmentations: nn.Module | None = None,
        bands: Sequence[str] | None = None,
        in_layer_init: InputLayerInit = 'random',
        freeze_patch_embed: bool = False,
        batch_norm: BatchNorm | None = None,
        optimizer: OptimizerName = 'adamw',
        lr_final: float = 0.0,
        weight_decay: float = 0.0,
        warmup_epochs: float = 0.0,
        layer_decay: float = 1.0,
        head_warmup_epochs: float = 0.0,
        grad_checkpointing: bool = False,
        channels_last: bool | None = None,
    ) -> None:
        """Initialize a new PretrainingTask instance.

        All arguments, and those of the subclass, become hyperparameters, but those in
        *ignore*.

        Args:
            weights: Initial weights: a weight enum or its name, True for timm's own (such
                as those of DINOv2), None or False for random ones, or the path of a
                checkpoint of a TorchGeo task or of a state dict.
            augmentations: Module that draws views of images (B, C, H, W), None to take
                them as they are. Not saved in checkpoints.
            bands: Names of the bands in their order, for ``in_layer_init='rgb'``.
            in_layer_init: What to do if *weights* are for another number of bands, see
                :func:`~torchgeo_softcon.models.input_layer.adapt_input_weight`.
                ``'random'`` is SoftCon's choice.
            freeze_patch_embed: Whether to keep the input layer as it is. Not after
                ``in_layer_init='random'``.
            batch_norm: Whether batch norm of the encoders learns running statistics
                (``'train'``) or keeps those of *weights*, in evaluation mode
                (``'frozen'``; scale and shift are trained all the same). Statistics of
                augmented views are not those of images: they alone can cost a pretrained
                encoder more than training gains. Only behind an input layer that is drawn
                anew, the first one learns. Defaults to ``'frozen'`` if *weights* are given
                and the encoder has batch norm, else to ``'train'``.
            optimizer: ``'adamw'``, ``'sgd'`` or ``'lars'``. SoftCon's authors used AdamW
                for Vision Transformers and SGD for ResNets.
            lr_final: Learning rate at the end of a cosine, as it is.
            weight_decay: Weight decay of all but one-dimensional parameters.
            warmup_epochs: Epochs of linear warm-up of the learning rate.
            layer_decay: Factor of the learning rate from a layer of the encoder to the one
                before it, so that what was pretrained moves least near the input. 1 for
                none; 0.65 to 0.9 in fine-tuning of Vision Transformers (BEiT, MAE). Heads
                and an input layer that is drawn anew have the full rate.
            head_warmup_epochs: First epochs in which only the heads are trained, and an
                input layer that is drawn anew, so that their first, random gradients do
                not reach what was pretrained.
            grad_checkpointing: Whether to compute activations of the trainable encoder
                again in the backward pass: the same results from less memory in more
                time, with a Trainer. Not for all models.
            channels_last: Whether parameters of encoders lie in memory with channels
                last, which is faster for convolutions. None: with more than one of
                them. Files do not show it; safetensors refuses to save a live encoder.
        """
        options = {**locals()}
        check_types(PretrainingTask.__init__, options)
        left_out = ('self', '__class__', *self.ignore)
        self._options = {k: v for k, v in options.items() if k not in left_out}
        silence_adverts()
        self.weights = weights
        super().__init__()
        self.augmentations = nn.Identity() if augmentations is None else augmentations
        # Modules start in training mode, without having been told
        self.train()

    def ema_pairs(self) -> Sequence[tuple[nn.Module, nn.Module]]:
        """Return pairs of a trained module and the teacher that follows it."""
        return ()

    def momentum_at(self, step: int) -> float:
        """Return the EMA momentum of an optimizer step: a cosine over the run."""
        return cosine_warmup(step, self.total_steps, *self.momentum)

    def create_encoder(self, drop_path_rate: float = 0.0) -> nn.Module:
        """Create the encoder that the hyperparameters ask for and load its weights.

        Raises:
            ValueError: If an option is out of range, or *model*, *weights*, *bands* and
                *size* do not fit each other.
        """
        for name, value in self._options.items():
            # The command line saves the arguments of a subclass alone
            self.hparams.setdefault(name, value)
        for check, names in _CHECKS.items():
            check(**{name: self.hparams.get(name) for name in names})
        require(
            0 <= drop_path_rate < 1,
            f'drop_path_rate must be in [0, 1), got {drop_path_rate}',
        )
        name, channels = self.hparams['model'], self.hparams['in_channels']
        bands = self.hparams['bands']
        require(
            bands is None or len(normalize_band_names(bands)) == channels,
            f'bands must name all in_channels = {channels} bands, got {len(bands or ())}: '
            f'{bands}',
        )

        size = self.hparams['size']
        encoder = create_encoder(name, channels, False, drop_path_rate, size)
        key, layer = input_layer(encoder)
        #: Number of features F of the encoder.
        self.feature_size = self.try_sizes(encoder)
        if self.weights:
            init = self.hparams['in_layer_init']
            source = initial_weights(self.weights, name, channels, bands)
            source.load_into(encoder, init, bands)
            others = source.state_dict[f'{key}.weight'].shape[1] != channels
            self.new_input_layer = others and init == 'random'
        self.choose_batch_norm(encoder, bool(self.weights))
        if self.hparams['freeze_patch_embed']:
            layer.requires_grad_(False)
        set_memory_format(encoder, self.hparams['channels_last'])
        # As a buffer: a run that goes on draws what it would have drawn
        self.register_buffer('rng_seed', torch.tensor(torch.initial_seed() % 2**63))
        self.guard = NonFiniteGuard()
        return encoder

    def make_encoder_teacher(self, encoder: nn.Module) -> nn.Module:
        """Copy the encoder into its teacher, then let it save memory if asked to."""
        teacher = make_teacher(encoder)
        if self.hparams['grad_checkpointing']:
            checkpoint_activations(encoder, self.hparams['model'])
        return teacher

    def try_sizes(self, encoder: nn.Module) -> int:
        """Return the number of features of an encoder, if it takes the sizes of views."""
        size = self.hparams['size']
        check_patches(encoder, (size, size), 'size')
        return feature_size(encoder, self.hparams['in_channels'], size)

    @contextmanager
    def step_rng(self, batch_idx: int) -> Iterator[None]:
        """Draw the random numbers of a step from its own seed.

        It depends on the run, the rank, the step and *batch_idx* (which tells the batches of
        one accumulation apart) alone, so a resumed run draws what an uninterrupted one
        draws. PyTorch's global generators are as before afterwards.
        """
        if not hasattr(self, '_seed'):
            # Once per run, because it waits for the device
            self._seed = int(self.rng_seed)
        step = [self._seed, self.global_rank, self.global_step, batch_idx]
        seed = int(np.random.SeedSequence(step).generate_state(1, np.uint64)[0])
        devices = [self.device] if self.device.type == 'cuda' else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed % 2**63)
            yield

    def read_image(self, batch: Sample, seasons: bool) -> Tensor:
        """Return the images (B, T, C, H, W) of a batch, see :func:`.split_seasons`."""
        require(
            'image' in batch, f"batch must have the key 'image', got {sorted(batch)}"
        )
        return split_seasons(batch['image'], self.hparams['in_channels'], seasons)

    def augment(self, image: Tensor) -> Tensor:
        """Draw a view (B, C, size, size) of each of the images (B, C, H, W)."""
        size = self.hparams['size']
        view = self.augmentations(image)
        expected = (*image.shape[:2], size, size)
        require(
            view.shape == expected,
            f'augmentations must give views of shape (B, C, size, size) = {expected}, got '
            f'{tuple(view.shape)}',
        )
        return view.to(self.dtype)

    def draw_for_report(self, batch: Sample) -> list[tuple[str, Tensor]]:
        """Draw views (B, C, h, w) of a batch, each with a title, for ``report``."""
        image = self.read_image(batch, False)[:, 0]
        return [('view', self.augment(image))]

    @classmethod
    def class_path(cls) -> str:
        """Return the name by which checkpoints note the class of their task."""
        return f'{cls.__module__}.{cls.__qualname__}'

    def unsaved(self) -> dict[str, str]:
        """Return the arguments that a checkpoint may not hold, in words."""
        return {'augmentations': repr(self.augmentations)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to overwrite a good checkpoint, leave out augmentations, note the task.

        Noted are its class, method, branches and initial weights, and whether images were
        scaled as :class:`.ToUnitRange` does, if the datamodule tells.
        """
        self.guard.check()
        state = checkpoint['state_dict']
        for key in [k for k in state if k.startswith('augmentations.')]:
            del state[key]
        contiguous(state)
        save_positions(checkpoint, self.model, self.hparams['model'])
        checkpoint['unsaved'] = self.unsaved()
        checkpoint[PRETRAINING] = {
            'task': self.class_path(),
            'method': getattr(self, 'method', type(self).__name__),
            'reference': self.reference,
            'branches': dict(self.branches),
            'new_input_layer': self.new_input_layer,
            'weights': str(self.weights) if self.weights else None,
        }
        # For those who use the encoder with other data
        datamodule = trainer_datamodule(self._trainer)
        checkpoint['unit_range'] = offer_of(datamodule).unit_range

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what the checkpoint does not hold from this task, and warn if it differs."""
        state = checkpoint['state_dict']
        load_positions(
            checkpoint, {n: getattr(self, n) for n in self.branches.values()}
        )
        for key, value in self.state_dict().items():
            if key.startswith('augmentations.'):
                state[key] = value
        for name, value in checkpoint.get('unsaved', {}).items():
            own = self.unsaved().get(name)
            if value != own:
                rank_zero_warn(
                    f'The checkpoint was made with {name}={value}, this task goes on '
                    f'with {own}. To go on as before, pass {name} to the task.'
                )
        # The seed is the checkpoint's
        self.__dict__.pop('_seed', None)
        warn_of_lost_gradients(checkpoint, self._trainer)
        self.keep_as_before(checkpoint)

    def on_train_start(self) -> None:
        """Put everything into training mode, and say so if batch norm stays frozen."""
        require_even(self.trainer, bool(self.hparams.get('gather_distributed')))
        # Lightning does not: batch norm of a teacher that was used before would stay
        self.train()
        self.guard.value_range = getattr(self.augmentations, 'value_range', None)
        self.tell_frozen()
        for optimizer in self.trainer.optimizers:
            follow_parameters(optimizer)
        save_once(self.trainer)
        count_epoch(self.trainer)

    def on_train_epoch_end(self) -> None:
        """Check all losses of the epoch, see :class:`.NonFiniteGuard`."""
        self.guard.check()

    def warmup_steps(self, name: str) -> int:
        """Return the steps of a start that *name* gives in epochs, at most half of the run."""
        epochs = self.hparams[name]
        steps = round(epochs * self.epoch_steps)
        if steps > self.total_steps // 2:
            rank_zero_warn(
                f'{name} = {epochs} is {steps} of the {self.total_steps} '
                'optimizer steps of this run. It is cut to one half of the run.'
            )
            steps = self.total_steps // 2
        return steps

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and a warm-up and cosine of the learning rate per step."""
        if str(self.trainer.precision).endswith('16-true'):
            raise ValueError(
                f'trainer.precision = {self.trainer.precision} rounds the small steps of '
                'the EMA teacher away. Use bf16-mixed'
            )
        self.total_steps, self.epoch_steps = run_length(self.trainer)
        warmup = self.warmup_steps('warmup_epochs')
        self._held_steps = self.warmup_steps('head_warmup_epochs')
        lr = peak_lr(self.hparams['lr'], self.trainer)

        # Lightning refuses to clip gradients of a fused optimizer in mixed precision
        fused = (
            self.trainer.gradient_clip_val is None
            # ... and in float16 it would unscale gradients only after we have clipped
            and getattr(self.trainer.precision_plugin, 'scaler', None) is None
            and self.trainer.strategy.root_device.type in ('cpu', 'cuda')
        )
        decay = self.hparams['weight_decay']
        groups = parameter_groups([self], decay, self.lr_scales())
        optimizer = create_optimizer(self.hparams['optimizer'], groups, lr, fused)
        final = self.hparams['lr_final'] / lr
        return with_schedule(optimizer, self.total_steps, final, warmup)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; batch norm does not see twice what is computed twice."""
        again = self.modules() if self.hparams['grad_checkpointing'] else ()
        with paused_statistics(again):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then move the teacher towards the student."""
        super().optimizer_step(*args, **kwargs)
        momentum = self.momentum_at(self.global_step)
        for student, teacher in self.ema_pairs():
            update_ema(student, teacher, momentum)

    def schedules(self) -> dict[str, float]:
        """Return what the schedules say at this step, to be logged."""
        values = {'lr': self.trainer.optimizers[0].param_groups[0]['lr']}
        if self.ema_pairs():
            values['momentum'] = self.momentum_at(self.global_step)
        return values

    def log_step(self, values: dict[str, Tensor], batch_size: int) -> None:
        """Log scalars, *train_loss* among them, and schedules, without reading them."""
        if self._trainer is None:
            return
        loss = values['train_loss']
        shown = {name: values.pop(name) for name in _SHOWN if name in values}
        # In the progress bar where that does not make the host wait
        self.log_dict(shown, batch_size=batch_size, prog_bar=not self.on_gpu)
        schedules = {f'schedule/{k}': v for k, v in self.schedules().items()}
        # Lightning would copy plain numbers to the device, and wait for it
        filled = {k: torch.full_like(loss, v) for k, v in schedules.items()}
        self.log_dict({**values, **filled}, batch_size=batch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, C, H, W) by the exported encoder."""
        check_patches(self.model, tuple(x.shape[-2:]), 'image size')
        return cast(Tensor, self.model(x))

    def predict_step(
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Return the features (B, F) of a batch, of several seasons their mean."""
        image = split_seasons(batch['image'], self.hparams['in_channels'])
        features = self(image.flatten(0, 1).to(self.dtype))
        return features.unflatten(0, image.shape[:2]).mean(1)

    def on_fit_end(self) -> None:
        """Say where the pretrained encoder is and how to go on from it."""
        tell_next_step(self)
