# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Reading checkpoints without running code in them, and finding the encoder in them."""

import argparse
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor

from .._checks import check_choice
from .convert import drop_head, has_layer_scale

Branch = Literal['student', 'teacher']
_T = TypeVar('_T')

_scalar = np.float64(0).__reduce__()[0]
#: What DINO and DINO-MC save besides tensors: their arguments, and learning rates of the
#: optimizer as numpy scalars. The module of numpy's scalars has changed its name.
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_scalar, 'numpy.core.multiarray.scalar'),
    (_scalar, 'numpy._core.multiarray.scalar'),
    np.dtype,
    *(
        type(np.dtype(name))
        for name in ('float64', 'float32', 'int64', 'int32', 'bool')
    ),
]

#: Prefix of all keys of a branch of DINO-MC. `module.` is there if the network was wrapped
#: for distributed training, which for teachers only those with batch norm are.
_DINO_KEY = re.compile(r'(?:module\.)?(backbone|head)\.(.+)')


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a file of torch.save or safetensors without running any code in it.

    Beyond the types that PyTorch allows, *SAFE_GLOBALS* are accepted.
    """
    try:
        if path.endswith('.safetensors'):
            from safetensors.torch import load_file

            return dict(load_file(path))
        # Mapped, not read: of a training checkpoint, a tenth is needed
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(
                path, map_location='cpu', weights_only=True, mmap=mapped
            )
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f'weights: {path} is not a checkpoint that PyTorch can load safely: '
            f'{_reason(error)}'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(  # noqa: TRY004
            f'weights: {path} must hold a state dict, got a {type(checkpoint).__name__}'
        )
    return dict(checkpoint)


def _reason(error: Exception) -> str:
    """Tell why a file cannot be read, and what to do."""
    found = re.findall(
        r'(?:GLOBAL|unsafe class|Unsupported class) ([A-Za-z_][\w.]*)', str(error)
    )
    if found:
        return (
            f'it holds Python objects ({", ".join(dict.fromkeys(found))}), which could '
            'run code. Remove the file; or, if you trust it, load it with '
            'weights_only=False, and save its state dict alone'
        )
    # PyTorch's text around the reason advises to load unsafely
    match = re.search(r'WeightsUnpickler error:\s*(.*)', str(error))
    reason = match[1] if match else f'{type(error).__name__} {error}'.strip()
    return f'{reason}. It may be incomplete: remove the file and download it again'


def dino_mc_encoder(
    checkpoint: Mapping[str, Any], branch: Branch = 'teacher'
) -> dict[str, Tensor]:
    """Find the encoder in a training checkpoint of DINO-MC, DINO-TP or DINO.

    https://github.com/WennyXY/DINO-MC/blob/4f8e519/main_dino_mc.py
    """
    check_choice('branch', branch, get_args(Branch))
    state_dict = checkpoint.get(branch)
    if not isinstance(state_dict, Mapping):
        raise ValueError(  # noqa: TRY004
            f'branch={branch!r} is not in the checkpoint, which has '
            f'{sorted(map(str, checkpoint))[:8]}. Choose another branch, or a training '
            'checkpoint of DINO-MC'
        )
    encoder, foreign = {}, []
    for key, value in state_dict.items():
        match = _DINO_KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
        elif match[1] == 'backbone':
            encoder[match[2]] = value
    if foreign or not encoder:
        raise ValueError(
            f'branch={branch!r} of the checkpoint must have keys that start with '
            f'(module.)backbone. or (module.)head., got {(foreign or [*state_dict])[:3]}'
        )
    return encoder


def on_meta(build: Callable[[], _T]) -> _T:
    """Build without memory for parameters, where timm does not read them as it builds."""
    try:
        with torch.device('meta'):
            return build()
    except (NotImplementedError, RuntimeError):
        return build()


def check_architecture(
    state_dict: Mapping[str, Tensor],
    model: str,
    in_channels: int,
    img_size: int | None = None,
    source: str = 'weights',
    hint: str = 'Choose the file that was made for this model',
) -> None:
    """Raise a ValueError unless parameters are those of an encoder, all and no others.

    *model* is one of timm without a classifier, built for *img_size*, or torchvision's
    *swin_t*. The error starts with *source* and ends with *hint*, what to do.
    """

    def build() -> dict[str, Tensor]:
        if model == 'swin_t':  # the host takes it from torchvision
            return drop_head(torchvision.models.swin_t().state_dict())
        size: Any = {} if img_size is None else {'img_size': img_size}
        created = timm.create_model(model, in_chans=in_channels, num_classes=0, **size)
        return dict(created.state_dict())

    message = f'{source} must have the parameters of {model} with {in_channels} bands'
    require_shapes(state_dict, on_meta(build), message, hint)


def require_shapes(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    message: str,
    hint: str,
) -> None:
    """Raise a ValueError, from *message* to *hint*, unless names and shapes are equal."""
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected.keys())
    shapes = [
        f'{k} {tuple(state_dict[k].shape)} instead of {tuple(v.shape)}'
        for k, v in expected.items()
        if k in state_dict and state_dict[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        if has_layer_scale(unexpected):
            hint += ', or convert them with models.convert.to_patch_size'
        raise ValueError(
            f'{message}: {len(missing)} keys missing {missing[:3]}, {len(unexpected)} '
            f'unexpected {unexpected[:3]}, {len(shapes)} of other shapes {shapes[:3]}. '
            f'{hint}'
        )
