# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Slow forms: what the methods say, one operation after the other."""

from collections.abc import Sequence
from typing import Any

import torch
from kornia import augmentation as K
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from torchgeo_softcon.tasks import DINOMCTask
from torchgeo_softcon.tasks.optimizers import parameter_groups


def cross_entropy(student: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """DINO's loss by a loop over all pairs of different views."""
    losses = []
    for t, probability in enumerate(target):
        for s, logits in enumerate(student):
            if s != t:
                log_probability = (logits / temperature).log_softmax(-1)
                losses.append(-(probability * log_probability).sum(-1).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def ema(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Moving averages, one parameter after the other."""
    for own, trained in zip(teacher.parameters(), student.parameters(), strict=True):
        own.mul_(momentum).add_((1 - momentum) * trained)


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """The norm of each gradient, clipped one after the other."""
    for parameter in parameters:
        if parameter.grad is not None:
            factor = max_norm / (parameter.grad.norm() + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)


def encode(encoder: nn.Module, crops: Sequence[Tensor], num_global: int) -> Tensor:
    """One forward pass for the global crops and one for each local crop."""
    if isinstance(encoder, VisionTransformer):
        for block in encoder.blocks:
            block.attn.fused_attn = False  # type: ignore[union-attr]
        p = encoder.patch_embed.patch_size[0]
        crops = [c[..., : c.shape[2] // p * p, : c.shape[3] // p * p] for c in crops]
    batches = [torch.cat(list(crops[:num_global])), *crops[num_global:]]
    features = torch.cat([encoder(batch) for batch in batches])
    return features.unflatten(0, (len(crops), -1))


class DINOMCStep:
    """A training step of DINO-MC on the modules of a task."""

    def __init__(self, task: DINOMCTask) -> None:
        self.task, self.center = task, task.criterion.center.clone()
        self.parameters = [p for p in task.parameters() if p.requires_grad]
        # What PyTorch takes by itself
        groups = parameter_groups([task], task.hparams['weight_decay'])
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)

    def __call__(self, image: Tensor) -> float:
        task = self.task
        self.optimizer.zero_grad()
        crops = task.augmentations(image)
        logits = task.assign(task.head, encode(task.student, crops, 2))
        with torch.no_grad():
            features = encode(task.model, crops[:2], 2)
            teacher = task.assign(task.teacher_head, features)
            target = ((teacher - self.center) / 0.04).softmax(-1)
        loss = cross_entropy(logits.float(), target.float())
        loss.backward()  # type: ignore[no-untyped-call]
        clip(self.parameters, 3)
        self.optimizer.step()
        for student, average in task.ema_pairs():
            ema(student, average, 0.996)
        self.center.lerp_(teacher.float().mean((0, 1)), 0.1)
        return loss.item()


def multi_crop(size: int, local_sizes: Sequence[int]) -> nn.Module:
    """The crops of DINO-MC by kornia, which draws per sample, too."""

    def view(side: int, scale: tuple[float, float], blur: float) -> nn.Module:
        return nn.Sequential(
            K.RandomResizedCrop((side, side), scale),
            K.RandomHorizontalFlip(),
            K.RandomBrightness((0.6, 1.4), p=0.8),
            K.RandomContrast((0.6, 1.4), p=0.8),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur),
        )

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.views = nn.ModuleList(
                [view(size, (0.32, 1.0), blur) for blur in (1.0, 0.1)]
                + [view(side, (0.05, 0.32), 0.5) for side in local_sizes]
            )

        def forward(self, image: Tensor) -> list[Any]:
            return [module(image) for module in self.views]

    return Views()
