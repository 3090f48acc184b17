# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A warning of features that collapse, during training."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightly.utils.debug import std_of_l2_normalized
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from .._checks import check_counts, check_not_negative, check_types
from ..evaluation.features import encode, prepare
from ..tasks.guard import is_chance, plateau_message
from .watch import EncoderWatch, gather, quietly


def effective_rank(features: Tensor) -> Tensor:
    r"""Measure how many dimensions features use.

    The exponential of the entropy of the singular values :math:`\sigma_i`,

    .. math::

        \exp\left(-\sum_i p_i \log p_i\right), \quad
        p_i = \frac{\sigma_i}{\sum_j \sigma_j}

    O. Roy and M. Vetterli, The effective rank, 2007; as a measure of self-supervised
    features, RankMe, https://arxiv.org/abs/2210.02885, section 3.

    Args:
        features: Features of shape (N, F), any floating dtype.

    Returns:
        A float32 scalar, from 1 if all features are multiples of one vector to min(N, F)
        if all directions are used alike, or 0 if all features are zero.
    """
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.special.entr(share).sum().exp() * (values.sum() > 0)


def uniformity(features: Tensor, t: float = 2.0) -> Tensor:
    r"""Measure how evenly features spread over the unit sphere.

    .. math::

        \log \operatorname{mean}_{i < j} \exp\left(-t \|z_i - z_j\|^2\right)

    of L2-normalized features z. 0 if all are the same, about -2 t if they are spread
    over a sphere of many dimensions. T. Wang and P. Isola,
    https://arxiv.org/abs/2005.10242, section 4.1.

    Args:
        features: Features of shape (N, F), N at least 2, any floating dtype.
        t: Scale of the kernel (2 in the paper).

    Returns:
        A float32 scalar.
    """
    distances = torch.pdist(F.normalize(features.float()))
    return (distances.square() * -t).exp().mean().log()


