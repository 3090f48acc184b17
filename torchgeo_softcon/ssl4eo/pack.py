# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SSL4EO-S12 in few large files that are mapped into memory, and back.

``torchgeo-softcon pack`` and ``torchgeo-softcon unpack``.
"""

import itertools
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from tqdm import tqdm

from .._workers import Workers, open_workers
from ..storage.lock import exclusive
from ..storage.whole_file import whole_file
from .labels import SeasonLabels, match_labels, read_labels
from .lulc import LULC, lulc_labels
from .record_archive import (
    CLOUD_MASK,
    SCHEMA,
    RecordArchive,
    checksum,
    cloud_shares,
    has_records,
    index_path,
    open_archives,
    read_metadata,
    shard_path,
    write_index,
    write_records,
)
from .shards import ShardArchive, find_splits, open_archive
from .tiffs import BANDS, MODALITIES, Georeference, TiffArchive, split_names

#: Images per file. Those of Sentinel-2 take 200 MB, which is also what a process holds in
#: memory and what is lost if it is killed.
SHARD_SIZE = 256

#: Number of a shard, the name of its two files: records, and their rows of the index.
_SHARD = re.compile(r'[0-9]{5,}')

#: Files that a killed run has not finished.
_UNFINISHED = re.compile(r'([0-9]{5,}\.(npy|parquet)|index\.parquet)\.tmp')

#: Images to write, and the file of their records.
_Shard = tuple[TiffArchive | ShardArchive, Path]


class Failure(NamedTuple):
    """An image that could not be read: its location, its name, and the reason."""

    id: str
    season: str
    reason: str


def pack(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | Sequence[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    workers: int = 1,
    shard_size: int = SHARD_SIZE,
    progress: bool = False,
    scheduler: str | None = None,
) -> list[Failure]:
    """Write the images of SSL4EO-S12, in any of its forms, so that they are fast to read.

    A run that was interrupted goes on when started again, and images that came later are
    added. Images that cannot be read are returned, listed in ``failures.csv`` and tried
    again by the next run.

    Args:
        root: Folder with the folders ``s1``, ``s2c`` or ``s2a``, or with those of v1.1.
        out: Folder to write, see :mod:`torchgeo_softcon.ssl4eo.record_archive`.
        split: Which of them, by default all that there are.
        labels: File of labels to put into the index, see :func:`.read_labels`, or
            ``lulc`` for the land-cover layer of v1.1.
        workers: Number of processes.
        shard_size: Images per file.
        progress: Whether to show a bar.
        scheduler: Address of a Dask scheduler to use instead of processes, whose workers
            have the same paths.
    """
    if workers < 1 or shard_size < 1:
        raise ValueError(
            f'workers and shard_size must be at least 1, got {workers} and {shard_size}'
        )
    _check_out(root, out)
    if scheduler is not None:  # its workers may be in another folder
        root, out = os.path.abspath(root), os.path.abspath(out)
    if split is None:
        split = find_splits(root)
        if not split:
            folders = (*BANDS, *MODALITIES.values())
            raise FileNotFoundError(
                f'root must have a folder {", ".join(folders)}, found none of them in '
                f'{root}'
            )
    splits = split_names(split)
    for name in splits:
        _check_ours(Path(out) / name)
    opened = (open_archive(root, name, masks=True) for name in splits)
    archives = [a for a in opened if not isinstance(a, RecordArchive)]
    if len(archives) < len(splits):
        raise ValueError(f'root must not be packed already, {root} is')
    tables: dict[str, SeasonLabels | None] = dict.fromkeys(splits)
    if labels is not None:
        for archive in archives:
            lulc = labels == LULC
            table = lulc_labels(root, archive) if lulc else read_labels(labels)
            # Only to find out now, and not after hours, whether they fit
            match_labels(table, archive.split, archive.location, archive.season)
            tables[archive.split] = table

    failures = []
    with open_workers(workers, scheduler) as pool:
        for archive in archives:
            folder = Path(out) / archive.split
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive(folder / '.lock', folder):
                failures += _pack_split(
                    archive, folder, tables[archive.split], pool, shard_size, progress
                )
    return failures


def verify(
    out: str | os.PathLike[str],
    split: str | Sequence[str] | None = None,
    progress: bool = False,
) -> list[Failure]:
    """Return the images whose record is not what it was, by its checksum."""
    archives = open_archives(out, split)
    return _for_each(RecordArchive.load, archives, 'verify', progress)


@dataclass
class Unpacked:
    """Numbers of images that a run wrote and that were there, and damaged ones."""

    written: int = 0
    there: int = 0
    failures: list[Failure] = field(default_factory=list)


def unpack(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | Sequence[str] | None = None,
    progress: bool = False,
) -> Unpacked:
    """Write the images of a packed archive as they were: one GeoTIFF per band.

    Images that are there already are passed over, so that an interrupted run goes on.
    """
    _check_out(root, out)
    archives = open_archives(root, split)
    done = Unpacked()

    def write(archive: RecordArchive, row: int) -> None:
        folder = Path(out).joinpath(archive.split, *archive.name(row))
        if folder.exists():
            done.there += 1
        else:
            _write_tiffs(folder, archive.bands, *archive.load(row))
            done.written += 1

    Path(out).mkdir(parents=True, exist_ok=True)
    with exclusive(Path(out, '.unpack.lock'), out):
        done.failures = _for_each(write, archives, 'unpack', progress)
    return done


def _for_each(
    function: Callable[[RecordArchive, int], Any],
    archives: Sequence[RecordArchive],
    verb: str,
    progress: bool,
) -> list[Failure]:
    """Call a function for each image, and return those whose record is damaged."""
    failures = []
    for archive in archives:
        rows = range(len(archive))
        for row in tqdm(rows, f'{verb} {archive.split}', disable=not progress):
            try:
                function(archive, row)
            except ValueError as error:
                failures.append(Failure(*archive.name(row), str(error)))
    return failures


def _pack_split(
    archive: TiffArchive | ShardArchive,
    folder: Path,
    table: SeasonLabels | None,
    pool: Workers,
    shard_size: int,
    progress: bool,
) -> list[Failure]:
    """Write what is missing of a split, and its index."""
    index = index_path(folder.parent, archive.split)
    before, labels = SCHEMA.empty_table(), None
    if index.exists():
        labels = read_metadata(index)['labels']
        before = _read_rows(index)
    indexed, not_indexed = _resume(archive, folder, before)
    done = pa.concat_tables([indexed, *not_indexed])
    ours = [archive.name(row) for row in range(len(archive))]
    there = _names(done)
    rows = np.array([n for n, name in enumerate(ours) if name not in there], int)
    rows = rows[np.argsort(archive.order[rows], kind='stable')]
    if labels is not None and table is None and len(rows) + len(not_indexed):
        raise ValueError(
            f'labels must be given again: {index} has some, and there are images that it '
            'has not'
        )

    # Not those of lost files: what the index on the disk says of them must not come true
    used = {*before['shard'].to_pylist(), *done['shard'].to_pylist()}
    paths = (shard_path(folder, n) for n in itertools.count() if n not in used)
    cuts = range(0, len(rows), shard_size)
    shards = ((archive.only(rows[c : c + shard_size]), next(paths)) for c in cuts)
    reason = f'its record is gone, and it is not in {archive.root}'
    lost = sorted(_names(before) - _names(indexed) - {*ours})
    failures = [Failure(*name, reason) for name in lost]
    bar = tqdm(
        total=len(ours),
        initial=len(ours) - len(rows),
        desc=f'pack {archive.split}',
        unit='image',
        disable=not progress,
    )
    with bar:
        for count, failed in pool.map(_write_shard, shards):
            failures += failed
            bar.update(count)

    path = folder / 'failures.csv'
    path.unlink(missing_ok=True)
    if failures:
        pd.DataFrame(failures).to_csv(path, index=False, lineterminator='\r\n')
    parts = _shard_files(folder, 'parquet')
    if not parts and not len(indexed):
        raise ValueError(
            f'none of the {len(ours)} images of {archive.root} can be read, the first one '
            f'because: {failures[0].reason}'
        )
    if parts or table is not None or len(indexed) < len(before):
        joined = pa.concat_tables([indexed, *map(_read_rows, parts)])
        # The order of the images does not depend on which were packed first
        joined = joined.sort_by([('id', 'ascending'), ('season', 'ascending')])
        if table is not None:
            joined = _with_labels(joined, table, archive.split)
            labels = {'codes': list(table.codes), 'shares': table.shares}
        write_index(index, joined, labels)
    for path in parts:
        path.unlink()
    return failures


def _check_out(root: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Refuse to write into the folder that is read."""
    if Path(root).resolve() == Path(out).resolve():
        raise ValueError(f'out must be another folder than root, got {out} for both')


