# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From a training checkpoint to files that other tools load.

A checkpoint of this package is large (optimizer, teacher, heads), but TorchGeo opens it as
it is. An export holds one encoder, in the layout of a tool, with a model card.
"""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn

from ..models.checkpoints import Branch, check_architecture
from ..models.convert import fresh, resample_positions, to_patch_size, to_smp
from ..models.encoders import read_trained
from ..models.timm_models import timm_name
from .card import model_card

Format = Literal['torchgeo', 'timm', 'safetensors', 'smp']

_PATCHES = 'patch_embed.proj.weight'

#: Suffixes of checkpoints, which an output may have whatever the format.
_SUFFIXES = ('.ckpt', '.pt', '.pth', '.safetensors')


class Encoder(NamedTuple):
    """An encoder of a checkpoint, and what is known of it."""

    model: str
    state_dict: dict[str, Tensor]
    branch: Branch
    checkpoint: dict[str, Any]
    #: What *model* has to be built with, besides the number of bands.
    options: dict[str, int]


def read_encoder(path: str | os.PathLike[str], branch: Branch | None = None) -> Encoder:
    """Find an encoder in a checkpoint of SoftConTask or DINOMCTask.

    Args:
        path: Path of the checkpoint.
        branch: ``'student'``, which is trained, or ``'teacher'``, its moving average.
            Defaults to the one that the paper evaluates: the student of SoftCon, the
            teacher of DINO-MC.

    Returns:
        The encoder in timm's layout.

    Raises:
        ValueError: If the file is not such a checkpoint or has no such branch.
    """
    trained = read_trained(path, branch)
    # Exports and checkpoints of other tasks have one branch only
    if trained.branch is None or trained.model is None:
        content = trained.checkpoint.get('state_dict', trained.checkpoint)
        parts = {str(key).partition('.')[0] for key in content}
        raise ValueError(
            f'{path} must be a checkpoint of SoftConTask or DINOMCTask, got a file with '
            f'{sorted(parts)[:6]}. Weights of others need no export'
        )
    return Encoder(
        trained.model, trained.state_dict, trained.branch, trained.checkpoint, {}
    )


def convert_encoder(
    encoder: Encoder, patch_size: int | None = None, img_size: int | None = None
) -> Encoder:
    """Convert a Vision Transformer to another patch size or image size.

    Args:
        encoder: The encoder.
        patch_size: Side of the patches in pixels, see
            :func:`~torchgeo_softcon.models.convert.to_patch_size`.
        img_size: Side of the images in pixels that the encoder is built for. Defaults to
            224 with another patch size, else to what it was.

    Returns:
        The encoder, with the name of a timm model that it loads into.

    Raises:
        ValueError: If the encoder has no patches, an argument does not fit, or timm has
            no such model.
    """
    state = encoder.state_dict
    if patch_size is not None or img_size is not None:
        if 'pos_embed' not in state or _PATCHES not in state:
            raise ValueError(
                'patch_size and img_size are for Vision Transformers with a position '
                f'embedding, got {encoder.model}. Leave them out'
            )
        old = state[_PATCHES].shape[-1]
        patch = old if patch_size is None else patch_size
        if patch < 1 or (
            img_size is not None and (img_size < patch or img_size % patch)
        ):
            raise ValueError(
                f'img_size must be a multiple of patch_size = {patch}, got {img_size}'
            )
        if patch != old:
            state = to_patch_size(state, patch, (img_size or 224) // patch)
        elif img_size is not None:
            state = resample_positions(state, img_size // patch)
    model, options = _name_of(encoder.model, state)
    return encoder._replace(model=model, state_dict=fresh(state), options=options)


def _name_of(
    model: str, state_dict: Mapping[str, Tensor]
) -> tuple[str, dict[str, int]]:
    """Name of a timm model that has these parameters, and what to build it with."""
    name = model.split('/')[-1].partition('.')[0]
    layer = next(v for v in state_dict.values() if v.ndim == 4)
    options: list[dict[str, int]] = [{}]
    names = [name]
    if _PATCHES in state_dict and 'pos_embed' in state_dict:
        patch = layer.shape[-1]
        grid = round((state_dict['pos_embed'].shape[1] - 1) ** 0.5)
        names = [
            re.sub(r'_patch\d+', f'_patch{patch}', n) for n in (name, timm_name(name))
        ]
        # Models without LayerScale or for other sizes, and ours, which take any size
        for side in (224, 256):
            names += [re.sub(r'_(dinov2|\d+)$', f'_{side}', n) for n in names[:2]]
        names += [f'softcon_{n}' for n in names if not n.startswith('softcon_')]
        options.append({'img_size': patch * grid})
    for option in options:
        for candidate in filter(timm.is_model, names):
            try:
                size = option.get('img_size')
                check_architecture(state_dict, candidate, layer.shape[1], size)
            except ValueError:
                continue
            return candidate, option
    raise ValueError(
        f'timm has no model for the result, tried {", ".join(dict.fromkeys(names))}. '
        'Choose another patch_size or img_size'
    )


def _torchgeo(encoder: Encoder) -> dict[str, Any]:
    """What ``weights=`` of TorchGeo's tasks opens."""
    return {
        'hyper_parameters': {'model': encoder.model},
        'state_dict': {f'model.{k}': v for k, v in encoder.state_dict.items()},
    }


