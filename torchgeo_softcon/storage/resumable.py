# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A Parquet file that is written in parts, so that an interrupted run can go on."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .lock import exclusive
from .parquet import write_parquet
from .whole_file import whole_file

#: Rows of a part.
ROWS = 4096

#: What to do about something else at the place of a file.
REMEDY = 'Choose another file, or set overwrite to replace it'


class ResumableParquet:
    """A Parquet file, and the folder of its parts while it is not complete.

    A Parquet file has its index at the end and is of no use without it. Its parts are
    complete files, and get their names only when they are: whenever a run is killed, the
    next one goes on with them. A file that is to be replaced stays until then.
    """

    #: Notes in the manifest, besides what the rows are made from.
    notes: tuple[str, ...] = ('overwrite',)

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        """Initialize a new ResumableParquet instance."""
        self.path = path
        self.folder = path.with_name(f'{path.name}.parts')
        self.origin = {key: str(value) for key, value in origin.items()}
        self._manifest = self.folder / 'origin.json'
        self._replaced = False

    @contextlib.contextmanager
    def open(self, overwrite: bool = False) -> Iterator[None]:
        """Start, or go on with the parts that are there. For one run at a time."""
        self._replaced = overwrite
        if not self.folder.exists():
            self.check_file()
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive(self.folder / 'lock', self.path):
            if overwrite:
                for part in self.part_files():
                    part.unlink()
            self._check_parts()
            self.check_file()
            yield

    @property
    def exists(self) -> bool:
        """Whether there is a file that is not to be replaced."""
        return self.path.exists() and not self._replaced

    def check_file(self) -> None:
        """Refuse to write where there is a file."""
        if self.exists:
            raise FileExistsError(f'{self.path} exists already. {REMEDY}')

    def _check_parts(self) -> None:
        """Refuse parts of something else, and delete those that are cut off."""
        # Without parts, it does not matter what was about to be written
        if not self.part_files():
            self._manifest.unlink(missing_ok=True)
            self.note(**self.origin, overwrite=self._replaced)
            return
        there = self.noted()
        self._replaced = there.get('overwrite', False)
        differ = [
            f'{key} = {there.get(key)}, not {self.origin.get(key)}'
            for key in {**there, **self.origin}
            if key not in self.notes
            and str(there.get(key)) != self.origin.get(key, 'None')
        ]
        if differ:
            raise ValueError(
                f'{self.folder} has parts of an interrupted run with {"; ".join(differ)}. '
                f'{REMEDY}'
            )
        cut_off: set[str] = set()
        for part in self.part_files():
            kind, _ = _numbered(part)
            try:
                pq.read_metadata(part)
            except (pa.ArrowInvalid, OSError):
                cut_off.add(kind)
            # Rows are numbered through: what comes after is done again, too
            if kind in cut_off:
                part.unlink()

    def note(self, **notes: Any) -> None:
        """Write values of :attr:`notes` to the manifest."""
        content = json.dumps({**self.noted(), **notes}, indent=2)
        with whole_file(self._manifest) as unfinished:
            unfinished.write_text(content)

    def noted(self) -> dict[str, Any]:
        """Read the manifest."""
        there = self._manifest.exists()
        return dict(json.loads(self._manifest.read_text())) if there else {}

    def part_files(self, kind: str = '*') -> list[Path]:
        """List the parts, of one kind or of all, in the order in which they were written."""
        return sorted(self.folder.glob(f'{kind}-*.parquet'), key=_numbered)

    def count_rows(self, kind: str = '*') -> int:
        """Count the rows of the parts, of one kind or of all."""
        return sum(pq.read_metadata(part).num_rows for part in self.part_files(kind))

    def append(self, kind: str, table: pa.Table) -> None:
        """Write a part with the columns of those before. Every process has its kinds."""
        number, before = 0, self.part_files(kind)
        if before:
            number = _numbered(before[-1])[1] + 1
            columns = pq.read_schema(before[0])
            if not columns.equals(table.schema):
                raise ValueError(
                    f'the columns {table.schema.names} are not those of the parts that '
                    f'are written already, {columns.names}. All samples must have the '
                    'same keys, and all features the same size'
                )
        with whole_file(self.folder / f'{kind}-{number:08d}.parquet') as unfinished:
            pq.write_table(table, unfinished, compression='zstd')

    def finish(self, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
        """Write the file as :func:`.write_parquet` does, and delete the parts."""
        rows = write_parquet(self.path, tables, schema)
        shutil.rmtree(self.folder, ignore_errors=True)
        return rows

    def join(
        self, samples: int, arrange: Callable[[pa.Table], pa.Table] | None = None
    ) -> int:
        """Make the file of the parts of all kinds, which must have a row per sample.

        *arrange* makes the table to write of that of all rows.
        """
        part_files, rows = self.part_files(), self.count_rows()
        if rows != samples:
            raise ValueError(
                f'{self.folder} has {rows} rows, but there are {samples} samples: the data '
                'have changed, or another program has written there. Set overwrite to '
                'start again'
            )
        if not rows:
            raise ValueError(f'there are no rows to write to {self.path}')
        parts = [pq.read_table(p).replace_schema_metadata(None) for p in part_files]
        table = pa.concat_tables(parts)
        table = table if arrange is None else arrange(table)
        return self.finish([table], table.schema)


def _numbered(part: Path) -> tuple[str, int]:
    """Return the kind and the number of a part."""
    kind, _, number = part.stem.rpartition('-')
    return kind, int(number)
