# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Slow forms: what the methods say, one operation after the other."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from kornia import augmentation as K
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchgeo.transforms.color import RandomGrayscale
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from torchgeo_softcon.modules.heads import DINOHead
from torchgeo_softcon.tasks import DINOMCTask
from torchgeo_softcon.tasks.optimizers import parameter_groups


def cross_entropy(student: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """DINO's loss by a loop over all pairs of different views, as its authors write it.

    https://github.com/facebookresearch/dino/blob/main/main_dino.py
    """
    losses = []
    student = student / temperature
    for t, q in enumerate(target):
        for s, logits in enumerate(student):
            if s != t:
                losses.append((-q * logits.log_softmax(-1)).sum(-1).mean())
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


def assign(head: DINOHead, features: Tensor) -> Tensor:
    """Compare features with prototypes that PyTorch's weight norm normalises first."""
    x = features.flatten(0, 1)
    for layer in head.layers:
        x = layer(x)
    last = head.last_layer
    weight = torch._weight_norm(last.weight_v, last.weight_g, 0)
    logits = F.linear(F.normalize(x, dim=-1), weight)
    return logits.unflatten(0, features.shape[:2])


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
        crops = task.augmentations(image)
        logits = assign(task.head, encode(task.student, crops, 2))
        with torch.no_grad():
            features = encode(task.model, crops[:2], 2)
            teacher = assign(cast(DINOHead, task.teacher_head), features)
            target = ((teacher - self.center) / 0.04).softmax(-1)
        loss = cross_entropy(logits.float(), target.float())
        loss.backward()  # type: ignore[no-untyped-call]
        clip(self.parameters, 3)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for student, average in task.ema_pairs():
            ema(student, average, 0.996)
        self.center.lerp_(teacher.float().mean((0, 1)), 0.1)
        return loss.item()


def views_one_by_one(
    image: Tensor,
    size: int,
    scale: tuple[float, float],
    vertical_flip: float,
    blur: float,
) -> Tensor:
    """Views of the distribution of ``RandomView``, image by image, as a dataset does it.

    By torchvision, but for changes of colour, which it has for RGB alone.

    Args:
        image: Images of shape (B, C, H, W) on the CPU.
        size: Side of a view in pixels.
        scale: Range of the crops' shares of an image.
        vertical_flip: Probability to mirror top and bottom.
        blur: Probability of a Gaussian blur.

    Returns:
        Views of shape (B, C, size, size).
    """
    views = []
    for x in image:
        box = RandomResizedCrop.get_params(x, list(scale), [3 / 4, 4 / 3])
        view = TF.resized_crop(x, *box, [size, size], antialias=False)
        if torch.rand(()) < 0.5:
            view = TF.hflip(view)
        if torch.rand(()) < vertical_flip:
            view = TF.vflip(view)
        if torch.rand(()) < 0.8:
            view = view * torch.empty(()).uniform_(0.6, 1.4)
            mean = view.mean((-2, -1), keepdim=True)
            view = mean.lerp(view, torch.empty(()).uniform_(0.6, 1.4))
        if torch.rand(()) < 0.2:
            view = view.mean(0, keepdim=True).expand_as(view)
        if torch.rand(()) < blur:
            sigma = float(torch.empty(()).uniform_(0.1, 2.0))
            view = TF.gaussian_blur(view, 2 * math.ceil(3 * sigma) + 1, sigma)
        views.append(view)
    return torch.stack(views)


def multi_crop(size: int, local_sizes: Sequence[int], channels: int) -> nn.Module:
    """The crops of DINO-MC by kornia and TorchGeo, which draw per sample, too.

    With the number of views, the sizes, shares, probabilities, blur and order of ours, and
    bicubic global crops. Not equal: crops are not antialiased, the blur always has 13 taps,
    brightness adds, contrast multiplies, both clip, and are drawn one by one. Ours change
    saturation and the gains of the bands, too, for which kornia has nothing but RGB.
    """
    grey = torch.full((channels,), 1 / channels)

    def view(
        side: int, kind: str, scale: tuple[float, float], jitter: float, blur: float
    ) -> nn.Module:
        factors = 1 - jitter, 1 + jitter
        return nn.Sequential(
            K.RandomResizedCrop((side, side), scale, resample=kind),
            K.RandomHorizontalFlip(),
            K.RandomBrightness(factors, p=0.8),
            K.RandomContrast(factors, p=0.8),
            RandomGrayscale(grey, p=0.2),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur),
        )

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            large = [
                view(size, 'bicubic', (0.32, 1.0), 0.4, blur) for blur in (1.0, 0.1)
            ]
            small = [
                view(side, 'bilinear', (0.05, 0.32), 0.8, 0.5) for side in local_sizes
            ]
            self.views = nn.ModuleList(large + small)

        def forward(self, image: Tensor) -> list[Any]:
            return [module(image) for module in self.views]

    return Views()
