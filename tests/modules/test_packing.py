# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from typing import Any, cast
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.modules import packed_blocks, packing
from torchgeo_softcon.modules.packed_blocks import can_use_varlen, draw_drop_paths
from torchgeo_softcon.modules.packing import can_pack, encode_crops, position_matrix

SIZES = (64, 64, 52, 48, 41, 33, 16)


def make_encoder(model: str = 'test_vit', channels: int = 4, **kwargs: Any) -> Any:
    """An encoder whose parameters, those of norms and biases too, are all random."""
    torch.manual_seed(0)
    encoder = create_encoder(model, channels, **kwargs)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def make_crops(
    sizes: tuple[int, ...] = SIZES, batch: int = 2, channels: int = 4
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, channels, s, s, generator=generator) for s in sizes]


def one_by_one(encoder: nn.Module, crops: list[Tensor], patch: int) -> Tensor:
    """One forward pass per crop, each cut to whole patches."""
    covered = [crop.shape[-1] // patch * patch for crop in crops]
    return torch.stack(
        [encoder(c[..., :s, :s]) for c, s in zip(crops, covered, strict=True)]
    )


@pytest.mark.parametrize(
    ('model', 'patch', 'packed'),
    [
        ('test_vit', 16, True),
        ('test_vit2', 16, True),  # several registers, LayerScale, average pooling
        ('test_vit3', 16, None),
        ('deit3_small_patch16_224', 16, True),  # class token without position
        ('eva02_tiny_patch14_224', 14, True),
    ],
)
def test_equals_one_forward_pass_per_crop(
    model: str, patch: int, packed: bool | None
) -> None:
    encoder = make_encoder(model)
    if packed is not None:
        assert can_pack(encoder) == packed
    crops = make_crops()
    features = encode_crops(encoder, crops)
    expected = one_by_one(encoder, crops, patch)
    assert features.shape == (7, 2, encoder.num_features)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)

    parameters = [p for p in encoder.parameters() if p.requires_grad]
    direction = torch.randn_like(features)
    for ours, theirs in zip(
        torch.autograd.grad(features, parameters, direction, allow_unused=True),
        torch.autograd.grad(expected, parameters, direction, allow_unused=True),
        strict=True,
    ):
        if theirs is None:
            assert ours is None
            continue
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7


def test_batching_by_size() -> None:
    encoder, crops = make_encoder(), make_crops()
    packed = encode_crops(encoder, crops)
    shapes: list[torch.Size] = []
    forward = encoder.forward

    def watched(image: Tensor) -> Any:
        shapes.append(image.shape)
        return forward(image)

    encoder.forward = watched
    features = encode_crops(encoder, crops, batching='by_size')
    assert [(s[0], s[2]) for s in shapes] == [(4, 64), (4, 48), (4, 32), (2, 16)]
    torch.testing.assert_close(features, packed)


@pytest.mark.parametrize('part', ['', 'blocks.1'])
def test_modules_that_must_be_called_are_called(part: str) -> None:
    encoder, crops = make_encoder(), make_crops()
    expected = encode_crops(encoder, crops)
    calls: list[Any] = []
    module = encoder.get_submodule(part)
    handle = module.register_forward_hook(lambda *args: calls.append(args))
    torch.testing.assert_close(encode_crops(encoder, crops), expected)
    assert len(calls) == 4  # sizes
    handle.remove()
    assert can_pack(encoder)
    module.compile()
    assert not can_pack(encoder)


def test_batching_packed_is_for_vision_transformers() -> None:
    with pytest.raises(ValueError, match=r'batching=.packed. needs .* got ResNet'):
        encode_crops(make_encoder('resnet18'), make_crops(), batching='packed')


def test_dinov2_layer_scale_and_registers() -> None:
    width: dict[str, Any] = {'embed_dim': 24, 'depth': 2, 'num_heads': 3}
    grid: dict[str, Any] = {'img_size': 56, 'patch_size': 14, 'no_embed_class': True}
    encoder = timm.models.VisionTransformer(
        **(width | grid),
        in_chans=2,
        num_classes=0,
        init_values=0.5,
        reg_tokens=3,
        qk_norm=True,
        dynamic_img_size=True,
    ).eval()
    assert can_pack(encoder)
    crops = make_crops((56, 42, 40), channels=2)
    torch.testing.assert_close(
        encode_crops(encoder, crops), one_by_one(encoder, crops, 14)
    )


