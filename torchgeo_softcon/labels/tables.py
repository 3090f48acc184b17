# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Tables of footprints: GeoPackage, Parquet, CSV, and other vector files."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import shapely
from pyproj import CRS

from ..geo.antimeridian import Floats
from ..geo.footprints import make_footprints
from ..geo.grid import parse_crs
from .sources import Read, check_unique

#: Columns of a table that has boxes instead of geometries.
_BOX = ('left', 'bottom', 'right', 'top')

#: Types of the columns of CSV files, the others are as they look like.
_CSV_TYPES = {
    **dict.fromkeys(('id', 'crs', 'geometry', 'wkt'), pa.string()),
    **dict.fromkeys(_BOX, pa.float64()),
}

#: Why a row is left out.
_NO_POLYGON = 'is no polygon'
_UNREADABLE = 'cannot be read'
_NO_PIXELS = 'has no height and width that are whole numbers of 1 or more'

#: Rows that are read at once.
_ROWS = 2**16


class Table:
    """A table of footprints, in memory."""

    def __init__(self, read: Read, ids: pa.StringArray) -> None:
        """Initialize a new Table instance.

        Args:
            read: The footprints, and the rows that have none.
            ids: Names of all rows.
        """
        self.ids = ids
        self._read = read

    def units(self, rows: pa.Array) -> Iterator[Any]:
        """See :class:`Source`."""
        wanted = self.ids.take(rows)
        table = self._read.table
        there = pc.drop_null(pc.index_in(wanted, table['id'].combine_chunks()))
        names = set(wanted.to_pylist()) if self._read.failures else ()
        failures = {k: v for k, v in self._read.failures.items() if k in names}
        yield Read(table.take(there), failures)


