# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From a training checkpoint to the encoder alone, in files that other tools load."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from safetensors.torch import save
from torch import nn

from .._checks import check_choice
from ..models.checkpoints import Branch, on_meta
from ..models.convert import to_smp
from ..models.encoders import Encoder, read_encoder
from ..models.timm_models import timm_name
from ..storage.whole_file import whole_file
from .card import model_card
from .encoder import at_native_size, convert_encoder

Format = Literal['torchgeo', 'timm', 'safetensors', 'smp', 'hf', 'onnx']

#: Suffixes of checkpoints, which an output may have whatever the format.
_SUFFIXES = ('.ckpt', '.pt', '.pth', '.safetensors', '.onnx')


def _host_checkpoint(encoder: Encoder, key: str, prefix: str, state: Any) -> Any:
    """Return what ``weights=`` of TorchGeo's tasks opens."""
    return {
        'hyper_parameters': {key: encoder.name},
        'state_dict': {f'{prefix}{k}': v for k, v in state.items()},
    }


def _torchgeo(encoder: Encoder) -> Any:
    """Return a checkpoint, if TorchGeo's loader opens models of this family.

    It looks at the last layer, and knows classifiers of one layer only.
    """
    name = encoder.name or ''
    model = on_meta(lambda: timm.create_model(name, num_classes=0))
    last = list(model.children())[-1]
    if isinstance(last, nn.Identity) or hasattr(last, 'out_features'):
        return _host_checkpoint(encoder, 'model', 'model.', encoder.state_dict)
    others = 'timm or safetensors'
    with suppress(ValueError):
        _smp(encoder)
        others += ', or smp for segmentation'
    raise ValueError(
        f"format must be another than 'torchgeo' for {name}: TorchGeo does not open "
        f'models of this family. Choose {others}'
    )


def _smp(encoder: Encoder) -> Any:
    return to_smp(encoder.state_dict, encoder.name or '')


def _smp_torchgeo(encoder: Encoder) -> Any:
    return _host_checkpoint(encoder, 'backbone', 'model.backbone.model.', _smp(encoder))


_state_dict = attrgetter('state_dict')


def _model_args(encoder: Encoder) -> dict[str, Any]:
    """Return what timm's own model of the architecture is built with."""
    args: dict[str, Any] = {'in_chans': encoder.in_channels}
    if 'pos_embed' in encoder.state_dict:
        model: Any = encoder.model
        args['img_size'] = model.patch_embed.img_size[0]
    return args


def _config(encoder: Encoder) -> dict[str, Any]:
    """Return what timm reads of a repository of Hugging Face.

    https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/_hub.py
    """
    model: Any = encoder.model
    channels, args = encoder.in_channels, _model_args(encoder)
    size = args.get('img_size', encoder.size or 224)
    return {
        'architecture': timm_name(encoder.name or ''),
        'num_classes': 0,
        'num_features': model.num_features,
        'model_args': args,
        'bands': encoder.bands,
        'pretrained_cfg': {
            'input_size': (channels, size, size),
            'fixed_input_size': 'img_size' in args,
            'interpolation': 'bicubic',
            'crop_pct': 1.0,
            'mean': (0.0,) * channels,
            'std': (1.0,) * channels,
            'num_classes': 0,
            'pool_size': None,
            # Else older timm takes any input layer for one of 3 bands, and replaces it by
            # random numbers
            'first_conv': None,
            'classifier': model.pretrained_cfg.get('classifier'),
        },
    }


