# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""SSL4EO-S12 v1.1 and TerraMesh, read where they are.

``train/S2L1C/ssl4eos12_shard_000001.tar`` and so on hold a Zarr group per location,
``train/S2L1C/ssl4eos12_train_seasonal_data_000001.zarr.zip`` and so on one for 64 of them.
https://github.com/DLR-MF-DAS/SSL4EO-S12-v1.1
"""

import copy
import functools
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from .._checks import require
from ..bands import spell_band_name
from ..geo.open_files import OpenFiles
from ..storage.user_cache import describe_files, file_stamp
from .image_records import record_dtype
from .offsets import find_offsets
from .record_archive import (
    CLOUD_MASK,
    BufferPool,
    RecordArchive,
    cloud_shares,
    index_path,
)
from .shard_index import describe_images
from .tiffs import BANDS, MODALITIES, Archive, Georeference, Grids, TiffArchive
from .zarr_zip import SUFFIX, Layout, read_chunk

#: Files that are open at once.
_OPEN = 64

#: Codes of land cover and clouds that are counted.
_CODES = 16

#: Images in a chunk, from which on a line says that reading them is slow.
_MANY = 8


def modality_folder(root: str | os.PathLike[str], split: str) -> Path | None:
    """Return the folder of a modality of v1.1, None if there is none.

    It is in *root*, or in ``train`` or else ``val`` in it.
    """
    name = MODALITIES.get(split, split)
    folders = (Path(root, part, name) for part in ('', 'train', 'val'))
    return next((one for one in folders if one.is_dir() and _files(one)), None)


def _files(folder: Path) -> list[str]:
    """Return the shards or chunk files in a folder."""
    with os.scandir(folder) as found:
        return sorted(e.path for e in found if e.name.endswith(('.tar', SUFFIX)))


def _open_file(path: str) -> IO[bytes]:
    """Open a file to read parts of it."""
    return open(path, 'rb', buffering=0)


#: Layouts by their texts, of which an archive has few.
_parse_layout = functools.lru_cache(Layout)


class ShardArchive(Archive):
    """Images of one modality in shards (TAR files) or in Zarr chunk files.

    The files are indexed once, see :func:`.describe_files`. An image is read by the place
    of its chunks. What is added to optical numbers is found in the data and taken off,
    see :func:`.find_offsets`.

    Attributes:
        stored_bands: Names of the bands in the order of the files.
        file: Number of the file of each image, shape (N,).
        time: When it was taken, in ns since 1970.
        told: The offset that its attributes tell, NaN without one.
        order: Its rank in the files, in which reading is fastest.
    """

    def __init__(
        self, folder: Path, split: str, offset: int | None = None, masks: bool = False
    ) -> None:
        """Initialize a new ShardArchive instance.

        Args:
            folder: Folder of the modality.
            split: Its name here.
            offset: What is added to optical numbers, None to find out.
            masks: Whether records end with the cloud mask, where there is one.
        """
        self.root, self.split = folder, split
        self.files = _files(folder)
        self._stamps = [file_stamp(path) for path in self.files]
        table = describe_files('shards-1', self.files, describe_images)
        require(len(table) > 0, f'{folder} has no images: download its files again')
        table = table.append_column('order', pa.array(np.arange(len(table))))
        self._select(
            table.sort_by([('location', 'ascending'), ('season', 'ascending')])
        )
        names = pd.MultiIndex.from_arrays([self.location, self.season])
        again = np.flatnonzero(names.duplicated())
        if len(again):
            raise ValueError(
                f'images must be there once, got {"/".join(self.name(again[0]))} again in '
                f'{folder}: keep one form of the archive there'
            )
        bands = json.loads(self._uniform(pc.unique(table['names']).to_pylist()))
        self.stored_bands = tuple(map(spell_band_name, bands))
        self.bands = BANDS.get(split, self.stored_bands)
        require(
            sorted(self.bands) == sorted(self.stored_bands),
            f'{folder} must have the bands {", ".join(self.bands)}, got '
            f'{", ".join(self.stored_bands)}: choose another split',
        )
        texts = pc.unique(pc.struct_field(table['bands'], 'layout')).to_pylist()
        layouts = [*map(_parse_layout, texts)]
        kinds = {(one.dtype.str, one.shape[-2:]) for one in layouts}
        dtype, (height, width) = self._uniform(sorted(kinds))
        self._shape = len(bands), height, width
        fields: dict[str, Any] = dict.fromkeys(
            self.stored_bands, (dtype, (height, width))
        )
        if masks and self.has_masks:
            fields[CLOUD_MASK] = np.uint8, (height, width)
        self.dtype = record_dtype(fields)
        self.offset = np.zeros(len(self), np.int64)
        if split in ('s2c', 's2a'):
            self.offset = find_offsets(self, offset)
        leading = sum(int(n[0] >= 0) for n in self._leading)
        group = max(int(np.prod(one.chunks[:leading])) for one in layouts)
        if group >= _MANY:
            rank_zero_info(
                f'A chunk of {folder} holds {group} images, which are all decoded to read '
                'one: `torchgeo-softcon pack` makes them fast'
            )

    def _select(self, table: pa.Table) -> None:
        """Take the rows of the index that this archive is made of."""
        self._table = table
        self.location, self.season = (
            np.array(table[name].to_pylist(), np.bytes_)
            for name in ('location', 'season')
        )
        self.file, self.time, self.told, self.order, *self._leading = (
            table[name].to_numpy()
            for name in ('file', 'time', 'told', 'order', 'sample', 'step')
        )
        #: Whether every image has a cloud mask.
        self.has_masks = not table['cloud_mask'].null_count
        self._opened = OpenFiles(_open_file, _OPEN)
        self._decoded: dict[str, dict[Any, npt.NDArray[Any]]] = {}
        self._buffers = BufferPool()

    def _uniform(self, kinds: Sequence[Any]) -> Any:
        """Return what all images have in common."""
        require(
            len(kinds) == 1,
            f'the images of an archive must be alike, those in {self.root} have '
            f'{" and ".join(map(str, kinds[:2]))}: keep files of one kind there',
        )
        return kinds[0]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was decoded."""
        return {**self.__dict__, '_decoded': {}}

    def only(self, rows: npt.NDArray[np.int64]) -> Self:
        """Return an archive of some of the images."""
        other = copy.copy(self)
        other._select(self._table.take(pa.array(rows)))
        other.offset = self.offset[rows]
        return other

    def georeference(self, row: int) -> Georeference:
        """Return the pixel grids of an image."""
        crs, transform = (
            self._table[name][row].as_py() for name in ('crs', 'transform')
        )
        count, height, width = self._shape
        dx, _, left, _, dy, top = transform
        right, bottom = left + width * dx, top + height * dy
        bounds = min(left, right), min(top, bottom), max(left, right), max(top, bottom)
        return Georeference(crs, (tuple(transform),) * count, (None,) * count, bounds)

    def grids(self) -> Grids:
        """Return CRS, transform and size of each image."""
        transform = self._table['transform'].combine_chunks().flatten().to_numpy()
        return self._table['crs'].to_pylist(), transform.reshape(-1, 6), self._shape[1:]

    def read(self, rows: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Read images, see :meth:`.Archive.read`."""
        records = self._buffers.empty(len(rows), self.dtype.itemsize)
        first = self.stored_bands[0]
        size = int(np.prod(self._shape)) * self.dtype[first].base.itemsize
        # Images of one chunk one after the other
        for place in np.argsort(self.order[rows], kind='stable').tolist():
            row = rows[place]
            pixels = records[place, :size].view(self.dtype[first].base)
            self.pixels(row, pixels.reshape(self._shape))
            records[place, size:] = 0
            if CLOUD_MASK in (self.dtype.names or ()):
                record = records[place].view(self.dtype)[0]
                record[CLOUD_MASK] = self.cloud_mask(row)
            if self.offset[row]:
                # Unsigned numbers must not begin again at the other end
                if pixels.dtype.kind == 'u':
                    np.maximum(pixels, self.offset[row], out=pixels, casting='unsafe')
                pixels -= pixels.dtype.type(self.offset[row])
        return records

    def pixels(self, row: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Read the numbers of an image as they are in the file, shape (C, H, W)."""
        if out is None:
            out = np.empty(self._shape, self.dtype[self.stored_bands[0]].base)
        self._fill(out, row, 'bands')
        return out

    def cloud_mask(self, row: int) -> npt.NDArray[np.uint8]:
        """Read the cloud mask of an image, see :meth:`.Archive.cloud_mask`."""
        if not self.has_masks:
            return super().cloud_mask(row)
        out = np.empty(self._shape[1:], np.uint8)
        self._fill(out, row, CLOUD_MASK)
        return out

    def _fill(self, out: npt.NDArray[Any], row: int, kind: str) -> None:
        """Read an array of an image, from the column of the index about it."""
        number = int(self.file[row])
        index = [int(n[row]) for n in self._leading if n[row] >= 0]
        chunks = self._table[kind][row].as_py()
        layout = _parse_layout(chunks['layout'])
        places = [*zip(chunks['offset'], chunks['size'], strict=True)]
        with self._opened.use(self.files[number]) as opened:
            file = opened.fileno()
            status = os.fstat(file)
            require(
                (status.st_size, status.st_mtime_ns) == self._stamps[number][1:],
                f'{self.files[number]} has changed since it was indexed: open the archive '
                'again',
            )

            def read(place: tuple[int, int]) -> bytes | None:
                return read_chunk(file, *place, chunks['deflated'])

            try:
                if layout.one_piece(index) and places[0][1]:
                    layout.codecs[0].decode(read(places[0]), out)
                    return
                # A chunk may hold several images: the last ones are kept
                names = [(number, place) for place in places]
                kept = self._decoded.get(kind, {})
                if not kept.keys() >= {*names}:
                    kept = {name: layout.decode(read(name[1])) for name in names}
                    self._decoded[kind] = kept
                shape = layout.shape[len(index) :]
                layout.place(out.reshape(shape), index, map(kept.__getitem__, names))
            except (OSError, RuntimeError, ValueError, zlib.error) as error:
                raise OSError(
                    f'{"/".join(self.name(row))} in {self.files[number]} cannot be read '
                    f'({error}): download the file again'
                ) from error

    def clouds(self) -> npt.NDArray[np.float32] | None:
        """Return the share of thin and thick clouds, see :meth:`.Archive.clouds`."""
        if not self.has_masks:
            return None
        return cloud_shares(self.count_codes(CLOUD_MASK))

    def count_codes(self, kind: str) -> npt.NDArray[np.int64]:
        """Count the codes in the pixels or cloud mask of each image.

        Returns:
            Pixels of the codes from 0 on, shape (N, 16), all higher ones in the last.
        """

        def count(path: str) -> pa.Table:
            rows = np.flatnonzero(self.file == numbers[path])
            # Of its own, so that several can be read at once
            part = self.only(rows[np.argsort(self.order[rows])])
            read = part.cloud_mask if kind == CLOUD_MASK else part.pixels
            images = (np.minimum(read(row), _CODES - 1) for row in range(len(part)))
            counts = [
                np.bincount(image.astype(np.int64).reshape(-1), minlength=_CODES)
                for image in images
            ]
            return pa.table({'counts': pa.array(counts, pa.list_(pa.int64()))})

        numbers = {os.path.abspath(path): n for n, path in enumerate(self.files)}
        table = describe_files(f'{kind}-codes-1', self.files, count)
        flat = table['counts'].combine_chunks().flatten().to_numpy()
        return flat.reshape(-1, _CODES)[self.order]

    def members(self) -> dict[str, list[str]]:
        """Return the groups of each file in their order, by its name without folders."""
        rows = np.argsort(self.order)
        keys = pd.Series(self._table['key'].take(pa.array(rows)).to_pylist())
        files = np.array([*map(os.path.basename, self.files)])[self.file[rows]]
        return {name: [*group.unique()] for name, group in keys.groupby(files)}


def check_aligned(archives: Sequence[Archive]) -> None:
    """Refuse shards of one name whose groups are not the same for all modalities.

    Raises:
        ValueError: If there are any.
    """
    shards = [a for a in archives if isinstance(a, ShardArchive)]
    members = shards[0].members() if len(shards) > 1 else {}
    for other in shards[1:]:
        for name, keys in other.members().items():
            ours = members.get(name, keys)
            if keys != ours:
                pairs = zip([*ours, None], [*keys, None], strict=False)
                one, two = next(pair for pair in pairs if pair[0] != pair[1])
                raise ValueError(
                    f'{shards[0].root / name} and {other.root / name} must have the same '
                    f'samples in the same order, got {one} and {two}: download both again, '
                    'one of them is of another release'
                )


def open_archive(
    root: str | os.PathLike[str],
    split: str,
    offset: int | None = None,
    masks: bool = False,
) -> RecordArchive | ShardArchive | TiffArchive:
    """Open a split in the form that it is there: packed, of v1.1, or of 2022.

    *offset* and *masks* are those of :class:`ShardArchive`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    if index_path(root, split).exists():
        return RecordArchive(root, split)
    folder = modality_folder(root, split)
    if folder is not None:
        return ShardArchive(folder, split, offset, masks)
    return TiffArchive(root, split)


def find_splits(root: str | os.PathLike[str]) -> list[str]:
    """Return the splits that are there in some form."""
    return [
        name
        for name in BANDS
        if Path(root, name).is_dir() or modality_folder(root, name) is not None
    ]
