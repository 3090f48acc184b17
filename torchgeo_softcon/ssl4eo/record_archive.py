# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""An archive that is packed: files of records, mapped into memory, and an index.

``s2c/00000.npy`` and so on hold the records of one split, and ``s2c/index.parquet`` has one
row per image: ``id`` (location), ``season``, ``shard`` (number of the file), ``offset``
(number of the record in it), ``crs``, ``bounds``, ``transforms`` and ``nodata`` (of all
bands), ``checksum`` (CRC-32 of the record), ``label`` and ``cloud`` (share of clouds, if
known). Its metadata tell what the labels are. Records of v1.1 end with the cloud mask.
"""

import functools
import json
import os
import weakref
import zlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .._checks import require
from ..storage.whole_file import whole_file
from .labels import SeasonLabels
from .tiffs import BANDS, Archive, Georeference, Grids, check_names, split_names

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
        ('cloud', pa.float32()),
    ]
)

#: Name of the classes of clouds and shadows in a record.
CLOUD_MASK = 'cloud_mask'

#: Thin and thick clouds, and pixels without data, in the cloud mask.
#: https://github.com/DLR-MF-DAS/SSL4EO-S12-v1.1#returning-metadata
_CLOUDS, _NO_DATA = (3, 4), 6

#: Columns that tell where the record of which image is.
_NAMES = ('id', 'season', 'shard', 'offset')

#: Unused memory that is kept, in batches.
_KEPT = 4


def index_path(root: str | os.PathLike[str], split: str) -> Path:
    """Return the path of the index of a split."""
    return Path(root) / split / 'index.parquet'


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a file of records in the folder of a split."""
    return folder / f'{shard:05}.npy'


def checksum(record: npt.NDArray[Any]) -> int:
    """Return the CRC-32 of a record, or of its bytes."""
    return zlib.crc32(np.ascontiguousarray(record).reshape(-1).view(np.uint8).data)


