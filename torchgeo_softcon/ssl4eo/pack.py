# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SSL4EO-S12 in few large files that are mapped into memory: ``torchgeo-softcon pack``."""

import csv
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ..storage.lock import exclusive
from .labels import SeasonLabels, match_labels, read_labels
from .record_archive import (
    SCHEMA,
    RecordArchive,
    checksum,
    find_splits,
    has_records,
    index_path,
    read_metadata,
    shard_path,
    write_index,
    write_records,
)
from .tiffs import BANDS, TiffArchive, split_names

#: Images per file. Those of Sentinel-2 take 200 MB, which is also what a process holds in
#: memory and what is lost if it is killed.
SHARD_SIZE = 256

#: Files of one shard: records, their rows, and either of them unfinished.
_SHARD_FILE = re.compile(r'([0-9]{5,})\.(npy|parquet)(\.tmp)?')


@dataclass(frozen=True)
class Failure:
    """An image that could not be read: its location, its name, and the reason."""

    id: str
    season: str
    reason: str


#: The number of a file of records, and the numbers of its images in the archive.
_Shard = tuple[int, npt.NDArray[np.int64]]


def pack(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | Sequence[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    workers: int = 1,
    shard_size: int = SHARD_SIZE,
    progress: bool = False,
) -> list[Failure]:
    """Write the images of SSL4EO-S12 in a form that is fast to read.

    See :mod:`torchgeo_softcon.ssl4eo.record_archive` for the form. A run that was interrupted
    goes on when started again, and images that came later are added. Images that cannot
    be read are left out, listed in ``failures.csv`` and tried again by the next run.

    Args:
        root: Folder with the folders ``s1``, ``s2c`` or ``s2a``.
        out: Folder to write.
        split: Which of them, by default all that there are.
        labels: File of labels to put into the index, see :func:`.read_labels`.
        workers: Number of processes.
        shard_size: Images per file.
        progress: Whether to show a bar.

    Raises:
        BlockingIOError: If another run is writing to *out*.
        FileNotFoundError: If there are no images, or no file of labels.
        OSError: If a file cannot be written.
        ValueError: If an argument is out of range, if labels do not belong to the images,
            or if *out* holds other data.
    """
    if workers < 1 or shard_size < 1:
        raise ValueError(
            f'workers and shard_size must be at least 1, got {workers} and {shard_size}'
        )
    if Path(root).resolve() == Path(out).resolve():
        raise ValueError(f'out must be another folder than root, got {out} for both')
    if split is None:
        split = [name for name in BANDS if (Path(root) / name).is_dir()]
        if not split:
            raise FileNotFoundError(
                f'root must have a folder {", ".join(BANDS)}, found none of them in {root}'
            )
    for name in split_names(split):
        _check_ours(Path(out) / name)
    archives = [TiffArchive(root, name) for name in split_names(split)]
    table = None if labels is None else read_labels(labels)
    if table is not None:
        for archive in archives:
            # Only to find out now, and not after hours, whether they fit
            match_labels(table, archive.split, archive.location, archive.season)

    failures = []
    for archive in archives:
        folder = Path(out) / archive.split
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / '.lock', folder):
            failures += _pack_split(
                archive, folder, table, workers, shard_size, progress
            )
    return failures


def verify(
    out: str | os.PathLike[str],
    split: str | Sequence[str] | None = None,
    progress: bool = False,
) -> list[Failure]:
    """Compare all records with the checksums that were taken when they were made.

    Args:
        out: Folder of a packed archive.
        split: Which of its splits, by default all.
        progress: Whether to show a bar.

    Raises:
        FileNotFoundError: If there is no packed archive, or a file of it is missing.
    """
    failures = []
    for name in find_splits(out) if split is None else split_names(split):
        archive = RecordArchive(out, name)
        for row in tqdm(range(len(archive)), f'verify {name}', disable=not progress):
            try:
                archive.read_checked(row)
            except ValueError as error:
                failures.append(Failure(*archive.name(row), str(error)))
    return failures


