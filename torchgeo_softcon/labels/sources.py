# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Archives of patches: images, tables of footprints, and known layouts of folders."""

import glob
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import rasterio
import shapely
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from .footprints import make_footprints, parse_crs

#: File types that a folder is searched for.
_IMAGES = ('.tif', '.tiff', '.jp2')

#: Files of a table that are read at once, and images of a work unit.
_ROWS, _FILES = 2**16, 1024

#: Columns of a table that has boxes instead of geometries.
_BOX = ('left', 'bottom', 'right', 'top')

#: In folders as TorchGeo has them: a file of the finest band of each image.
_SSL4EO_S12 = {'s2c': 'B2.tif', 's2a': 'B2.tif', 's1': 'VV.tif'}

#: Names of layouts.
LAYOUTS = ('ssl4eo-s12',)


@dataclass
class Read:
    """Footprints of some patches.

    Attributes:
        table: The footprints.
        failures: Why a patch has none, by its id.
    """

    table: pa.Table
    failures: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """An archive.

    Attributes:
        ids: Names of all patches, in the order of the labels.
    """

    ids: pa.StringArray

    def units(self, rows: pa.Array) -> Iterator[Any]:
        """Work units that read footprints with :func:`read`.

        Args:
            rows: Positions of the patches to read.

        Yields:
            The units.
        """
        ...


class Images:
    """Images, of which every file is a patch."""

    def __init__(self, ids: list[str], paths: list[str]) -> None:
        """Initialize a new Images instance.

        Args:
            ids: Names of the patches.
            paths: Their files.
        """
        self.ids = pa.array(ids, pa.string())
        self._paths = pa.array(paths, pa.string())

    def units(self, rows: pa.Array) -> Iterator[Any]:
        """See :class:`Source`."""
        for start in range(0, len(rows), _FILES):
            chosen = rows.slice(start, _FILES)
            yield list(
                zip(
                    self.ids.take(chosen).to_pylist(),
                    self._paths.take(chosen).to_pylist(),
                    strict=True,
                )
            )


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


def read(unit: Any) -> Read:
    """Read the footprints of a work unit.

    Args:
        unit: From :meth:`Source.units`.

    Returns:
        The footprints.
    """
    if isinstance(unit, Read):
        return unit
    ids, systems, transforms, shapes = [], [], [], []
    failures = {}
    for name, path in unit:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', NotGeoreferencedWarning)
                with rasterio.open(path) as source:
                    crs, transform = source.crs, source.transform
                    shape = source.height, source.width
        except RasterioError as error:
            failures[name] = (
                f'cannot be opened as a raster: {" ".join(str(error).split())}'
            )
            continue
        if crs is None:
            failures[name] = 'has no coordinate reference system'
        elif transform.is_identity or transform.determinant == 0:
            failures[name] = 'has no georeference, only a coordinate reference system'
        else:
            ids.append(name)
            systems.append(crs.to_string())
            transforms.append(transform[:6])
            shapes.append(shape)
    grids = np.array(transforms, np.float64).reshape(-1, 6)
    return Read(
        make_footprints(ids, systems, grids, np.array(shapes, np.int32).reshape(-1, 2)),
        failures,
    )


def find_images(pattern: str | os.PathLike[str]) -> Images:
    """List the images of an archive.

    Args:
        pattern: A pattern such as ``DIR/**/*.tif``, or a folder for all rasters in it.

    Returns:
        The images. Their ids are their paths below the folder where the pattern begins.

    Raises:
        FileNotFoundError: If there are none.
    """
    text = os.fspath(pattern)
    if os.path.isdir(text):
        root = Path(text)
        found = glob.iglob(os.path.join(glob.escape(text), '**', '*'), recursive=True)
        paths = sorted(path for path in found if path.lower().endswith(_IMAGES))
    else:
        parts = Path(text).parts
        plain = (
            [glob.has_magic(part) for part in parts].index(True)
            if glob.has_magic(text)
            else -1
        )
        root = Path(*parts[:plain])
        paths = sorted(
            path for path in glob.iglob(text, recursive=True) if os.path.isfile(path)
        )
    if not paths:
        raise FileNotFoundError(
            f'images must match at least one raster, got {text!r}, which matches none. '
            "Quote patterns: --images 'DIR/**/*.tif'"
        )
    return Images(
        [os.path.relpath(path, root).replace(os.sep, '/') for path in paths], paths
    )


