# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files of embeddings: their rows, the forms that others read, what they say of themselves."""

import datetime
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from torch import Tensor

from ..bands import SENTINEL2_BANDS, spell_band_name
from ..datamodules.normalization import dataset_level
from ..models.encoders import Encoder
from ..storage.parquet import FOOTPRINT, GEOMETRY
from ..storage.resumable import ROWS, ResumableParquet
from ..storage.whole_file import whole_file
from .footprints import Footprint, footprints

#: Whether the column *geometry* has the outlines of samples, or their centres with the
#: outlines in *footprint*.
Layout = Literal['footprint', 'point']

#: Type of the numbers of an embedding.
Dtype = Literal['float32', 'int8']

#: A part is written after so many seconds at the latest.
_SECONDS = 30

#: The fields of what a file says of itself, a JSON object under its key ``emb``.
#: https://github.com/stac-extensions/embeddings
_EXTENSION = 'https://stac-extensions.github.io/embeddings/v0.0.1/schema.json'


def arrange(
    table: pa.Table,
    about: Mapping[str, Any],
    layout: Layout = 'footprint',
    dtype: Dtype = 'float32',
) -> pa.Table:
    """Make the table of a file of embeddings from its rows.

    Rows with a place get what readers look for: *centre_lon*, *centre_lat*, *timestamp*
    and *datetime*. ClayEmbeddings, MajorTOMEmbeddings and EarthEmbeddings of TorchGeo open
    both layouts, EarthIndexEmbeddings opens ``'point'``.
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


def write_stac_item(path: Path) -> Path:
    """Write the STAC item of a file of embeddings beside it, and return its path."""
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


class EmbeddingRows:
    """The rows of one process, on their way to a file of embeddings."""

    def __init__(
        self,
        file: ResumableParquet,
        dataset: Any,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Start after *position* samples, of a *rank* whose turn is every *world_size*."""
        self.position = position
        self._file = file
        self.dataset = dataset
        self._rank, self._world_size = rank, world_size
        self._kind = f'part-{rank:05d}'
        self._written = file.count_rows(self._kind)
        self._held: list[pa.Table] = []
        self._since = time.monotonic()

    def add(self, embedding: Tensor, batch: Any, queries: Sequence[Any] | None) -> None:
        """Take the embeddings (B, F) of a batch, and write a part if it is time.

        Rows that an interrupted run has written are left out. *queries* are what the
        dataset was asked for, if that is known.
        """
        start = self.position
        self.position += len(embedding)
        if self.position <= self._written:
            return
        index = np.arange(start, self.position) * self._world_size + self._rank
        label = batch.get('label') if isinstance(batch, dict) else None
        if not isinstance(label, Tensor) or (
            label.ndim not in (1, 2) or len(label) != len(embedding)
        ):
            label = None
        found = footprints(batch, queries, self.dataset)
        table = make_table(index, embedding, found, label)
        self._held.append(table.slice(max(self._written - start, 0)))
        rows = sum(table.num_rows for table in self._held)
        if rows >= ROWS or time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are in memory as a part."""
        if self._held:
            self._file.append(self._kind, pa.concat_tables(self._held))
        self._held, self._since = [], time.monotonic()


def make_table(
    index: Any,
    embedding: Tensor,
    footprints: Sequence[Footprint] | None = None,
    label: Tensor | None = None,
) -> pa.Table:
    """Make rows of numbers (B,), embeddings (B, F), footprints, and labels (B,) or (B, K)."""
    columns = {
        'index': pa.array(index, pa.int64()),
        'embedding': _column(embedding.float()),
    }
    if label is not None:
        columns['label'] = _column(label)
    if footprints is not None:
        outlines = shapely.to_wkb([footprint.outline for footprint in footprints])
        moment = pa.timestamp('us', 'UTC')
        columns |= {
            'crs': pa.array([footprint.crs for footprint in footprints], pa.string()),
            'start': pa.array([footprint.start for footprint in footprints], moment),
            'stop': pa.array([footprint.stop for footprint in footprints], moment),
            'geometry': pa.array(outlines, pa.binary()),
        }
    return pa.table(columns)


def _column(values: Tensor) -> pa.Array:
    """Make a column of numbers (B,) or of vectors (B, F)."""
    array = values.detach().cpu().numpy()
    return pa.array(array) if array.ndim == 1 else vectors(array)


def vectors(values: npt.NDArray[Any]) -> pa.Array:
    """Make a column of vectors (B, F)."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
