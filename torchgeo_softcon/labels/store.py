# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files of labels: as Parquet, which is resumable, and in the structure of SSL4EO-S12-ML."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from ..geo.footprints import SCHEMA, outlines
from ..landcover.product import LandCoverProduct
from ..storage.resumable import REMEDY, ResumableParquet
from ..storage.whole_file import whole_file
from .counting import Counted, Counts

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
        counts = _in_order(ids, self.read_parts('counts'))
        table = self._to_labels(counts, _in_order(counts['id'], footprints))
        if self.exists:
            table = pa.concat_tables([table, self.labels()])
        return self.finish([_in_order(ids, table).cast(schema)], schema)

    def _to_labels(self, counts: pa.Table, footprints: pa.Table) -> pa.Table:
        """Make rows of the file of counts, and of the footprints in the same order."""
        values = np.zeros((len(counts), len(self.legend.codes)), np.int64)
        by_code = _by_code(counts).T
        for target, column in zip(self.of_code.values(), by_code, strict=True):
            values[:, self.legend.codes.index(target)] += column
        editions = [self.product] * len(counts)
        if len(self.editions) > 1:
            editions = [self.editions[year] for year in counts['year'].to_pylist()]
        pixels = counts['pixels'].to_numpy()
        found = values.sum(1)
        shares = (values / np.maximum(found, 1)[:, None]).astype(np.float32)
        columns: list[Any] = [
            counts['id'],
            pa.array(editions, pa.string()),
            footprints['crs'].cast(pa.string()),
            pixels,
            (found / np.maximum(pixels, 1)).astype(np.float32),
            *values.T,
            *shares.T,
            pa.array(shapely.to_wkb(outlines(footprints)), pa.binary()),
        ]
        return pa.table(columns, schema=self._schema())

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
        names = [name for name in ids.to_pylist() if name in failures]
        table = pd.DataFrame({'id': names, 'reason': [failures[n] for n in names]})
        with whole_file(self.failures) as unfinished:
            table.to_csv(unfinished, index=False, lineterminator='\r\n')


def _in_order(ids: pa.Array | pa.ChunkedArray, table: pa.Table) -> pa.Table:
    """Return the first row of a table with each of some ids, if there is one."""
    return table.take(pc.index_in(ids, table['id']).drop_null())


def _by_code(counts: pa.Table) -> Counts:
    """Return the counts of a part, of shape (N, K)."""
    column = counts['counts'].combine_chunks()
    return np.asarray(column.flatten()).reshape(-1, column.type.list_size)


def write_json(
    labels: str | os.PathLike[str],
    out: str | os.PathLike[str],
    min_fraction: float = 0.05,
    min_valid: float = 0.5,
) -> None:
    """Write which classes the patches have: ``{location: {season id: [class, ...]}}``.

    A location is the last folder of an id, a season id its last part. For SSL4EO-S12, these
    are the folders of the location and of the date. An id without folders is both. Classes
    are codes of the legend, from the lowest to the highest. Patches with too few valid
    pixels have none: unknown.

    Args:
        labels: A file of labels.
        out: The file to write.
        min_fraction: Smallest share of the valid pixels that a class must cover.
        min_valid: Smallest share of the pixels that must be valid.

    Raises:
        ValueError: If patches of one location and season have different classes.
    """
    locations: dict[str, dict[str, list[int]]] = {}
    with pq.ParquetFile(labels) as file:
        names = [n for n in file.schema_arrow.names if n.startswith('fraction_')]
        codes = np.array([int(name.removeprefix('fraction_')) for name in names])
        for batch in file.iter_batches(columns=['id', 'valid', *names]):
            shares = np.stack([batch[name].to_numpy() for name in names], 1)
            present = (shares >= np.float32(min_fraction)) & (
                batch['valid'].to_numpy() >= np.float32(min_valid)
            )[:, None]
            for name, row in zip(batch['id'].to_pylist(), present, strict=True):
                location, season = _location(name)
                classes = codes[row].tolist()
                # Products of one image have the same classes, and are one
                if locations.setdefault(location, {}).setdefault(season, classes) != (
                    classes
                ):
                    raise ValueError(
                        f'labels have different classes for {location}/{season}, the '
                        f'last folder and the name of {name} and of another patch: '
                        f'JSON cannot have both, use the Parquet file {labels}'
                    )
    with whole_file(Path(out)) as unfinished:
        unfinished.write_text(json.dumps(locations))


def check_locations(ids: Iterable[str]) -> None:
    """Refuse ids that are one location and season in JSON, where one would be lost."""
    first: dict[tuple[str, str], str] = {}
    twice = [
        (name, other)
        for name in ids
        if (other := first.setdefault(_location(name), name)) != name
    ]
    if twice:
        examples = ', '.join(f'{name} (as {other})' for name, other in twice[:3])
        raise ValueError(
            'ids must differ in their last folder or name, which are the location and the '
            f'season in JSON, {len(twice)} do not, such as {examples}: write Parquet'
        )


def _location(name: str) -> tuple[str, str]:
    """Return the location and the season id of a patch."""
    folders, _, season = name.rpartition('/')
    return folders.rpartition('/')[2] or season, season