def _check_host(encoder: Encoder) -> None:
    """Raise if TorchGeo's loader does not open models of this family.

    It looks at the last layer, and knows classifiers of one layer only.
    """
    try:
        with torch.device('meta'):
            model = timm.create_model(encoder.model, num_classes=0)
    except (NotImplementedError, RuntimeError):  # timm that reads numbers as it builds
        model = timm.create_model(encoder.model, num_classes=0)
    last = list(model.children())[-1]
    if isinstance(last, nn.Identity) or hasattr(last, 'out_features'):
        return
    others = 'timm or safetensors'
    with suppress(ValueError):
        to_smp(encoder.state_dict, encoder.model)
        others += ', or smp for segmentation'
    raise ValueError(
        f"format must be another than 'torchgeo' for {encoder.model}: TorchGeo does not "
        f'open models of this family. Choose {others}'
    )


def _smp_torchgeo(encoder: Encoder) -> dict[str, Any]:
    """The layout of smp, as ``weights=`` of TorchGeo's segmentation tasks opens it."""
    state_dict = to_smp(encoder.state_dict, encoder.model)
    prefix = 'model.backbone.model.'
    return {
        'hyper_parameters': {'backbone': encoder.model},
        'state_dict': {prefix + k: v for k, v in state_dict.items()},
    }


def export(
    path: str | os.PathLike[str],
    format: Format,
    branch: Branch | None = None,
    patch_size: int | None = None,
    img_size: int | None = None,
    output: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the encoder of a checkpoint for another tool, with a model card.

    * ``'torchgeo'``: a checkpoint for ``weights=`` of TorchGeo's classification,
      regression and pretraining tasks, and of its segmentation tasks with ResNets;
    * ``'timm'``: a state dict for ``timm.create_model(..., checkpoint_path=...)``;
    * ``'safetensors'``: the same in safetensors;
    * ``'smp'``: a state dict for encoders of segmentation_models_pytorch (``tu-``
      encoders but for ResNets), and a checkpoint of it for ``weights=`` of TorchGeo's
      segmentation tasks.

    Args:
        path: Path of the checkpoint.
        format: The layout.
        branch: See :func:`read_encoder`.
        patch_size: See :func:`convert_encoder`.
        img_size: See :func:`convert_encoder`.
        output: Path of the new file, or a folder for it. It gets the suffix of the format
            in place of that of another checkpoint; ``.pt`` may stand for ``.pth``.
            Defaults to the name of the checkpoint with the format, beside it.

    Returns:
        Paths of the files: one or two for the encoder, and the card.

    Raises:
        ValueError: If something does not fit.
    """
    writers: dict[str, list[tuple[str, Callable[[Encoder], dict[str, Any]]]]] = {
        'torchgeo': [('.ckpt', _torchgeo)],
        'timm': [('.pth', lambda e: e.state_dict)],
        'safetensors': [('.safetensors', lambda e: e.state_dict)],
        'smp': [
            ('.pth', lambda e: to_smp(e.state_dict, e.model)),
            ('.ckpt', _smp_torchgeo),
        ],
    }
    if format not in writers:
        raise ValueError(f'format must be one of {", ".join(writers)}, got {format!r}')
    source = Path(path)
    base, pt = _base(source, format, output)
    targets = [
        Path(f'{base}{".pt" if pt and suffix == ".pth" else suffix}')
        for suffix, _ in writers[format]
    ]
    if source.resolve() in [target.resolve() for target in targets]:
        raise ValueError(f'output must be another file than {source}')
    encoder = convert_encoder(read_encoder(source, branch), patch_size, img_size)
    if encoder.options and format in ('torchgeo', 'smp'):
        raise ValueError(
            f'img_size must be one that a model of timm is built for, but {encoder.model} '
            f'needs {encoder.options}, which cannot be told to {format}. Choose another '
            'img_size, such as 224, or another format'
        )
    if format == 'torchgeo':
        _check_host(encoder)
    contents = [make(encoder) for _, make in writers[format]]
    for content, target in zip(contents, targets, strict=True):
        _save(content, target, encoder)
    card = Path(f'{targets[0]}.md')
    card.write_text(model_card(encoder, format, source, targets))
    return [*targets, card]


def _base(
    source: Path, format: str, output: str | os.PathLike[str] | None
) -> tuple[Path, bool]:
    """Path of the new files without suffix, and whether it had the suffix .pt."""
    name = f'{source.stem}_{format}'
    if output is None:
        return source.with_name(name), False
    path = Path(output)
    if path.is_dir():
        return path / name, False
    # A path forgets that it ended in a separator
    folder = path if os.fspath(output).endswith(('/', os.sep)) else path.parent
    if not folder.is_dir():
        raise ValueError(
            f'output must be in an existing folder, got {str(output)!r}. Make the folder '
            f'{folder}, or choose another'
        )
    known = path.suffix in _SUFFIXES
    return path.with_suffix('') if known else path, path.suffix == '.pt'


def _save(content: dict[str, Any], target: Path, encoder: Encoder) -> None:
    """Write a file, all or nothing."""
    partial = target.with_name(f'.{target.name}.partial')
    try:
        if target.suffix == '.safetensors':
            from safetensors.torch import save_file

            save_file(content, partial, {'format': 'pt', 'model': encoder.model})
        else:
            torch.save(content, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
