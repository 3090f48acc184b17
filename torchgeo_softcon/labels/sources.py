# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Archives of images, in any folders and in known layouts."""

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..geo.dates import name_year
from ..geo.find_files import find_files, pattern_root, readable_name
from ..geo.footprints import make_footprints
from ..geo.rasters import check_place, open_raster

if TYPE_CHECKING:
    from ..ssl4eo.record_archive import RecordArchive
    from ..ssl4eo.shards import ShardArchive

#: Images of a work unit.
_FILES = 1024

#: In folders as TorchGeo has them: a file of the finest band of each image.
_SSL4EO_S12 = {'s2c': 'B2.tif', 's2a': 'B2.tif', 's1': 'VV.tif'}


class Read(NamedTuple):
    """Footprints of some patches, and why others have none, by their ids."""

    table: pa.Table
    failures: dict[str, str]


class Images:
    """Images, of which every file is a patch.

    Attributes:
        ids: Names of all patches, in the order of the labels.
    """

    def __init__(self, ids: list[str], paths: list[str]) -> None:
        """Initialize a new Images instance of files and their names."""
        self.ids = pa.array(ids, pa.string())
        # Bytes: names of files are not always UTF-8
        self._paths = pa.array(map(os.fsencode, paths), pa.binary())

    def years(self, ids: pa.Array) -> list[int | None]:
        """Return the year of each patch, None where nothing tells it."""
        paths = self._paths.take(pc.index_in(ids, self.ids)).to_pylist()
        return [name_year(os.path.realpath(os.fsdecode(p))) for p in paths]

    def units(self, rows: pa.Array) -> Iterator[Any]:
        """Yield work units of :func:`read` for the patches at some positions."""
        for start in range(0, len(rows), _FILES):
            chosen = rows.slice(start, _FILES)
            paths = map(os.fsdecode, self._paths.take(chosen).to_pylist())
            yield [*zip(self.ids.take(chosen).to_pylist(), paths, strict=True)]


class Table:
    """A table of footprints, in memory.

    Attributes:
        ids: Names of all rows, also of those without a footprint.
    """

    def __init__(
        self, read: Read, ids: pa.StringArray, years: pa.Array | None = None
    ) -> None:
        """Initialize a new Table instance of footprints, names and years of all rows."""
        self.ids, self._read = ids, read
        self._years = pa.nulls(len(ids), pa.int64()) if years is None else years

    def years(self, ids: pa.Array) -> list[int | None]:
        """Return the year of each patch, None where nothing tells it."""
        told = self._years.take(pc.index_in(ids, self.ids)).to_pylist()
        names = ids.to_pylist()
        return [y or name_year(name) for y, name in zip(told, names, strict=True)]

    def units(self, rows: pa.Array) -> Iterator[Any]:
        """Yield the footprints of the rows at some positions, as one unit."""
        wanted = self.ids.take(rows)
        table, reasons = self._read
        there = pc.drop_null(pc.index_in(wanted, table['id'].combine_chunks()))
        names = {*wanted.to_pylist()} & reasons.keys()
        yield Read(table.take(there), {name: reasons[name] for name in names})


def read(unit: Any) -> Read:
    """Read the footprints of a work unit, from :meth:`Images.units` or the like."""
    if isinstance(unit, Read):
        return unit
    grids, failures = {}, {}
    for name, path in unit:
        try:
            with open_raster(path) as source:
                check_place(source)
                crs = source.crs.to_string()
                grids[name] = crs, source.transform[:6], source.shape
        except (OSError, ValueError) as error:
            failures[name] = ' '.join(str(error).split())
    columns = zip(*grids.values(), strict=True) if grids else ((), (), ())
    return Read(make_footprints(grids, *columns), failures)


def check_unique(ids: pa.StringArray) -> None:
    """Raise a ValueError if ids are not unique."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    counted = ids.value_counts()
    often = counted.field('values').filter(pc.greater(counted.field('counts'), 1))
    raise ValueError(
        f'ids must be unique, {len(often)} occur more than once, such as '
        f'{", ".join(often[:3].to_pylist())}'
    )


def find_images(pattern: str | os.PathLike[str]) -> Images:
    """List the images of an archive.

    Args:
        pattern: A pattern such as ``DIR/**/*.tif``, or a folder for all rasters in it.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the pattern matches the same twice.
    """
    paths = find_files(pattern, option='images', odd_names=True)
    if not paths:
        raise FileNotFoundError(
            f'images must match at least one raster, got {os.fspath(pattern)!r}, which '
            "matches none. Quote patterns: --images 'DIR/**/*.tif'"
        )
    root = pattern_root(pattern)
    ids = (readable_name(os.path.relpath(path, root)) for path in paths)
    images = Images([name.replace(os.sep, '/') for name in ids], paths)
    check_unique(images.ids)
    return images


def find_layout(layout: str, root: str | os.PathLike[str]) -> Images | Table:
    """List the images of an archive with known folders.

    Args:
        layout: ``ssl4eo-s12``: ``s2c``, ``s2a`` and ``s1`` with folders of locations,
            with folders of dates, with a file per band; the same packed; or v1.1.
        root: Folder of the archive.

    Returns:
        One patch per image, as :func:`.open_archive` finds them, with ids of its folders, such as
        ``s2c/0000000/20180710T125311_20180710T125627_T24KVE``. Where a 10 m band is, is
        its grid.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the layout is unknown.
    """
    if layout != 'ssl4eo-s12':
        raise ValueError(f'layout must be one of ssl4eo-s12, got {layout!r}')
    # Not before: it needs PyTorch
    from ..ssl4eo.shards import find_splits, open_archive
    from ..ssl4eo.tiffs import TiffArchive, list_images

    ids, paths = [], []
    if find_splits(root) and not any(list_images(root, name) for name in _SSL4EO_S12):
        opened = [open_archive(root, name) for name in find_splits(root)]
        return _footprints([a for a in opened if not isinstance(a, TiffArchive)])
    for product, band in _SSL4EO_S12.items():
        for location, date in list_images(root, product):
            ids.append(f'{product}/{location}/{date}')
            paths.append(os.path.join(root, product, location, date, band))
    if not ids:
        raise FileNotFoundError(
            f'root must have {", ".join(_SSL4EO_S12)} with folders LOCATION/DATE of '
            f'SSL4EO-S12, found none in {os.fspath(root)!r}'
        )
    return Images(ids, paths)


def _footprints(archives: Iterable['RecordArchive | ShardArchive']) -> Table:
    """Return the footprints of archives that know them."""
    tables = []
    for archive in archives:
        crs, transforms, size = archive.grids()
        images = [archive.name(row) for row in range(len(crs))]
        names = ('/'.join((archive.split, *image)) for image in images)
        sizes = np.broadcast_to(size, (len(crs), 2))
        tables.append(make_footprints(names, crs, transforms, sizes))
    table = pa.concat_tables(tables).unify_dictionaries()
    nowhere = pc.is_null(table['crs'])
    failures = dict.fromkeys(
        table['id'].filter(nowhere).to_pylist(), 'has no coordinate reference system'
    )
    known = Read(table.filter(pc.invert(nowhere)), failures)
    return Table(known, table['id'].combine_chunks())
