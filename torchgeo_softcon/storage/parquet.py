# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Parquet files, which are GeoParquet files if they have geometries."""

import base64
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from pyproj import CRS

from .whole_file import whole_file

#: The column of outlines, as WKB in longitude and latitude.
GEOMETRY = 'geometry'

#: The column of boxes around them, by which readers skip row groups.
_BOX = pa.struct([(side, pa.float64()) for side in ('xmin', 'ymin', 'xmax', 'ymax')])


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write a Parquet file, all or nothing.

    With a column *geometry* (WKB in longitude and latitude) it becomes a GeoParquet file,
    which has a further column *bbox*.
    """
    rows, types, box = 0, set(), np.full(4, np.nan)
    geographic = GEOMETRY in schema.names
    if geographic:
        schema = schema.append(pa.field('bbox', _BOX))
    with (
        whole_file(path) as unfinished,
        pq.ParquetWriter(unfinished, schema, compression='zstd') as writer,
    ):
        for table in tables:
            if geographic:
                shapes = shapely.from_wkb(table[GEOMETRY].to_numpy())
                types |= {shape.geom_type for shape in shapes if shape is not None}
                boxes = shapely.bounds(shapes)
                sides = pa.StructArray.from_arrays(
                    [pa.array(side) for side in boxes.T], fields=list(_BOX)
                )
                table = table.append_column('bbox', sides)
                boxes = np.vstack([box, boxes])
                box[:2] = np.fmin.reduce(boxes)[:2]
                box[2:] = np.fmax.reduce(boxes)[2:]
            writer.write_table(table)
            rows += table.num_rows
        if geographic:
            geo = json.dumps(_geo_metadata(types, box.tolist()))
            # Arrow reads metadata from its own schema, other readers from the file
            schema = schema.with_metadata({**(schema.metadata or {}), 'geo': geo})
            arrow = base64.b64encode(schema.serialize().to_pybytes())
            writer.add_key_value_metadata({'geo': geo, 'ARROW:schema': arrow})
    return rows


def _geo_metadata(types: Iterable[str], box: list[float]) -> dict[str, Any]:
    """Describe the geometries of a file.

    https://geoparquet.org/releases/v1.1.0/
    """
    column: dict[str, Any] = {
        'encoding': 'WKB',
        'geometry_types': sorted(types),
        'crs': CRS.from_user_input('OGC:CRS84').to_json_dict(),
        'covering': {'bbox': {side.name: ['bbox', side.name] for side in _BOX}},
    }
    if not any(map(math.isnan, box)):  # as without rows
        column['bbox'] = box
    return {
        'version': '1.1.0',
        'primary_column': GEOMETRY,
        'columns': {GEOMETRY: column},
    }