def _check_ours(folder: Path) -> None:
    """Refuse a folder that no run has written to, unless it is empty."""
    found = [*folder.iterdir()] if folder.exists() else []
    if found and not {'.lock', 'index.parquet'} & {path.name for path in found}:
        raise ValueError(
            f'out must be a new folder or a packed archive, but there is {found[0]}'
        )


def _read_rows(path: Path) -> pa.Table:
    """Read rows of an index, also one of before there were clouds in it."""
    rows = pq.read_table(path).replace_schema_metadata(None)
    if 'cloud' not in rows.column_names:
        rows = rows.append_column('cloud', pa.nulls(len(rows), pa.float32()))
    return rows


def _names(rows: pa.Table) -> set[tuple[str, str]]:
    """Return the location and the name of each image in rows of an index."""
    return {*zip(rows['id'].to_pylist(), rows['season'].to_pylist(), strict=True)}


def _with_labels(rows: pa.Table, labels: SeasonLabels, split: str) -> pa.Table:
    """Put labels into rows of an index."""
    location, season = (
        np.array(rows[name].to_pylist(), np.bytes_) for name in ('id', 'season')
    )
    # Not strictly: those that fit may be of images that cannot be read
    values = match_labels(labels, split, location, season, strict=False)
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    column = pa.ListArray.from_arrays(offsets, values.ravel())
    position = rows.schema.get_field_index('label')
    return rows.set_column(position, SCHEMA.field('label'), column)