@pytest.mark.parametrize('training', [True, False])
def test_convolutional_network_normalises_each_size(training: bool) -> None:
    encoder = make_encoder('resnet18').train(training)
    crops = make_crops((48, 48, 40, 32, 32))
    assert not can_pack(encoder)
    features = encode_crops(encoder, crops)
    batches = [torch.cat(crops[:2]), crops[2], torch.cat(crops[3:])]
    expected = torch.cat([encoder(batch) for batch in batches]).unflatten(0, (5, 2))
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize('training', [True, False])
def test_compiled_is_one_graph(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        packing._encode_packed, dynamic=False, fullgraph=True, backend=backend
    )
    monkeypatch.setattr(packing, '_compiled', lambda: compiled)
    encoder, crops = make_encoder(drop_path_rate=0.1).train(training), make_crops()
    for _ in range(2):
        torch.manual_seed(0)
        features = encode_crops(encoder, crops, compiled=True)
        torch.manual_seed(0)
        torch.testing.assert_close(features, encode_crops(encoder, crops))
    assert len(graphs) == 1


def test_order_of_crops() -> None:
    # Not grouped by size: the third crop has the size of the first
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    crops = [torch.full((2, 1, s, s), float(i)) for i, s in enumerate((8, 6, 8, 8))]
    features = encode_crops(Mean(), crops)
    assert features[:, 0, 0].tolist() == [0, 1, 2, 3]
    vit = make_encoder()
    crops = make_crops((48, 32, 48))
    torch.testing.assert_close(encode_crops(vit, crops), one_by_one(vit, crops, 16))


def test_rectangles() -> None:
    encoder = make_encoder()
    crops = [torch.rand(2, 4, 32, 64), torch.rand(2, 4, 64, 32)]
    expected = torch.stack([encoder(crop) for crop in crops])
    torch.testing.assert_close(encode_crops(encoder, crops), expected)


def test_positions_are_those_of_timm() -> None:
    position = torch.randn(1, 1 + 14 * 14, 8)
    matrix = position_matrix((14, 14), (11, 9), torch.device('cpu'))
    expected = resample_abs_pos_embed(position, new_size=[11, 9], old_size=[14, 14])
    torch.testing.assert_close(matrix @ position[0, 1:], expected[0, 1:])


def dino_positions(position: Tensor, size: int, native: int) -> Tensor:
    """DINO's way to resample positions, from its description: bicubic without antialias,
    sampling positions scaled by (n + 0.1) / native."""
    grid = position.unflatten(1, (native, native)).permute(0, 3, 1, 2)
    out = nn.functional.interpolate(
        grid, scale_factor=(size + 0.1) / native, mode='bicubic'
    )
    return out.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize('size', [23, 20, 18, 15, 13, 10])
def test_positions_are_close_to_those_of_dino(size: int) -> None:
    # Smooth, as trained ones are
    axis = torch.linspace(0, 1, 28)
    waves = torch.stack([torch.sin(k * axis * torch.pi) for k in range(1, 4)])
    position = (waves[:, None, :, None] + waves[None, :, None, :]).flatten(0, 1)
    position = position.permute(1, 2, 0).flatten(0, 1)[None]
    matrix = position_matrix((28, 28), (size, size), torch.device('cpu'))
    ours, theirs = matrix @ position[0], dino_positions(position, size, 28)[0]
    assert ours.shape == theirs.shape
    cosine = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    assert cosine > 0.999


