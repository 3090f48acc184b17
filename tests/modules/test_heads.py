# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import pickle

import pytest
import torch
from lightly.models.modules.heads import DINOProjectionHead
from torch import nn

from torchgeo_softcon.modules.ema import make_teacher, update_ema
from torchgeo_softcon.modules.heads import DINOHead, Prototypes, mlp_head


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


class TestPrototypes:
    def make(self, learn_norms: bool = True) -> Prototypes:
        torch.manual_seed(0)
        layer = Prototypes(6, 32, learn_norms)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(0.5, 2)
        return layer

    @pytest.mark.parametrize('precision', [None, torch.bfloat16])
    @pytest.mark.parametrize('learn_norms', [False, True])
    def test_equals_weight_norm(
        self, learn_norms: bool, precision: torch.dtype | None
    ) -> None:
        layer = self.make(learn_norms)
        x = torch.randn(5, 6, requires_grad=True)
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        direction = torch.randn(5, 32)
        results = []
        for slow in (True, False):
            with torch.autocast('cpu', precision, enabled=precision is not None):
                if slow:
                    weight = torch._weight_norm(layer.weight_v, layer.weight_g, 0)
                    logits = torch.nn.functional.linear(x, weight)
                else:
                    logits = layer(x)
            grads = torch.autograd.grad(logits, inputs, direction.to(logits))
            results.append([logits, *grads])
        tolerance = 1e-6 if precision is None else 0.02
        for expected, actual in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            assert (actual - expected).norm() <= tolerance * expected.norm()

    def test_gradient(self) -> None:
        layer = self.make().double()
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, *_: layer(x), (x, *layer.parameters())
        )


class TestDINOHead:
    @pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
    def test_is_the_head_of_lightly(self) -> None:
        torch.manual_seed(0)
        theirs, ours = DINOProjectionHead(64, 96, 48, 512), DINOHead(64, 96, 48, 512)
        state = theirs.state_dict()
        # Other draws of the same distribution
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(
                value.std(correction=0), state[key].std(correction=0), rtol=0.1, atol=0
            )
        ours.load_state_dict(state)
        x = torch.randn(5, 64)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_logits_are_cosines(self) -> None:
        head = DINOHead(6, 10, 4, 32)
        with torch.no_grad():
            for parameter in head.parameters():
                if parameter.requires_grad:
                    parameter *= 3
        logits = head(100 * torch.randn(50, 6))
        assert logits.abs().max() <= 1 + 1e-6

    def test_norms_of_prototypes(self) -> None:
        assert not DINOHead(6, 10, 4, 32).last_layer.weight_g.requires_grad
        free = DINOHead(6, 10, 4, 32, norm_last_layer=False)
        assert free.last_layer.weight_g.requires_grad

    def test_travels_to_other_processes(self) -> None:
        head = DINOHead(6, 10, 4, 32)
        copy = pickle.loads(pickle.dumps(head))
        x = torch.randn(5, 6)
        assert torch.equal(copy(x), head(x))

    def test_copies_and_follows(self) -> None:
        head = DINOHead(6, 10, 4, 32)
        teacher = make_teacher(head)
        x = torch.randn(5, 6)
        assert torch.equal(teacher(x), head(x))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 1
        update_ema(head, teacher, 0)
        torch.testing.assert_close(teacher(x), head(x))
        assert not any(p.requires_grad for p in teacher.parameters())
