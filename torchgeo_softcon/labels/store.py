# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A file of labels, and the folder of its parts while it is not complete.

Whenever a run is killed, the next one finds complete files only: they get their names when
they are written. The file is the same, whether the run was interrupted or not.
"""

import contextlib
import csv
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from pyproj import CRS

from ..geo.footprints import SCHEMA, outlines
from ..geo.grid import LONLAT
from ..landcover.product import LandCoverProduct
from ..storage.whole_file import whole_file
from .counting import Counted, Counts

#: Rows of a row group of the file.
_ROWS = 2**16

#: What to do about something else at the place of a file.
_REMEDY = 'Choose another file, or set overwrite to replace it'

#: Version of the columns of the file.
_VERSION = 1


class LabelStore:
    """Labels that are done: in the file, and in parts."""

    def __init__(
        self,
        path: Path,
        legend: LandCoverProduct,
        of_code: Mapping[int, int],
        year: int | None,
        product: str,
    ) -> None:
        """Initialize a new LabelStore instance.

        Args:
            path: Path of the file.
            legend: Product that has the classes of the labels.
            of_code: Its code for every code that is counted.
            year: Year of the map.
            product: Name of the map with its version.
        """
        self.path = path
        self.folder = path.with_name(f'{path.name}.parts')
        self.failures = path.with_name(f'{path.stem}.failed.csv')
        self.legend, self.of_code, self.year, self.product = (
            legend,
            of_code,
            year,
            product,
        )
        self._manifest = self.folder / 'origin.json'
        #: Whether the file is to be replaced: until that is done, it is as if not there.
        self._replaced = False

    @contextlib.contextmanager
    def open(self, archive: str, overwrite: bool) -> Iterator[None]:
        """Start, or go on with what is there. For one run at a time.

        Args:
            archive: What the archive is, to tell whether parts belong to it.
            overwrite: Whether to replace what is there.

        Raises:
            BlockingIOError: If another run writes the file.
            ValueError: If there are labels of another map or legend.
        """
        self._replaced = overwrite
        if not self.folder.exists():
            self._check_file()  # before it is
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        # It does not outlive its process, unlike a file that is there or not
        with (self.folder / 'lock').open('w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(f'another run is writing {self.path}') from error
            if overwrite:
                for part in self.folder.glob('*.parquet'):
                    part.unlink()
            self._check(archive, overwrite)
            yield

    def _check(self, archive: str, overwrite: bool) -> None:
        """Raise an error if what is there is something else."""
        origin = {
            'archive': archive,
            'year': self.year,
            'product': self.product,
            'version': _VERSION,
        }
        # Without parts, it is left over from a run that did nothing: a wrong command
        if any(self.folder.glob('*.parquet')) and self._manifest.exists():
            there = json.loads(self._manifest.read_text())
            for key, value in origin.items():
                # Versions that knew WorldCover only did not note the product
                if there.get(key, value) != value:
                    raise ValueError(
                        f'{self.folder} has parts of an interrupted run with {key} = '
                        f'{there.get(key)}, this one has {value}. {_REMEDY}'
                    )
        else:
            there = {**origin, 'overwrite': overwrite, 'tiles': []}
            _write(self._manifest, json.dumps(there).encode())
        self._replaced = there.get('overwrite', False)
        self._check_file()

    def _check_file(self) -> None:
        """Raise an error if the file has other labels, or none."""
        if self._there():
            there = self.about()
            for key, value in self._origin().items():
                if there.get(key) != value:
                    raise ValueError(
                        f'{self.path} has labels with {key} = {there.get(key)}, this run '
                        f'has {value}. {_REMEDY}'
                    )

    def _there(self) -> bool:
        """Whether there is a file that is not to be replaced."""
        return self.path.exists() and not self._replaced

    def about(self) -> dict[str, Any]:
        """What the file says about itself.

        Raises:
            ValueError: If it is no file of labels.
        """
        try:
            metadata = pq.read_schema(self.path).metadata or {}
            return dict(json.loads(metadata[b'labels']))
        except (KeyError, pa.ArrowInvalid) as error:
            raise ValueError(
                f'{self.path} is there, but is no file of labels. {_REMEDY}'
            ) from error

    def _origin(self) -> dict[str, Any]:
        """What labels must have in common."""
        names = map(str, self.legend.codes)
        classes = self.legend.class_names
        return {
            'version': _VERSION,
            'product': self.product,
            'legend': self.legend.name,
            'classes': dict(zip(names, classes, strict=True)),
        }

    def labels(self) -> pa.Table | None:
        """The file, None if there is none."""
        return pq.read_table(self.path) if self._there() else None

    def parts(self, kind: Literal['counts', 'footprints']) -> pa.Table:
        """Rows of all parts of a kind, those that were written last first."""
        schema = SCHEMA if kind == 'footprints' else counts_schema(len(self.of_code))
        tables = [schema.empty_table()]
        for path in sorted(self.folder.glob(f'{kind}-*.parquet'), reverse=True):
            try:
                tables.append(pq.read_table(path).cast(schema))
            except (pa.ArrowInvalid, OSError):
                path.unlink()  # cut off by a power failure, so it is done again
        return pa.concat_tables(tables).unify_dictionaries()

    def start_counting(self, tiles: Sequence[str]) -> None:
        """Drop counts that lack data, if there are tiles they were not made with.

        Args:
            tiles: Names of the tiles that are there.
        """
        origin = json.loads(self._manifest.read_text())
        if not set(tiles) <= set(origin.get('tiles', ())):
            for path in self.folder.glob('counts-*.parquet'):
                part = pq.read_table(path)
                whole = _by_code(part).sum(1) == part['pixels'].to_numpy()
                if not whole.all():
                    with whole_file(path) as unfinished:
                        pq.write_table(
                            part.filter(pa.array(whole)), unfinished, compression='zstd'
                        )
        # Not before: a run that is killed in between drops them once more
        _write(self._manifest, json.dumps({**origin, 'tiles': [*tiles]}).encode())

    def append(self, kind: Literal['counts', 'footprints'], table: pa.Table) -> None:
        """Write a part.

        Args:
            kind: Kind of the part.
            table: Its rows.
        """
        last = max(self.folder.glob(f'{kind}-*.parquet'), default=None)
        number = 0 if last is None else int(last.stem.rpartition('-')[2]) + 1
        path = self.folder / f'{kind}-{number:08d}.parquet'
        with whole_file(path) as unfinished:
            pq.write_table(table, unfinished, compression='zstd')

    def finish(
        self,
        ids: pa.StringArray,
        footprints: pa.Table,
        failures: Mapping[str, str],
        about: Mapping[str, Any],
    ) -> int:
        """Make the file of its parts.

        Args:
            ids: All patches of the archive, in order.
            footprints: Footprints of the patches that have parts.
            failures: Why patches have no label.
            about: What else the file should say about itself.

        Returns:
            Number of rows.
        """
        before, counts = self.labels(), self.parts('counts')
        schema = self._schema({**self._origin(), **about})
        rows = 0
        with whole_file(self.path) as unfinished:
            with pq.ParquetWriter(unfinished, schema, compression='zstd') as writer:
                for start in range(0, len(ids), _ROWS):
                    chunk = ids.slice(start, _ROWS)
                    table = self._rows(chunk, before, counts, footprints, schema)
                    writer.write_table(table)
                    rows += len(table)
            # Before the file: when it is there, all is
            self._write_failures(ids, failures)
        shutil.rmtree(self.folder)
        return rows

    def _rows(
        self,
        ids: pa.StringArray,
        before: pa.Table | None,
        counts: pa.Table,
        footprints: pa.Table,
        schema: pa.Schema,
    ) -> pa.Table:
        """Rows of the file, from parts or else from the file before."""
        position = pc.index_in(ids, counts['id'].combine_chunks())
        new = pc.is_valid(position)
        mine = counts.take(position.filter(new))
        where = pc.index_in(ids.filter(new), footprints['id'].combine_chunks())
        tables = [self._make(mine, footprints.take(where)).cast(schema)]
        if before is not None:
            old = ids.filter(pc.invert(new))
            position = pc.index_in(old, before['id'].combine_chunks()).drop_null()
            tables.append(before.take(position).cast(schema))
        table = pa.concat_tables(tables)
        order = pc.index_in(ids, table['id'].combine_chunks()).drop_null()
        return table.take(order)

    def _make(self, counts: pa.Table, footprints: pa.Table) -> pa.Table:
        """Columns of the file."""
        values = self._to_legend(counts)
        pixels = counts['pixels'].to_numpy()
        found = values.sum(1)
        columns: dict[str, Any] = {
            'id': counts['id'],
            'product': pa.array([self.product] * len(counts), pa.string()),
            'crs': footprints['crs'].cast(pa.string()),
            'pixels': pixels,
            'valid': (found / np.maximum(pixels, 1)).astype(np.float32),
        }
        for code, column in zip(self.legend.codes, values.T, strict=True):
            columns[f'count_{code}'] = column
        shares = (values / np.maximum(found, 1)[:, None]).astype(np.float32)
        for code, column in zip(self.legend.codes, shares.T, strict=True):
            columns[f'fraction_{code}'] = column
        columns['geometry'] = pa.array(
            shapely.to_wkb(outlines(footprints)), pa.binary()
        )
        return pa.table(columns)

    def _to_legend(self, counts: pa.Table) -> Any:
        """Counts of the legend's classes, of shape (N, K)."""
        values = np.zeros((len(counts), len(self.legend.codes)), np.int64)
        columns = _by_code(counts).T
        for target, column in zip(self.of_code.values(), columns, strict=True):
            values[:, self.legend.codes.index(target)] += column
        return values

    def _schema(self, about: Mapping[str, Any]) -> pa.Schema:
        """Columns of the file, with what GeoParquet wants to know about them."""
        codes = self.legend.codes
        geo = {
            'version': '1.0.0',
            'primary_column': 'geometry',
            'columns': {
                'geometry': {
                    'encoding': 'WKB',
                    'geometry_types': [],
                    'crs': CRS.from_user_input(LONLAT).to_json_dict(),
                }
            },
        }
        return pa.schema(
            [
                ('id', pa.string()),
                ('product', pa.string()),
                ('crs', pa.string()),
                ('pixels', pa.int64()),
                ('valid', pa.float32()),
                *((f'count_{code}', pa.int64()) for code in codes),
                *((f'fraction_{code}', pa.float32()) for code in codes),
                ('geometry', pa.binary()),
            ],
            {'geo': json.dumps(geo), 'labels': json.dumps(about)},
        )

    def _write_failures(self, ids: pa.StringArray, failures: Mapping[str, str]) -> None:
        """Write the table of what failed, or remove that of an earlier run."""
        if not failures:
            self.failures.unlink(missing_ok=True)
            return
        with (
            whole_file(self.failures) as unfinished,
            unfinished.open('w', newline='') as file,
        ):
            writer = csv.writer(file)
            writer.writerow(['id', 'reason'])
            for name in ids.to_pylist():
                if name in failures:
                    writer.writerow([name, failures[name]])


def counts_table(ids: pa.Array, counted: Counted) -> pa.Table:
    """Counts as a part.

    Args:
        ids: Patches, in the order of the counts.
        counted: The counts.

    Returns:
        Rows of the patches that have counts.
    """
    good = np.ones(len(ids), bool)
    good[list(counted.reasons)] = False
    flat = pa.array(counted.counts[good].reshape(-1))
    return pa.table(
        [
            ids.filter(pa.array(good)),
            pa.array(counted.pixels[good]),
            pa.FixedSizeListArray.from_arrays(flat, counted.counts.shape[1]),
        ],
        schema=counts_schema(counted.counts.shape[1]),
    )


def counts_schema(classes: int) -> pa.Schema:
    """Return the columns of the parts with counts of a number of classes."""
    counts = pa.list_(pa.int64(), classes)
    return pa.schema({'id': pa.string(), 'pixels': pa.int64(), 'counts': counts})


def _by_code(counts: pa.Table) -> Counts:
    """Counts of a part, of shape (N, K)."""
    column = counts['counts'].combine_chunks()
    return np.asarray(column.flatten()).reshape(-1, column.type.list_size)


def _write(path: Path, data: bytes) -> None:
    with whole_file(path) as unfinished:
        unfinished.write_bytes(data)
