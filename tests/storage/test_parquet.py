# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
from pathlib import Path

import geopandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from pyproj import CRS

from torchgeo_softcon.storage import parquet
from torchgeo_softcon.storage.lock import exclusive
from torchgeo_softcon.storage.parquet import write_parquet
from torchgeo_softcon.storage.whole_file import whole_file

SCHEMA = pa.schema([('id', pa.string()), ('geometry', pa.binary())], {'about': 'this'})


def places(*shapes: shapely.Geometry) -> pa.Table:
    geometry = [shapely.to_wkb(shape) for shape in shapes]
    ids = [str(number) for number in range(len(shapes))]
    return pa.table({'id': ids, 'geometry': geometry}, SCHEMA)


def test_geoparquet(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    two = shapely.MultiPolygon([shapely.box(5, 5, 6, 6), shapely.box(8, 7, 9, 9)])
    boxes = [shapely.box(1, 2, 3, 4), shapely.box(-7, 3, -6, 8)]
    assert write_parquet(path, [places(*boxes), places(two)], SCHEMA) == 3
    metadata = pq.read_schema(path).metadata
    assert metadata[b'about'] == b'this'
    geo = json.loads(metadata[b'geo'])
    assert (geo['version'], geo['primary_column']) == ('1.1.0', 'geometry')
    column = geo['columns']['geometry']
    assert column['encoding'] == 'WKB'
    assert column['geometry_types'] == ['MultiPolygon', 'Polygon']
    assert column['bbox'] == [-7, 2, 9, 9]
    assert CRS.from_json_dict(column['crs']).equals(CRS('OGC:CRS84'))
    box = {'xmin': -7, 'ymin': 3, 'xmax': -6, 'ymax': 8}
    assert box in pq.read_table(path)['bbox'].to_pylist()

    frame = geopandas.read_parquet(path)
    assert list(frame.columns) == ['id', 'geometry']
    assert {*frame.geometry} == {*boxes, two}
    # By the column of boxes
    assert len(geopandas.read_parquet(path, bbox=(0, 0, 4, 4))) == 1


def test_neighbours_are_in_one_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, '_GROUP_ROWS', 16)
    path = tmp_path / 'a.parquet'
    # Row by row, as images are read
    boxes = [shapely.box(x, y, x + 1, y + 1) for y in range(16) for x in range(16)]
    rows = pa.concat_tables(
        [places(*boxes), places(shapely.Point(), shapely.box(0, 0, 1, 1))]
    )
    rows = rows.set_column(
        1, 'geometry', pa.array([None, *rows['geometry'].to_pylist()[1:]])
    )
    assert write_parquet(path, [rows], SCHEMA) == 258
    table = pq.read_table(path)
    assert table['geometry'].to_pylist()[-2:] == [None, shapely.to_wkb(shapely.Point())]
    file = pq.ParquetFile(path)
    assert file.metadata.row_group(0).column(0).compression == 'ZSTD'
    for group in range(file.num_row_groups - 1):
        shapes = shapely.from_wkb(file.read_row_group(group)['geometry'].to_numpy())
        west, south, east, north = shapely.total_bounds(shapes)
        # As compact as can be
        assert (east - west) * (north - south) <= 32
    near = geopandas.read_parquet(path, bbox=(2.2, 3.2, 3.8, 3.8))
    assert len(near) == 2


def test_no_rows(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    assert write_parquet(path, [places()], SCHEMA) == 0
    geo = json.loads(pq.read_schema(path).metadata[b'geo'])
    assert 'bbox' not in geo['columns']['geometry']
    assert geopandas.read_parquet(path).empty


def test_without_geometry(tmp_path: Path) -> None:
    path = tmp_path / 'a.parquet'
    table = pa.table({'a': [1, 2]})
    assert write_parquet(path, [table, table], table.schema) == 4
    assert pq.read_schema(path) == table.schema
    assert pq.read_schema(path).metadata is None


def test_whole_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / 'a.txt'
    path.write_text('before')

    def write_half() -> None:
        with whole_file(path) as unfinished:
            unfinished.write_text('half of')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == 'before'
    assert [*tmp_path.iterdir()] == [path]
    with whole_file(path) as unfinished:
        unfinished.write_text('after')
        assert path.read_text() == 'before'
    assert path.read_text() == 'after'
    with (
        pytest.raises(OSError, match=r'cannot write .*x/a: No such file'),
        whole_file(tmp_path / 'x' / 'a') as unfinished,
    ):
        unfinished.touch()


def test_errors_under_a_lock_are_its_own(tmp_path: Path) -> None:
    lock = tmp_path / 'lock'
    with pytest.raises(BlockingIOError, match='a pipe'), exclusive(lock, 'a'):
        raise BlockingIOError('a pipe')
    with exclusive(lock, 'a'):
        pass
