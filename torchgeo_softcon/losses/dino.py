# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""DINO's loss: students predict the teacher's assignment of other views to prototypes."""

from typing import Any

import torch
from lightly.utils import dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import check_positive, check_types, require

#: Logits that are turned into a gradient in one go on a CPU, so that they and the gradient
#: stay in its cache from one pass to the next.
_CACHED = 2**20


class _CrossEntropy(torch.autograd.Function):
    """Mean cross entropy of all pairs of views, and its gradient at once.

    The cross entropy is linear in the teacher's probabilities q, so that all pairs of one
    student view need one sum of exponentials and one product with the sum of the other
    views' q. As every q sums to one, the gradient is n softmax(s) - sum q. It is made
    while the logits are at hand, in five passes, and is all that is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, target: Tensor, temperature: float
    ) -> Tensor:
        views, batch, prototypes = student.shape
        teachers = len(target)
        step = batch
        if student.device.type == 'cpu':
            step = max(1, _CACHED // (views * prototypes))
        weight = 1 / max(teachers * (views - 1) * batch, 1)
        # The gradient of half precision is not made small before the scaler of losses
        # has made it large: most of it would be lost
        ctx.factor = weight if student.dtype == torch.float16 else 1.0
        weight /= ctx.factor
        # How many teacher views a student view meets: all but itself
        meets = target.new_full((views, 1, 1), weight * teachers)
        meets[:teachers] -= weight

        weight, inverse = weight / temperature, 1 / temperature
        loss = target.new_zeros(())
        gradient = torch.empty_like(student)
        for start in range(0, batch, step):
            rows = slice(start, start + step)
            logits, q = student[:, rows].to(target.dtype), target[:, rows]
            out = gradient[:, rows]
            part = out if out.dtype == target.dtype else torch.empty_like(logits)

            largest = logits.amax(-1, keepdim=True) * inverse
            torch.add(-largest, logits, alpha=inverse, out=part).exp_()
            total = part.sum(-1, keepdim=True)
            # Minus the sum of all q; the view's own is added again
            others = q.sum(0).mul_(-weight)
            loss += (meets * (largest + total.log())).sum()
            loss += torch.linalg.vecdot(logits.sum(0), others).sum()
            loss += torch.linalg.vecdot(logits[:teachers], q).sum() * weight
            torch.addcmul(others, part, meets * inverse / total, out=part)
            part[:teachers].add_(q, alpha=weight)
            if part is not out:
                out.copy_(part)
        ctx.save_for_backward(gradient)
        return loss * ctx.factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # Saves a pass on a CPU; on a GPU, looking at the number would wait for the device
        if ctx.factor != 1 or grad_output.device.type != 'cpu' or grad_output != 1:
            gradient = gradient * (grad_output * ctx.factor)
        return gradient, None, None


def multi_crop_cross_entropy(
    student: Tensor, target: Tensor, temperature: float = 0.1
) -> Tensor:
    r"""Cross entropy of every student view with every other teacher view, averaged.

    .. math::

        \frac{1}{|P| B} \sum_{(t, s) \in P} \sum_b
        - q_{t b} \cdot \log \operatorname{softmax}(s_{s b} / \tau),
        \quad P = \{(t, s) : t \neq s\}

    Equal to the loop over pairs of DINO, without its time and memory.
    https://github.com/facebookresearch/dino/blob/main/main_dino.py

    Args:
        student: Logits of shape (S, B, K), of S views of each of B images. The first T
            views are those that the teacher sees. Gradients are of first order only.
        target: Probabilities of shape (T, B, K), float32 or float64, detached.
        temperature: Temperature :math:`\tau` of the student.

    Returns:
        The scalar loss, in the dtype of *target*.
    """
    loss: Tensor = _CrossEntropy.apply(student, target, temperature)
    return loss


class DINOLoss(nn.Module):
    """Loss of DINO for several views: cross entropy with centred, sharpened targets.

    The centre, a moving average of the teacher's logits, keeps one prototype from taking
    everything; the teacher's low temperature keeps the targets from becoming uniform.

    Equal to lightly's ``DINOLoss`` in float32. That one is computed in half precision
    under autocast (0.3 % off in bfloat16), keeps all log-probabilities for the backward
    pass, and moves its centre in every forward pass.

    If you use this loss in your research, please cite the following papers:

    * https://arxiv.org/abs/2104.14294
    * https://arxiv.org/abs/2303.06670
    """

    center: Tensor
    pending: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        """Initialize a new DINOLoss instance.

        Args:
            output_dim: Number of prototypes K.
            student_temperature: Temperature of the student (0.1 in DINO).
            center_momentum: Share of the old centre in the new one (0.9 in DINO).

        Raises:
            ValueError: If an argument is out of range.
        """
        check_types(DINOLoss.__init__, locals())
        require(
            output_dim > 1,
            f'output_dim must be at least 2 prototypes, got {output_dim}',
        )
        check_positive(student_temperature=student_temperature)
        require(
            0 <= center_momentum < 1,
            f'center_momentum must be in [0, 1), got {center_momentum}',
        )

        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer('center', torch.zeros(1, output_dim))
        # Sum of the teacher's logits since the last update, and their number. Not saved,
        # as the gradients of an unfinished optimizer step are not saved either.
        self.register_buffer('pending', torch.zeros(output_dim + 1), persistent=False)

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_temperature: float = 0.04
    ) -> Tensor:
        """Compute the loss, and remember the teacher's logits for the centre.

        Args:
            student: Logits of shape (S, B, K), of S views of each of B images. The first
                T views are those that the teacher sees.
            teacher: Logits of shape (T, B, K), usually detached.
            teacher_temperature: Temperature of the teacher (0.04 in DINO-MC).

        Returns:
            The scalar loss, float32 (float64 for such logits) also under autocast.

        Raises:
            ValueError: If shapes disagree.
        """
        require(
            student.ndim == 3
            and student.shape[1:] == teacher.shape[1:]
            and student.shape[-1] == self.center.shape[-1]
            and 1 <= len(teacher) <= len(student)
            and len(student) > 1,
            'student and teacher must have the shapes (S, B, K) and (T, B, K) with S >= 2, '
            f'1 <= T <= S and K = output_dim = {self.center.shape[-1]}, got '
            f'{tuple(student.shape)} and {tuple(teacher.shape)}',
        )

        with torch.autocast(student.device.type, enabled=False):
            double = student.dtype == torch.float64
            teacher = teacher.detach().to(torch.float64 if double else torch.float32)
            target = ((teacher - self.center) / teacher_temperature).softmax(-1)
            loss = multi_crop_cross_entropy(student, target, self.student_temperature)
            if self.training:
                self.pending[:-1] += teacher.sum((0, 1))
                self.pending[-1] += teacher.shape[0] * teacher.shape[1]
        return loss

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the centre by the logits of all forward passes since the last call.

        To be called once per optimizer step, so that accumulated batches have one
        centre, as one large batch has. Averages over all ranks.
        """
        if dist.world_size() > 1:
            torch.distributed.all_reduce(self.pending)
        # A step may have been skipped: then there is nothing to move towards
        count = self.pending[-1]
        mean = self.pending[:-1] / count.clamp(min=1)
        self.center.lerp_(mean, (1 - self.center_momentum) * (count > 0))
        self.pending.zero_()