def read_footprints(path: str | os.PathLike[str]) -> Table:
    """Read a table of footprints.

    It has a column *id*, and one of

    * geometries, polygons: the geometry of a GeoPackage, GeoParquet or any vector file, or
      a column *geometry* or *wkt* with well-known text in a CSV file,
    * boxes: columns *left*, *bottom*, *right*, *top*,

    and, if wanted, *crs* (where there is none: that of the file, else longitude and
    latitude), and *height* and *width*: then the box of each patch has so many pixels, and
    is labelled on these. Without them it is labelled by the pixels of the map inside of
    it. Names of columns may be in any case, the first of each name counts.

    Args:
        path: A GeoPackage, Parquet, CSV, or what else GeoPandas reads.

    Returns:
        The footprints.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If columns are missing, ids are not unique, or no row has a polygon.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f'footprints must be a file, there is no {path!r}')
    names, tables = [], []
    failures: dict[str, str] = {}
    for batch in _batches(path):
        names.append(batch['id'].combine_chunks().cast(pa.string()))
        without = pc.equal(names[-1].fill_null(''), '').sum().as_py()
        if without:
            raise ValueError(
                f'footprints must all have an id, {without} have none in {path}'
            )
        part = _normalize(batch, path)
        tables.append(part.table)
        failures |= part.failures
    if not sum(map(len, names)):
        raise ValueError(f'footprints must have at least one row, {path} has none')
    table = pa.concat_tables(tables).unify_dictionaries()
    if not len(table) and set(failures.values()) <= {_NO_POLYGON, _UNREADABLE}:
        raise ValueError(
            'footprints must be polygons in well-known text or binary, none of the '
            f'{len(failures)} rows of {path} is'
        )
    ids = pa.concat_arrays(names)
    check_unique(ids)
    return Table(Read(table, failures), ids)


def _batches(path: str) -> Iterator[pa.Table]:
    """Parts of a table file, with geometries as a binary column *geometry*."""
    suffix = Path(path).suffix.lower()
    if suffix == '.csv':
        with pa.csv.open_csv(path) as reader:
            names = reader.schema.names
        # Not guessed: 0007 is a name, and the boxes of the first rows may be whole numbers
        types = {name: _CSV_TYPES.get(name.lower()) for name in names}
        options = pa.csv.ConvertOptions(
            column_types={name: kind for name, kind in types.items() if kind}
        )
        with pa.csv.open_csv(path, convert_options=options) as reader:
            for batch in reader:
                yield _rename(pa.Table.from_batches([batch]), path)
    elif suffix in ('.parquet', '.geoparquet', '.pq'):
        with pq.ParquetFile(path) as file:
            geometry, crs = _geoparquet(file.schema_arrow.metadata)
            for batch in file.iter_batches(_ROWS):
                table = _rename(pa.Table.from_batches([batch]), path, geometry)
                yield _with_crs(table, crs)
    else:
        import geopandas

        for start in range(0, 2**62, _ROWS):
            frame = geopandas.read_file(path, rows=slice(start, start + _ROWS))
            if len(frame):
                columns = {
                    name: pa.array(frame[name])
                    for name in frame.columns
                    if name.lower() in ('id', 'crs', 'height', 'width')
                }
                columns['geometry'] = pa.array(frame.geometry.to_wkb(), pa.binary())
                crs = None if frame.crs is None else frame.crs.to_string()
                yield _with_crs(_rename(pa.table(columns), path), crs)
            if len(frame) < _ROWS:
                return


def _rename(table: pa.Table, path: str, geometry: str = 'geometry') -> pa.Table:
    """Bring the names of columns to lower case, and look for those that must be there."""
    given = table.column_names
    # What the file says is its geometry comes before others of the name
    order = sorted(range(len(given)), key=lambda i: given[i] != geometry)
    names = [given[i].lower() if given[i] != geometry else 'geometry' for i in order]
    if 'wkt' in names and 'geometry' not in names:
        names[names.index('wkt')] = 'geometry'
    unique = list(dict.fromkeys(names))
    table = table.select([order[names.index(name)] for name in unique])
    table = table.rename_columns(unique)
    boxes = set(_BOX) <= set(table.column_names)
    if 'id' not in table.column_names or not (
        boxes or 'geometry' in table.column_names
    ):
        raise ValueError(
            'footprints must have the columns id, and geometry or left, bottom, right, '
            f'top, got {", ".join(table.column_names)} in {path}'
        )
    if ('height' in table.column_names) != ('width' in table.column_names):
        raise ValueError(f'footprints must have both of height and width, see {path}')
    if 'geometry' in unique and pa.types.is_nested(table['geometry'].type):
        raise ValueError(
            'footprints must have geometries as well-known binary or text, got '
            f"{table['geometry'].type} in {path}: write it with geometry_encoding='WKB'"
        )
    return table


def _with_crs(table: pa.Table, crs: str | None) -> pa.Table:
    """Give the rows without a CRS that of the file."""
    if crs is None:
        return table
    if 'crs' not in table.column_names:
        return table.append_column('crs', pa.array([crs] * len(table), pa.string()))
    given = table['crs'].cast(pa.string())
    filled = pc.if_else(pc.equal(given.fill_null(''), ''), crs, given)
    return table.set_column(table.column_names.index('crs'), 'crs', filled)


def _geoparquet(metadata: dict[bytes, bytes] | None) -> tuple[str, str | None]:
    """Column of geometries of a Parquet file, and its CRS unless in degrees."""
    geo = json.loads((metadata or {}).get(b'geo', b'{}'))
    column = geo.get('primary_column', 'geometry')
    crs = geo.get('columns', {}).get(column, {}).get('crs')
    return column, None if crs is None else str(CRS.from_json_dict(crs).to_string())


def _normalize(table: pa.Table, path: str) -> Read:
    """Rows of a file as footprints."""
    ids = table['id'].cast(pa.string()).to_pylist()
    columns = table.column_names
    given = table['crs'].to_pylist() if 'crs' in columns else [None] * len(ids)
    systems = [str(text or 'EPSG:4326') for text in given]
    failures: dict[str, str] = {}
    if 'geometry' in columns:
        geometry = table['geometry'].to_numpy(zero_copy_only=False)
        is_text = any(isinstance(value, str) for value in geometry)
        # One bad row must not cost the labels of a million good ones
        shapes = (shapely.from_wkt if is_text else shapely.from_wkb)(
            geometry, on_invalid='ignore'
        )
        bad = ~np.isin(shapely.get_type_id(shapes), (3, 6)) | shapely.is_empty(shapes)
        given = np.array([bool(value) for value in geometry], bool)
        unreadable = shapely.is_missing(shapes) & given
        bounds = shapely.bounds(shapes)
    else:
        bounds = np.stack([table[n].to_numpy().astype(np.float64) for n in _BOX], 1)
        shapes = shapely.box(*bounds.T)
        bad, unreadable = np.zeros((2, len(ids)), bool)
    with np.errstate(invalid='ignore'):
        flat = ~((bounds[:, 2] > bounds[:, 0]) & (bounds[:, 3] > bounds[:, 1]))
    for row in np.flatnonzero(bad | flat):
        reason = _UNREADABLE if unreadable[row] else _NO_POLYGON
        failures[ids[row]] = reason if bad[row] else 'has no area'
    for text in set(systems):
        try:
            parse_crs(text)
        except ValueError as error:
            same = np.array([system == text for system in systems])
            bad |= same
            failures |= {ids[row]: str(error) for row in np.flatnonzero(same)}
    sized = 'height' in columns
    sizes = _sizes(table) if sized else np.ones((len(ids), 2))
    empty = ~((sizes >= 1) & (sizes < 2**31) & (sizes == np.floor(sizes))).all(1)
    failures |= {ids[row]: _NO_PIXELS for row in np.flatnonzero(empty & ~(bad | flat))}
    good = np.flatnonzero(~(bad | flat | empty))
    ids = [ids[row] for row in good]
    systems = [systems[row] for row in good]
    if not sized:
        return Read(
            make_footprints(ids, systems, polygons=shapely.to_wkb(shapes[good])),
            failures,
        )
    pixels = sizes[good].astype(np.int32)
    if (shapely.area(shapes) < (1 - 1e-6) * shapely.area(shapely.box(*bounds.T)))[
        good
    ].any():
        raise ValueError(
            'footprints with height and width must be boxes, parallel to the axes of '
            f'their CRS, see {path}: leave height and width out to label what is inside'
        )
    left, bottom, right, top = bounds[good].T
    zero = np.zeros(len(good))
    grid = [
        (right - left) / pixels[:, 1],
        zero,
        left,
        zero,
        (bottom - top) / pixels[:, 0],
        top,
    ]
    return Read(make_footprints(ids, systems, np.stack(grid, 1), pixels), failures)


def _sizes(table: pa.Table) -> Floats:
    """Heights and widths of shape (N, 2), not a number where there is none."""
    columns = (table[name].to_pandas() for name in ('height', 'width'))
    numbers = [pd.to_numeric(column, errors='coerce') for column in columns]
    return np.stack(
        [column.to_numpy(np.float64, na_value=np.nan) for column in numbers], 1
    )
