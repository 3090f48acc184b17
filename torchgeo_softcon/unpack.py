# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The GeoTIFFs of a packed archive: ``torchgeo-softcon unpack``."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from tqdm import tqdm

from .datasets.packed import PackedArchive, checksum, packed_splits
from .datasets.ssl4eo_s12 import BANDS, Georeference, split_names


def unpack(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | Sequence[str] | None = None,
    progress: bool = False,
) -> int:
    """Write the images of a packed archive as they were: one GeoTIFF per band.

    Images that are there already are passed over, so that an interrupted run goes on.

    Args:
        root: Folder of a packed archive.
        out: Folder to write.
        split: Which of its splits, by default all.
        progress: Whether to show a bar.

    Returns:
        Number of images written.

    Raises:
        FileNotFoundError: If there is no packed archive.
        OSError: If a file can not be written.
        ValueError: If a record is not what it was, its image is named.
    """
    written = 0
    for name in packed_splits(root) if split is None else split_names(split):
        archive = PackedArchive(root, name)
        checksums = archive.checksums.tolist()
        for row in tqdm(range(len(archive)), f'unpack {name}', disable=not progress):
            folder = Path(out).joinpath(name, *archive.name(row))
            if folder.exists():
                continue
            record = archive.read([row])
            if checksum(record) != checksums[row]:
                raise ValueError(
                    f'the record of {"/".join(archive.name(row))} in {archive.root} is '
                    'damaged: its checksum is not the one in the index. Delete the index '
                    'and the file of records, and pack again'
                )
            place = archive.georeference(row)
            _write(folder, record.view(archive.dtype)[0, 0], archive.bands, place)
            written += 1
    return written


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
        try:
            with rasterio.open(
                unfinished / f'{band}.tif',
                'w',
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
        except rasterio.errors.RasterioError as error:
            raise OSError(f'cannot write {folder / band}.tif: {error}') from error
    os.replace(unfinished, folder)


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon unpack``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(
        prog='torchgeo-softcon unpack',
        description='Write the GeoTIFFs of an archive that `torchgeo-softcon pack` wrote, '
        'with the same pixels and georeference. An interrupted run goes on when started '
        'again.',
    )
    parser.add_argument('root', help='folder that is packed')
    parser.add_argument('out', help='folder to write')
    parser.add_argument(
        '--split', nargs='+', choices=BANDS, help='default: all there are'
    )
    options = parser.parse_args(args)
    try:
        written = unpack(options.root, options.out, options.split, progress=True)
    except (OSError, ValueError) as error:
        print(f'torchgeo-softcon unpack: {error}', file=sys.stderr)
        return 2
    print(f'{written} images are in {options.out}')
    return 0
