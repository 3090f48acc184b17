# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Decoded images and masks in files that are mapped into memory."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm.auto import tqdm

from ..geo.rasters import Values
from ..ssl4eo.record_archive import has_records, shard_path, write_records
from ..storage.lock import exclusive
from .scaling import to_unit_range

#: Bytes in a file of the cache, about: as much memory as writing it takes.
_SHARD = 256 * 2**20

_Flags = npt.NDArray[np.bool_]


class Decoded(NamedTuple):
    """An image with its mask."""

    image: Values  # (C, H, W)
    empty: _Flags  # (H, W), where no band has data
    mask: npt.NDArray[Any]  # (H, W), 0 is no data


class ImageCache:
    """Decoded images of one size, in the order of their files, in a folder.

    They are written when this is made for the first time, and again when a file has
    changed (by its size or time). An interrupted run goes on where it ended.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        files: Iterable[Path],
        options: Sequence[Any],
        dtype: str,
        decode: Callable[[int], Decoded],
        count: int,
        value_range: Sequence[tuple[float, float]],
    ) -> None:
        """Write what is missing.

        Args:
            folder: Folder for the caches of any number of datasets.
            files: Files whose change makes another cache.
            options: What else does.
            dtype: Type of the images, where it fits into 16 bits.
            decode: Reads an image by its number, NaN where it has no data.
            count: Number of images.
            value_range: What becomes 0 and 1 when images are read, a pair per band.

        Raises:
            ValueError: If images or masks are not all of one size and type.
        """
        first = decode(0)
        shape = first.image.shape
        exact = np.dtype(dtype).kind in 'iu' and np.dtype(dtype).itemsize <= 2
        self.dtype = np.dtype(
            [
                ('image', np.dtype(dtype if exact else np.float32), shape),
                ('missing', np.uint8, -(-first.image.size // 8)),
                ('empty', np.uint8, -(-first.empty.size // 8)),
                ('mask', first.mask.dtype, shape[1:]),
            ]
        )
        states = [
            (str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in files
        ]
        key = hashlib.sha256(repr((states, options, self.dtype)).encode())
        self.folder = Path(folder, key.hexdigest()[:16])
        self._rows = max(1, _SHARD // self.dtype.itemsize)
        self._range = value_range
        # All values that an image of 8 bits can have, (C, 256)
        values = np.arange(256, dtype=np.float32)[None, :, None]
        table = to_unit_range(np.repeat(values, shape[0], 0), value_range)
        self._table = table[..., 0] if self.dtype['image'].base == np.uint8 else None
        self._maps: dict[int, npt.NDArray[Any]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        # The processes of one training all come here
        with exclusive(self.folder / 'lock', self.folder, wait=True):
            for start in range(0, count, self._rows):
                numbers = range(start, min(start + self._rows, count))
                path = shard_path(self.folder, start // self._rows)
                if not has_records(path, len(numbers)):
                    rank_zero_info(f'Decoded images go to {path} (option cache)')
                    write_records(path, self._encode(map(decode, numbers), numbers))

    def _encode(
        self, images: Iterable[Decoded], numbers: Sequence[int]
    ) -> npt.NDArray[Any]:
        """Make records (N,)."""
        records = np.zeros(len(numbers), self.dtype)
        found = zip(
            records, tqdm(images, 'cache', len(numbers), leave=False), strict=True
        )
        for record, (image, empty, mask) in found:
            if (
                image.shape != record['image'].shape
                or mask.dtype != record['mask'].dtype
            ):
                raise ValueError(
                    'cache needs images of one size and masks of one type, got '
                    f'{record["image"].shape} and {image.shape}, {record["mask"].dtype} '
                    f'and {mask.dtype}. Leave cache out'
                )
            missing = ~np.isfinite(image)
            record['image'] = np.where(missing, 0, image)
            record['missing'] = np.packbits(missing)
            record['empty'] = np.packbits(empty)
            record['mask'] = mask
        return records

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files: each process maps its own."""
        return {**self.__dict__, '_maps': {}}

    def read(self, number: int, rows: slice, columns: slice) -> Decoded:
        """Read a window of an image, in [0, 1], 0 where it has no data."""
        shard, offset = divmod(number, self._rows)
        if shard not in self._maps:
            self._maps[shard] = np.load(shard_path(self.folder, shard), mmap_mode='r')
        record = self._maps[shard][offset]
        stored = record['image']
        window = stored[:, rows, columns]
        if self._table is not None and not record['missing'].any():
            image = np.empty(window.shape, np.float32)
            for band, values in enumerate(self._table):
                np.take(values, window[band], out=image[band], mode='clip')
        else:
            image = window.astype(np.float32)
            image[_unpack(record['missing'], stored.shape)[:, rows, columns]] = np.nan
            to_unit_range(image, self._range)
        empty = np.zeros(image.shape[1:], np.bool_)
        if record['empty'].any():
            empty = _unpack(record['empty'], stored.shape[1:])[rows, columns]
        return Decoded(image, empty, np.array(record['mask'][rows, columns]))


def _unpack(bits: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> _Flags:
    """Undo numpy.packbits."""
    count = int(np.prod(shape))
    return np.unpackbits(np.asarray(bits), count=count).reshape(shape).view(np.bool_)