def _resume(
    archive: TiffArchive | ShardArchive, folder: Path, indexed: pa.Table
) -> tuple[pa.Table, list[pa.Table]]:
    """Delete what a killed run left unfinished, and return the rows of complete files.

    They are those of the index, and those of each file that is not yet in it.
    """
    known = {*indexed['shard'].to_pylist()}
    indexed = _with_records(folder, indexed)
    not_indexed = []
    for path in _shard_files(folder, 'parquet'):
        rows = _read_rows(path)
        if int(path.stem) not in known and len(_with_records(folder, rows)):
            not_indexed.append(rows)
        else:
            path.unlink()

    complete = {n for t in (indexed, *not_indexed) for n in t['shard'].to_pylist()}
    unfinished = [p for p in folder.iterdir() if _UNFINISHED.fullmatch(p.name)]
    records = _shard_files(folder, 'npy')
    for path in (*unfinished, *(p for p in records if int(p.stem) not in complete)):
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
    images = rows.select(['shard', 'offset']).to_pandas()
    last = images.groupby('shard')['offset'].max()
    complete = [
        n for n, end in last.items() if has_records(shard_path(folder, n), end + 1)
    ]
    return rows.filter(pa.array(images['shard'].isin(complete)))


def _shard_files(folder: Path, suffix: str) -> list[Path]:
    """Return the files of all shards: records (npy), or rows of an index (parquet)."""
    return sorted(p for p in folder.glob(f'*.{suffix}') if _SHARD.fullmatch(p.stem))


def _write_shard(unit: _Shard) -> tuple[int, list[Failure]]:
    """Write a file of records and then, as a sign that it is complete, its rows.

    Returns how many images there were, and those that failed.
    """
    archive, path = unit
    records = np.empty(len(archive), archive.dtype)
    entries: list[dict[str, Any]] = []
    failures = []
    for row in range(len(archive)):
        location, season = archive.name(row)
        try:
            record, grids = archive.load(row)
        except (OSError, ValueError) as error:
            failures.append(Failure(location, season, str(error)))
            continue
        offset = len(entries)
        records[offset] = record
        cloud = None
        if CLOUD_MASK in (record.dtype.names or ()):
            counts = np.bincount(record[CLOUD_MASK].reshape(-1), minlength=256)
            (cloud,) = cloud_shares(counts[None]).tolist()
        entries.append(
            {
                'id': location,
                'season': season,
                'shard': int(path.stem),
                'offset': offset,
                **grids._asdict(),
                'transforms': [x for transform in grids.transforms for x in transform],
                'checksum': checksum(record),
                'cloud': cloud,
            }
        )
    if entries:
        write_records(path, records[: len(entries)])
        table = pa.Table.from_pylist(entries, SCHEMA)
        write_index(path.with_suffix('.parquet'), table, None)
    return len(archive), failures


def _write_tiffs(
    folder: Path, bands: Sequence[str], record: npt.NDArray[Any], grids: Georeference
) -> None:
    """Write the bands of an image to a folder, which is there once it is complete."""
    unfinished = folder.with_name(f'.{folder.name}.tmp')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    crs = None if grids.crs is None else CRS.from_user_input(grids.crs)
    for band, transform, nodata in zip(
        bands, grids.transforms, grids.nodata, strict=True
    ):
        half = record.dtype[band].base == np.float16  # which GeoTIFFs rarely have
        values = record[band].astype(np.float32) if half else record[band]
        # GDAL does not always tell when the disk is full
        with MemoryFile() as memory:
            with memory.open(
                driver='GTiff',
                height=values.shape[0],
                width=values.shape[1],
                count=1,
                dtype=values.dtype.name,
                crs=crs,
                transform=rasterio.Affine(*transform),
                nodata=nodata,
                compress='lzw',
            ) as file:
                file.write(values, 1)
            with whole_file(unfinished / f'{band}.tif') as path:
                path.write_bytes(memory.read())
    os.replace(unfinished, folder)