def _pack_split(
    archive: TiffArchive,
    folder: Path,
    table: SeasonLabels | None,
    workers: int,
    shard_size: int,
    progress: bool,
) -> list[Failure]:
    """Write what is missing of a split, and its index."""
    index = index_path(folder.parent, archive.split)
    before, labels = _read_index(index)
    indexed, not_indexed = _resume(archive, folder, before)
    done = pa.concat_tables([indexed, *not_indexed])
    ours = pd.MultiIndex.from_arrays(
        [archive.location.astype(str), archive.season.astype(str)]
    )
    rows = np.flatnonzero(~ours.isin(_names(done)))
    if labels is not None and table is None and len(rows) + len(not_indexed):
        raise ValueError(
            f'labels must be given again: {index} has some, and there are images that it '
            'has not'
        )

    # Not those of lost files: what the index on the disk says of them must not come true
    used = {*before['shard'].to_pylist(), *done['shard'].to_pylist()}
    numbers = (n for n in itertools.count() if n not in used)
    cuts = range(0, len(rows), shard_size)
    shards = [(next(numbers), rows[c : c + shard_size]) for c in cuts]
    failures = [
        Failure(location, name, f'its record is gone, and it is not in {archive.root}')
        for location, name in _names(before)
        .difference(_names(indexed))
        .difference(ours)
    ]
    with tqdm(
        total=len(ours),
        initial=len(ours) - len(rows),
        desc=f'pack {archive.split}',
        unit='image',
        disable=not progress,
    ) as bar:
        for count, failed in _write_shards(archive, folder, shards, workers):
            failures += failed
            bar.update(count)

    _write_failures(folder / 'failures.csv', failures)
    paths = _shard_indexes(folder)
    if not paths and not len(indexed):
        raise ValueError(
            f'none of the {len(ours)} images of {archive.root} can be read, the first one '
            f'because: {failures[0].reason}'
        )
    if paths or table is not None or len(indexed) < len(before):
        joined = pa.concat_tables([indexed, *map(_read_rows, paths)])
        # The order of the images does not depend on which were packed first
        joined = joined.sort_by([('id', 'ascending'), ('season', 'ascending')])
        if table is not None:
            joined, labels = _with_labels(joined, table, archive.split)
        write_index(index, joined, labels)
    for path in paths:
        path.unlink()
    return failures


def _check_ours(folder: Path) -> None:
    """Refuse a folder that no run has written to, unless it is empty."""
    ours = [folder / '.lock', folder / 'index.parquet']
    if any(path.exists() for path in ours) or not folder.exists():
        return
    other = next(folder.iterdir(), None)
    if other is not None:
        raise ValueError(
            f'out must be a new folder or a packed archive, but there is {other}'
        )


def _read_index(index: Path) -> tuple[pa.Table, dict[str, Any] | None]:
    """Read rows of an index, none if there is no index, and what its labels are."""
    if not index.exists():
        return SCHEMA.empty_table(), None
    labels = read_metadata(index)['labels']
    return _read_rows(index), labels


def _read_rows(path: Path) -> pa.Table:
    return pq.read_table(path).replace_schema_metadata(None)


def _names(rows: pa.Table) -> pd.MultiIndex:
    """Return the location and the name of each image in rows of an index."""
    return pd.MultiIndex.from_arrays(
        [rows['id'].to_pylist(), rows['season'].to_pylist()]
    )


def _with_labels(
    rows: pa.Table, labels: SeasonLabels, split: str
) -> tuple[pa.Table, dict[str, Any]]:
    """Put labels into rows of an index."""
    location, season = (
        np.array(rows[name].to_pylist(), np.bytes_) for name in ('id', 'season')
    )
    # Not strictly: those that fit may be of images that cannot be read
    values = match_labels(labels, split, location, season, strict=False)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    column = pa.ListArray.from_arrays(offsets, values.ravel())
    position = rows.schema.get_field_index('label')
    return rows.set_column(position, SCHEMA.field('label'), column), {
        'codes': list(labels.codes),
        'shares': labels.shares,
    }


