# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files of embeddings in the forms that others read, and what they say of themselves.

What they say is a JSON object in the fields of STAC's extension for embeddings, 0.0.1,
under the key ``emb`` of the file: https://github.com/stac-extensions/embeddings
"""

import datetime
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely

from ..bands import SENTINEL2_BANDS, spell_band_name
from ..datamodules.normalization import dataset_level
from ..models.encoders import Encoder
from ..storage.parquet import FOOTPRINT, GEOMETRY
from ..storage.whole_file import whole_file
from .embedding_rows import vectors

#: Whether the column *geometry* has the outlines of samples, or their centres with the
#: outlines in *footprint*.
Layout = Literal['footprint', 'point']

#: Type of the numbers of an embedding.
Dtype = Literal['float32', 'int8']

_EXTENSION = 'https://stac-extensions.github.io/embeddings/v0.0.1/schema.json'


def arrange(
    table: pa.Table,
    about: Mapping[str, Any],
    layout: Layout = 'footprint',
    dtype: Dtype = 'float32',
) -> pa.Table:
    """Make the table of a file of embeddings from its rows.

    Of rows with a place, all of TorchGeo's readers open the layout ``'point'``:
    ClayEmbeddings, EarthIndexEmbeddings, MajorTOMEmbeddings and EarthEmbeddings. All but
    EarthIndexEmbeddings open ``'footprint'`` as well.
    """
    about = dict(about)
    values = np.asarray(table['embedding'].combine_chunks().flatten())
    values = values.reshape(len(table), -1)
    about |= {'emb:dimensions': values.shape[1], 'data_type': dtype}
    if dtype == 'int8':
        # Linear in each dimension, and 0 stays 0: cosines need no offset
        scale = np.abs(values).max(0) / np.float32(127)
        scale[scale == 0] = 1
        values = np.rint(values / scale).astype(np.int8)
        about['emb:quantization'] = {
            'method': 'linear',
            'original_dtype': 'float32',
            'quantized_dtype': dtype,
            'scale': scale.tolist(),
            'offset': [0.0] * len(scale),
        }
        position = table.column_names.index('embedding')
        table = table.set_column(position, 'embedding', vectors(values))
    if GEOMETRY in table.column_names:
        outlines = table[GEOMETRY]
        centres = shapely.centroid(shapely.from_wkb(outlines.to_numpy()))
        columns = {
            'centre_lon': pa.array(shapely.get_x(centres)),
            'centre_lat': pa.array(shapely.get_y(centres)),
            'timestamp': table['start'],  # for MajorTOM and EarthEmbeddings
            'datetime': table['start'],  # for Clay
        }
        if layout == 'point':
            columns[FOOTPRINT] = outlines
            outlines = pa.array(shapely.to_wkb(centres), pa.binary())
        table = table.drop_columns(GEOMETRY)
        for name, column in {**columns, GEOMETRY: outlines}.items():
            table = table.append_column(name, column)
    return table.replace_schema_metadata({'emb': json.dumps(about)})


def describe(
    encoder: Encoder,
    pooling: str,
    size: int | None,
    chip_size: Sequence[int],
    source: str,
    dataset: Any,
    kind: Literal['chip', 'pixel'] = 'chip',
) -> dict[str, Any]:
    """Tell how embeddings were made.

    Args:
        encoder: The encoder.
        pooling: How it pools.
        size: Side that images are resized to in pixels, None for no change.
        chip_size: Height and width of an image as it is read, in pixels.
        source: What the data are.
        dataset: What gives them, whose processing level is noted if it is of Sentinel-2.
        kind: Whether an embedding is of an image or of a patch in it.
    """
    bands = [spell_band_name(band) for band in encoder.bands or ()]
    level = getattr(getattr(dataset, 'scenes', dataset), 'level', None)
    level = level or dataset_level(dataset, bands)
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict.items()):
        digest.update(name.encode() + value.float().cpu().numpy().tobytes())
    weights = encoder.source
    if os.path.exists(weights):
        weights = os.path.basename(weights)
    values = '[0, 1], as torchgeo_softcon.ToUnitRange scales bands'
    if not encoder.unit_range:
        values = 'as the datamodule gives them'
    return {
        'version': '0.0.1',
        'stac_extensions': [_EXTENSION],
        'emb:type': kind,
        'emb:chip_layout': {'layout_type': 'variable_grid', 'chip_size': [*chip_size]},
        'emb:preprocessing': {
            'format': 'text',
            'expression': f'values {values}; '
            + ('not resized' if size is None else f'resized to {size} x {size} pixels'),
        },
        'emb:runtime_parameters': {
            'model': encoder.name,
            'weights': weights,
            'hash': f'sha256:{digest.hexdigest()}',  # of the parameters, by name
            'method': encoder.method,
            'pooling': pooling,
            'bands': bands or None,
            'range': values,
            'level': level if {*bands} & {*SENTINEL2_BANDS} else None,
            'size': size,
            'chip_size': [*chip_size],
            'source': source,
        },
        'links': [
            {
                'rel': 'emb:model',
                'href': 'https://github.com/huggingface/pytorch-image-models',
                'title': f'{encoder.name} with {weights}',
            }
        ],
    }


def arranger(
    about: Mapping[str, Any], layout: Layout = 'footprint', dtype: Dtype = 'float32'
) -> Callable[[pa.Table], pa.Table]:
    """Return :func:`arrange` with its options."""
    return functools.partial(arrange, about=about, layout=layout, dtype=dtype)


def write_stac_item(path: Path) -> Path:
    """Write the STAC item of a file of embeddings beside it, and return its path."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata
    about = json.loads(metadata[b'emb'])
    extensions, links = about.pop('stac_extensions'), about.pop('links')
    about.pop('version')
    geometry: dict[str, Any] = {'geometry': None}
    now = datetime.datetime.now(datetime.UTC)
    first = last = now
    if b'geo' in metadata:
        boxes = json.loads(metadata[b'geo'])['columns']
        box = boxes.get(FOOTPRINT, boxes[GEOMETRY])['bbox']
        outline = json.loads(shapely.to_geojson(shapely.box(*box)))
        geometry = {'geometry': outline, 'bbox': box}
        times = pd.read_parquet(path, columns=['start', 'stop'])
        if times.notna().all(None):
            first, last = times['start'].min(), times['stop'].max()
    item = {
        'type': 'Feature',
        'stac_version': '1.1.0',
        'stac_extensions': extensions,
        'id': path.stem,
        **geometry,
        'properties': {
            'datetime': None if first < last else f'{first:%Y-%m-%dT%H:%M:%SZ}',
            'start_datetime': f'{first:%Y-%m-%dT%H:%M:%SZ}',
            'end_datetime': f'{last:%Y-%m-%dT%H:%M:%SZ}',
            'created': f'{now:%Y-%m-%dT%H:%M:%SZ}',
            **about,
        },
        'links': links,
        'assets': {
            'embeddings': {
                'href': f'./{path.name}',
                'type': 'application/vnd.apache.parquet',
                'roles': ['data', 'embeddings'],
            }
        },
    }
    target = path.with_suffix('.json')
    with whole_file(target) as unfinished:
        unfinished.write_text(json.dumps(item, indent=2))
    return target
