# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The GeoTIFFs of a packed archive: ``torchgeo-softcon unpack``."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from tqdm import tqdm

from .pack import Failure
from .packed import PackedArchive, checksum, packed_splits
from .tiffs import Georeference, split_names


@dataclass
class Unpacked:
    """What a run did.

    Attributes:
        written: Number of images that it wrote.
        there: Number of images that were there already.
        failures: Images whose record is not what it was.
    """

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

    Args:
        root: Folder of a packed archive.
        out: Folder to write.
        split: Which of its splits, by default all.
        progress: Whether to show a bar.

    Returns:
        What was written, and what could not be.

    Raises:
        FileNotFoundError: If there is no packed archive.
        OSError: If a file can not be written.
        ValueError: If *out* is *root*.
    """
    if Path(root).resolve() == Path(out).resolve():
        raise ValueError(f'out must be another folder than root, got {out} for both')
    done = Unpacked()
    for name in packed_splits(root) if split is None else split_names(split):
        archive = PackedArchive(root, name)
        checksums = archive.checksums.tolist()
        for row in tqdm(range(len(archive)), f'unpack {name}', disable=not progress):
            folder = Path(out).joinpath(name, *archive.name(row))
            if folder.exists():
                done.there += 1
                continue
            record = archive.read([row])
            if checksum(record) != checksums[row]:
                reason = (
                    'its checksum is not the one in the index. Delete '
                    f'{archive.file(row)}, and pack again'
                )
                done.failures.append(Failure(*archive.name(row), reason))
                continue
            place = archive.georeference(row)
            _write(folder, record.view(archive.dtype)[0, 0], archive.bands, place)
            done.written += 1
    return done


def _write(
    folder: Path, record: npt.NDArray[Any], bands: Sequence[str], place: Georeference
) -> None:
    """Write the bands of an image to a folder, which is there once it is complete."""
    unfinished = folder.with_name(f'.{folder.name}.tmp')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    crs = None if place.crs is None else CRS.from_user_input(place.crs)
    for band, transform, nodata in zip(
        bands, place.transforms, place.nodata, strict=True
    ):
        values = np.asarray(record[band])
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
            content = memory.read()
        try:
            with open(unfinished / f'{band}.tif', 'wb') as written:
                written.write(content)
                written.flush()
                os.fsync(written.fileno())
        except OSError as error:
            raise OSError(
                error.errno,
                f'cannot write {folder / band}.tif: {error.strerror}. Make room, and '
                'start again to go on',
            ) from error
    os.replace(unfinished, folder)
