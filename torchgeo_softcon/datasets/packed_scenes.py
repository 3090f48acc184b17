# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Scenes with the land cover under them, mapped into memory: ``torchgeo-softcon pack``.

``images`` has the rasters as they were, but not compressed, ``cover`` the land cover on
the pixels of each place, ``legend.yaml`` its classes, and ``scenes.jsonl`` a line for
every file: what it was made of, and its checksum.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from rasterio.windows import Window
from torch import Tensor

from .._checks import require
from ..geo.grid import Grid
from ..geo.mapped import open_mapped
from ..geo.open_files import OpenFiles
from ..landcover.products import find_product

#: Name of the index, and version of the format.
INDEX, FORMAT = 'scenes.jsonl', 1


def is_packed(images: Any) -> bool:
    """Return whether *images* is a folder of packed scenes."""
    return isinstance(images, str | os.PathLike) and Path(images, INDEX).is_file()


def has_cover(root: Path) -> bool:
    """Return whether *root* is a folder of packed scenes with the land cover under them."""
    return is_packed(root) and any('year' in line for line in read_index(root).values())


def read_index(root: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Read the lines of an index by the file they are about, the last one of each counts.

    Raises:
        ValueError: If it is of another version.
    """
    lines: dict[str, dict[str, Any]] = {}
    for text in Path(root, INDEX).read_text(encoding='utf-8').splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # where a run was killed
            continue
        require(
            line.get('format') == FORMAT,
            f'{Path(root, INDEX)} must be of format {FORMAT}, got {line.get("format")}: '
            'pack the scenes again',
        )
        lines[line['file']] = line
    return lines


def grid_name(grid: Grid) -> str:
    """Return a name for a pixel grid."""
    numbers = (*grid.transform[:6], grid.height, grid.width)
    return hashlib.sha256(f'{grid.crs.to_wkt()} {numbers}'.encode()).hexdigest()[:20]


class PackedCover:
    """The land cover of packed scenes, in place of :class:`.ESAWorldCover`."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Open the land cover in a folder of packed scenes."""
        self.root = Path(root)
        lines = [line for line in read_index(root).values() if 'year' in line]
        if not lines:
            raise FileNotFoundError(
                f'{root} has no land cover: pack it again with --worldcover, or set '
                'allow_unlabelled'
            )
        self.product = find_product(self.root / 'legend.yaml')
        self.year = lines[0]['year']
        self.files = [str(self.root / line['file']) for line in lines]
        self._opened = OpenFiles(open_mapped)

    def check_year(self, year: int | None) -> None:
        """Refuse another year than the one that is packed."""
        require(
            year in (None, self.year),
            f'year must be {self.year}, which {self.root} is packed with, got {year}: '
            'pack it again with that year, or leave year out',
        )

    def find(self, grid: Grid, name: str) -> str:
        """Return the file on a grid, that of the place *name*."""
        path = str(self.root / 'cover' / f'{grid_name(grid)}.tif')
        if path not in self.files or not os.path.exists(path):
            raise FileNotFoundError(
                f'{self.root} has no land cover under {name}: pack the scenes again'
            )
        return path

    def read(self, path: str, top: int, left: int, size: int) -> Tensor:
        """Read a window of a file, shape (size, size), long."""
        with self._opened.use(path) as source:
            (codes,) = source.read([1], Window(left, top, size, size))
        return torch.from_numpy(codes).long()
