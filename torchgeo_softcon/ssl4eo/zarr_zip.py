# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Zarr of format 2 in ZIP files, which may lie inside of TAR files.

Chunks are found once and then read by their place in the file. Opening each sample as a
Zarr group takes longer than decoding its pixels, so only the codecs of Zarr are used
(numcodecs), not Zarr itself.
"""

import itertools
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numcodecs.registry import get_codec

from .._checks import require

#: Ending of the files that are read.
SUFFIX = '.zarr.zip'

#: Bytes of a local header of a ZIP file, without the name and the extra field at its end.
_HEADER = 30

#: Bytes of the block of zeros that a TAR file ends with.
_BLOCK = 512


class Layout:
    """How an array is stored, from the text of its ``.zarray``.

    Attributes:
        text: That text.
        shape: Shape of the array.
        chunks: Shape of a chunk, also at the edges.
        dtype: Type of the numbers.
    """

    def __init__(self, text: str) -> None:
        """Initialize a new Layout instance."""
        values = json.loads(text)
        self.text = text
        self.shape, self.chunks = tuple(values['shape']), tuple(values['chunks'])
        self.dtype, self._values = np.dtype(values['dtype']), values

    @cached_property
    def codecs(self) -> list[Any]:
        """The codecs that decode a chunk, in this order."""
        stored = [*(self._values['filters'] or ()), self._values['compressor']]
        return [get_codec(config) for config in reversed(stored) if config]

    def chunk_names(self, index: Sequence[int] = ()) -> list[str]:
        """Return the names of the chunks under a first few indices."""
        separator = self._values.get('dimension_separator', '.')
        return [separator.join(map(str, n)) or '0' for n in self._numbers(index)]

    def _numbers(self, index: Sequence[int]) -> Iterator[tuple[int, ...]]:
        counts = [-(-s // c) for s, c in zip(self.shape, self.chunks, strict=True)]
        first = [(i // c,) for i, c in zip(index, self.chunks, strict=False)]
        return itertools.product(*first, *map(range, counts[len(index) :]))

    def decode(self, raw: bytes | None) -> npt.NDArray[Any]:
        """Decode a chunk, None for one that is not stored."""
        if raw is None:
            fill = self._values['fill_value']
            return np.full(self.chunks, 0 if fill is None else fill, self.dtype)
        data: Any = raw
        for codec in self.codecs:
            data = codec.decode(data)
        if self.dtype != object:
            data = np.frombuffer(data, self.dtype)
        return np.reshape(data, self.chunks, order=self._values['order'])

    def one_piece(self, index: Sequence[int]) -> bool:
        """Return whether a codec decodes what is under a first few indices in one go."""
        n = len(index)
        return (
            set(self.chunks[:n]) <= {1}
            and self.chunks[n:] == self.shape[n:]
            and self._values['order'] == 'C'
            and len(self.codecs) == 1
            and self.dtype.isnative
        )

    def place(
        self,
        out: npt.NDArray[Any],
        index: Sequence[int],
        chunks: Iterator[npt.NDArray[Any]],
    ) -> None:
        """Put chunks together, in the order of :meth:`chunk_names`."""
        n = len(index)
        inside = tuple(i % c for i, c in zip(index, self.chunks, strict=False))
        for number, chunk in zip(self._numbers(index), chunks, strict=True):
            sizes = self.chunks[n:]
            starts = (i * c for i, c in zip(number[n:], sizes, strict=True))
            here = [slice(i, i + c) for i, c in zip(starts, sizes, strict=True)]
            part: Any = out[(*here, ...)]  # type: ignore[arg-type]
            # Chunks are whole, also at the edges of the array
            inner: Any = (*inside, *map(slice, part.shape))
            part[...] = chunk[inner]


class ZarrZip:
    """A Zarr group in a ZIP file, with what is needed to find chunks without it."""

    def __init__(self, file: IO[bytes], where: str, start: int = 0) -> None:
        """Open a group.

        Args:
            file: The ZIP file.
            where: What errors call it.
            start: Where it begins in the file that it is a part of.

        Raises:
            ValueError: If it is damaged, or of another version of Zarr.
        """
        self._file, self._where, self._start = file, where, start
        try:
            self._zip = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f'{where} is not a complete ZIP file ({error}): download it again'
            ) from error
        paths = (name.rpartition('/') for name in self._zip.namelist())
        roots = [path for path in paths if path[2] in ('.zgroup', 'zarr.json')]
        require(roots, f'{where} has no Zarr group: is it another kind of file?')
        folder, slash, kind = min(roots, key=lambda path: (path[0].count('/'), path))
        self._prefix = folder + slash
        version = self._json(kind).get('zarr_format')
        require(
            version == 2,
            f'{where} is of Zarr format {version}, and only format 2 is known here: '
            'download the published file, or write it with zarr_format=2',
        )

    def _entry(self, name: str) -> zipfile.ZipInfo | None:
        return self._zip.NameToInfo.get(self._prefix + name)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._zip.read(self._prefix + name)))
        except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f'{name} in {self._where} cannot be read ({error}): download it again'
            ) from error

    def __contains__(self, name: str) -> bool:
        """Return whether there is an array of this name."""
        return self._entry(f'{name}/.zarray') is not None

    def layout(self, name: str) -> Layout:
        """Return how an array is stored."""
        require(name in self, f'{self._where} has no array {name!r}')
        return Layout(json.dumps(self._json(f'{name}/.zarray'), sort_keys=True))

    def attributes(self, name: str) -> dict[str, Any]:
        """Return the attributes of an array."""
        path = f'{name}/.zattrs'
        return {} if self._entry(path) is None else self._json(path)

    def places(self, name: str, layout: Layout, index: Sequence[int]) -> dict[str, Any]:
        """Return *layout*, and where the chunks under a first few indices are.

        Chunks begin at *offset* in the outer file and have *size* bytes, 0 if they are not
        stored.
        """
        offsets, sizes, deflated = [], [], False
        for key in layout.chunk_names(index):
            entry = self._entry(f'{name}/{key}')
            offset = size = 0
            if entry is not None:
                self._file.seek(entry.header_offset)
                header = self._file.read(_HEADER)
                lengths = struct.unpack_from('<HH', header, _HEADER - 4)
                offset = self._start + entry.header_offset + _HEADER + sum(lengths)
                size = entry.compress_size
                deflated |= entry.compress_type == zipfile.ZIP_DEFLATED
            offsets.append(offset)
            sizes.append(size)
        stored = {'offset': offsets, 'size': sizes, 'deflated': deflated}
        return {'layout': layout.text, **stored}

    def read(self, name: str, default: Any = None) -> npt.NDArray[Any]:
        """Read a whole array, or return a default if there is none."""
        if name not in self:
            return np.asarray(default)
        layout = self.layout(name)
        out = np.empty(layout.shape, layout.dtype)
        entries = (self._entry(f'{name}/{key}') for key in layout.chunk_names())
        stored = (None if e is None else self._zip.read(e) for e in entries)
        try:
            layout.place(out, (), map(layout.decode, stored))
        except (RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f'{name} in {self._where} cannot be decoded ({error}): download it again'
            ) from error
        return out


def read_chunk(file: int, offset: int, size: int, deflated: bool) -> bytes | None:
    """Read a chunk from an open file (by its number), None if it is not stored."""
    if not size:
        return None
    raw = os.pread(file, size, offset)
    require(len(raw) == size, 'the file is shorter than it was')
    return zlib.decompress(raw, -zlib.MAX_WBITS) if deflated else raw


def open_members(path: str) -> Iterator[tuple[str, ZarrZip]]:
    """Open the groups of a TAR file, or the one of a ZIP file, with their names.

    Raises:
        ValueError: If the file is cut off or damaged.
    """
    if path.endswith(SUFFIX):
        with open(path, 'rb') as file:
            yield _key(path), ZarrZip(file, path)
        return
    size = os.stat(path).st_size
    remedy = f'is cut off after {size} bytes: download it again'
    end = 0
    try:
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                require(end <= size, f'{path} {remedy}')
                if member.isfile() and member.name.endswith(SUFFIX):
                    opened: Any = tar.extractfile(member)
                    where, start = f'{path}:{member.name}', member.offset_data
                    yield _key(member.name), ZarrZip(opened, where, start)
    except tarfile.TarError as error:
        raise ValueError(f'{path} {remedy} ({error})') from error
    # Without the zeros at its end, the last members may be missing
    require(end + _BLOCK <= size, f'{path} {remedy}')


def _key(path: str) -> str:
    return os.path.basename(path).removesuffix(SUFFIX)