class Times(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class TestDropPath:
    def test_per_sequence_and_unbiased(self) -> None:
        encoder = make_encoder(drop_path_rate=0.5)
        rates = [m.drop_prob for m in encoder.modules() if hasattr(m, 'drop_prob')]
        assert rates[-1] == 0.5
        encoder.blocks[-1].drop_path2.scale_by_keep = False
        assert draw_drop_paths(encoder, 9) is None
        torch.manual_seed(0)
        factors = draw_drop_paths(encoder.train(), 4000)
        assert factors is not None
        # The first block has none
        rates = [0.0] * (2 * len(encoder.blocks) - len(rates)) + rates
        assert factors.shape == (len(rates), 4000)
        for rate, row in zip(rates, factors[:-1], strict=False):
            assert row[row > 0].unique().tolist() == pytest.approx([1 / (1 - rate)])
            assert (row > 0).float().mean() == pytest.approx(1 - rate, abs=0.03)
        assert factors[-1].unique().tolist() == [0, 1]
        assert abs(torch.corrcoef(factors[-4:])[0, 2]) < 0.1

    def test_drops_what_timm_drops(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder = make_encoder(drop_path_rate=0.5).train()
        crops = make_crops((32, 16), batch=1)
        factors = torch.ones(2 * len(encoder.blocks), 2)
        factors[3, 0] = factors[-1, 1] = factors[-2, 0] = 0
        monkeypatch.setattr(packing, 'draw_drop_paths', lambda vit, number: factors)
        features = encode_crops(encoder, crops)
        monkeypatch.undo()
        for i, (crop, feature) in enumerate(zip(crops, features, strict=True)):
            for block, (first, second) in zip(
                encoder.blocks, factors[:, i].unflatten(0, (-1, 2)), strict=True
            ):
                block.drop_path1 = Times(first)
                block.drop_path2 = Times(second)
            torch.testing.assert_close(feature, encoder(crop))

    def test_only_in_training(self) -> None:
        encoder = make_encoder(drop_path_rate=0.9)
        crops = make_crops()
        expected = encode_crops(encoder, crops)
        torch.testing.assert_close(encode_crops(encoder, crops), expected)
        encoder.train()
        assert not torch.allclose(encode_crops(encoder, crops), expected)


def test_gradient_checkpointing() -> None:
    encoder, crops = make_encoder().train(), make_crops()
    expected = encode_crops(encoder, crops)
    parameter = encoder.patch_embed.proj.weight
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), parameter)
    encoder.set_grad_checkpointing()
    features = encode_crops(encoder, crops)
    (grad,) = torch.autograd.grad(features.square().sum(), parameter)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize('model', ['test_vit', 'test_vit2', 'vit_tiny_patch16_224'])
def test_half_precision(model: str) -> None:
    torch.manual_seed(0)
    encoder: Any = create_encoder(model, 4).eval()
    crops = make_crops()
    expected = encode_crops(encoder, crops)
    dtypes: set[torch.dtype] = set()
    encoder.blocks[-1].norm1.register_forward_pre_hook(
        lambda _, tokens: dtypes.add(tokens[0].dtype)
    )
    with torch.autocast('cpu', torch.bfloat16):
        features = encode_crops(encoder, crops)
        slow = one_by_one(encoder, crops, 16)
    # What blocks add up is float32 in both
    assert dtypes == {torch.float32}
    error, own = (features - expected).norm(), (slow - expected).norm()
    assert error < 1.15 * own  # 1.5 and more if blocks add up half precision


