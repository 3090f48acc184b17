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
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

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


class ChunkPlace(NamedTuple):
    """Where a chunk is in a file: *offset* and *size* in bytes, 0 if it is not stored."""

    offset: int
    size: int
    deflated: bool


@dataclass(frozen=True)
class Layout:
    """How an array is stored, from the text of its ``.zarray``."""

    text: str

    def __post_init__(self) -> None:
        """Refuse what is not of format 2."""
        version = self._values.get('zarr_format')
        require(version == 2, f'must be of Zarr format 2, got {version!r}')

    @cached_property
    def _values(self) -> dict[str, Any]:
        return dict(json.loads(self.text))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self._values['shape'])

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Shape of a chunk, also at the edges."""
        return tuple(self._values['chunks'])

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers."""
        return np.dtype(self._values['dtype'])

    @cached_property
    def codecs(self) -> list[Any]:
        """The codecs that decode a chunk, in this order."""
        compressor, filters = self._values['compressor'], self._values['filters']
        stored = [*(filters or ()), *([compressor] if compressor else ())]
        return [get_codec(config) for config in reversed(stored)]

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
        """Return whether what is under a first few indices is a chunk of its own."""
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
        """Put chunks, in the order of :meth:`chunk_names`, together under a first few indices."""
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
        names = self._zip.namelist()
        known = ('zarr.json', '.zmetadata', '.zgroup')
        roots = [n for n in names if n.rpartition('/')[2] in known]
        require(bool(roots), f'{where} has no Zarr group: is it another kind of file?')
        root = min(roots, key=lambda n: (n.count('/'), known.index(n.rsplit('/')[-1])))
        self._prefix, _, kind = root.rpartition('/')
        self._prefix += '/' if self._prefix else ''
        if kind == '.zmetadata':
            self._metadata = self._json('.zmetadata').get('metadata', {})
        else:
            texts = {n.removeprefix(self._prefix) for n in names}
            ends = ('.zarray', '.zattrs', '.zgroup')
            self._metadata = {n: self._json(n) for n in texts if n.endswith(ends)}
        about: dict[str, Any] = (
            self._json(kind)
            if kind == 'zarr.json'
            else self._metadata.get('.zgroup', {})
        )
        version = about.get('zarr_format')
        require(
            version == 2,
            f'{where} is of Zarr format {version}, and only format 2 is known here: '
            'download the published file, or write it with zarr_format=2',
        )

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._zip.read(self._prefix + name)))
        except (KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f'{name} in {self._where} cannot be read ({error}): download it again'
            ) from error

    def __contains__(self, name: str) -> bool:
        """Return whether there is an array of this name."""
        return f'{name}/.zarray' in self._metadata

    def layout(self, name: str) -> Layout:
        """Return how an array is stored."""
        require(name in self, f'{self._where} has no array {name!r}')
        try:
            return Layout(json.dumps(self._metadata[f'{name}/.zarray'], sort_keys=True))
        except ValueError as error:
            raise ValueError(f'{name} in {self._where} {error}') from error

    def attributes(self, name: str) -> dict[str, Any]:
        """Return the attributes of an array."""
        return dict(self._metadata.get(f'{name}/.zattrs', {}))

    def places(self, name: str, index: Sequence[int] = ()) -> list[ChunkPlace]:
        """Return where the chunks under a first few indices are in the outer file."""
        places = []
        for key in self.layout(name).chunk_names(index):
            try:
                entry = self._zip.getinfo(f'{self._prefix}{name}/{key}')
            except KeyError:
                places.append(ChunkPlace(0, 0, False))
                continue
            self._file.seek(entry.header_offset)
            header = self._file.read(_HEADER)
            name_size, extra = (
                int.from_bytes(header[i : i + 2], 'little') for i in (26, 28)
            )
            offset = self._start + entry.header_offset + _HEADER + name_size + extra
            deflated = entry.compress_type == zipfile.ZIP_DEFLATED
            places.append(ChunkPlace(offset, entry.compress_size, deflated))
        return places

    def read(self, name: str, default: Any = None) -> npt.NDArray[Any]:
        """Read a whole array, or return a default if there is none."""
        if name not in self:
            return np.asarray(default)
        layout = self.layout(name)
        out = np.empty(layout.shape, layout.dtype)
        entries = (f'{self._prefix}{name}/{key}' for key in layout.chunk_names())
        known = self._zip.NameToInfo
        chunks = (
            layout.decode(self._zip.read(n) if n in known else None) for n in entries
        )
        try:
            layout.place(out, (), chunks)
        except (RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f'{name} in {self._where} cannot be decoded ({error}): download it again'
            ) from error
        return out


def read_chunk(
    file: int, place: ChunkPlace, layout: Layout, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Read a chunk from an open file (by its number), into *out* if that is whole."""
    raw: Any = None
    if place.size:
        raw = os.pread(file, place.size, place.offset)
        if len(raw) < place.size:
            raise ValueError('the file is shorter than it was')
        if place.deflated:
            raw = zlib.decompress(raw, -zlib.MAX_WBITS)
    if out is None or raw is None:
        return layout.decode(raw)
    layout.codecs[0].decode(raw, out)
    return out


def open_members(path: str) -> Iterator[tuple[str, ZarrZip]]:
    """Open the groups of a TAR file, or the one of a ZIP file, with their names.

    Raises:
        ValueError: If the file is cut off or damaged.
    """
    name = os.path.basename(path)
    if name.endswith(SUFFIX):
        with open(path, 'rb') as file:
            yield name.removesuffix(SUFFIX), ZarrZip(file, path)
        return
    size = Path(path).stat().st_size
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
                    key = os.path.basename(member.name).removesuffix(SUFFIX)
                    yield key, ZarrZip(opened, where, start)
    except tarfile.TarError as error:
        raise ValueError(f'{path} {remedy} ({error})') from error
    # Without the zeros at its end, the last members may be missing
    require(end + _BLOCK <= size, f'{path} {remedy}')
