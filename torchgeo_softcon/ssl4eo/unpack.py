# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The GeoTIFFs of a packed archive: ``torchgeo-softcon unpack``."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from tqdm import tqdm

from ..storage.lock import exclusive
from ..storage.whole_file import whole_file
from .pack import Failure, check_out
from .record_archive import open_archives
from .tiffs import Georeference


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
    Images whose record is not what it was are passed over, too.
    """
    check_out(root, out)
    archives = open_archives(root, split)
    done = Unpacked()
    Path(out).mkdir(parents=True, exist_ok=True)
    with exclusive(Path(out, '.unpack.lock'), out):
        for archive in archives:
            split = archive.split
            rows = tqdm(range(len(archive)), f'unpack {split}', disable=not progress)
            for row in rows:
                folder = Path(out).joinpath(split, *archive.name(row))
                if folder.exists():
                    done.there += 1
                    continue
                try:
                    record, grids = archive.load(row)
                except ValueError as error:
                    done.failures.append(Failure(*archive.name(row), str(error)))
                    continue
                _write(folder, record, archive.bands, grids)
                done.written += 1
    return done


def _write(
    folder: Path, record: npt.NDArray[Any], bands: Sequence[str], grids: Georeference
) -> None:
    """Write the bands of an image to a folder, which is there once it is complete."""
    unfinished = folder.with_name(f'.{folder.name}.tmp')
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    crs = None if grids.crs is None else CRS.from_user_input(grids.crs)
    for band, transform, nodata in zip(
        bands, grids.transforms, grids.nodata, strict=True
    ):
        # GDAL does not always tell when the disk is full
        with MemoryFile() as memory:
            with memory.open(
                driver='GTiff',
                height=record[band].shape[0],
                width=record[band].shape[1],
                count=1,
                dtype=record[band].dtype.name,
                crs=crs,
                transform=rasterio.Affine(*transform),
                nodata=nodata,
                compress='lzw',
            ) as file:
                file.write(record[band], 1)
            with whole_file(unfinished / f'{band}.tif') as path:
                path.write_bytes(memory.read())
    os.replace(unfinished, folder)
