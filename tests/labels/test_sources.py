# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from affine import Affine
from pyproj import Transformer

from torchgeo_softcon.geo.footprints import (
    SCHEMA,
    make_footprints,
    outlines,
    transforms_of,
)
from torchgeo_softcon.labels import sources, tables
from torchgeo_softcon.labels.sources import Read, find_images, find_layout, read
from torchgeo_softcon.labels.tables import read_footprints

from ..ssl4eo.archives import season
from .helpers import grid, write_image


def read_all(source: Any) -> Read:
    rows = pa.array(np.arange(len(source.ids)))
    parts = [read(unit) for unit in source.units(rows)]
    failures: dict[str, str] = {}
    for part in parts:
        assert part.table.schema.equals(SCHEMA)
        failures |= part.failures
    return Read(pa.concat_tables(part.table for part in parts), failures)


class TestImages:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ('b/c/1.tif', 'b/2.tif', 'a.tiff'):
            write_image(tmp_path / name, 'EPSG:32632', grid('EPSG:32632', 7, 46))
        (tmp_path / 'b' / 'notes.txt').write_text('no image')
        return tmp_path

    @pytest.mark.parametrize(
        ('pattern', 'expected'),
        [
            ('', ['a.tiff', 'b/2.tif', 'b/c/1.tif']),
            ('**/*.tif', ['b/2.tif', 'b/c/1.tif']),
            ('b/**/*.tif', ['2.tif', 'c/1.tif']),
            ('b/c/1.tif', ['1.tif']),
        ],
    )
    def test_ids_are_paths_below_where_the_pattern_begins(
        self, folder: Path, pattern: str, expected: list[str]
    ) -> None:
        assert find_images(folder / pattern).ids.to_pylist() == expected

    def test_georeference(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, '_FILES', 2)
        whole = read_all(find_images(folder))
        assert whole.failures == {}
        assert whole.table['crs'].to_pylist() == ['EPSG:32632'] * 3
        expected = grid('EPSG:32632', 7, 46)[:6]
        np.testing.assert_array_equal(transforms_of(whole.table), [expected] * 3)
        assert whole.table['height'].to_pylist() == [32] * 3

    def test_some_rows(self, folder: Path) -> None:
        (unit,) = find_images(folder).units(pa.array([2, 0]))
        assert read(unit).table['id'].to_pylist() == ['b/c/1.tif', 'a.tiff']

    def test_layout(self, shared: Path) -> None:
        source = find_layout('ssl4eo-s12', shared / 'ssl4eo_s12_layout')
        assert source.ids.to_pylist() == [
            's2c/000000/20180710T125311_20180710T125627_T24KVE',
            's2c/000001/20180302T125301_20180302T125304_T24KUF',
        ]
        table = read_all(source).table
        assert table['height'].to_pylist() == [264, 264]

    def test_empty_layout(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match='root must have s2c, s2a, s1'):
            find_layout('ssl4eo-s12', tmp_path)

    def test_a_date_without_its_band(self, tmp_path: Path) -> None:
        name = season('s1', '20210101')
        (tmp_path / 's1' / '0000001' / name).mkdir(parents=True)
        whole = read_all(find_layout('ssl4eo-s12', tmp_path))
        assert list(whole.failures) == [f's1/0000001/{name}']

    def test_what_is_no_image(self, tmp_path: Path) -> None:
        name = season('s2c', '20210101')
        # A run of `unpack` that was killed leaves the second
        for folder in (name, f'.{name}.tmp', 'thumbnails'):
            (tmp_path / 's2c' / '0000001' / folder).mkdir(parents=True)
        (tmp_path / 's2c' / 'notes' / name).mkdir(parents=True)
        found = find_layout('ssl4eo-s12', tmp_path)
        assert found.ids.to_pylist() == [f's2c/0000001/{name}']


def frame() -> geopandas.GeoDataFrame:
    # Edges below 5 km, which are not bent
    shapes = [shapely.box(i, 46, i + 0.05, 46.025) for i in range(3)]
    shapes[1] = shapely.Point(1, 46).buffer(0.1)
    names = ['a', 'b', 'c']
    return geopandas.GeoDataFrame({'id': names}, geometry=shapes, crs='EPSG:4326')