def _resume(
    archive: TiffArchive, folder: Path, indexed: pa.Table
) -> tuple[pa.Table, list[pa.Table]]:
    """Find what is packed already, and delete what a killed run left unfinished."""
    known = {*indexed['shard'].to_pylist()}
    indexed = _with_records(folder, indexed)
    not_indexed = []
    for path in _shard_indexes(folder):
        rows = _read_rows(path)
        if int(path.stem) not in known and len(_with_records(folder, rows)):
            not_indexed.append(rows)
        else:
            path.unlink()

    complete = {n for t in (indexed, *not_indexed) for n in t['shard'].to_pylist()}
    for path in folder.iterdir():
        match = _SHARD_FILE.fullmatch(path.name)
        unfinished = match is not None and (
            match[3] is not None
            or (match[2] == 'npy' and int(match[1]) not in complete)
        )
        if unfinished or path.name == 'index.parquet.tmp':
            path.unlink()
    if complete:
        dtype = np.load(shard_path(folder, min(complete)), mmap_mode='r').dtype
        if dtype != archive.dtype:
            raise ValueError(
                f'{folder} has images of another kind than {archive.root}, {dtype} and '
                f'{archive.dtype}. Choose another folder'
            )
    return indexed, not_indexed


def _with_records(folder: Path, rows: pa.Table) -> pa.Table:
    """Return the rows of an index whose file of records has all of them."""
    if not len(rows):
        return rows
    shard = rows['shard'].to_numpy()
    last = pd.Series(rows['offset'].to_numpy()).groupby(shard).max()
    whole = [
        n
        for n, offset in last.items()
        if has_records(shard_path(folder, n), offset + 1)
    ]
    return rows.filter(pa.array(np.isin(shard, whole)))


def _shard_indexes(folder: Path) -> list[Path]:
    """Return the files of rows of an index that belong to one file of records each."""
    return sorted(
        path for path in folder.glob('*.parquet') if _SHARD_FILE.fullmatch(path.name)
    )


def _write_shards(
    archive: TiffArchive, folder: Path, shards: Sequence[_Shard], workers: int
) -> Iterator[tuple[int, list[Failure]]]:
    """Write files of records, and yield how many images each had, and its failures."""
    if workers == 1 or len(shards) < 2:
        for number, rows in shards:
            yield len(rows), _write_shard(archive, folder, number, rows)
        return
    # Forks of a process with threads may hang
    context = get_context('spawn')
    with ProcessPoolExecutor(workers, context, _set_archive, (archive,)) as pool:
        jobs = {pool.submit(_write_in_worker, folder, *s): len(s[1]) for s in shards}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


#: The archive of a worker, which gets it once and not with every job.
_archive: TiffArchive


def _set_archive(archive: TiffArchive) -> None:
    global _archive
    _archive = archive


def _write_in_worker(*shard: Any) -> list[Failure]:
    return _write_shard(_archive, *shard)


def _write_shard(
    archive: TiffArchive, folder: Path, number: int, rows: npt.NDArray[np.int64]
) -> list[Failure]:
    """Write a file of records and then, as a sign that it is complete, its rows."""
    records = np.empty(len(rows), archive.dtype)
    entries: list[dict[str, Any]] = []
    failures = []
    for row in rows.tolist():
        location, season = archive.name(row)
        try:
            record, grids = archive.load(row)
        except (OSError, ValueError) as error:
            failures.append(Failure(location, season, str(error)))
            continue
        offset = len(entries)
        records[offset] = record
        entries.append(
            {
                'id': location,
                'season': season,
                'shard': number,
                'offset': offset,
                'crs': grids.crs,
                'bounds': grids.bounds,
                'transforms': [x for transform in grids.transforms for x in transform],
                'nodata': grids.nodata,
                'checksum': checksum(record),
                'label': None,
            }
        )
    if entries:
        path = shard_path(folder, number)
        write_records(path, records[: len(entries)])
        table = pa.Table.from_pylist(entries, SCHEMA)
        write_index(path.with_suffix('.parquet'), table, None)
    return failures


def _write_failures(path: Path, failures: Sequence[Failure]) -> None:
    if not failures:
        path.unlink(missing_ok=True)
        return
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['id', 'season', 'reason'])
        writer.writerows((f.id, f.season, f.reason) for f in failures)
