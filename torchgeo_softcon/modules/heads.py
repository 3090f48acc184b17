# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Projection and prediction heads."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from lightly.models.modules.heads import ProjectionHead
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import check_counts


def mlp_head(
    input_dim: int,
    hidden_dim: int,
    output_dim: int,
    num_layers: int,
    last_batch_norm: bool = True,
) -> ProjectionHead:
    """Build a projection or prediction head of MoCo v3.

    Every linear layer is without bias and followed by batch norm, every one but the
    last by ReLU, and the last batch norm has no affine parameters. lightly's own
    ``MoCoProjectionHead`` differs in the last point.
    https://github.com/facebookresearch/moco-v3/blob/main/moco/builder.py
    """
    check_counts(hidden_dim=hidden_dim, output_dim=output_dim, num_layers=num_layers)
    widths = [input_dim, *[hidden_dim] * (num_layers - 1)]
    hidden = [
        (width, hidden_dim, nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True))
        for width in widths[:-1]
    ]
    norm = nn.BatchNorm1d(output_dim, affine=False) if last_batch_norm else None
    last = (widths[-1], output_dim, norm, None, False)
    return ProjectionHead([*hidden, last])


class _WeightNorm(torch.autograd.Function):
    """Products of features with directions that have other norms than their own.

    PyTorch's weight norm scales all directions first, and keeps them: with 65,536 of
    them, that takes several times as long as the products with a small batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, direction: Tensor, norm: Tensor) -> Tensor:
        """Products (B, K) of features (B, D) with directions (K, D) of norms (K, 1)."""
        own = torch.linalg.vector_norm(direction, dim=1)
        narrow = direction.to(x.dtype)
        scale = norm[:, 0] / own
        out = ((x @ narrow.T) * scale).to(x.dtype)
        ctx.save_for_backward(x, direction, narrow, own, norm, out)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all three. That of a direction has no part along itself."""
        x, direction, narrow, own, norm, out = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            along = (grad.to(own) * out).sum(0)
            grad = (grad * (norm[:, 0] / own)).to(x.dtype)
            of_direction = (grad.T @ x).to(direction)
            share = (along / own.square())[:, None]
            of_direction.addcmul_(direction, share, value=-1)
            return grad @ narrow, of_direction, along[:, None] / norm


class Prototypes(nn.Module):
    """Linear layer without bias whose rows have their norms as parameters of their own.

    Unlike modules with PyTorch's weight norm (of either kind), it can be copied and sent
    to other processes. The names of the parameters are those of DINO's checkpoints.
    """

    def __init__(self, input_dim: int, output_dim: int, learn_norms: bool) -> None:
        """Initialize a new Prototypes instance."""
        super().__init__()
        direction = nn.Linear(input_dim, output_dim, bias=False).weight
        self.weight_v = nn.Parameter(direction.detach())
        self.weight_g = nn.Parameter(torch.ones(output_dim, 1), learn_norms)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply features with the prototypes, shape (B, K): cosines if all have norm 1."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            out = _WeightNorm.apply(x, self.weight_v, self.weight_g)  # type: ignore[no-untyped-call]
            return cast(Tensor, out)


class DINOHead(ProjectionHead):
    """Projection head of DINO: an MLP with GELU, then cosines with K prototypes.

    Equal to lightly's ``DINOProjectionHead``, which cannot be copied, see
    :class:`Prototypes`.
    https://github.com/facebookresearch/dino/blob/main/vision_transformer.py
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        output_dim: int = 65536,
        norm_last_layer: bool = True,
    ) -> None:
        """Initialize a new DINOHead instance."""
        super().__init__(
            [
                (input_dim, hidden_dim, None, nn.GELU()),
                (hidden_dim, hidden_dim, None, nn.GELU()),
                (hidden_dim, bottleneck_dim, None, None),
            ]
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, output_dim, not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Compare features with the prototypes, to logits of shape (B, K)."""
        return cast(Tensor, self.last_layer(self.embed(x)))

    def embed(self, x: Tensor) -> Tensor:
        """Return what is compared with the prototypes, of norm 1, shape (B, D)."""
        return F.normalize(super().forward(x), dim=-1)
