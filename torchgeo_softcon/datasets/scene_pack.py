# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Write scenes with the land cover under them: ``torchgeo-softcon pack``."""

import dataclasses
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from .._workers import open_workers
from ..geo.discovery import find_rasters
from ..geo.grid import Grid
from ..geo.mapped import create_mapped, try_write_mapped
from ..geo.sentinel2 import Products
from ..landcover.products import ProductLike
from ..storage.lock import exclusive
from ..storage.user_cache import file_stamps
from .packed_scenes import FORMAT, INDEX, grid_name, is_packed, read_index
from .scenes import WorldCoverScenes
from .worldcover import ESAWorldCover

#: Rows of land cover that are warped at once.
_ROWS = 1024

#: Bytes of a file that are read at once.
_PART = 2**24


class SceneFailure(NamedTuple):
    """A file that could not be packed, and the reason."""

    path: str
    reason: str


def pack_scenes(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    worldcover: Any = None,
    year: int | None = None,
    product: ProductLike = 'worldcover',
    progress: bool = False,
    workers: int = 1,
    scheduler: str | None = None,
) -> list[SceneFailure]:
    """Write scenes in a form that is fast to read, with the land cover under them.

    Pixels are as in the files. A run that was interrupted goes on when started again, and
    files that are new or have changed are packed. Files that cannot be read are returned.

    Args:
        images: Folder of the rasters of :class:`.WorldCoverScenes`.
        out: Folder to write.
        worldcover: Folders or files of WorldCover tiles, or of rasters of *product*. None
            for scenes without land cover.
        year: Year of the map.
        product: The land-cover product.
        progress: Whether to show a bar.
        workers: Number of processes that copy files.
        scheduler: Address of a Dask scheduler to use instead of processes, whose workers
            have the same paths.

    Raises:
        FileNotFoundError: If there are no rasters, or no tiles under some of them.
        ValueError: If *out* is *images*, or has something else in it.
    """
    source, target = Path(images).resolve(), Path(out)
    if source == target.resolve():
        raise ValueError(f'out must be another folder than images, got {out} for both')
    if target.is_dir() and any(target.iterdir()) and not is_packed(target):
        raise ValueError(f'out must be a new folder or packed scenes, got {out}')
    target.mkdir(parents=True, exist_ok=True)
    failures = []
    products = Products()
    with exclusive(target / '.lock', target), open(target / INDEX, 'a') as index:
        known = read_index(target)
        paths = find_rasters(source)
        stamps = file_stamps(paths)
        new = {}
        for raster, stamp in zip(paths, stamps, strict=True):
            # The names of folders tell what is in the files
            relative = os.path.relpath(raster, source.parent)
            packed = (target / 'images' / relative).with_suffix('.tif')
            stamp[0] = os.path.realpath(raster)
            line = known.get(str(packed.relative_to(target)), {})
            if line.get('source') != stamp or not packed.exists():
                new[raster] = packed, stamp
        units = ((raster, packed.absolute()) for raster, (packed, _) in new.items())
        with open_workers(workers, scheduler) as pool:
            copied = pool.map(try_write_mapped, units)
            for name, reason in tqdm(copied, 'pack', len(new), disable=not progress):
                if reason is not None:
                    failures.append(SceneFailure(name, reason))
                    continue
                packed, stamp = new[name]
                for told in products.files(name):
                    shutil.copy(told, packed.parent)
                _note(index, target, packed, source=stamp)
        if worldcover is not None:
            scenes = WorldCoverScenes(
                target / 'images', worldcover, year, patch_size=1, product=product
            )
            cover: Any = scenes.worldcover
            edition = cover.product.edition(cover.year)
            legend = yaml.safe_dump(dataclasses.asdict(cover.product))
            (target / 'legend.yaml').write_text(legend)
            for place in tqdm(scenes.places, 'land cover', disable=not progress):
                path = target / 'cover' / f'{grid_name(place.grid)}.tif'
                line = known.get(str(path.relative_to(target)), {})
                if line.get('edition') != edition or not path.exists():
                    _write_cover(path, place.grid, cover)
                    _note(index, target, path, edition=edition, year=cover.year)
    return failures


def verify_scenes(out: str | os.PathLike[str]) -> list[SceneFailure]:
    """Return the packed files that are not what they were, by their checksums."""
    reason = 'its checksum is not the one in the index. Delete it, and pack again'
    failures = []
    for name, line in read_index(out).items():
        path = Path(out, name)
        if not path.exists() or _checksum(path) != line['checksum']:
            failures.append(SceneFailure(str(path), reason))
    return failures


def _write_cover(path: Path, grid: Grid, cover: ESAWorldCover) -> None:
    """Write the land cover on the pixels of a place."""
    profile = {'crs': grid.crs.to_wkt(), 'transform': grid.transform, 'count': 1}
    size = {'height': grid.height, 'width': grid.width}
    with create_mapped(path, dtype='uint8', **profile, **size) as (band,):
        for top in range(0, grid.height, _ROWS):
            rows = min(_ROWS, grid.height - top)
            window = grid.window(top, 0, rows, grid.width)
            codes = cover.read_window(window.crs, window.transform, rows, grid.width)
            band[top : top + rows] = codes.numpy().astype(np.uint8)


def _note(index: IO[str], root: Path, path: Path, **line: Any) -> None:
    """Add a line about a file, once it is complete."""
    line |= {'format': FORMAT, 'file': str(path.relative_to(root))}
    # Apart from a line that a killed run has not finished
    index.write(f'\n{json.dumps({**line, "checksum": _checksum(path)})}\n')
    index.flush()


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open(path, 'rb') as file:
        while part := file.read(_PART):
            value = zlib.crc32(part, value)
    return value
