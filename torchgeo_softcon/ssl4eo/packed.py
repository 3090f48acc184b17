# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A packed archive: files of records that are mapped into memory, and an index.

``s2c/00000.npy`` and so on hold the records of one split, and ``s2c/index.parquet`` has one
row per image: ``id`` (location), ``season``, ``shard`` (number of the file), ``offset``
(number of the record in it), ``crs``, ``bounds``, ``transforms`` and ``nodata`` (of all
bands), ``checksum`` (CRC-32 of the record) and ``label``. Its metadata tell what the labels
are.
"""

import functools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..storage.whole_file import whole_file
from .batch_memory import BufferPool
from .labels import SeasonLabels
from .tiffs import BANDS, Archive, Georeference

#: Version of the format.
FORMAT = 1

_METADATA = b'torchgeo_softcon'

#: Columns of an index.
SCHEMA = pa.schema(
    [
        ('id', pa.string()),
        ('season', pa.string()),
        ('shard', pa.int32()),
        ('offset', pa.int32()),
        ('crs', pa.string()),
        ('bounds', pa.list_(pa.float64(), 4)),
        ('transforms', pa.list_(pa.float64())),
        ('nodata', pa.list_(pa.float64())),
        ('checksum', pa.uint32()),
        ('label', pa.list_(pa.float32())),
    ]
)


def index_path(root: str | os.PathLike[str], split: str) -> Path:
    """Where the index of a split is.

    Args:
        root: Folder of a packed archive.
        split: Name of the split.

    Returns:
        The file.
    """
    return Path(root) / split / 'index.parquet'


def shard_path(folder: Path, shard: int) -> Path:
    """Where records are.

    Args:
        folder: Folder of a split.
        shard: Number of the file.

    Returns:
        The file.
    """
    return folder / f'{shard:05}.npy'


def packed_splits(root: str | os.PathLike[str]) -> list[str]:
    """Find the splits of a packed archive.

    Args:
        root: Its folder.

    Returns:
        Names of the splits.

    Raises:
        FileNotFoundError: If there is none.
    """
    splits = [name for name in BANDS if index_path(root, name).exists()]
    if not splits:
        raise FileNotFoundError(
            f'{root} is no packed archive: {", ".join(BANDS)} with index.parquet are '
            'missing'
        )
    return splits


def checksum(record: npt.NDArray[Any]) -> int:
    """Checksum of a record.

    Args:
        record: A record, or its bytes.

    Returns:
        Its CRC-32.
    """
    return zlib.crc32(np.ascontiguousarray(record).reshape(-1).view(np.uint8).data)


class PackedArchive(Archive):
    """Images of one split of a packed archive."""

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        """Initialize a new PackedArchive instance.

        Args:
            root: Folder of a packed archive.
            split: Name of the split.

        Raises:
            FileNotFoundError: If there is no index, or a file of records is missing.
            ValueError: If the files are of another version, or do not fit the index.
        """
        self.root = Path(root) / split
        self.split = split
        self.bands = BANDS[split]
        self.index = index_path(root, split)
        self._version = _version(self.index)
        self.metadata = read_metadata(self.index)
        table = self._columns('id', 'season', 'shard', 'offset')
        self.location = np.array(table['id'].to_pylist(), dtype=np.bytes_)
        self.season = np.array(table['season'].to_pylist(), dtype=np.bytes_)
        self._shard = table['shard'].to_numpy()
        self._offset = table['offset'].to_numpy()
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}
        self._buffers = BufferPool()
        self.dtype = self._check()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files: each process maps its own."""
        return {**self.__dict__, '_maps': {}}

    @property
    def labels(self) -> SeasonLabels | None:
        """Labels that are packed with the images, None if there are none."""
        if self.metadata['labels'] is None:
            return None
        column = self._columns('label')['label'].combine_chunks()
        values = column.flatten().to_numpy().reshape(len(self), -1)
        return SeasonLabels(
            str(self.index),
            np.full(len(self), self.split.encode()),
            self.location,
            self.season,
            values,
            **self.metadata['labels'],
        )

    def file(self, row: int) -> Path:
        """Where the record of an image is.

        Args:
            row: Number of the image.

        Returns:
            The file of records.
        """
        return shard_path(self.root, self._shard[row])

    def read(self, rows: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Read images.

        Args:
            rows: Numbers of N images.

        Returns:
            Their records of R bytes, shape (N, R).
        """
        records = self._buffers.empty(len(rows), self.dtype.itemsize)
        shards, offsets = self._shard[rows].tolist(), self._offset[rows].tolist()
        for position, (shard, offset) in enumerate(zip(shards, offsets, strict=True)):
            if shard not in self._maps:
                # As plain bytes: NumPy copies structured values field by field
                mapped = np.asarray(
                    np.load(shard_path(self.root, shard), mmap_mode='r')
                )
                self._maps[shard] = mapped.view(np.uint8).reshape(len(mapped), -1)
            records[position] = self._maps[shard][offset]
        return records

    def georeference(self, row: int) -> Georeference:
        """Where an image is.

        Args:
            row: Number of the image.

        Returns:
            Its georeference.

        Raises:
            ValueError: If more was packed since this was opened: rows have moved.
        """
        return georeferences(self._places.slice(row, 1))[0]

    @property
    def checksums(self) -> npt.NDArray[np.uint32]:
        """Checksums of the records, shape (N,)."""
        return np.asarray(self._columns('checksum')['checksum'])

    @functools.cached_property
    def _places(self) -> pa.Table:
        return self._columns('crs', 'bounds', 'transforms', 'nodata')

    def _columns(self, *names: str) -> pa.Table:
        """Columns of the index, whose rows must be those of the start."""
        table = pq.read_table(self.index, columns=list(names))
        if _version(self.index) != self._version:
            raise ValueError(
                f'{self.index} has changed since it was opened: open the archive again'
            )
        return table

    def _check(self) -> np.dtype[Any]:
        """Find the type of the records, and look at the length of all files."""
        shards, inverse = np.unique(self._shard, return_inverse=True)
        counts = np.zeros(len(shards), np.int64)
        np.maximum.at(counts, inverse, self._offset + 1)
        dtype, start = _read_header(shard_path(self.root, int(shards[0])))
        if set(self.bands) != set(dtype.names or ()):
            raise ValueError(
                f'records of {self.split} must have the bands {", ".join(self.bands)}, '
                f'those in {self.root} have {", ".join(dtype.names or ())}'
            )
        for shard, count in zip(shards.tolist(), counts.tolist(), strict=True):
            path = shard_path(self.root, shard)
            if path.stat().st_size < start + count * dtype.itemsize:
                raise ValueError(
                    f'{path} must have {count} records of {dtype.itemsize} bytes, it is '
                    f'cut off after {path.stat().st_size} bytes. Delete it, and pack again'
                )
        return dtype


def _version(path: Path) -> tuple[int, int]:
    """What tells a file from another that takes its place."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _read_header(path: Path) -> tuple[np.dtype[Any], int]:
    """Type of the records in a file, and where they begin."""
    with open(path, 'rb') as file:
        np.lib.format.read_magic(file)
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        return dtype, file.tell()


def has_records(path: Path, count: int) -> bool:
    """Whether a file of records is there and long enough.

    Args:
        path: The file.
        count: Number of records that it must have.

    Returns:
        Whether it has them.
    """
    try:
        dtype, start = _read_header(path)
    except (FileNotFoundError, ValueError):
        return False
    return path.stat().st_size >= start + count * dtype.itemsize


def read_metadata(path: Path) -> dict[str, Any]:
    """What an index tells of the whole archive.

    Args:
        path: The index.

    Returns:
        The version of the *format*, and *labels*: what they are, or None.

    Raises:
        ValueError: If it is of another version, or no index of a packed archive.
    """
    try:
        metadata: dict[str, Any] = json.loads(pq.read_schema(path).metadata[_METADATA])
        version = metadata['format']
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is no index of `torchgeo-softcon pack`') from error
    if version != FORMAT:
        raise ValueError(
            f'{path} must be of format {FORMAT}, got {version}. Pack the '
            'archive again, or use the version of this package that it was packed with'
        )
    return metadata


def write_index(path: Path, table: pa.Table, labels: dict[str, Any] | None) -> None:
    """Write an index, or the part of it that belongs to one file of records.

    Args:
        path: The file, which is there once it is complete.
        table: Rows of :data:`SCHEMA`.
        labels: What the labels are, None if there are none.

    Raises:
        OSError: If the file can not be written. What there is of it is deleted.
    """
    metadata = {_METADATA: json.dumps({'format': FORMAT, 'labels': labels})}
    with whole_file(path) as unfinished:
        pq.write_table(
            table.replace_schema_metadata(metadata), unfinished, compression='zstd'
        )


def georeferences(table: pa.Table) -> list[Georeference]:
    """Read where images are from rows of an index.

    Args:
        table: Rows of :data:`SCHEMA`.

    Returns:
        One georeference per row.
    """
    rows = table.select(['crs', 'bounds', 'transforms', 'nodata']).to_pylist()
    return [
        Georeference(
            row['crs'],
            tuple(zip(*[iter(row['transforms'])] * 6, strict=True)),
            tuple(row['nodata']),
            tuple(row['bounds']),
        )
        for row in rows
    ]


def write_records(path: Path, records: npt.NDArray[Any]) -> None:
    """Write a file of records.

    Args:
        path: The file, which is there once it is complete.
        records: Records of shape (N,).

    Raises:
        OSError: If the file can not be written. What there is of it is deleted.
    """
    header = np.lib.format.header_data_from_array_1_0(records)
    with whole_file(path) as unfinished, open(unfinished, 'wb') as file:
        np.lib.format.write_array_header_1_0(file, header)
        # Not numpy.save, whose error does not tell that the disk is full
        file.write(records.view(np.uint8).data)