def find_layout(layout: str, root: str | os.PathLike[str]) -> Images:
    """List the images of an archive with known folders.

    Args:
        layout: ``ssl4eo-s12``: ``s2c``, ``s2a`` and ``s1`` with folders of locations,
            with folders of dates, with a file per band.
        root: Folder of the archive.

    Returns:
        One patch per image, with ids of its folders, such as
        ``s2c/0000000/20180710T125311_20180710T125627_T24KVE``. Where a 10 m band is, is
        its grid.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    ids, paths = [], []
    for product, band in _SSL4EO_S12.items():
        folder = os.path.join(os.fspath(root), product)
        if not os.path.isdir(folder):
            continue
        for location in sorted(os.listdir(folder)):
            place = os.path.join(folder, location)
            for date in sorted(os.listdir(place)) if os.path.isdir(place) else ():
                if os.path.isdir(os.path.join(place, date)):
                    ids.append(f'{product}/{location}/{date}')
                    paths.append(os.path.join(place, date, band))
    if not ids:
        raise FileNotFoundError(
            f'root must have {", ".join(_SSL4EO_S12)} with folders LOCATION/DATE of '
            f'SSL4EO-S12, found none in {os.fspath(root)!r}'
        )
    return Images(ids, paths)


def read_footprints(path: str | os.PathLike[str]) -> Table:
    """Read a table of footprints.

    It has a column *id* (or the first column of that name in any case), and one of

    * geometries, polygons: the geometry of a GeoPackage, GeoParquet or any vector file, or
      a column *geometry* or *wkt* with well-known text in a CSV file,
    * boxes: columns *left*, *bottom*, *right*, *top*,

    and, if wanted, *crs* (default: that of the file, else longitude and latitude), and
    *height* and *width*: then the box of each patch has so many pixels, and is labelled
    on these. Without them it is labelled by the pixels of the map inside of it.

    Args:
        path: A GeoPackage, Parquet, CSV, or what else GeoPandas reads.

    Returns:
        The footprints.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If columns are missing, or ids are not unique.
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
    return Table(Read(table, failures), pa.concat_arrays(names))


def _batches(path: str) -> Iterator[pa.Table]:
    """Parts of a table file, with geometries as a binary column *geometry*."""
    suffix = Path(path).suffix.lower()
    if suffix == '.csv':
        with pa.csv.open_csv(path) as reader:
            for batch in reader:
                yield _rename(pa.Table.from_batches([batch]), path)
    elif suffix in ('.parquet', '.geoparquet', '.pq'):
        with pq.ParquetFile(path) as file:
            crs = _crs_of_geoparquet(file.schema_arrow.metadata)
            for batch in file.iter_batches(_ROWS):
                table = _rename(pa.Table.from_batches([batch]), path)
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


def _rename(table: pa.Table, path: str) -> pa.Table:
    """Bring the names of columns to lower case, and look for those that must be there."""
    table = table.rename_columns([name.lower() for name in table.column_names])
    if 'wkt' in table.column_names and 'geometry' not in table.column_names:
        at = table.column_names.index('wkt')
        names = [*table.column_names]
        names[at] = 'geometry'
        table = table.rename_columns(names)
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
    return table


def _with_crs(table: pa.Table, crs: str | None) -> pa.Table:
    if crs is None or 'crs' in table.column_names:
        return table
    return table.append_column('crs', pa.array([crs] * len(table), pa.string()))


def _crs_of_geoparquet(metadata: dict[bytes, bytes] | None) -> str | None:
    """CRS of the geometries of a GeoParquet file, None for longitude and latitude."""
    import json

    from pyproj import CRS

    geo = json.loads((metadata or {}).get(b'geo', b'{}'))
    crs = geo.get('columns', {}).get(geo.get('primary_column'), {}).get('crs')
    return None if crs is None else str(CRS.from_json_dict(crs).to_string())


def _normalize(table: pa.Table, path: str) -> Read:
    """Rows of a file as footprints."""
    ids = table['id'].cast(pa.string()).to_pylist()
    columns = table.column_names
    given = table['crs'].to_pylist() if 'crs' in columns else [None] * len(ids)
    systems = [str(text or 'EPSG:4326') for text in given]
    failures: dict[str, str] = {}
    if 'geometry' in columns:
        geometry = table['geometry'].to_numpy(zero_copy_only=False)
        try:
            is_text = len(geometry) > 0 and isinstance(geometry[0], str)
            shapes = (shapely.from_wkt if is_text else shapely.from_wkb)(geometry)
        except shapely.errors.GEOSException as error:
            raise ValueError(
                f'footprints must be geometries: {error} in {path}'
            ) from error
        bad = ~np.isin(shapely.get_type_id(shapes), (3, 6)) | shapely.is_empty(shapes)
        bounds = shapely.bounds(shapes)
    else:
        bounds = np.stack([table[n].to_numpy().astype(np.float64) for n in _BOX], 1)
        shapes = shapely.box(*bounds.T)
        bad = np.zeros(len(ids), bool)
    with np.errstate(invalid='ignore'):
        flat = ~((bounds[:, 2] > bounds[:, 0]) & (bounds[:, 3] > bounds[:, 1]))
    for row in np.flatnonzero(bad | flat):
        failures[ids[row]] = 'is no polygon' if bad[row] else 'has no area'
    for text in set(systems):
        try:
            parse_crs(text)
        except ValueError as error:
            same = np.array([system == text for system in systems])
            bad |= same
            failures |= {ids[row]: str(error) for row in np.flatnonzero(same)}
    good = np.flatnonzero(~(bad | flat))
    ids = [ids[row] for row in good]
    systems = [systems[row] for row in good]
    if 'height' not in columns:
        return Read(
            make_footprints(ids, systems, polygons=shapely.to_wkb(shapes[good])),
            failures,
        )
    sizes = np.stack([table[n].to_numpy() for n in ('height', 'width')], 1)[good]
    sizes = sizes.astype(np.int32)
    if (sizes < 1).any():
        raise ValueError(
            f'footprints must have height and width of 1 or more, see {path}'
        )
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
        (right - left) / sizes[:, 1],
        zero,
        left,
        zero,
        (bottom - top) / sizes[:, 0],
        top,
    ]
    return Read(make_footprints(ids, systems, np.stack(grid, 1), sizes), failures)
