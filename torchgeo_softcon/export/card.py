# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Model cards of exported encoders."""

import csv
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from segmentation_models_pytorch.encoders import encoders

from ..models.encoders import Encoder

_CARD = """\
# {title}

| | |
|---|---|
{rows}

## Use

```
{usage}
```

## Settings

```yaml
{settings}```
"""


def model_card(
    encoder: Encoder, pretrained_as: str, usage: str, written: Sequence[Path]
) -> str:
    """Tell what a file holds, how it was made, and how to load it."""
    checkpoint, name = encoder.checkpoint, encoder.name or ''
    channels = encoder.in_channels
    run = _run_files(Path(encoder.source))
    bands = encoder.bands or run.get('bands')
    values = run.get('value range', 'not known')
    if encoder.unit_range:
        values = '[0, 1], as torchgeo_softcon.ToUnitRange scales bands'
    reference = f' ({encoder.reference})' if encoder.reference else ''
    packages = ('torchgeo-softcon', 'torchgeo', 'timm', 'torch')
    rows = {
        'method': f'{encoder.method}{reference}',
        'encoder': f'{name}, the {encoder.branch}',
        'pretrained as': pretrained_as,
        'bands': ', '.join(bands) if bands else f'{channels}, not named',
        'value range': values,
        'image size in training': encoder.size or 'not known',
        **(
            {'batch norm': 'frozen: running statistics of the weights it started from'}
            if encoder.hparams.get('batch_norm') == 'frozen'
            else {}
        ),
        'data': run.get('data', 'not known'),
        'epochs, steps': f'{checkpoint.get("epoch", -1) + 1}, '
        f'{checkpoint.get("global_step", "not known")}',
        'metrics at the end': run.get('metrics', 'not known'),
        'versions': ', '.join(f'{package} {version(package)}' for package in packages),
    }
    settings = {k: v for k, v in encoder.hparams.items() if not k.startswith('_')}
    return _CARD.format(
        title=written[0].stem,
        rows='\n'.join(f'| {name} | {value} |' for name, value in rows.items()),
        usage=usage.format(
            model=name,
            channels=channels,
            options=''.join(f', {k}={v}' for k, v in encoder.options.items()),
            smp=name if name in encoders else f'tu-{name}',
            file=written[0].name,
            last_file=written[-1].name,
        ),
        settings=yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True),
    )


def _plain(value: Any) -> Any:
    """Return a setting in the types of YAML."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    plain = value is None or type(value) in (bool, int, float, str)
    return value if plain else str(value)


def _run_files(source: Path) -> dict[str, Any]:
    """Read what the files beside a checkpoint tell of the run."""
    folder = source.absolute().parents[1]
    result: dict[str, Any] = {}
    if (folder / 'config.yaml').is_file():
        config = yaml.safe_load((folder / 'config.yaml').read_text())
        data = config.get('data') if isinstance(config, Mapping) else None
        if isinstance(data, Mapping) and 'class_path' in data:
            init = data.get('init_args') or {}
            options = ', '.join(f'{k}={v}' for k, v in init.items() if v is not None)
            result['bands'] = init.get('bands')
            result['data'] = f'{data["class_path"]}({options})'
            if str(data['class_path']).startswith('torchgeo_softcon.'):
                result['value range'] = '[0, 1]'
    if (folder / 'metrics.csv').is_file():
        last: dict[str, str] = {}
        with open(folder / 'metrics.csv') as file:
            for row in csv.DictReader(file):
                last.update({k: v for k, v in row.items() if v and k})
        if last:
            result['metrics'] = ', '.join(f'{k} {v}' for k, v in last.items())
    return result
