# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Decoded images and masks in files that are mapped into memory."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tqdm.auto import tqdm

from ..geo.rasters import Values
from ..ssl4eo.record_archive import has_records, shard_path, write_records
from ..storage.lock import exclusive
from ..storage.user_cache import file_stamps
from .patches import Part, Patch, PatchFiles

#: Bytes in a file of the cache, about: as much memory as writing it takes.
_SHARD = 256 * 2**20


class ImageCache:
    """Decoded images of one size, in the order of their files, in a folder.

    They are written when this is made for the first time, and again when a file has
    changed (by its size or time). An interrupted run goes on where it ended.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        patches: Sequence[Patch],
        source: PatchFiles,
    ) -> None:
        """Write what is missing.

        Args:
            folder: Folder for the caches of any number of datasets.
            patches: The images.
            source: Reads them.

        Raises:
            ValueError: If images or masks are not all of one size and type.
        """
        layers = [patch.scene.layers[0] for patch in patches]
        dtype = np.result_type(*{layer.dtype for layer in layers})
        scaled = any(any(x.offset) or {*x.scale} - {1} for x in layers)
        if scaled or dtype.kind not in 'iu' or dtype.itemsize > 2:
            dtype = np.dtype(np.float32)
        image, mask = _read_whole(source, patches[0])
        self._dtype = np.dtype(
            [
                ('image', dtype, image.shape),
                ('missing', np.uint8, -(-image.size // 8)),
                ('mask', mask.dtype, mask.shape),
            ]
        )
        files = dict.fromkeys(path for p in patches for path in (p.image, p.mask))
        states = file_stamps(map(str, files))
        options = [(x.indexes, x.nodata, x.alpha, x.scale, x.offset) for x in layers]
        key = repr((states, source.mask_band, options, self._dtype))
        self._folder = Path(folder, hashlib.sha256(key.encode()).hexdigest()[:16])
        self._rows = max(1, _SHARD // self._dtype.itemsize)
        self._maps: dict[int, npt.NDArray[Any]] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        # The processes of one training all come here
        with exclusive(self._folder / 'lock', self._folder, wait=True):
            for start in range(0, len(patches), self._rows):
                some = patches[start : start + self._rows]
                path = shard_path(self._folder, start // self._rows)
                if not has_records(path, len(some)):
                    rank_zero_info(f'Decoded images go to {path} (option cache)')
                    write_records(path, self._encode(some, source))

    def _encode(self, patches: Sequence[Patch], source: PatchFiles) -> npt.NDArray[Any]:
        """Make records (N,)."""
        records = np.zeros(len(patches), self._dtype)
        for record, patch in zip(
            records, tqdm(patches, 'cache', leave=False), strict=True
        ):
            image, mask = _read_whole(source, patch)
            first = record['image'].shape, record['mask'].dtype
            if (image.shape, mask.dtype) != first:
                raise ValueError(
                    'cache needs images of one size and masks of one type, got '
                    f'{first[0]} and {image.shape}, {first[1]} and {mask.dtype}. Leave '
                    'cache out'
                )
            missing = ~np.isfinite(image)
            record['image'] = np.where(missing, 0, image)
            record['missing'] = np.packbits(missing)
            record['mask'] = mask
        return records

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files: each process maps its own."""
        return {**self.__dict__, '_maps': {}}

    def _open(self, number: int) -> Any:
        """Return the record of an image, which is not read yet."""
        shard, offset = divmod(number, self._rows)
        if shard not in self._maps:
            self._maps[shard] = np.load(shard_path(self._folder, shard), mmap_mode='r')
        return self._maps[shard][offset]

    def read_image(self, patch: Patch, part: Part) -> Values:
        """Read an image, see :meth:`.PatchFiles.read_image`."""
        record, window = self._open(patch.number), (slice(None), *_slices(part))
        image: Values = record['image'][window].astype(np.float32)
        if record['missing'].any():
            shape = record['image'].shape
            missing = np.unpackbits(record['missing'], count=np.prod(shape))
            image[missing.reshape(shape)[window] > 0] = np.nan
        return image

    def read_mask(self, patch: Patch, part: Part) -> npt.NDArray[Any]:
        """Read a mask, see :meth:`.PatchFiles.read_mask`."""
        return np.array(self._open(patch.number)['mask'][_slices(part)])


def _slices(part: Part) -> tuple[slice, slice]:
    top, left, height, width = part
    return slice(top, top + height), slice(left, left + width)


def _read_whole(source: PatchFiles, patch: Patch) -> tuple[Values, npt.NDArray[Any]]:
    whole = 0, 0, *patch.shape
    return source.read_image(patch, whole), source.read_mask(patch, whole)
