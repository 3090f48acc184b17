# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Tables of footprints: GeoPackage, Parquet, CSV, and other vector files."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import shapely
from pyproj import CRS
from pyproj.exceptions import CRSError

from ..geo.antimeridian import Floats
from ..geo.footprints import make_footprints
from ..geo.grid import parse_crs
from .sources import Read, Table, check_unique

#: Columns of a table that has boxes instead of geometries.
_BOX = ('left', 'bottom', 'right', 'top')

#: Types of the columns of CSV files, the others are as they look like.
_CSV_TYPES = {
    **dict.fromkeys(('id', 'crs', 'geometry', 'wkt'), pa.string()),
    **dict.fromkeys(_BOX, pa.float64()),
}

#: Columns that may tell when a patch was taken.
_DATES = ('date', 'datetime', 'year')

#: Why a row is left out.
_NO_POLYGON = 'is no polygon'
_UNREADABLE = 'cannot be read'
_NO_PIXELS = 'has no height and width that are whole numbers of 1 or more'

#: Rows that are read at once.
_ROWS = 2**16


def read_footprints(path: str | os.PathLike[str]) -> Table:
    """Read a table of footprints.

    It has a column *id*, and one of

    * geometries, polygons: the geometry of a GeoPackage, GeoParquet or any vector file, or
      a column *geometry* or *wkt* with well-known text in a CSV file,
    * boxes: columns *left*, *bottom*, *right*, *top*,

    and, if wanted, *crs* (where there is none: that of the file, else longitude and
    latitude), and *height* and *width*: then the box of each patch has so many pixels, and
    is labelled on these. Without them it is labelled by the pixels of the map inside of
    it. A column *date*, *datetime* or *year* tells its year for ``year='nearest'``. Names of columns may be in any case, the first of each name counts.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f'footprints must be a file, {path!r} does not exist')
    names, years, tables = [], [], []
    failures: dict[str, str] = {}
    for batch, crs in _batches(path):
        names.append(batch['id'].combine_chunks().cast(pa.string()))
        years.append(_find_years(batch))
        without = pc.equal(names[-1].fill_null(''), '').sum().as_py()
        if without:
            raise ValueError(
                f'footprints must all have an id, {without} have none in {path}'
            )
        part = _normalize(batch, crs or 'EPSG:4326', path)
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
    return Table(Read(table, failures), ids, pa.concat_arrays(years))


def _find_years(table: pa.Table) -> pa.Array:
    """Return the years of the rows of a file by a column of dates, null without."""
    for name in _DATES:
        if name in table.column_names:
            texts = table[name].cast(pa.string()).to_pandas()
            years = texts.str.extract(r'(?<!\d)((?:19|20)\d{2})', expand=False)
            return pa.array(pd.to_numeric(years), pa.float64()).cast(pa.int64())
    return pa.nulls(len(table), pa.int64())


def _batches(path: str) -> Iterator[tuple[pa.Table, str | None]]:
    """Read batches of a file, with geometries as a binary column *geometry*, and its CRS."""
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
                yield _rename(pa.Table.from_batches([batch]), path), None
    elif suffix in ('.parquet', '.geoparquet', '.pq'):
        with pq.ParquetFile(path) as file:
            try:
                geometry, crs = _geoparquet(file.schema_arrow.metadata)
            except (AttributeError, CRSError, RecursionError, ValueError) as error:
                raise ValueError(
                    f'footprints {path} has metadata that are not those of GeoParquet '
                    f'({error}): write it again, for example with GeoPandas'
                ) from error
            for batch in file.iter_batches(_ROWS):
                yield _rename(pa.Table.from_batches([batch]), path, geometry), crs
    else:
        import geopandas

        for start in range(0, 2**62, _ROWS):
            frame = geopandas.read_file(path, rows=slice(start, start + _ROWS))
            if len(frame):
                columns = {
                    name: pa.array(frame[name])
                    for name in frame.columns
                    if name.lower() in ('id', 'crs', 'height', 'width', *_DATES)
                }
                columns['geometry'] = pa.array(frame.geometry.to_wkb(), pa.binary())
                crs = None if frame.crs is None else frame.crs.to_string()
                yield _rename(pa.table(columns), path), crs
            if len(frame) < _ROWS:
                return


def _rename(table: pa.Table, path: str, geometry: str = 'geometry') -> pa.Table:
    """Bring the names of columns to lower case, and look for those that must be there."""
    # What the file says is its geometry comes before others of the name
    order = sorted(enumerate(table.column_names), key=lambda item: item[1] != geometry)
    columns: dict[str, int] = {}
    for number, name in order:
        columns.setdefault('geometry' if name == geometry else name.lower(), number)
    if 'wkt' in columns:
        columns.setdefault('geometry', columns.pop('wkt'))
    unique = [*columns]
    table = table.select([*columns.values()]).rename_columns(unique)
    placed = 'geometry' in unique or set(_BOX) <= set(unique)
    if 'id' not in unique or not placed:
        raise ValueError(
            'footprints must have the columns id, and geometry or left, bottom, right, '
            f'top, got {", ".join(unique)} in {path}'
        )
    if ('height' in unique) != ('width' in unique):
        raise ValueError(f'footprints must have both of height and width, see {path}')
    if 'geometry' in unique and pa.types.is_nested(table['geometry'].type):
        raise ValueError(
            'footprints must have geometries as well-known binary or text, got '
            f"{table['geometry'].type} in {path}: write it with geometry_encoding='WKB'"
        )
    return table


def _geoparquet(metadata: dict[bytes, bytes] | None) -> tuple[str, str | None]:
    """Return the column of geometries of a Parquet file, and its CRS unless in degrees."""
    geo = json.loads((metadata or {}).get(b'geo', b'{}'))
    column = geo.get('primary_column', 'geometry')
    crs = geo.get('columns', {}).get(column, {}).get('crs')
    return column, None if crs is None else str(CRS.from_json_dict(crs).to_string())


def _normalize(table: pa.Table, crs: str, path: str) -> Read:
    """Make footprints of the rows of a file, whose CRS is for rows without one."""
    names = np.array(table['id'].cast(pa.string()).to_pylist(), object)
    columns = table.column_names
    given = table['crs'].to_pylist() if 'crs' in columns else [None] * len(names)
    systems = np.array([str(text or crs) for text in given], object)
    # One bad row must not cost the labels of a million good ones
    reasons = np.full(len(names), '', object)
    sized = 'height' in columns
    if sized:
        sizes = _numbers(table, ('height', 'width'))
        integers = (sizes >= 1) & (sizes < 2**31) & (sizes == np.floor(sizes))
        reasons[~integers.all(1)] = _NO_PIXELS
    if 'geometry' in columns:
        geometry = table['geometry'].to_numpy(zero_copy_only=False)
        is_text = any(isinstance(value, str) for value in geometry)
        parse = shapely.from_wkt if is_text else shapely.from_wkb
        shapes = parse(geometry, on_invalid='ignore')
        bounds = shapely.bounds(shapes)
    else:
        bounds = _numbers(table, _BOX)
        geometry = shapes = shapely.box(*bounds.T)
    left, bottom, right, top = bounds.T
    with np.errstate(invalid='ignore'):
        reasons[~((right > left) & (top > bottom))] = 'has no area'
    if 'geometry' in columns:
        polygon = np.isin(shapely.get_type_id(shapes), (3, 6))
        reasons[~polygon | shapely.is_empty(shapes)] = _NO_POLYGON
        reasons[shapely.is_missing(shapes) & (geometry.astype(bool))] = _UNREADABLE
    for text in set(systems):
        try:
            parse_crs(text)
        except ValueError as error:
            reasons[systems == text] = str(error)

    bad, good = np.flatnonzero(reasons != ''), np.flatnonzero(reasons == '')
    failures = dict(zip(names[bad], reasons[bad], strict=True))
    names, systems, shapes = names[good], systems[good], shapes[good]
    if not sized:
        polygons = shapely.to_wkb(shapes)
        return Read(make_footprints(names, systems, polygons=polygons), failures)
    left, bottom, right, top = bounds[good].T
    boxes = shapely.box(left, bottom, right, top)
    if (shapely.area(shapes) < (1 - 1e-6) * shapely.area(boxes)).any():
        raise ValueError(
            'footprints with height and width must be boxes, parallel to the axes of '
            f'their CRS, see {path}: leave height and width out to label what is inside'
        )
    pixels = sizes[good].astype(np.int32)
    zero = np.zeros(len(good))
    across, down = (right - left) / pixels[:, 1], (bottom - top) / pixels[:, 0]
    transforms = np.stack([across, zero, left, zero, down, top], 1)
    return Read(make_footprints(names, systems, transforms, pixels), failures)


def _numbers(table: pa.Table, names: Sequence[str]) -> Floats:
    """Return columns of shape (N, C), NaN where there is no number."""
    columns = (table[name].to_pandas() for name in names)
    numbers = (pd.to_numeric(column, errors='coerce') for column in columns)
    arrays = (column.to_numpy(np.float64, na_value=np.nan) for column in numbers)
    return np.stack([*arrays], 1)
