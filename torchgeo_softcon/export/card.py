# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Model cards of exported encoders."""

import csv
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from segmentation_models_pytorch.encoders import encoders

from ..models.encoders import noted_unit_range

if TYPE_CHECKING:
    from .encoder import Encoder, Format


def model_card(
    encoder: 'Encoder', format: 'Format', source: Path, written: Sequence[Path]
) -> str:
    """What a file holds, how it was made, and how to load it.

    Args:
        encoder: The encoder.
        format: Layout of the file.
        source: Checkpoint that it is from. Files of its run may lie beside it.
        written: The files.

    Returns:
        The card in Markdown.
    """
    checkpoint, state = encoder.checkpoint, encoder.state_dict
    hparams = checkpoint['hyper_parameters']
    dino = any(key.startswith('student.') for key in checkpoint['state_dict'])
    channels = next(v for v in state.values() if v.ndim == 4).shape[1]
    options = ''.join(f', {k}={v}' for k, v in encoder.options.items())
    create = (
        f"timm.create_model('{encoder.model}', in_chans={channels}, num_classes=0"
        f'{options}'
    )
    file = written[0].name
    name = encoder.model if encoder.model in encoders else f'tu-{encoder.model}'
    usage = {
        'torchgeo': f'--model.model {encoder.model} --model.weights {file} '
        f'--model.in_channels {channels}',
        'timm': f"{create}, checkpoint_path='{file}')",
        'safetensors': f"{create}, checkpoint_path='{file}')",
        'smp': f"encoder.load_state_dict(torch.load('{file}'))  # of {name}\n"
        f'--model.backbone {name} --model.weights {written[-1].name}',
    }[format]
    run = _run_files(source)
    bands = hparams.get('bands') or run['bands']
    values = run['range'] or 'not known'
    if noted_unit_range(checkpoint):
        values = '[0, 1], as torchgeo_softcon.ToUnitRange scales bands'
    rows = {
        'method': 'DINO-MC (arXiv 2303.06670)'
        if dino
        else 'SoftCon (arXiv 2405.20462)',
        'encoder': f'{encoder.model}, the {encoder.branch}',
        'pretrained as': hparams['model'],
        'bands': ', '.join(bands) if bands else f'{channels}, not named',
        'value range': values,
        'image size in training': hparams.get('size', 'not known'),
        'data': run['data'] or 'not known',
        'epochs, steps': f'{checkpoint.get("epoch", -1) + 1}, '
        f'{checkpoint.get("global_step", "not known")}',
        'metrics at the end': run['metrics'] or 'not known',
        'versions': ', '.join(
            f'{name} {version(name)}'
            for name in ('torchgeo-softcon', 'torchgeo', 'timm', 'torch')
        ),
    }
    table = '\n'.join(f'| {name} | {value} |' for name, value in rows.items())
    settings = yaml.safe_dump(
        {k: _plain(v) for k, v in hparams.items() if not k.startswith('_')},
        sort_keys=False,
        allow_unicode=True,
    )
    return (
        f'# {written[0].stem}\n\n| | |\n|---|---|\n{table}\n\n## Use\n\n'
        f'```\n{usage}\n```\n\n## Settings\n\n```yaml\n{settings}```\n'
    )


def _plain(value: Any) -> Any:
    """A setting in the types of YAML."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    plain = value is None or type(value) in (bool, int, float, str)
    return value if plain else str(value)


def _run_files(source: Path) -> dict[str, Any]:
    """What the files beside a checkpoint tell of the run."""
    folder = source.absolute().parents[1]
    result: dict[str, Any] = dict.fromkeys(('bands', 'range', 'data', 'metrics'))
    if (folder / 'config.yaml').is_file():
        config = yaml.safe_load((folder / 'config.yaml').read_text())
        data = config.get('data') if isinstance(config, Mapping) else None
        if isinstance(data, Mapping) and 'class_path' in data:
            init = data.get('init_args') or {}
            options = ', '.join(f'{k}={v}' for k, v in init.items() if v is not None)
            result['bands'] = init.get('bands')
            result['data'] = f'{data["class_path"]}({options})'
            if str(data['class_path']).startswith('torchgeo_softcon.'):
                result['range'] = '[0, 1]'
    if (folder / 'metrics.csv').is_file():
        last: dict[str, str] = {}
        with open(folder / 'metrics.csv') as file:
            for row in csv.DictReader(file):
                last.update({k: v for k, v in row.items() if v and k})
        if last:
            result['metrics'] = ', '.join(f'{k} {v}' for k, v in last.items())
    return result
