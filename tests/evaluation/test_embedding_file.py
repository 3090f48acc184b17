# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import datetime
import json
from functools import partial
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import torch
import torchgeo.datasets
from torch import Tensor

from torchgeo_softcon.evaluation.embedding_file import (
    Layout,
    arrange,
    describe,
    make_table,
    write_stac_item,
)
from torchgeo_softcon.evaluation.footprints import Footprint
from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.models.encoders import Encoder
from torchgeo_softcon.storage.resumable import ResumableParquet

DAY = datetime.datetime(2021, 6, 30, tzinfo=datetime.UTC)
BANDS = ('B4', 'B3', 'B2')


class Scenes:
    level = 'L2A'


def embeddings(count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(32, generator=generator) * 10
    return torch.randn(count, 32, generator=generator) * scale + scale


def about() -> dict[str, Any]:
    state = create_encoder('test_vit', 3).state_dict()
    encoder = Encoder(
        state, 'test_vit', 96, BANDS, True, method='SoftCon', source='run.ckpt'
    )
    return describe(encoder, 'cls', 96, (120, 100), 'Scenes', Scenes())


def write(
    path: Path, layout: Layout = 'footprint', dtype: Any = 'float32', place: bool = True
) -> Path:
    boxes = [shapely.box(10 + i, 50, 10.5 + i, 50.5) for i in range(12)]
    found = [Footprint(box, 'EPSG:32632', DAY, DAY) for box in boxes] if place else None
    file = ResumableParquet(path, {})
    with file.open():
        file.append('part', make_table(range(12), embeddings(), found))
        finish = partial(arrange, about=about(), layout=layout, dtype=dtype)
        file.join(12, finish)
    return path


@pytest.mark.parametrize(
    ('reader', 'layouts'),
    [
        ('ClayEmbeddings', ('footprint', 'point')),
        ('EarthIndexEmbeddings', ('point',)),
        ('MajorTOMEmbeddings', ('footprint', 'point')),
        ('EarthEmbeddings', ('footprint', 'point')),
    ],
)
@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_readers_of_torchgeo(
    reader: str, layouts: tuple[Layout, ...], dtype: str, tmp_path: Path
) -> None:
    if not hasattr(torchgeo.datasets, reader):
        pytest.skip('TorchGeo has it since 0.9 or 0.10')
    for layout in layouts:
        path = write(tmp_path / f'{layout}.parquet', layout, dtype)
        dataset = getattr(torchgeo.datasets, reader)(path)
        index = int(pd.read_parquet(path)['index'][3])
        sample = dataset[3]
        assert len(dataset) == 12
        assert (sample['x'], sample['y']) == (10.25 + index, 50.25)
        note = json.loads(pq.read_schema(path).metadata[b'emb'])
        scale = note.get('emb:quantization', {'scale': 1})['scale']
        found = sample['embedding'].float() * torch.tensor(scale)
        assert torch.cosine_similarity(found, embeddings()[index], 0) > 0.99
        assert sample.get('t', torch.tensor(DAY.timestamp())) == DAY.timestamp()
        dataset.plot(sample)


def test_points_and_footprints_are_geometries(tmp_path: Path) -> None:
    frame = geopandas.read_parquet(write(tmp_path / 'e.parquet', 'point'))
    assert frame.geometry.name == 'geometry'
    assert {*frame.geometry.geom_type} == {'Point'}
    assert frame['footprint'].crs == frame.crs
    assert frame['footprint'].contains(frame.geometry).all()
    path = write(tmp_path / 'f.parquet')
    assert len(geopandas.read_parquet(path, bbox=(10, 50, 11.2, 51))) == 2


def test_int8(tmp_path: Path) -> None:
    small = pq.read_table(write(tmp_path / 'e.parquet', dtype='int8', place=False))
    note = json.loads(small.schema.metadata[b'emb'])
    quantization = note['emb:quantization']
    assert note['data_type'] == quantization['quantized_dtype'] == 'int8'
    values = np.stack(small['embedding'].to_numpy())
    assert values.dtype == np.int8
    expected = embeddings().numpy()
    restored = values * np.array(quantization['scale']) + quantization['offset']
    np.testing.assert_allclose(restored, expected, atol=np.abs(expected).max() / 250)
    cosines = torch.cosine_similarity(torch.tensor(restored), embeddings())
    assert cosines.min() > 0.99


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    note = json.loads(pq.read_schema(write(tmp_path / 'e.parquet')).metadata[b'emb'])
    assert (note['emb:type'], note['emb:dimensions']) == ('chip', 32)
    assert note['emb:chip_layout']['chip_size'] == [120, 100]
    run = note['emb:runtime_parameters']
    assert run.pop('hash').startswith('sha256:')
    assert run == {
        'model': 'test_vit',
        'weights': 'run.ckpt',
        'method': 'SoftCon',
        'pooling': 'cls',
        'bands': [*BANDS],
        'range': '[0, 1], as torchgeo_softcon.ToUnitRange scales bands',
        'level': 'L2A',
        'size': 96,
        'chip_size': [120, 100],
        'source': 'Scenes',
    }


@pytest.mark.parametrize('place', [True, False])
def test_stac_item(place: bool, tmp_path: Path) -> None:
    target = write_stac_item(write(tmp_path / 'e.parquet', 'point', place=place))
    item = json.loads(target.read_text())
    assert target == tmp_path / 'e.json'
    assert (item['type'], item['id']) == ('Feature', 'e')
    assert item['stac_extensions'] == [
        'https://stac-extensions.github.io/embeddings/v0.0.1/schema.json'
    ]
    properties = item['properties']
    assert {'emb:type', 'emb:dimensions', 'data_type'} <= properties.keys()
    assert item['assets']['embeddings']['href'] == './e.parquet'
    assert 'emb:model' in [link['rel'] for link in item['links']]
    if place:
        assert item['bbox'] == [10, 50, 21.5, 50.5]
        assert shapely.geometry.shape(item['geometry']).bounds == (10, 50, 21.5, 50.5)
        assert properties['datetime'] == '2021-06-30T00:00:00Z'
    else:
        assert item['geometry'] is None
        assert 'bbox' not in item
        assert properties['datetime'] is not None