def cloud_shares(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the share of thin and thick clouds in N cloud masks, 1 without any data.

    *counts* are the pixels of each code from 0 to 6 or more, shape (N, K).
    """
    known = counts.sum(1) - counts[:, _NO_DATA]
    shares = counts[:, _CLOUDS].sum(1) / np.maximum(known, 1)
    return np.where(known > 0, shares, 1).astype(np.float32)


class BufferPool:
    """Gives arrays, and takes their memory back when nobody refers to them any more.

    The kernel clears new memory page by page. For batches of tens of megabytes that takes
    as long as reading them.
    """

    def __init__(self) -> None:
        """Initialize a new BufferPool instance."""
        self._free: deque[memoryview] = deque(maxlen=_KEPT)

    def __reduce__(self) -> Any:
        """Another process has its own memory."""
        return BufferPool, ()

    def empty(self, rows: int, width: int) -> npt.NDArray[np.uint8]:
        """Return an array of shape (rows, width) whose values are arbitrary."""
        memory = np.empty(0, np.uint8).data
        while self._free and len(memory) != rows * width:
            memory = self._free.popleft()
        if len(memory) != rows * width:
            memory = np.empty(rows * width, np.uint8).data
        # Whatever is made of this array, by slicing or by torch.from_numpy, keeps it: a
        # view of an array that has its memory from elsewhere refers to that array
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(rows, width)


class RecordArchive(Archive):
    """Images of one split of a packed archive."""

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        """Initialize a new RecordArchive instance."""
        super().__init__(root, split)
        self.index = index_path(root, split)
        self._version = _version(self.index)
        self.metadata = read_metadata(self.index)
        table = self._columns(*_NAMES).combine_chunks()
        check_names(self.index, split, table['id'], table['season'])
        self.location = np.array(table['id'].to_pylist(), dtype=np.bytes_)
        self.season = np.array(table['season'].to_pylist(), dtype=np.bytes_)
        self._shard = table['shard'].to_numpy()
        self._offset = table['offset'].to_numpy()
        self.order = np.lexsort([self._offset, self._shard]).argsort()
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

    def load(self, row: int) -> tuple[npt.NDArray[Any], Georeference]:
        """Read an image, compare it with its checksum, see :meth:`.Archive.load`."""
        records = self.read([row])
        require(
            checksum(records) == self._checksums[row],
            'its checksum is not the one in the index. Delete '
            f'{shard_path(self.root, self._shard[row])}, and pack again',
        )
        return records.view(self.dtype)[0, 0], self.georeference(row)

    def read(self, rows: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Read images, see :meth:`.Archive.read`."""
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
        """Return the pixel grids of an image, see :meth:`load`."""
        (entry,) = self._grids.slice(row, 1).to_pylist()
        transforms = tuple(zip(*[iter(entry['transforms'])] * 6, strict=True))
        nodata, bounds = tuple(entry['nodata']), tuple(entry['bounds'])
        return Georeference(entry['crs'], transforms, nodata, bounds)

    def clouds(self) -> npt.NDArray[np.float32] | None:
        """Return the share of clouds of each image, see :meth:`.Archive.clouds`."""
        if 'cloud' not in pq.read_schema(self.index).names:
            return None
        shares = self._columns('cloud')['cloud'].to_numpy()
        return None if np.isnan(shares).any() else shares

    def cloud_mask(self, row: int) -> npt.NDArray[np.uint8]:
        """Read the cloud mask of an image, see :meth:`.Archive.cloud_mask`."""
        if CLOUD_MASK not in (self.dtype.names or ()):
            return super().cloud_mask(row)
        return np.asarray(self.read([row]).view(self.dtype)[0, 0][CLOUD_MASK])

    def grids(self) -> Grids:
        """Return CRS, transform and size of each image, see :meth:`.ShardArchive.grids`."""
        sizes = [self.dtype[band].shape for band in self.bands]
        finest = sizes.index(max(sizes))
        flat = self._grids['transforms'].combine_chunks().flatten().to_numpy()
        transforms = flat.reshape(len(self), len(self.bands), 6)[:, finest]
        return self._grids['crs'].to_pylist(), transforms, sizes[finest]

    @functools.cached_property
    def _checksums(self) -> npt.NDArray[np.uint32]:
        return np.asarray(self._columns('checksum')['checksum'])

    @functools.cached_property
    def _grids(self) -> pa.Table:
        return self._columns(*Georeference._fields)

    def _columns(self, *names: str) -> pa.Table:
        """Read columns of the index, whose rows must be those of the start."""
        table = pq.read_table(self.index, columns=list(names))
        require(
            _version(self.index) == self._version,
            f'{self.index} has changed since it was opened: open the archive again',
        )
        return table

    def _check(self) -> np.dtype[Any]:
        """Return the type of the records, and check the length of all files."""
        counts = pd.Series(self._offset + 1).groupby(self._shard).max()
        dtype, start = _read_header(shard_path(self.root, counts.index[0]))
        names = dtype.names or ()
        require(
            {*self.bands} == {*names} - {CLOUD_MASK},
            f'records of {self.split} must have the bands {", ".join(self.bands)}, those '
            f'in {self.root} have {", ".join(names)}',
        )
        for shard, count in counts.items():
            path = shard_path(self.root, shard)
            size = path.stat().st_size
            require(
                size >= start + count * dtype.itemsize,
                f'{path} must have {count} records of {dtype.itemsize} bytes, it is cut '
                f'off after {size} bytes. Delete it, and pack again',
            )
        return dtype


def open_archives(
    root: str | os.PathLike[str], split: str | Sequence[str] | None
) -> list[RecordArchive]:
    """Open splits of a packed archive, None for all that there are."""
    found = [name for name in BANDS if index_path(root, name).exists()]
    if split is None and not found:
        raise FileNotFoundError(
            f'{root} is not a packed archive: {", ".join(BANDS)} with index.parquet are '
            'missing'
        )
    return [RecordArchive(root, name) for name in split_names(split or found)]


def _version(path: Path) -> tuple[int, int]:
    """Return what tells a file from another one of the same name."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _read_header(path: Path) -> tuple[np.dtype[Any], int]:
    """Read the type of the records in a file, and where they begin."""
    with open(path, 'rb') as file:
        np.lib.format.read_magic(file)
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        return dtype, file.tell()


def has_records(path: Path, count: int) -> bool:
    """Tell whether a file has a number of complete records."""
    try:
        dtype, start = _read_header(path)
    except (FileNotFoundError, ValueError):
        return False
    return path.stat().st_size >= start + count * dtype.itemsize


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the version of the *format* of an index, and what its *labels* are, or None."""
    try:
        schema = pq.read_schema(path)
        metadata: dict[str, Any] = json.loads(schema.metadata[_METADATA])
        version = metadata['format']
        # Paths are made of these: text in place of a number could lead anywhere
        types = [schema.field(name).type for name in _NAMES]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path} is not an index of `torchgeo-softcon pack`'
        ) from error
    require(
        version == FORMAT,
        f'{path} must be of format {FORMAT}, got {version}. Pack the archive again, or '
        'use the version of this package that it was packed with',
    )
    expected = [SCHEMA.field(name).type for name in _NAMES]
    require(
        types == expected,
        f'{path} must have the columns {", ".join(_NAMES)} of the types '
        f'{", ".join(map(str, expected))}, got {", ".join(map(str, types))}',
    )
    return metadata


def write_index(path: Path, table: pa.Table, labels: dict[str, Any] | None) -> None:
    """Write rows of :data:`SCHEMA` to an index or a part of it, see :func:`.whole_file`.

    *labels* are its codes and whether they are *shares*, None if there are none.
    """
    metadata = {_METADATA: json.dumps({'format': FORMAT, 'labels': labels})}
    with whole_file(path) as unfinished:
        pq.write_table(
            table.replace_schema_metadata(metadata), unfinished, compression='zstd'
        )


def write_records(path: Path, records: npt.NDArray[Any]) -> None:
    """Write a file of records of shape (N,), which is there once it is complete."""
    header = np.lib.format.header_data_from_array_1_0(records)
    with whole_file(path) as unfinished, open(unfinished, 'wb') as file:
        np.lib.format.write_array_header_1_0(file, header)
        # Not numpy.save, whose error does not tell that the disk is full
        file.write(records.view(np.uint8).data)
