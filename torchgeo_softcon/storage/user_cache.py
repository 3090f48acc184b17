# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Tables about many files, kept for the next start in the user's cache folder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .lock import exclusive
from .whole_file import whole_file

_METADATA = b'torchgeo_softcon'

#: Files that are read at once: most of the time goes into waiting for a disk.
_THREADS = 8

#: From so many files on, a bar is shown.
_MANY = 100

#: What tells a file from another one of the same name: path, size, time of change in ns.
Stamp = tuple[str, int, int]


def cache_folder() -> Path:
    """Return ``TORCHGEO_SOFTCON_CACHE``, by default ``~/.cache/torchgeo_softcon``."""
    folder = os.environ.get('TORCHGEO_SOFTCON_CACHE', '~/.cache/torchgeo_softcon')
    return Path(folder).expanduser()


def file_stamp(path: str) -> Stamp:
    """Return what tells a file from another one of the same name."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


def describe_files(
    kind: str,
    files: Sequence[str],
    describe: Callable[[str], pa.Table],
    threads: int = _THREADS,
) -> pa.Table:
    """Describe files, each of them only once as long as its size and time are the same.

    Of several processes that start together, one reads the files and all others wait for
    it. Without a cache folder that can be written, every start reads them.

    Args:
        kind: Name and version of what *describe* makes.
        files: Their paths, at least one.
        describe: Makes rows of a file, always of one schema.
        threads: Number of files that are read at once.

    Returns:
        The rows of all files in their order, with the position of the file as *file*.
    """
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.dirname(paths[0])
    with contextlib.suppress(ValueError):  # on different drives
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:20]
    index = cache_folder() / f'{kind}-{name}.parquet'
    stamps = [file_stamp(path) for path in paths]
    known, rows = _load(index)
    if not known.keys() >= {*stamps}:
        with _alone(index):
            known, rows = _load(index)
            known, rows = _add(index, known, rows, stamps, describe, threads)
    assert rows is not None
    position = np.full(len(known), -1)
    position[[known[stamp] for stamp in stamps]] = np.arange(len(stamps))
    where = position[rows['file'].to_numpy()]
    order = np.argsort(where, kind='stable')[np.count_nonzero(where < 0) :]
    chosen = rows.take(pa.array(order))
    column = chosen.column_names.index('file')
    return chosen.set_column(column, 'file', pa.array(where[order], pa.int32()))


def _load(index: Path) -> tuple[dict[Stamp, int], pa.Table | None]:
    """Return the numbers of the files in a cached table, and its rows."""
    try:
        rows = pq.read_table(index)
        stamps = json.loads(rows.schema.metadata[_METADATA])
        return {tuple(stamp): number for number, stamp in enumerate(stamps)}, rows
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException):
        return {}, None  # missing or damaged: it is made again


@contextlib.contextmanager
def _alone(index: Path) -> Iterator[None]:
    """Hold the lock of a cached table, if there can be one."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            index.parent.mkdir(parents=True, exist_ok=True)
            lock = index.with_suffix('.lock')
            stack.enter_context(exclusive(lock, index, wait=True))
        yield


def _add(
    index: Path,
    known: dict[Stamp, int],
    rows: pa.Table | None,
    asked: Sequence[Stamp],
    describe: Callable[[str], pa.Table],
    threads: int,
) -> tuple[dict[Stamp, int], pa.Table]:
    """Read files that are not in a cached table, and write it again with their rows."""
    new = [stamp for stamp in asked if stamp not in known]
    replaced = {path for path, *_ in new}
    kept = [stamp for stamp in known if stamp[0] not in replaced]
    tables = []
    if rows is not None:
        renumber = np.full(len(known), -1)
        renumber[[known[stamp] for stamp in kept]] = np.arange(len(kept))
        numbers = renumber[rows['file'].to_numpy()]
        column = rows.column_names.index('file')
        rows = rows.set_column(column, 'file', pa.array(numbers, pa.int32()))
        tables.append(rows.filter(pa.array(numbers >= 0)).replace_schema_metadata())
    stamps = kept[:]
    with ThreadPoolExecutor(threads) as pool:
        described = pool.map(describe, [path for path, *_ in new])
        bar = tqdm(described, f'index {index.stem}', len(new), disable=len(new) < _MANY)
        try:
            for stamp, table in zip(new, bar, strict=True):
                file = pa.array(np.full(len(table), len(stamps)), pa.int32())
                tables.append(table.append_column('file', file))
                stamps.append(stamp)
        finally:  # a file that cannot be read must not cost the others
            everything = pa.concat_tables(tables).combine_chunks() if tables else rows
            if everything is not None:
                metadata = {_METADATA: json.dumps(stamps)}
                everything = everything.replace_schema_metadata(metadata)
                with contextlib.suppress(OSError), whole_file(index) as unfinished:
                    pq.write_table(everything, unfinished, compression='zstd')
    return {stamp: number for number, stamp in enumerate(stamps)}, everything
