# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Model cards of exported encoders."""

import csv
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from segmentation_models_pytorch.encoders import encoders

from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS, spell_band_name
from ..models.encoders import Encoder

_SENSORS = {'sentinel-2': SENTINEL2_BANDS, 'sentinel-1': SENTINEL1_BANDS}

_FROZEN = {'batch norm': 'frozen: running statistics of the weights it started from'}

#: What Hugging Face calls the use of an encoder.
_TASK = 'image-feature-extraction'

_CARD = """\
---
{front}
---

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
    encoder: Encoder,
    pretrained_as: str,
    usage: str,
    written: Sequence[Path],
    license: str,
) -> str:
    """Tell what a file holds, how it was made, and how to load it."""
    checkpoint, name = encoder.checkpoint, encoder.name or ''
    channels = encoder.in_channels
    run = _run_files(Path(encoder.source))
    bands = encoder.bands or run.get('bands')
    metrics, data = run.get('metrics', {}), run.get('data', 'not known')
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
        **(_FROZEN if encoder.hparams.get('batch_norm') == 'frozen' else {}),
        'data': data,
        'epochs, steps': f'{checkpoint.get("epoch", -1) + 1}, '
        f'{checkpoint.get("global_step", "not known")}',
        'metrics at the end': ', '.join(f'{k} {v}' for k, v in metrics.items())
        or 'not known',
        'versions': ', '.join(f'{package} {version(package)}' for package in packages),
    }
    hub = written[0].name == 'config.json'
    title = written[0].parent.name if hub else written[0].stem
    seen = {spell_band_name(band) for band in bands or ()}
    front = ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag=_TASK,
        tags=[
            *('timm', 'torchgeo', 'remote-sensing'),
            str(encoder.method or 'self-supervised').lower(),
            *(sensor for sensor, known in _SENSORS.items() if seen & {*known}),
        ],
        bands=[*bands] if bands else channels,
        range=values,
        metrics=[*metrics],
        model_name=title if metrics else None,
        # Which Hugging Face shows
        eval_results=[
            EvalResult(
                task_type=_TASK,
                dataset_type=data.partition('(')[0],
                dataset_name=data,
                metric_type=name,
                metric_name=name,
                metric_value=float(value),
            )
            for name, value in metrics.items()
        ]
        or None,
    )
    settings = {k: v for k, v in encoder.hparams.items() if not k.startswith('_')}
    plain = json.loads(json.dumps(settings, default=str))
    return _CARD.format(
        front=front.to_yaml(),
        title=title,
        rows='\n'.join(f'| {name} | {value} |' for name, value in rows.items()),
        usage=usage.format(
            model=name,
            channels=channels,
            options=''.join(f', {k}={v}' for k, v in encoder.options.items()),
            smp=name if name in encoders else f'tu-{name}',
            file=written[0].name,
            folder=title,
            last_file=written[-1].name,
        ),
        settings=yaml.safe_dump(plain, sort_keys=False, allow_unicode=True),
    )


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
            result['metrics'] = last
    return result
