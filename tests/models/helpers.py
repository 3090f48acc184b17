# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Checkpoints with the keys and shapes of the published ones, and their networks."""

import argparse
import functools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def vit_shapes(
    width: int, patch: int, channels: int, grid: int, dino_v2: bool, depth: int = 12
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a ViT of DINO, or of DINOv2 (LayerScale, mask token)."""
    d = width
    shapes: dict[str, tuple[int, ...]] = {
        'cls_token': (1, 1, d),
        'pos_embed': (1, 1 + grid * grid, d),
        **({'mask_token': (1, d)} if dino_v2 else {}),
        'patch_embed.proj.weight': (d, channels, patch, patch),
        'patch_embed.proj.bias': (d,),
    }
    for i in range(depth):
        block = {
            'norm1.weight': (d,),
            'norm1.bias': (d,),
            'attn.qkv.weight': (3 * d, d),
            'attn.qkv.bias': (3 * d,),
            'attn.proj.weight': (d, d),
            'attn.proj.bias': (d,),
            **({'ls1.gamma': (d,)} if dino_v2 else {}),
            'norm2.weight': (d,),
            'norm2.bias': (d,),
            'mlp.fc1.weight': (4 * d, d),
            'mlp.fc1.bias': (4 * d,),
            'mlp.fc2.weight': (d, 4 * d),
            'mlp.fc2.bias': (d,),
            **({'ls2.gamma': (d,)} if dino_v2 else {}),
        }
        shapes |= {f'blocks.{i}.{k}': v for k, v in block.items()}
    return shapes | {'norm.weight': (d,), 'norm.bias': (d,)}


def randomize(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> dict[str, Tensor]:
    """Parameters of sensible sizes, none of them trivial."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith('gamma'):
            return 0.2 + 0.8 * torch.rand(shape, generator=generator)
        if 'norm' in name and name.endswith('weight'):
            return 1 + 0.1 * noise
        return noise * (0.02 if len(shape) < 4 else shape[1] ** -0.5 / shape[2])

    return {name: draw(name, shape) for name, shape in shapes.items()}


def compact(
    shapes: Mapping[str, tuple[int, ...] | Tensor], start: float = 0
) -> dict[str, Tensor]:
    """Parameters of one number each, whose file is small, and constants as they are."""
    return {
        name: shape
        if isinstance(shape, Tensor)
        else torch.full((), start + 1 / (i + 2)).expand(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def vit_tokens(state: Mapping[str, Tensor], image: Tensor, heads: int = 6) -> Tensor:
    """Forward pass of a ViT in plain functions, after the papers: all tokens."""
    get = state.__getitem__
    x = F.conv2d(
        image,
        get('patch_embed.proj.weight'),
        get('patch_embed.proj.bias'),
        stride=get('patch_embed.proj.weight').shape[-1],
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([get('cls_token').expand(len(x), -1, -1), x], 1) + get('pos_embed')
    width = x.shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = get(f'{name}.weight'), get(f'{name}.bias')
        return F.layer_norm(x, (width,), weight, bias, 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, get(f'{name}.weight'), get(f'{name}.bias'))

    for i in range(sum(k.endswith('norm1.bias') for k in state)):
        b = f'blocks.{i}.'
        qkv = linear(norm(x, f'{b}norm1'), f'{b}attn.qkv')
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        y = linear(attention.transpose(1, 2).flatten(2), f'{b}attn.proj')
        x = x + y * state.get(f'{b}ls1.gamma', torch.ones(()).to(x))
        y = linear(F.gelu(linear(norm(x, f'{b}norm2'), f'{b}mlp.fc1')), f'{b}mlp.fc2')
        x = x + y * state.get(f'{b}ls2.gamma', torch.ones(()).to(x))
    return norm(x, 'norm')


@functools.cache
def torchvision_backbone(name: str, channels: int = 3) -> nn.Module:
    """A network as DINO-MC and SoftCon make it: without its classifier."""
    torch.manual_seed(0)
    model: Any = getattr(torchvision.models, name)()
    if name == 'swin_t':
        model.head = nn.Identity()
    else:
        model.fc = nn.Identity()
        if channels != 3:
            model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer('running_mean').uniform_(-0.1, 0.1)
            module.get_buffer('running_var').uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return nn.Module.eval(model)


def dino_checkpoint(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch_norm: bool
) -> dict[str, Any]:
    """A training checkpoint of DINO-MC, with what it holds besides tensors."""
    head = {
        **{f'head.mlp.{i}.weight': torch.ones(2, 2) for i in (0, 2, 4)},
        **{f'head.mlp.{i}.bias': torch.ones(2) for i in (0, 2, 4)},
        'head.last_layer.weight_g': torch.ones(4, 1),
        'head.last_layer.weight_v': torch.ones(4, 2),
    }

    def branch(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        encoder = {f'{prefix}backbone.{k}': v for k, v in state.items()}
        return encoder | {f'{prefix}{k}': v for k, v in head.items()}

    return {
        'student': branch(student, 'module.'),
        'teacher': branch(teacher, 'module.' if batch_norm else ''),
        'optimizer': {'state': {}, 'param_groups': [{'lr': np.float64(1e-4)}]},
        'epoch': 300,
        'args': argparse.Namespace(arch='vit_small', lr=5e-4, bands=['B4', 'B3', 'B2']),
        'dino_loss': {'center': torch.zeros(1, 65536)},
    }


class Server:
    """A web server on this machine. It counts what it is asked for."""

    def __init__(self, root: Path) -> None:
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                name = self.path.strip('/').partition('?')[0]
                path = root / name.removeprefix('cut/')
                if not path.is_file():
                    self.send_error(404)
                    return
                body = path.read_bytes()
                self.send_response(200)
                if not name.startswith('cut/'):
                    self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                # As a proxy does that loses the connection behind it
                end = len(body) // 2 if name.startswith('cut/') else len(body)
                self.wfile.write(body[:end])

            def log_message(self, *args: Any) -> None:
                pass

        self.server = HTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'


@contextmanager
def serve(root: Path) -> Iterator[Server]:
    """Serve the files of a folder."""
    server = Server(root)
    thread = threading.Thread(target=server.server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        thread.join()
        server.server.server_close()


#: Files of SoftCon, and what is in them.
SOFTCON_FILES: dict[str, tuple[Any, int]] = {
    'B13_rn50_softcon.pth': ('resnet50', 13),
    'B2_rn50_softcon.pth': ('resnet50', 2),
    'B13_vits14_softcon_enc.pth': (384, 13),
    'B2_vits14_softcon_enc.pth': (384, 2),
    'B13_vitb14_softcon_enc.pth': (768, 13),
    'B2_vitb14_softcon_enc.pth': (768, 2),
}


def _backbone(model: str, channels: int = 3) -> dict[str, Any]:
    if model == 'vit_small_patch8_224':
        return {**vit_shapes(384, 8, 3, 28, False)}
    if model == 'swin_t':  # with constants of its own
        state = torchvision_backbone(model).state_dict()
    else:
        with torch.device('meta'):
            network = torchvision_backbone.__wrapped__(model, channels)
        state = network.to_empty(device='cpu').state_dict()
    # Batches that a norm has counted are none
    return {
        k: tuple(v.shape) if v.is_floating_point() else v if v.ndim else v.new_zeros(())
        for k, v in state.items()
    }


class WeightsFolder:
    """A folder with all files, of one number per parameter."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, (model, channels) in SOFTCON_FILES.items():
            shapes: Any = (
                _backbone(model, channels)
                if isinstance(model, str)
                else vit_shapes(model, 14, channels, 16, True)
            )
            torch.save(compact(shapes), root / name)
        models = ('resnet50', 'wide_resnet50_2', 'vit_small_patch8_224', 'swin_t')
        for model in models:
            shapes = _backbone(model)
            for method, start in (('dinomc', 0), ('dinotp', 2)):
                checkpoint = dino_checkpoint(
                    compact(shapes, start), compact(shapes, start + 1), 'res' in model
                )
                torch.save(checkpoint, root / f'{method}_{model}.pth')

    def use(self, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Have files from this folder, and no network."""
        monkeypatch.setenv('TORCHGEO_SOFTCON_WEIGHTS', str(self.root))
        monkeypatch.setattr('torchgeo_softcon.models.hub._fetch', None)
        return self.root