def slow_varlen(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, *longest: int
) -> Tensor:
    """Attention of packed sequences, one after the other."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert {q.dtype, k.dtype, v.dtype} <= {torch.bfloat16}
    assert longest == tuple(int(ends.diff().max()) for ends in (ends_q, ends_k))
    out = []
    sequences = (ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:])
    for first_q, last_q, first_k, last_k in torch.stack(sequences, 1).tolist():
        rows, columns = slice(first_q, last_q), slice(first_k, last_k)
        score = torch.einsum('qhd,khd->hqk', q[rows].float(), k[columns].float())
        weight = (score / q.shape[-1] ** 0.5).softmax(-1)
        out.append(torch.einsum('hqk,khd->qhd', weight, v[columns].float()))
    return torch.cat(out).to(v.dtype)


class TestVarlen:
    @pytest.mark.parametrize('qk_norm', [False, True])
    def test_once_for_all_sizes(
        self, qk_norm: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder, crops = make_encoder(), make_crops()
        if qk_norm:
            for block in encoder.blocks:
                block.attn.q_norm = nn.LayerNorm(block.attn.head_dim)
        parameter = encoder.blocks[0].attn.qkv.weight
        calls = mock.Mock(side_effect=slow_varlen)
        monkeypatch.setattr(packed_blocks, 'varlen_attn', calls)
        monkeypatch.setattr(packing, 'can_use_varlen', lambda *args: True)
        results = []
        for batching in ('packed', 'auto'):
            with torch.autocast('cpu', torch.bfloat16):
                features = encode_crops(encoder, crops, batching=batching)
            (grad,) = torch.autograd.grad(features.float().square().sum(), parameter)
            results.append((features.float(), grad))
        for one, other in zip(*results, strict=True):
            assert (one - other).norm() < 0.02 * one.norm()
        assert calls.call_count == len(encoder.blocks)

    def test_computed_again_by_the_same_backend(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoder, crops = make_encoder().train(), make_crops()
        encoder.set_grad_checkpointing()
        cudnn: list[bool] = []

        def watched(*args: Any) -> Tensor:
            cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
            return slow_varlen(*args)

        monkeypatch.setattr(packed_blocks, 'varlen_attn', watched)
        monkeypatch.setattr(packing, 'can_use_varlen', lambda *args: True)
        with torch.autocast('cpu', torch.bfloat16):
            features = encode_crops(encoder, crops)
        features.float().sum().backward()
        assert cudnn == [False] * 2 * len(encoder.blocks)

    def test_not_in_single_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder, crops = make_encoder(), make_crops()
        expected = encode_crops(encoder, crops)
        monkeypatch.setattr(packed_blocks, 'varlen_attn', None)
        monkeypatch.setattr(packing, 'can_use_varlen', lambda *args: True)
        assert torch.equal(encode_crops(encoder, crops), expected)

    @pytest.mark.parametrize(
        ('function', 'device', 'capability', 'width', 'expected'),
        [
            (slow_varlen, 'cuda', (8, 0), 64, True),
            (slow_varlen, 'cuda', (9, 0), 8, True),
            (slow_varlen, 'cpu', (8, 0), 64, False),
            (slow_varlen, 'cuda', (7, 5), 64, False),
            (slow_varlen, 'cuda', (8, 0), 20, False),
            (slow_varlen, 'cuda', (8, 0), 264, False),
            (None, 'cuda', (8, 0), 64, False),
        ],
    )
    def test_where_it_is(
        self,
        function: Any,
        device: str,
        capability: tuple[int, int],
        width: int,
        expected: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        encoder = make_encoder()
        encoder.blocks[1].attn.head_dim = width
        monkeypatch.setattr(packed_blocks, 'varlen_attn', function)
        monkeypatch.setattr(
            torch.cuda, 'get_device_capability', lambda device: capability
        )
        assert can_use_varlen(encoder, torch.device(device)) is expected


def test_caches_survive_inference_mode() -> None:
    packed_blocks.make_layout.cache_clear()
    encoder, crops = make_encoder(), make_crops((32, 16))
    with torch.inference_mode():
        encode_crops(encoder, crops)
    encode_crops(encoder, crops).sum().backward()
    assert encoder.pos_embed.grad.any()


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.number += 'mm' in str(func)
        return func(*args, **(kwargs or {}))


def test_one_matrix_product_per_layer() -> None:
    encoder, crops = make_encoder(), make_crops()
    with Count() as packed, torch.no_grad():
        encode_crops(encoder, crops)
    with Count() as single, torch.no_grad():
        one_by_one(encoder, crops, 16)
    # Per block qkv, proj, fc1, fc2; in the last one q and kv apart; patches, positions
    assert packed.number <= 4 * len(encoder.blocks) + 3
    assert single.number >= 7 * 4 * len(encoder.blocks)


def test_class_tokens_alone_in_the_last_block() -> None:
    encoder, crops = make_encoder(), make_crops()
    shapes: list[tuple[int, ...]] = []
    cast(nn.Module, encoder.blocks[-1].mlp).register_forward_hook(
        lambda _, args, out: shapes.append(tuple(out.shape))
    )
    encode_crops(encoder, crops)
    assert shapes == [(14, 64)]


def test_bad_crops() -> None:
    encoder = make_encoder()
    with pytest.raises(ValueError, match=r'one batch size, got \[2, 3\]'):
        encode_crops(encoder, [torch.rand(2, 4, 32, 32), torch.rand(3, 4, 32, 32)])
    with pytest.raises(ValueError, match=r'one batch size, got \[\]'):
        encode_crops(encoder, [])
    with pytest.raises(ValueError, match='16 x 16 pixels of a patch, got 15 x 15'):
        encode_crops(encoder, [torch.rand(2, 4, 15, 15)])


def test_positions_as_dino_resamples_them() -> None:
    encoder = make_encoder(size=64)
    crops = make_crops((64, 48, 32))
    actual = encode_crops(encoder, crops, position_rule='dino')

    def interpolate(positions: Tensor, *_: Any, new_size: Any, **kwargs: Any) -> Tensor:
        """`interpolate_pos_encoding` of DINO, from a grid of 4 x 4."""
        if tuple(new_size) == (4, 4):
            return positions
        grid = positions[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        factors = [(size + 0.1) / 4 for size in new_size]
        grid = F.interpolate(grid, scale_factor=factors, mode='bicubic')
        assert grid.shape[2:] == tuple(new_size)
        return torch.cat([positions[:, :1], grid.flatten(2).mT], 1)

    with mock.patch.object(
        timm.models.vision_transformer, 'resample_abs_pos_embed', interpolate
    ):
        expected = one_by_one(encoder, crops, 16)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (encode_crops(encoder, crops) - actual).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"'dino' needs .*packed, got ResNet"):
        encode_crops(make_encoder('resnet18'), crops, position_rule='dino')
