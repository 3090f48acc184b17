# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A Parquet file that is written in parts, so that an interrupted run can go on."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

#: Rows of a row group of the file.
ROWS = 4096


class PartedFile:
    """A Parquet file, and the folder of its parts while it is not complete.

    A Parquet file has its index at the end and is of no use without it. Parts are
    complete files, and get their names only when they are. Each process writes its own.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any], rank: int = 0) -> None:
        """Initialize a new PartedFile instance.

        Args:
            path: Path of the file.
            origin: What the rows are made from, to tell whether parts belong to it.
            rank: Number of the process.
        """
        self.path = path
        self.folder = path.with_name(f'{path.name}.parts')
        self.origin = {key: str(value) for key, value in origin.items()}
        self.rank = rank

    def open(self, overwrite: bool = False) -> None:
        """Start, or go on with what is there. For one process only.

        Args:
            overwrite: Whether to delete what is there.

        Raises:
            FileExistsError: If the file exists already.
            ValueError: If there are parts of something else.
        """
        if overwrite:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.path.exists():
            raise FileExistsError(
                f'{self.path} exists already. Choose another file, or set overwrite to '
                'replace it'
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        manifest = self.folder / 'origin.json'
        there = json.loads(manifest.read_text()) if manifest.exists() else {}
        keys = [
            k for k in {**there, **self.origin} if there.get(k) != self.origin.get(k)
        ]
        # Without parts, it does not matter what was about to be written
        if keys and self.parts():
            differ = (f'{k} = {there.get(k)}, not {self.origin.get(k)}' for k in keys)
            raise ValueError(
                f'{self.folder} has parts of an interrupted run with {"; ".join(differ)}. '
                'Choose another file, delete the folder, or set overwrite'
            )
        _write_text(manifest, json.dumps(self.origin, indent=2))

    def parts(self, rank: int | None = None) -> list[Path]:
        """Complete parts in the order of their rows, of one process or of all."""
        name = '*' if rank is None else f'{rank:05d}'
        return sorted(self.folder.glob(f'part-{name}-*.parquet'))

    def rows(self) -> int:
        """Number of rows that this process has written."""
        return sum(pq.read_metadata(part).num_rows for part in self.parts(self.rank))

    def append(self, table: pa.Table) -> None:
        """Write a part.

        Args:
            table: Rows, with the metadata of a GeoParquet file where it is one.

        Raises:
            ValueError: If its columns are not those of the parts before.
        """
        before = self.parts(self.rank)
        if before and not pq.read_schema(before[0]).equals(table.schema):
            raise ValueError(
                f'the columns {table.schema.names} are not those of the parts that are '
                f'written already, {pq.read_schema(before[0]).names}. All samples must '
                'have the same keys, and all features the same size'
            )
        path = self.folder / f'part-{self.rank:05d}-{len(before):06d}.parquet'
        unfinished = path.with_suffix('.tmp')
        pq.write_table(table, unfinished, compression='zstd')
        os.replace(unfinished, path)

    def close(self) -> int:
        """Join the parts of all processes. For one process only.

        Returns:
            Number of rows.

        Raises:
            ValueError: If there are none.
        """
        parts = self.parts()
        if not parts:
            raise ValueError(f'there are no rows to write to {self.path}')
        schema = pq.read_schema(parts[0])
        geo = [
            json.loads((pq.read_schema(p).metadata or {}).get(b'geo', b'{}'))
            for p in parts
        ]
        if geo[0]:
            column = geo[0]['columns']['geometry']
            boxes = [g['columns']['geometry']['bbox'] for g in geo]
            low, high = zip(*((b[:2], b[2:]) for b in boxes), strict=True)
            column['bbox'] = [*map(min, zip(*low, strict=True))]
            column['bbox'] += map(max, zip(*high, strict=True))
            schema = schema.with_metadata({'geo': json.dumps(geo[0])})

        rows = 0
        unfinished = self.path.with_name(f'{self.path.name}.tmp')
        with pq.ParquetWriter(unfinished, schema, compression='zstd') as writer:
            for table in _groups(parts):
                writer.write_table(table.replace_schema_metadata(schema.metadata))
                rows += table.num_rows
        os.replace(unfinished, self.path)
        shutil.rmtree(self.folder)
        return rows


def _groups(parts: list[Path]) -> Iterator[pa.Table]:
    """Rows of all parts, in tables that are worth a row group."""
    held: list[pa.Table] = []
    for part in parts:
        held.append(pq.read_table(part).replace_schema_metadata(None))
        if sum(table.num_rows for table in held) >= ROWS:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_suffix('.tmp')
    unfinished.write_text(text)
    os.replace(unfinished, path)
