# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import pytest
import torch
from torch import nn

from torchgeo_softcon.modules import mlp_head


@pytest.mark.parametrize('num_layers', [1, 2, 3])
def test_is_the_head_of_moco_v3(num_layers: int) -> None:
    torch.manual_seed(0)
    head = mlp_head(6, 10, 4, num_layers)
    x = torch.randn(32, 6)

    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == num_layers
    assert all(m.bias is None for m in linear)
    expected = x
    for i, layer in enumerate(linear):
        expected = expected @ layer.weight.T
        mean, var = expected.mean(0), expected.var(0, unbiased=False)
        expected = (expected - mean) / (var + 1e-5).sqrt()
        if i < num_layers - 1:
            expected = expected.relu()
    torch.testing.assert_close(head(x), expected)
    last = list(head.modules())[-1]
    assert isinstance(last, nn.BatchNorm1d)
    assert not last.affine


def test_bad_number_of_layers() -> None:
    with pytest.raises(ValueError, match='num_layers must be at least 1, got 0'):
        mlp_head(6, 10, 4, 0)


def test_last_layer_without_batch_norm() -> None:
    layers = list(mlp_head(6, 10, 4, 2, last_batch_norm=False).layers)
    assert isinstance(layers[-1], nn.Linear)
    assert layers[-1].bias is None
