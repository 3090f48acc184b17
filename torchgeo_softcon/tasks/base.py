# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What the pretraining tasks share: encoder, seasons, randomness, schedules, EMA."""

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .._compat import BaseTask, Sample, WeightsEnum, finetune_command
from ..bands import normalize_band_names
from ..models import (
    create_encoder,
    feature_size,
    is_vit,
    load_encoder,
    read_pretrained,
    read_weights,
)
from ..models.input_layer import input_layer
from ..modules.ema import make_teacher, update_ema
from ..transforms.seasons import split_seasons
from .checkpointing import checkpoint_activations, paused_statistics
from .guard import NonFiniteGuard
from .memory_format import contiguous, follow_parameters, set_memory_format
from .optimizers import create_optimizer, parameter_groups, peak_lr, run_length
from .schedules import cosine_warmup


class EMATask(BaseTask):
    """A task with an encoder, a teacher that follows it, and per-step schedules."""

    #: Not saved as hyperparameters: a checkpoint holds plain values only, so that it
    #: opens safely and without this package.
    ignore: tuple[str, ...] = ('weights', 'augmentations')

    weights: WeightsEnum | bool | str | None
    augmentations: nn.Module
    rng_seed: Tensor

    #: EMA momentum at the start and at the end of the run.
    momentum: tuple[float, float]

    #: Number of optimizer steps of the run and of an epoch. A step without a trainer is
    #: one of a run of one step.
    total_steps: int = 1
    epoch_steps: int = 1

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Pairs of a trained module and the teacher that follows it."""
        return ()

    def momentum_at(self, step: int) -> float:
        """EMA momentum of an optimizer step.

        Args:
            step: Index of the optimizer step.

        Returns:
            A cosine from *momentum* to *momentum_final*.
        """
        return cosine_warmup(step, self.total_steps, *self.momentum)

    def create_encoder(self, drop_path_rate: float) -> nn.Module:
        """Create the encoder that the hyperparameters ask for and load its weights.

        Args:
            drop_path_rate: Stochastic depth rate of the last block.

        Returns:
            The encoder.

        Raises:
            ValueError: If *drop_path_rate* is out of range, or *model*, *weights*, *bands*
                and *size* do not fit each other.
        """
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate}')
        name, channels = self.hparams['model'], self.hparams['in_channels']
        bands = self.hparams['bands']
        if bands is not None and len(normalize_band_names(bands)) != channels:
            raise ValueError(
                f'bands must name all in_channels = {channels} bands, got {len(bands)}: '
                f'{tuple(bands)}'
            )

        encoder = create_encoder(name, channels, False, drop_path_rate)
        #: Number of features F of the encoder.
        self.feature_size = self.try_sizes(encoder)
        if self.weights:
            if self.weights is True:
                state_dict = read_pretrained(name, channels, bands)
            else:
                state_dict = read_weights(self.weights)
            load_encoder(encoder, state_dict, self.hparams['in_layer_init'], bands)
        if self.hparams['freeze_patch_embed']:
            input_layer(encoder)[1].requires_grad_(False)
        set_memory_format(encoder, self.hparams['channels_last'])
        # As a buffer: a run that goes on draws what it would have drawn
        self.register_buffer('rng_seed', torch.tensor(torch.initial_seed() % 2**63))
        self.guard = NonFiniteGuard()
        return encoder

    def make_encoder_teacher(self, encoder: nn.Module) -> nn.Module:
        """Copy the encoder into its teacher, and let it save memory if asked to.

        Args:
            encoder: The trained encoder.

        Returns:
            The teacher, which keeps no activations anyway.

        Raises:
            ValueError: If *grad_checkpointing* is not possible.
        """
        teacher = make_teacher(encoder)
        if self.hparams['grad_checkpointing']:
            checkpoint_activations(encoder, self.hparams['model'])
        return teacher

    def try_sizes(self, encoder: nn.Module) -> int:
        """Find out whether an encoder takes the sizes of the views.

        Args:
            encoder: The encoder.

        Returns:
            Its number of features F.

        Raises:
            ValueError: If it does not take them.
        """
        size = self.hparams['size']
        self._check_divisible(encoder, (size, size), 'size')
        return feature_size(encoder, self.hparams['in_channels'], size)

    @staticmethod
    def _check_divisible(encoder: nn.Module, size: tuple[int, ...], name: str) -> None:
        """Check that patches cover an image."""
        if is_vit(encoder):
            patch = cast(Any, encoder).patch_embed.patch_size
            if size[0] % patch[0] or size[1] % patch[1]:
                raise ValueError(
                    f'{name} must be a multiple of the patch size {patch[0]} of the '
                    f'model, got {size[0]} x {size[1]}. The nearest one is '
                    f'{max(1, round(size[0] / patch[0])) * patch[0]}'
                )

    @contextmanager
    def step_rng(self, batch_idx: int) -> Iterator[None]:
        """Draw the random numbers of a step from its own seed.

        The seed depends on the run, the rank and the step alone. A resumed run therefore
        draws what an uninterrupted run draws, and ranks draw differently. PyTorch's
        global generators are as before afterwards.

        Args:
            batch_idx: Index of the batch, which tells the batches of one gradient
                accumulation apart.
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
        """Images of a batch.

        Args:
            batch: Mini-batch with *image*, see :func:`.split_seasons`.
            seasons: Whether the options of the task ask for several seasons.

        Returns:
            Images of shape (B, T, C, H, W).

        Raises:
            ValueError: If there are none, or their number of bands does not fit.
        """
        if 'image' not in batch:
            raise ValueError(f"batch must have the key 'image', got {sorted(batch)}")
        return split_seasons(batch['image'], self.hparams['in_channels'], seasons)

    def augment(self, image: Tensor) -> Tensor:
        """Draw one view of each image.

        Args:
            image: Images of shape (B, C, H, W).

        Returns:
            Views of shape (B, C, size, size).

        Raises:
            ValueError: If *augmentations* gives another shape.
        """
        size = self.hparams['size']
        view = self.augmentations(image)
        if view.shape != (*image.shape[:2], size, size):
            raise ValueError(
                f'augmentations must give views of shape (B, C, size, size) = '
                f'{(*image.shape[:2], size, size)}, got {tuple(view.shape)}. Give them '
                'the size of the task'
            )
        return view.to(self.dtype)

    def unsaved(self) -> dict[str, str]:
        """Arguments that a checkpoint may not hold, in words, to compare on loading."""
        return {'augmentations': repr(self.augmentations)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out augmentations, and refuse to overwrite a good checkpoint.

        Whether images were scaled as :class:`.ToUnitRange` does is noted, if the datamodule
        tells.

        Args:
            checkpoint: The checkpoint.

        Raises:
            NonFiniteLossError: If a loss was not finite.
        """
        self.guard.check()
        state = checkpoint['state_dict']
        for key in [k for k in state if k.startswith('augmentations.')]:
            del state[key]
        contiguous(state)
        checkpoint['unsaved'] = self.unsaved()
        # For those who use the encoder with other data
        datamodule = getattr(self._trainer, 'datamodule', None)
        checkpoint['unit_range'] = getattr(datamodule, 'unit_range', False)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what the checkpoint does not hold from this task.

        Args:
            checkpoint: The checkpoint.

        Warns:
            UserWarning: If it was made with other arguments, see :meth:`unsaved`.
        """
        for key, value in self.state_dict().items():
            if key.startswith('augmentations.'):
                checkpoint['state_dict'][key] = value
        for name, value in checkpoint.get('unsaved', {}).items():
            own = self.unsaved().get(name)
            if value != own:
                rank_zero_warn(
                    f'The checkpoint was made with {name}={value}, this task goes on '
                    f'with {own}. To go on as before, pass {name} to the task.'
                )
        # The seed is the checkpoint's
        self.__dict__.pop('_seed', None)

    def on_train_start(self) -> None:
        """Put everything into training mode.

        Lightning leaves modules as they are. The batch norm of a teacher that was used
        before, in evaluation mode, would never learn its statistics.
        """
        self.train()
        for optimizer in self.trainer.optimizers:
            follow_parameters(optimizer)

    def on_train_epoch_end(self) -> None:
        """Check all losses of the epoch.

        Raises:
            NonFiniteLossError: If a loss was not finite.
        """
        self.guard.check()

    def warmup_steps(self, name: str) -> int:
        """Number of optimizer steps of a start, at most one half of the run.

        Args:
            name: Name of the hyperparameter that gives it in epochs.

        Returns:
            The number of steps.
        """
        steps = round(self.hparams[name] * self.epoch_steps)
        if steps > self.total_steps // 2:
            rank_zero_warn(
                f'{name} = {self.hparams[name]} is {steps} of the {self.total_steps} '
                'optimizer steps of this run. It is cut to one half of the run.'
            )
            steps = self.total_steps // 2
        return steps

    def configure_optimizers(self) -> Any:
        """Initialize the optimizer and the learning rate schedule.

        The peak learning rate is *lr* times the images per optimizer step over 256. It
        rises linearly during the warm-up and falls as a cosine to *lr_final*, or to zero
        for tasks without, per step.

        Returns:
            Optimizer and learning rate scheduler.

        Raises:
            ValueError: If the run has no end or its precision is too low.
        """
        if str(self.trainer.precision).endswith('16-true'):
            raise ValueError(
                f'trainer.precision = {self.trainer.precision} rounds the small steps of '
                'the EMA teacher away. Use bf16-mixed'
            )
        self.total_steps, self.epoch_steps = run_length(self.trainer)
        warmup = self.warmup_steps('warmup_epochs')
        lr = peak_lr(self.hparams['lr'], self.trainer)

        # Lightning refuses to clip gradients of a fused optimizer in mixed precision
        fused = (
            self.trainer.gradient_clip_val is None
            # ... and in float16 it would unscale gradients only after we have clipped
            and getattr(self.trainer.precision_plugin, 'scaler', None) is None
            and self.trainer.strategy.root_device.type in ('cpu', 'cuda')
        )
        groups = parameter_groups([self], self.hparams['weight_decay'])
        optimizer = create_optimizer(self.hparams['optimizer'], groups, lr, fused)
        total, final = self.total_steps, self.hparams.get('lr_final', 0) / lr
        scheduler = LambdaLR(
            optimizer, lambda step: cosine_warmup(step, total, 1, final, warmup)
        )
        return {
            'optimizer': optimizer,
            'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'},
        }

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients; batch norm does not see twice what is computed twice.

        Args:
            loss: The loss.
            *args: Of Lightning.
            **kwargs: Of Lightning.
        """
        again = self.modules() if self.hparams['grad_checkpointing'] else ()
        with paused_statistics(again):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer, then move the teacher towards the student.

        Called once per optimizer step, so gradient accumulation does not change the
        teacher.

        Args:
            *args: Arguments of Lightning's hook.
            **kwargs: Keyword arguments of Lightning's hook.
        """
        super().optimizer_step(*args, **kwargs)
        momentum = self.momentum_at(self.global_step)
        for student, teacher in self.ema_pairs():
            update_ema(student, teacher, momentum)

    def schedules(self) -> dict[str, float]:
        """What the schedules say at this step, to be logged."""
        return {
            'lr': self.trainer.optimizers[0].param_groups[0]['lr'],
            'momentum': self.momentum_at(self.global_step),
        }

    def log_step(self, values: dict[str, Tensor], batch_size: int) -> None:
        """Log the losses and where the schedules are.

        Args:
            values: Scalars by name, *train_loss* among them. They are not read here, only
                when Lightning's loggers need them.
            batch_size: Number of images B.
        """
        if self._trainer is None:
            return
        loss = values.pop('train_loss')
        # Shown in the progress bar where that does not make the host wait
        self.log('train_loss', loss, batch_size=batch_size, prog_bar=not self.on_gpu)
        schedules = {f'schedule/{k}': v for k, v in self.schedules().items()}
        # Lightning would copy plain numbers to the device, and wait for it
        filled = {k: torch.full_like(loss, v) for k, v in schedules.items()}
        self.log_dict({**values, **filled}, batch_size=batch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Compute features with the encoder that is exported.

        Args:
            x: Images of shape (B, C, H, W).

        Returns:
            Features of shape (B, F).

        Raises:
            ValueError: If the image is not covered by whole patches.
        """
        self._check_divisible(self.model, tuple(x.shape[-2:]), 'image size')
        return cast(Tensor, self.model(x))

    def predict_step(
        self, batch: Sample, batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Compute the features of a batch.

        Args:
            batch: Mini-batch with *image*, see :func:`.split_seasons`.
            batch_idx: Index of this batch.
            dataloader_idx: Index of the current dataloader.

        Returns:
            Features of shape (B, F), of several seasons their mean.
        """
        image = split_seasons(batch['image'], self.hparams['in_channels'])
        features = self(image.flatten(0, 1).to(self.dtype))
        return features.unflatten(0, image.shape[:2]).mean(1)

    def on_fit_end(self) -> None:
        """Say where the pretrained encoder is and how to go on from it."""
        callback = self.trainer.checkpoint_callback
        path = getattr(callback, 'best_model_path', '')
        path = path or getattr(callback, 'last_model_path', '')
        if path:
            model, channels = self.hparams['model'], self.hparams['in_channels']
            # The host builds Vision Transformers for one image size
            size = self.model.patch_embed.img_size[0] if is_vit(self.model) else None
            options = getattr(
                getattr(self.trainer, 'datamodule', None), 'finetune_options', None
            )
            data = None if options is None else options(size)
            rank_zero_info(f'The pretrained encoder is in {path}')
            head = list(self.model.children())[-1]
            if isinstance(head, nn.Identity):
                command = finetune_command(model, path, channels, data)
                rank_zero_info(f'Fine-tune from it with:\n  {command}')
            else:
                # The host's loader knows classifiers of one layer only
                rank_zero_info(
                    'TorchGeo does not open checkpoints of this family of models. Export '
                    f'it with:\n  torchgeo-softcon export {shlex.quote(path)} --format '
                    'timm\nand load the file into a task: '
                    'task.model.load_state_dict(torch.load(FILE), strict=False)'
                )