def _onnx(encoder: Encoder) -> bytes:
    """Return a graph from images (B, C, H, W) to features (B, F), of any batch size."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "format='onnx' needs onnxscript. Run: pip install 'torchgeo-softcon[onnx]'"
        ) from error
    args = _model_args(encoder)
    # Not encoder.model, whose positions follow the size of each image
    model = timm.create_model(timm_name(encoder.name or ''), num_classes=0, **args)
    model.load_state_dict(encoder.state_dict, strict=False)
    size = args.get('img_size', encoder.size or 224)
    program = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, encoder.in_channels, size, size),),
        input_names=['image'],
        output_names=['features'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # as there is no file to write to
    return program.model_proto.SerializeToString()


class _Files(NamedTuple):
    """The files of a format."""

    #: Suffix of each file, and what makes its content.
    contents: dict[str, Callable[[Encoder], Any]]
    #: How to load them, filled in by :func:`.model_card`.
    usage: str
    #: Whether the tool can build a model of another image size than that of its name.
    any_size: bool


_CREATE = (
    "timm.create_model('{model}', in_chans={channels}, num_classes=0{options}, "
    "checkpoint_path='{file}')"
)
_FORMATS: dict[Format, _Files] = {
    'torchgeo': _Files(
        {'.ckpt': _torchgeo},
        '--model.model {model} --model.weights {file} --model.in_channels {channels}',
        False,
    ),
    'timm': _Files({'.pth': _state_dict}, _CREATE, True),
    'safetensors': _Files({'.safetensors': _state_dict}, _CREATE, True),
    'smp': _Files(
        {'.pth': _smp, '.ckpt': _smp_torchgeo},
        "encoder.load_state_dict(torch.load('{file}'))  # of {smp}\n"
        '--model.backbone {smp} --model.weights {last_file}',
        False,
    ),
    'hf': _Files(
        {'/config.json': _config, '/model.safetensors': _state_dict},
        "timm.create_model('local-dir:{folder}', pretrained=True)",
        True,
    ),
    'onnx': _Files(
        {'.onnx': _onnx},
        "onnxruntime.InferenceSession('{file}').run(None, {{'image': images}})",
        True,
    ),
}


def export(
    path: str | os.PathLike[str],
    format: Format,
    branch: Branch | None = None,
    patch_size: int | None = None,
    img_size: int | None = None,
    output: str | os.PathLike[str] | None = None,
    license: str = 'unknown',
) -> list[Path]:
    """Write the encoder of a checkpoint for another tool, with a model card.

    * ``'torchgeo'``: a checkpoint for ``weights=`` of TorchGeo's classification,
      regression and pretraining tasks, and of its segmentation tasks with ResNets;
    * ``'timm'``: a state dict for ``timm.create_model(..., checkpoint_path=...)``;
    * ``'safetensors'``: the same in safetensors;
    * ``'smp'``: a state dict for encoders of segmentation_models_pytorch (``tu-``
      encoders but for ResNets), and a checkpoint of it for ``weights=`` of TorchGeo's
      segmentation tasks;
    * ``'hf'``: a folder for ``timm.create_model('local-dir:...', pretrained=True)``, and
      for Hugging Face, see :func:`push_to_hub`;
    * ``'onnx'``: a graph with weights for ONNX Runtime and others, for images of one size.

    Args:
        path: Path of the checkpoint of a pretraining task.
        format: The layout.
        branch: See :func:`.read_encoder`.
        patch_size: See :func:`.convert_encoder`.
        img_size: See :func:`.convert_encoder`.
        output: Path of the new file, or a folder for it. It gets the suffix of the format
            in place of that of another checkpoint; ``.pt`` may stand for ``.pth``.
            Of *hf*, the folder that the files are in. Defaults to the name of the
            checkpoint with the format, beside it.
        license: For the card, one of https://hf.co/docs/hub/repositories-licenses.
    """
    check_choice('format', format, [*_FORMATS])
    contents, usage, any_size = _FORMATS[format]
    source = Path(path)
    targets = _targets(source, format, output, contents)
    if source.resolve() in [target.resolve() for target in targets]:
        raise ValueError(f'output must be another file than {source}')
    encoder = read_encoder(source, branch)
    # Exports and checkpoints of other tasks have no branches
    if encoder.branch is None or encoder.name is None:
        content = encoder.checkpoint.get('state_dict', encoder.checkpoint)
        attributes = {str(key).partition('.')[0] for key in content}
        raise ValueError(
            f'{path} must be a checkpoint of a pretraining task such as SoftConTask or '
            f'DINOMCTask, got a file with {sorted(attributes)[:6]}. Weights of others '
            'need no export'
        )
    pretrained_as = encoder.name
    encoder = convert_encoder(encoder, patch_size, img_size)
    if encoder.options and not any_size and img_size is None:
        encoder = at_native_size(encoder)
    if encoder.options and not any_size:
        raise ValueError(
            f'img_size must be one that a model of timm is built for, but {encoder.name} '
            f'needs {encoder.options}, which cannot be told to {format}. Choose another '
            'img_size, such as 224, or another format'
        )
    made = [make(encoder) for make in contents.values()]
    for content, target in zip(made, targets, strict=True):
        _save(content, target, encoder)
    hub = format == 'hf'
    card = targets[0].with_name('README.md') if hub else Path(f'{targets[0]}.md')
    card.write_text(model_card(encoder, pretrained_as, usage, targets, license))
    return [*targets, card]


def push_to_hub(
    folder: str | os.PathLike[str], repo_id: str, private: bool = False, api: Any = None
) -> str:
    """Upload an export of the format ``'hf'`` to Hugging Face.

    Args:
        folder: The folder of the export.
        repo_id: Owner and name of the repository, which is made if there is none.
        private: Whether a new repository is.
        api: A ``huggingface_hub.HfApi``. Defaults to one with the token of
            ``hf auth login``.

    Returns:
        The name by which timm creates the model.

    Raises:
        ValueError: If *folder* has no export.
    """
    files = ('config.json', 'model.safetensors', 'README.md')
    if missing := [name for name in files if not Path(folder, name).is_file()]:
        raise ValueError(
            f"folder must have an export of the format 'hf', but {os.fspath(folder)} "
            f'has no {", ".join(missing)}. Run export first'
        )
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository,
        folder_path=os.fspath(folder),
        allow_patterns=[*files],
        commit_message='Add the encoder',
    )
    return f'hf-hub:{repository}'


def _targets(
    source: Path,
    format: str,
    output: str | os.PathLike[str] | None,
    suffixes: Iterable[str],
) -> list[Path]:
    """Return the paths of the new files, one of each suffix."""
    name = f'{source.stem}_{format}'
    hub = format == 'hf'
    if output is None or (os.path.isdir(output) and not hub):
        folder = source.parent if output is None else Path(output)
        return [folder / f'{name}{suffix}' for suffix in suffixes]
    path = Path(output)
    # A path forgets that it ended in a separator
    inside = os.fspath(output).endswith(('/', os.sep)) and not hub
    folder = path if inside else path.parent
    if not folder.is_dir():
        raise ValueError(
            f'output must be in an existing folder, got {str(output)!r}. Make the folder '
            f'{folder}, or choose another'
        )
    base = path.with_suffix('') if path.suffix in _SUFFIXES else path
    short = path.suffix == '.pt'
    return [Path(f'{base}{".pt" if short and s == ".pth" else s}') for s in suffixes]


def _save(content: Any, target: Path, encoder: Encoder) -> None:
    """Write a file, all or nothing."""
    target.parent.mkdir(exist_ok=True)
    with whole_file(target) as partial:
        if target.suffix == '.safetensors':
            # Not save_file, whose files nobody else may read
            content = save(content, {'format': 'pt', 'model': encoder.name or ''})
        elif target.suffix == '.json':
            content = json.dumps(content, indent=2).encode()
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            torch.save(content, partial)
