# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A control of what labels do: the soft term with the labels of other images."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from .._checks import check_counts, check_types, require
from .watch import EncoderWatch, gather, quietly


class LabelControl(EncoderWatch):
    """Repeat the soft term with permuted labels, from time to time, and log the difference.

    Permuted labels have the same frequencies and belong to other images. If the soft term
    is as low with them, embeddings know nothing of the labels but how common they are.
    Logged are

    * ``label_control/soft``: the soft term of a batch, in evaluation mode,
    * ``label_control/permuted``: its mean over permutations of the labels,
    * ``label_control/difference``: how much lower it is with the true labels, and
    * ``label_control/spread``: the standard deviation over permutations, which a difference
      that means something exceeds several times.

    For tasks that labels guide. The training is the same to the bit with and without it.
    """

    def __init__(self, every_n_steps: int = 50, permutations: int = 8) -> None:
        """Initialize a new LabelControl instance.

        Args:
            every_n_steps: Optimizer steps between two looks at one batch, each of which
                costs about half a training step.
            permutations: Number of permutations of the labels, at least 2.

        Raises:
            ValueError: If an argument is out of range.
        """
        check_types(LabelControl.__init__, locals())
        check_counts(every_n_steps=every_n_steps)
        require(
            permutations >= 2, f'permutations must be at least 2, got {permutations}'
        )
        super().__init__()
        self.every_n_steps = every_n_steps
        self.permutations = permutations

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there are labels to permute."""
        super().on_train_start(trainer, pl_module)
        task: Any = pl_module
        require(
            getattr(task, 'uses_labels', False) and task.hparams['soft_weight'] != 0,
            f'LabelControl needs a task that labels guide, got {type(task).__name__} '
            f'with soft_weight = {task.hparams.get("soft_weight")}. Set that, or leave '
            'out LabelControl',
        )

    def look(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any
    ) -> Mapping[str, float] | None:
        """Compare the soft term of a batch with that of permuted labels."""
        task: Any = pl_module
        with quietly(trainer, task):
            *embeddings, label, key_label = task.label_pairs(batch, 0)
            draws = torch.rand(self.permutations, len(label), device=label.device)
            values = [
                task.soft_criterion(*embeddings, label[order], key_label[order])
                for order in (slice(None), *draws.argsort(dim=1))
            ]
        true, *others = gather(trainer, torch.stack(values)).mean(0)
        drawn = torch.stack(others)
        # The only place where the host waits for the device
        soft, permuted, spread = torch.stack([true, drawn.mean(), drawn.std()]).tolist()
        return {
            'label_control/soft': soft,
            'label_control/permuted': permuted,
            'label_control/difference': permuted - soft,
            'label_control/spread': spread,
        }
