# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Tables about many files, kept for the next start in the user's cache folder."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from .lock import exclusive
from .whole_file import whole_file

#: Files that are read at once: most of the time goes into waiting for a disk.
_THREADS = 8

#: From so many files on, a bar is shown.
_MANY = 100


def cache_folder() -> Path:
    """Return ``TORCHGEO_SOFTCON_CACHE``, by default ``~/.cache/torchgeo_softcon``."""
    folder = os.environ.get('TORCHGEO_SOFTCON_CACHE', '~/.cache/torchgeo_softcon')
    return Path(folder).expanduser()


def file_stamp(path: str) -> tuple[str, int, int]:
    """Return the path, size and time of change in ns of a file."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


def file_stamps(paths: Iterable[str]) -> list[list[Any]]:
    """Return the stamps of files, each followed by those of the files that belong to it.

    These lie beside it, and their names begin like its own: ``a.tif.msk``, ``a.tfw``.
    """
    list_folder = functools.cache(_names_by_stem)
    stamps = []
    for path in paths:
        folder, name = os.path.split(path)
        names = list_folder(folder)[os.path.splitext(name)[0]]
        others = (os.path.join(folder, other) for other in names if other != name)
        beside = [list(file_stamp(other)) for other in others if os.path.isfile(other)]
        stamps.append([*file_stamp(path), *beside])
    return stamps


def _names_by_stem(folder: str) -> dict[str, list[str]]:
    """List a folder by what stands before any point of a name."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(os.listdir(folder or '.')):
        for point in re.finditer(r'\.', name):
            names[name[: point.start()]].append(name)
    return names


def describe_files(
    kind: str,
    files: Sequence[str],
    describe: Callable[[str], pa.Table],
    threads: int = _THREADS,
) -> pa.Table:
    """Describe files, each of them only once as long as its stamp is the same.

    See :func:`file_stamps`. Of several processes that start together, one reads the files
    and all others wait for it. Without a cache folder that can be written, every start
    reads them.

    Args:
        kind: Name and version of the rows that *describe* makes.
        files: Their paths, at least one.
        describe: Makes rows of a file, always of one schema.
        threads: Number of files that are read at once.

    Returns:
        The rows of all files in their order, with the position of the file as *file*.
    """
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:20]
    index = cache_folder() / f'{kind}-{name}.parquet'
    stamps = [json.dumps(stamp) for stamp in file_stamps(paths)]
    wanted = dict(zip(stamps, paths, strict=True))
    rows = _load(index)
    if rows is None or _missing(rows, wanted):
        with _alone(index):
            rows = _add(index, _load(index), wanted, describe, threads)
    where = pc.index_in(rows['stamp'], pa.array(stamps))
    rows = rows.drop_columns(['path', 'stamp']).append_column('file', where)
    return rows.filter(pc.is_valid(where)).sort_by('file')


def _load(index: Path) -> pa.Table | None:
    """Read a cached table, None if it is missing, damaged or of an older form."""
    try:
        rows = pq.read_table(index)
    except (OSError, pa.ArrowException):
        return None
    return rows if {'path', 'stamp'} <= {*rows.column_names} else None


def _missing(rows: pa.Table | None, wanted: dict[str, str]) -> dict[str, str]:
    """Return the stamps, each with its path, that no row has."""
    if rows is None:
        return wanted
    known = {*pc.unique(rows['stamp']).to_pylist()}
    return {stamp: path for stamp, path in wanted.items() if stamp not in known}


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
    rows: pa.Table | None,
    wanted: dict[str, str],
    describe: Callable[[str], pa.Table],
    threads: int,
) -> pa.Table:
    """Describe files that are not in a cached table, and write it again with their rows."""
    new = _missing(rows, wanted)
    tables = []
    if rows is not None:
        changed = pa.array(map(os.fsencode, new.values()), pa.binary())
        tables = [rows.filter(pc.invert(pc.is_in(rows['path'], changed)))]
    with ThreadPoolExecutor(threads) as pool:
        described = pool.map(describe, new.values())
        bar = tqdm(described, f'index {index.stem}', len(new), disable=len(new) < _MANY)
        try:
            for (stamp, path), table in zip(new.items(), bar, strict=True):
                for name, value in (('path', os.fsencode(path)), ('stamp', stamp)):
                    table = table.append_column(name, pa.repeat(value, len(table)))
                tables.append(table)
        finally:  # a file that cannot be read must not cost the others
            if tables:
                rows = pa.concat_tables(tables).combine_chunks()
                with contextlib.suppress(OSError), whole_file(index) as unfinished:
                    pq.write_table(rows, unfinished, compression='zstd')
    return rows