class CollapseMonitor(EncoderWatch):
    """Measure how much of their space the features use, and warn of too little.

    Encodes the images of a batch from time to time, and logs

    * ``collapse/feature_std``: standard deviation of L2-normalized features, averaged
      over dimensions. 1 / sqrt(F) if they are spread evenly, 0 if all images look alike.
    * ``collapse/effective_rank``: see :func:`effective_rank`.
    * ``collapse/uniformity``: see :func:`uniformity`.

    Warns once if all images of a batch have had nearly the same features several times in
    a row, or if a loss over prototypes (DINO) stays at the logarithm of their number:
    then outputs tell nothing apart.

    For the tasks of this package and TorchGeo's own. The training is the same to the
    bit with and without it.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        min_std: float = 0.02,
        min_rank: float = 1.5,
        patience: int = 3,
        plateau_steps: int = 1000,
        encoder: str | None = None,
    ) -> None:
        """Initialize a new CollapseMonitor instance.

        Args:
            every_n_steps: Optimizer steps between two looks. One look encodes one batch,
                which costs a fourth of a training step or less.
            min_std: Smallest feature standard deviation that is not called a collapse,
                in units of 1 / sqrt(F). 0.02 is a cosine similarity of 0.9996 between
                different images; new encoders have 0.05 to 0.15 on synthetic scenes.
            min_rank: Smallest effective rank that is not called a collapse.
            patience: Number of looks in a row that must see a collapse.
            plateau_steps: Number of optimizer steps that a DINO loss may stay within
                1 % of log(prototypes). It starts there.
            encoder: Name of the encoder in the task, by default the exported one.

        Raises:
            ValueError: If an argument is out of range.
        """
        check_types(CollapseMonitor.__init__, locals())
        check_counts(
            every_n_steps=every_n_steps, patience=patience, plateau_steps=plateau_steps
        )
        check_not_negative(min_std=min_std, min_rank=min_rank)

        super().__init__()
        self.every_n_steps, self.encoder = every_n_steps, encoder
        self.min_std, self.min_rank = min_std, min_rank
        self.patience, self.plateau_steps = patience, plateau_steps
        self._seen = 0
        self._plateau_start = -1
        self._warned: list[str] = []

    @property
    def state_key(self) -> str:
        """Name of the state of this monitor in checkpoints."""
        return self._generate_state_key(encoder=self.encoder)

    def state_dict(self) -> dict[str, Any]:
        """Return looks in a row with a collapse, start of the plateau, and warnings."""
        return {
            'seen': self._seen,
            'plateau_start': self._plateau_start,
            'warned': list(self._warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._seen = state_dict['seen']
        self._plateau_start = state_dict['plateau_start']
        self._warned = list(state_dict['warned'])

    def look(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any
    ) -> dict[str, float] | None:
        """Measure the features of a batch, and warn if they have collapsed."""
        with quietly(trainer, pl_module):
            image, _ = prepare(
                batch['image'].to(pl_module.dtype),
                pl_module.hparams.get('in_channels'),
                pl_module.hparams.get('size'),
                first=True,
            )
            features = next(iter(encode(self._encoder, image).values())).float()
        features = gather(trainer, features).flatten(0, 1)
        if len(features) < 2:
            return None
        loss = torch.tensor(math.nan)
        for name in ('train_loss', 'train_loss_dino'):  # the part without labels
            loss = trainer.callback_metrics.get(name, loss)
        with torch.autocast(features.device.type, enabled=False):
            measures = [
                std_of_l2_normalized(features),
                effective_rank(features.nan_to_num()),
                uniformity(features),
                loss.to(features),
            ]
        # The only place where the host waits for the device
        std, rank, uniform, last_loss = torch.stack(measures).tolist()

        self._judge_features(std, rank, *features.shape)
        self._judge_loss(pl_module, trainer.global_step, last_loss)
        named = {'feature_std': std, 'effective_rank': rank, 'uniformity': uniform}
        return {f'collapse/{name}': value for name, value in named.items()}

    def _judge_features(self, std: float, rank: float, count: int, width: int) -> None:
        """Warn if features have been alike for too long."""
        relative = std * math.sqrt(width)
        collapsed = relative < self.min_std or rank < self.min_rank
        self._seen = self._seen + 1 if collapsed else 0
        if self._seen >= self.patience:
            self._warn(
                'features',
                f'The features of different images are nearly the same: their standard '
                f'deviation is {std:.2g}, {relative:.2g} of the 1 / sqrt(F) of features '
                f'that are spread evenly, and they use {rank:.1f} of '
                f'{min(count, width)} dimensions ({self._seen} looks in a row, '
                f'{self.every_n_steps} steps apart). Usually one of these helps: a lower '
                'lr or a longer warm-up, a larger batch_size, a momentum of the teacher '
                'that moves it neither at once nor never, images in the range that the '
                'task expects (about [0, 1]).',
            )

    def _judge_loss(self, pl_module: LightningModule, step: int, loss: float) -> None:
        """Warn if a loss over prototypes has stayed where it starts."""
        prototypes = count_prototypes(pl_module)
        if prototypes is None or not is_chance(loss, prototypes, 0.01):
            self._plateau_start = -1
            return
        if self._plateau_start < 0:
            self._plateau_start = step
        steps = step - self._plateau_start
        if steps >= self.plateau_steps:
            self._warn('plateau', plateau_message(f'{loss:.3f}', prototypes, steps))

    def _warn(self, kind: str, message: str) -> None:
        """Warn once per run, also if the run is interrupted."""
        if kind not in self._warned:
            self._warned.append(kind)
            rank_zero_warn(message)


def count_prototypes(task: LightningModule) -> int | None:
    """Return the size of the centre of a loss over prototypes, None for other losses."""
    criterion = getattr(task, 'criterion', None)
    center = getattr(criterion, 'centre', getattr(criterion, 'center', None))
    # lightly's loss has a module of that name with the buffer in it
    center = getattr(center, 'center', center)
    return int(center.shape[-1]) if isinstance(center, Tensor) else None
