# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Parquet files, which are GeoParquet files if they have geometries."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from pyproj import CRS

from .whole_file import whole_file

#: The column that places rows, as WKB in longitude and latitude, and one that may stand
#: beside it.
GEOMETRY, FOOTPRINT = 'geometry', 'footprint'

#: The column of boxes around them, by which readers skip row groups.
_BOX = pa.struct([(side, pa.float64()) for side in ('xmin', 'ymin', 'xmax', 'ymax')])

#: Size of a row group, uncompressed, and its most rows. See
#: https://github.com/opengeospatial/geoparquet/blob/main/format-specs/distributing-geoparquet.md
_GROUP_BYTES, _GROUP_ROWS = 128 * 2**20, 100_000


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write a Parquet file, all or nothing.

    With a column *geometry* (WKB in longitude and latitude) it becomes a GeoParquet file,
    which has further columns of boxes, and whose rows follow a Hilbert curve: neighbours
    on Earth are in the same row groups. Rows without a geometry come last.
    """
    table = pa.concat_tables([schema.empty_table(), *tables])
    if GEOMETRY in schema.names:
        order = _hilbert_order(shapely.from_wkb(table[GEOMETRY].to_numpy()))
        table, geo = _with_boxes(table.take(order))
        table = table.replace_schema_metadata({**(schema.metadata or {}), 'geo': geo})
    row_bytes = max(1, table.nbytes // max(1, len(table)))
    rows = max(1, min(_GROUP_ROWS, _GROUP_BYTES // row_bytes))
    with whole_file(path) as unfinished:
        pq.write_table(table, unfinished, row_group_size=rows, compression='zstd')
    return len(table)


def _hilbert_order(shapes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the order of shapes along a Hilbert curve, without a place last."""
    from geopandas import GeoSeries

    nowhere = shapely.is_missing(shapes) | shapely.is_empty(shapes)
    key = np.full(len(shapes), 2**32, np.int64)
    if not nowhere.all():
        key[~nowhere] = GeoSeries(shapes[~nowhere]).hilbert_distance()
    return np.argsort(key, kind='stable')


def _with_boxes(table: pa.Table) -> tuple[pa.Table, str]:
    """Append the boxes around geometries, and describe the geometries.

    https://geoparquet.org/releases/v1.1.0/
    """
    columns: dict[str, Any] = {}
    for name in [name for name in (GEOMETRY, FOOTPRINT) if name in table.column_names]:
        shapes = shapely.from_wkb(table[name].to_numpy())
        boxes = shapely.bounds(shapes)
        sides = [pa.array(side) for side in boxes.T]
        # Readers that filter by boxes would keep those of NaN
        nowhere = pa.array(np.isnan(boxes).any(1))
        box = 'bbox' if name == GEOMETRY else f'{name}_bbox'
        column = pa.StructArray.from_arrays(sides, fields=list(_BOX), mask=nowhere)
        table = table.append_column(box, column)
        columns[name] = {
            'encoding': 'WKB',
            'geometry_types': sorted(
                {shape.geom_type for shape in shapes if shape is not None}
            ),
            'crs': CRS.from_user_input('OGC:CRS84').to_json_dict(),
            'covering': {'bbox': {side.name: [box, side.name] for side in _BOX}},
        }
        if not np.isnan(boxes).all():  # as without rows
            columns[name]['bbox'] = shapely.total_bounds(shapes).tolist()
    geo = {'version': '1.1.0', 'primary_column': GEOMETRY, 'columns': columns}
    return table, json.dumps(geo)
