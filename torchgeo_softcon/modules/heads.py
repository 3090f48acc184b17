# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Projection and prediction heads."""

from lightly.models.modules.heads import ProjectionHead
from torch import nn


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

    Args:
        input_dim: Number of input features.
        hidden_dim: Number of features between the layers.
        output_dim: Number of output features.
        num_layers: Number of linear layers.
        last_batch_norm: Whether batch norm follows the last layer, too. MoCo v3's
            predictor for ResNets has none there.

    Returns:
        A head from (B, input_dim) to (B, output_dim).

    Raises:
        ValueError: If *num_layers* is not positive.
    """
    if num_layers < 1:
        raise ValueError(f'num_layers must be at least 1, got {num_layers}')

    widths = [input_dim, *[hidden_dim] * (num_layers - 1)]
    hidden = [
        (width, hidden_dim, nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True))
        for width in widths[:-1]
    ]
    norm = nn.BatchNorm1d(output_dim, affine=False) if last_batch_norm else None
    last = (widths[-1], output_dim, norm, None, False)
    return ProjectionHead([*hidden, last])