class TestTables:
    @pytest.mark.parametrize('suffix', ['gpkg', 'geojson', 'parquet', 'csv'])
    @pytest.mark.parametrize('crs', ['EPSG:4326', 'EPSG:32632'])
    def test_polygons(
        self, tmp_path: Path, suffix: str, crs: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tables, '_ROWS', 2)
        path = tmp_path / f'a.{suffix}'
        table = frame().to_crs(crs)
        if suffix == 'csv':
            text = pd.DataFrame(
                {'ID': table.id, 'WKT': table.geometry.to_wkt(), 'crs': crs}
            )
            text.to_csv(path, index=False)
        elif suffix == 'parquet':
            table.to_parquet(path)
        else:
            table.to_file(path)
        if suffix == 'geojson' and crs != 'EPSG:4326':
            pytest.skip('GeoJSON is in degrees')
        source = read_footprints(path)
        whole = read_all(source)
        assert source.ids.to_pylist() == ['a', 'b', 'c']
        assert set(whole.table['crs'].to_pylist()) == {crs}
        assert whole.table['height'].to_pylist() == [0, 0, 0]
        ours = outlines(whole.table)
        theirs = frame().geometry.to_numpy()
        assert shapely.equals_exact(ours, theirs, 1e-5).all()

    def test_ids_are_text(self, tmp_path: Path) -> None:
        path = tmp_path / 'a.csv'
        names = ['0000001', '1', '1e5', 'NA']
        rows = [f'{name},1,2,3,4\n' for name in names]
        path.write_text(f'id,left,bottom,right,top\n{"".join(rows)}')
        source = read_footprints(path)
        assert source.ids.to_pylist() == names
        assert read_all(source).table['id'].to_pylist() == names

    def test_types_do_not_depend_on_the_first_rows(self, tmp_path: Path) -> None:
        path = tmp_path / 'a.csv'
        # More than what pyarrow looks at to guess types
        first = ''.join(f'{number:0600000},1,2,3,4\n' for number in range(3))
        path.write_text(f'ID,Left,bottom,right,top\n{first}a,1.5,2.5,3.5,4.5\n')
        whole = read_all(read_footprints(path))
        bounds = shapely.bounds(shapely.from_wkb(whole.table['polygon'].to_numpy()))
        assert bounds[-1].tolist() == [1.5, 2.5, 3.5, 4.5]

    @pytest.mark.parametrize('suffix', ['csv', 'parquet'])
    def test_grids(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f'a.{suffix}'
        edges = {'left': 3e5, 'bottom': 5e6, 'right': 3e5 + 640, 'top': 5e6 + 480}
        table = pd.DataFrame(
            {
                'id': [7, 8],
                'crs': ['EPSG:32632', 'EPSG:32633'],
                **edges,
                'height': 24,
                'width': 64,
            }
        )
        getattr(table, f'to_{suffix}')(path, index=False)
        whole = read_all(read_footprints(path))
        assert whole.table['id'].to_pylist() == ['7', '8']
        assert whole.table['crs'].to_pylist() == ['EPSG:32632', 'EPSG:32633']
        expected = Affine(10, 0, 3e5, 0, -20, 5e6 + 480)[:6]
        np.testing.assert_array_equal(transforms_of(whole.table), [expected] * 2)

    def test_rows_that_are_no_footprints(self, tmp_path: Path) -> None:
        square = 'POLYGON ((0 0, 1 0, 1 1, 0 0))'
        shapes = ['POINT (1 1)', 'POLYGON EMPTY', square, square, 'POLYGON ((0 0,']
        shapes += ['POLYGON ((0 0, 1 0, 1 1))', '']
        table = pd.DataFrame({'id': [*'abcdefg'], 'geometry': shapes})
        table['crs'] = ['EPSG:4326'] * 3 + ['EPSG:1'] + ['EPSG:4326'] * 3
        table.to_csv(tmp_path / 'a.csv', index=False)
        whole = read_all(read_footprints(tmp_path / 'a.csv'))
        assert whole.table['id'].to_pylist() == ['c']
        assert whole.failures == {
            'a': 'is no polygon',
            'b': 'is no polygon',
            'd': "unknown coordinate reference system 'EPSG:1'",
            'e': 'cannot be read',
            'f': 'cannot be read',
            'g': 'is no polygon',
        }

    def test_binary_that_cannot_be_read(self, tmp_path: Path) -> None:
        square = shapely.to_wkb(shapely.box(0, 0, 1, 1))
        table = pa.table({'id': [*'abc'], 'geometry': [square, square[:-9], None]})
        pq.write_table(table, tmp_path / 'a.parquet')
        whole = read_all(read_footprints(tmp_path / 'a.parquet'))
        assert whole.table['id'].to_pylist() == ['a']
        assert whole.failures == {'b': 'cannot be read', 'c': 'is no polygon'}

    @pytest.mark.parametrize('suffix', ['gpkg', 'parquet'])
    def test_rows_without_a_crs_have_that_of_the_file(
        self, tmp_path: Path, suffix: str
    ) -> None:
        path = tmp_path / f'a.{suffix}'
        table = frame().to_crs('EPSG:32632')
        table['crs'] = [None, '', 'EPSG:32633']
        table.to_parquet(path) if suffix == 'parquet' else table.to_file(path)
        systems = read_all(read_footprints(path)).table['crs'].to_pylist()
        assert systems == ['EPSG:32632', 'EPSG:32632', 'EPSG:32633']

    def test_the_geometry_that_a_file_says(self, tmp_path: Path) -> None:
        table = frame().rename_geometry('outline')
        table['Geometry'] = 'a square'
        table.to_crs('EPSG:32632').to_parquet(tmp_path / 'a.parquet')
        whole = read_all(read_footprints(tmp_path / 'a.parquet'))
        assert whole.table['crs'].to_pylist() == ['EPSG:32632'] * 3
        assert shapely.equals_exact(
            outlines(whole.table), frame().geometry.to_numpy(), 1e-5
        ).all()

    def test_the_first_column_of_a_name(self, tmp_path: Path) -> None:
        path = tmp_path / 'a.csv'
        path.write_text('ID,id,left,bottom,right,top\na,b,1,2,3,4\n')
        assert read_footprints(path).ids.to_pylist() == ['a']

    def test_geometries_in_another_encoding(self, tmp_path: Path) -> None:
        frame().to_parquet(tmp_path / 'a.parquet', geometry_encoding='geoarrow')
        with pytest.raises(ValueError, match=r"list<.*: write it with .*'WKB'"):
            read_footprints(tmp_path / 'a.parquet')

    @pytest.mark.parametrize('geo', ['{', '[]', '{"columns": [1]}', '[' * 10**5])
    def test_metadata_that_are_not_those_of_geoparquet(
        self, tmp_path: Path, geo: str
    ) -> None:
        table = pa.table({'id': ['a'], 'geometry': [shapely.box(0, 0, 1, 1).wkb]})
        pq.write_table(
            table.replace_schema_metadata({'geo': geo}), tmp_path / 'a.parquet'
        )
        with pytest.raises(ValueError, match=r'a\.parquet has metadata that are not'):
            read_footprints(tmp_path / 'a.parquet')

    def test_boxes_that_are_no_numbers(self, tmp_path: Path) -> None:
        columns = {'left': ['0', 'x'], 'bottom': [0, 0], 'right': [1, 1], 'top': [1, 1]}
        table = pa.table({'id': ['a', 'b'], **columns})
        pq.write_table(table, tmp_path / 'a.parquet')
        whole = read_all(read_footprints(tmp_path / 'a.parquet'))
        assert whole.table['id'].to_pylist() == ['a']
        assert whole.failures == {'b': 'has no area'}

    @pytest.mark.parametrize('height', ['', '10.7', '0', 'ten'])
    def test_rows_without_a_size(self, tmp_path: Path, height: str) -> None:
        path = tmp_path / 'a.csv'
        rows = f'a,0,0,1,1,{height},9\nb,0,0,1,1,8,9\n'
        path.write_text(f'id,left,bottom,right,top,height,width\n{rows}')
        whole = read_all(read_footprints(path))
        assert whole.table['id'].to_pylist() == ['b']
        assert whole.table['height'].to_pylist() == [8]
        reason = 'has no height and width that are whole numbers of 1 or more'
        assert whole.failures == {'a': reason}

    @pytest.mark.parametrize(
        ('columns', 'message'),
        [
            ({'name': ['a']}, 'must have the columns id, and geometry or left'),
            (
                {'id': ['a'], 'left': [1]},
                'must have the columns id, and geometry or left',
            ),
            (
                {'id': ['a'], 'wkt': ['POINT (1 1)'], 'height': [1]},
                'both of height and width',
            ),
            ({'id': ['a'], 'wkt': ['here']}, 'footprints must be polygons'),
            (
                {'id': ['a', 'b'], 'wkt': ['POINT (1 1)', 'POLYGON ((0 0,']},
                'none of the 2 rows of .* is',
            ),
            (
                {
                    'id': ['a'],
                    'wkt': ['POLYGON ((0 0, 1 0, 1 1, 0 0))'],
                    'height': 9,
                    'width': 9,
                },
                'with height and width must be boxes',
            ),
            (
                {'id': ['a', 'b', 'a'], 'wkt': ['POLYGON ((0 0, 1 0, 1 1, 0 0))'] * 3},
                'ids must be unique, 1 occur more than once, such as a',
            ),
            (
                {'id': [None, 'b'], 'wkt': 'POINT (1 1)'},
                'must all have an id, 1 have none',
            ),
        ],
    )
    def test_columns(
        self, tmp_path: Path, columns: dict[str, Any], message: str
    ) -> None:
        pd.DataFrame(columns).to_csv(tmp_path / 'a.csv', index=False)
        with pytest.raises(ValueError, match=message):
            read_footprints(tmp_path / 'a.csv')

    def test_no_rows(self, tmp_path: Path) -> None:
        (tmp_path / 'a.csv').write_text('id,geometry\n')
        with pytest.raises(ValueError, match='at least one row'):
            read_footprints(tmp_path / 'a.csv')

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match='footprints must be a file'):
            read_footprints(tmp_path / 'a.gpkg')


