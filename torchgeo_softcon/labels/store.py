# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A file of labels, and the folder of its parts while it is not complete.

The file is the same, whether the run was interrupted or not.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from ..geo.footprints import SCHEMA, outlines
from ..landcover.product import LandCoverProduct
from ..storage.resumable import REMEDY, ResumableParquet
from ..storage.whole_file import whole_file
from .counting import Counted, Counts

#: Rows of a row group of the file.
_ROWS = 2**16

#: Version of the columns of the file.
_VERSION = 1


class LabelStore(ResumableParquet):
    """Labels that are done: in the file, and in parts."""

    # The tiles that the counts were made with
    notes = ('overwrite', 'tiles')

    def __init__(
        self,
        path: Path,
        archive: str,
        legend: LandCoverProduct,
        of_code: Mapping[int, int],
        year: int | str | None,
        editions: Mapping[int | None, str],
    ) -> None:
        """Initialize a new LabelStore instance, for editions of a product by year."""
        product = next(iter(editions.values()))
        if len(editions) > 1:
            product = f'{" and ".join(editions.values())}, of the nearest year'
        self.editions = editions
        origin = {'archive': archive, 'year': year, 'product': product}
        super().__init__(path, {**origin, 'version': _VERSION})
        self.failures = path.with_name(f'{path.stem}.failed.csv')
        self.legend, self.of_code, self.product = legend, of_code, product

    def noted(self) -> dict[str, Any]:
        """Read the manifest. Versions that knew one product did not note it."""
        there = super().noted()
        return {'product': self.product, **there} if there else {}

    def check_file(self) -> None:
        """Refuse to go on with a file of other labels, or of none."""
        if self.exists:
            there = self.about()
            for key, value in self._in_common().items():
                if there.get(key) != value:
                    raise ValueError(
                        f'{self.path} has labels with {key} = {there.get(key)}, this run '
                        f'has {value}. {REMEDY}'
                    )

    def about(self) -> dict[str, Any]:
        """Read what the file says about itself."""
        try:
            metadata = pq.read_schema(self.path).metadata or {}
            return dict(json.loads(metadata[b'labels']))
        except (KeyError, pa.ArrowInvalid) as error:
            raise ValueError(
                f'{self.path} is there, but is no file of labels. {REMEDY}'
            ) from error

    def _in_common(self) -> dict[str, Any]:
        """Return what all labels of a file must have in common."""
        names = map(str, self.legend.codes)
        classes = self.legend.class_names
        return {
            'version': _VERSION,
            'product': self.product,
            'legend': self.legend.name,
            'classes': dict(zip(names, classes, strict=True)),
        }

    def labels(self) -> pa.Table | None:
        """Read the file, None if there is none."""
        if not self.exists:
            return None
        return pq.read_table(self.path, columns=self._schema().names)

    def read_parts(self, kind: Literal['counts', 'footprints']) -> pa.Table:
        """Read all parts of a kind, those that were written last first."""
        schema = SCHEMA if kind == 'footprints' else self.counts_schema()
        tables = [pq.read_table(part).cast(schema) for part in self.part_files(kind)]
        tables.append(schema.empty_table())
        return pa.concat_tables(tables[::-1]).unify_dictionaries()

    def counts_schema(self) -> pa.Schema:
        """Return the columns of the parts with counts."""
        counts = pa.list_(pa.int64(), len(self.of_code))
        schema = pa.schema({'id': pa.string(), 'pixels': pa.int64(), 'counts': counts})
        dated = len(self.editions) > 1
        return schema.append(pa.field('year', pa.int32())) if dated else schema

    def append_counts(self, ids: pa.Array, counted: Counted, year: int | None) -> int:
        """Keep counts, but of patches that have none, and return of how many."""
        good = np.ones(len(ids), bool)
        good[list(counted.reasons)] = False
        flat = pa.array(counted.counts[good].reshape(-1))
        columns = [
            ids.filter(pa.array(good)),
            pa.array(counted.pixels[good]),
            pa.FixedSizeListArray.from_arrays(flat, counted.counts.shape[1]),
            pa.array([year] * int(good.sum()), pa.int32()),
        ]
        schema = self.counts_schema()
        self.append('counts', pa.table(columns[: len(schema)], schema=schema))
        return int(good.sum())

    def start_counting(self, tiles: Sequence[str]) -> None:
        """Drop counts that lack data, if there are tiles they were not made with."""
        if not set(tiles) <= set(self.noted().get('tiles', ())):
            for path in self.part_files('counts'):
                part = pq.read_table(path)
                complete = _by_code(part).sum(1) == part['pixels'].to_numpy()
                if not complete.all():
                    with whole_file(path) as unfinished:
                        kept = part.filter(pa.array(complete))
                        pq.write_table(kept, unfinished, compression='zstd')
        # Not before: a run that is killed in between drops them once more
        self.note(tiles=[*tiles])

    def write(
        self,
        ids: pa.StringArray,
        footprints: pa.Table,
        failures: Mapping[str, str],
        tiles: Sequence[str],
    ) -> int:
        """Make the file of its parts, and of the file that is there."""
        about = {**self._in_common(), 'tiles': [*tiles]}
        schema = self._schema().with_metadata({'labels': json.dumps(about)})
        # Before the file: when it is there, all is
        self._write_failures(ids, failures)
        return self.finish(self._row_groups(ids, footprints), schema)

    def _row_groups(
        self, ids: pa.StringArray, footprints: pa.Table
    ) -> Iterator[pa.Table]:
        """Make the rows of the file, from parts or else from the file before."""
        before, counts = self.labels(), self.read_parts('counts')
        schema = self._schema()
        for start in range(0, len(ids), _ROWS):
            chunk = ids.slice(start, _ROWS)
            position = pc.index_in(chunk, counts['id'].combine_chunks())
            new = pc.is_valid(position)
            counted = counts.take(position.filter(new))
            where = pc.index_in(chunk.filter(new), footprints['id'].combine_chunks())
            table = self._to_labels(counted, footprints.take(where)).cast(schema)
            if before is not None:
                old = chunk.filter(pc.invert(new))
                position = pc.index_in(old, before['id'].combine_chunks()).drop_null()
                table = pa.concat_tables([table, before.take(position).cast(schema)])
            order = pc.index_in(chunk, table['id'].combine_chunks()).drop_null()
            yield table.take(order)

    def _to_labels(self, counts: pa.Table, footprints: pa.Table) -> pa.Table:
        """Make rows of the file of counts, and of the footprints in the same order."""
        values = self._to_legend(counts)
        pixels = counts['pixels'].to_numpy()
        found = values.sum(1)
        shares = (values / np.maximum(found, 1)[:, None]).astype(np.float32)
        columns: list[Any] = [
            counts['id'],
            pa.array(self._editions(counts), pa.string()),
            footprints['crs'].cast(pa.string()),
            pixels,
            (found / np.maximum(pixels, 1)).astype(np.float32),
            *values.T,
            *shares.T,
            pa.array(shapely.to_wkb(outlines(footprints)), pa.binary()),
        ]
        return pa.table(columns, names=self._schema().names)

    def _editions(self, counts: pa.Table) -> list[str]:
        """Return the map, with its year, that each row was counted in."""
        if len(self.editions) == 1:
            return [self.product] * len(counts)
        return [self.editions[year] for year in counts['year'].to_pylist()]

    def _to_legend(self, counts: pa.Table) -> Any:
        """Add up counts for the legend's classes, of shape (N, K)."""
        values = np.zeros((len(counts), len(self.legend.codes)), np.int64)
        columns = _by_code(counts).T
        for target, column in zip(self.of_code.values(), columns, strict=True):
            values[:, self.legend.codes.index(target)] += column
        return values

    def _schema(self) -> pa.Schema:
        """Return the columns of the file."""
        codes = self.legend.codes
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
            ]
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
            writer.writerows(
                (name, failures[name]) for name in ids.to_pylist() if name in failures
            )


def _by_code(counts: pa.Table) -> Counts:
    """Return the counts of a part, of shape (N, K)."""
    column = counts['counts'].combine_chunks()
    return np.asarray(column.flatten()).reshape(-1, column.type.list_size)