def test_outlines_of_grids() -> None:
    grids = [
        ('EPSG:32632', grid('EPSG:32632', 7, 46), (100, 200)),
        ('EPSG:32660', grid('EPSG:32660', 179.99, 66), (100, 200)),
        ('EPSG:4326', Affine(0.001, 0, 179.95, 0, -0.001, 10), (100, 100)),
    ]
    for crs, transform, shape in grids:
        table = make_footprints(['a'], [crs], [transform[:6]], [shape])
        (polygon,) = outlines(table)
        left, _, right, _ = polygon.bounds
        assert right - left < 1
        assert (right > 180) == (crs != 'EPSG:32632')
        assert polygon.exterior.is_ccw


@pytest.mark.parametrize('pixels', [True, False])
def test_outlines_have_the_bends_of_long_edges(pixels: bool) -> None:
    # 100 km: in the middle, the upper edge is farther north than at its corners
    transform = Affine(100, 0, 450_000, 0, -100, 6_651_000)
    table = make_footprints(['a'], ['EPSG:32632'], [transform[:6]], [(1000, 1000)])
    if not pixels:
        box = shapely.box(450_000, 6_551_000, 550_000, 6_651_000)
        table = make_footprints(['a'], ['EPSG:32632'], polygons=[shapely.to_wkb(box)])
    (polygon,) = outlines(table)
    to_degrees = Transformer.from_crs('EPSG:32632', 'EPSG:4326', always_xy=True)
    _, top = to_degrees.transform(500_000, 6_651_000)
    _, corner = to_degrees.transform(450_000, 6_651_000)
    assert polygon.bounds[3] == pytest.approx(top, abs=1e-6)
    assert top - corner > 1e-3


def test_outlines_of_small_grids_are_their_corners() -> None:
    transform = grid('EPSG:32632', 7, 46)
    table = make_footprints(['a'], ['EPSG:32632'], [transform[:6]], [(500, 500)])
    assert shapely.get_num_coordinates(outlines(table)).tolist() == [5]
