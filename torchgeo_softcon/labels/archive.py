# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Land-cover labels of all patches of an archive."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from tqdm import tqdm

from .._checks import check_counts, check_fractions
from .._cores import count_cores
from ..geo.antimeridian import Floats
from ..geo.find_files import AnyPath as Path
from ..geo.footprints import outlines
from ..landcover.product import LandCoverProduct
from ..landcover.products import ProductLike, find_legend, find_product
from ..storage.resumable import REMEDY
from .cover import download_folder, find_cover, find_year, reasons, remote_bucket
from .export import check_locations, write_json
from .plan import Plan, count_unit
from .sources import Images, Table, find_images, find_layout, read
from .store import LabelStore, counts_table
from .tables import read_footprints
from .workers import Workers, open_workers

#: Footprints whose outlines are made at once.
_CHUNK = 2**16


@dataclass(frozen=True)
class Labelled:
    """Outcome of a run.

    Attributes:
        path: The file of labels.
        rows: How many patches it has.
        new: How many of them were labelled now.
        failures: Why patches have no label, by their id.
        decoded: How many blocks of the map were decoded.
        partial: How many of the rows have land cover for a part of their pixels only, as
            at the edge of the map, or beside a tile that is missing.
    """

    path: FilePath
    rows: int
    new: int
    failures: dict[str, str]
    decoded: int
    partial: int


def label_archive(
    images: Path | None = None,
    worldcover: Path | Iterable[Path] = 'data',
    out: Path = 'labels.parquet',
    year: int | None = None,
    *,
    footprints: Path | None = None,
    layout: tuple[str, Path] | None = None,
    classes: str | None = None,
    format: Literal['parquet', 'json'] | None = None,
    min_fraction: float = 0.05,
    min_valid: float = 0.5,
    workers: int | None = None,
    scheduler: str | None = None,
    download: bool = False,
    base_url: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    product: ProductLike = 'worldcover',
) -> Labelled:
    """Count the land cover of every patch of an archive, and write it to a file.

    The file is GeoParquet with a row per patch: *id*, *product* (the map and its version),
    *crs*, *pixels*, *valid* (share of the pixels with data), for every class *count_CODE*
    (pixels) and *fraction_CODE* (share of the valid pixels), and *geometry* (its outline
    in longitude and latitude). Patches that fail are in a table beside it,
    ``labels.failed.csv``, with the reason.

    An interrupted run goes on when it is started again, and a run whose file exists labels
    what is missing there. An id stands for the same image or footprint in all runs.

    Args:
        images: A pattern such as ``'DIR/**/*.tif'``, or a folder. Every file is a patch.
        worldcover: Folders of ESA WorldCover tiles (or of *product*), or files. To read
            tiles on a server in place, ``/vsicurl/https://...`` of a file or of a bucket.
        out: The file to write.
        year: Year of the map, by default the last one.
        footprints: A table of footprints instead of images, see
            :func:`.read_footprints`.
        layout: Instead of images, a layout and its root: ``('ssl4eo-s12', ROOT)``, see
            :func:`.find_layout`.
        classes: Classes to count: those of the product (by default, 11 for WorldCover),
            or of one that it has a mapping to, ``'dynamicworld'`` (9) for WorldCover.
        format: ``'json'`` also writes the classes of every patch in the structure of
            SSL4EO-S12-ML, see :func:`.write_json`. By default, the suffix of *out* tells.
        min_fraction: For JSON, smallest share of the valid pixels that a class must
            cover, in (0, 1].
        min_valid: For JSON, smallest share of the pixels that must be valid, in [0, 1].
        workers: Number of processes, by default one per core.
        scheduler: Address of a Dask scheduler to use instead of processes.
        download: Whether to download the tiles under the archive to *worldcover*, a
            folder, if they are not there. Tiles that do not exist are sea: no data.
        base_url: Address of a server with the same paths, by default the public bucket.
        overwrite: Whether to replace a file that exists.
        progress: Whether to show progress bars.
        product: Land-cover product: its name, its YAML file, or the object itself, see
            :func:`torchgeo_softcon.landcover.find_product`.

    Returns:
        What was done.

    Raises:
        ImportError: If there is a *scheduler*, but no Dask.
        OSError: If there are no images or no tiles, if a tile cannot be opened, or if the
            file cannot be written.
        RuntimeError: If workers die again and again, or results are lost.
        TimeoutError: If workers give no result for an hour.
        ValueError: If not exactly one archive is given, ids are not unique (for JSON, in
            their last folder and name), other options are out of range, or if the file has
            labels of another map, legend or archive, or is none of labels.
    """
    product = find_product(product)
    year = product.check_year(year)
    legend, of_code = find_legend(product, classes)
    check_counts(workers=workers)
    if not 0 < min_fraction <= 1:
        raise ValueError(f'min_fraction must be in (0, 1], got {min_fraction}')
    check_fractions(min_valid=min_valid)
    path = FilePath(out)
    format = format or ('json' if path.suffix == '.json' else 'parquet')
    if format not in ('parquet', 'json'):
        raise ValueError(f'format must be parquet or json, got {format!r}')

    if not isinstance(worldcover, str | os.PathLike):
        worldcover = list(worldcover)
    if download or remote_bucket(worldcover) is not None:
        product.grid  # noqa: B018, raises an error if there is none
    if download:
        download_folder(worldcover)
    elif remote_bucket(worldcover) is None:
        find_year(worldcover, product, year)
    source, name = _find_archive(images, footprints, layout)
    if format == 'json' and layout is None:
        # The products of an image in a layout are at one place
        check_locations(source.ids.to_pylist())
    # The counts are kept beside the JSON, so that other thresholds take no second run
    file = path.with_suffix('.parquet') if format == 'json' else path
    json = path.with_suffix('.json')
    if format == 'json' and json.exists() and not (file.exists() or overwrite):
        raise ValueError(
            f'{json} is there, but not {file} of which it would be made: it may not be of '
            'this command. Choose another file, or set overwrite to replace it'
        )
    store = LabelStore(file, name, legend, of_code, year, product.edition(year))
    count = workers or count_cores()
    with store.open(overwrite), open_workers(count, scheduler) as pool:
        labelled = _Run(source, store, pool, product, year, progress).run(
            worldcover, (base_url or product.url) if download else None
        )
    if format == 'json':
        write_json(store.path, json, min_fraction, min_valid)
    return labelled


def _find_archive(
    images: Path | None, footprints: Path | None, layout: tuple[str, Path] | None
) -> tuple[Images | Table, str]:
    """Find the archive, and what tells it from others."""
    if sum(value is not None for value in (images, footprints, layout)) != 1:
        raise ValueError(
            'one of images, footprints and layout must be given, got '
            f'images = {images}, footprints = {footprints}, layout = {layout}'
        )
    if images is not None:
        return find_images(images), f'images {os.path.abspath(images)}'
    if layout is not None:
        return find_layout(*layout), f'{layout[0]} {os.path.abspath(layout[1])}'
    assert footprints is not None
    table = read_footprints(footprints)
    with open(footprints, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return table, f'footprints {digest}'


def _absent(ids: pa.Array, among: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Tell which ids are not among others, of shape (N,)."""
    if isinstance(among, pa.ChunkedArray):
        among = among.combine_chunks()
    missing = pc.is_null(pc.index_in(ids, among))
    return np.array(missing.to_numpy(zero_copy_only=False))


class _Run:
    """Labels the patches of an archive that are missing in a store."""

    def __init__(
        self,
        source: Images | Table,
        store: LabelStore,
        workers: Workers,
        product: LandCoverProduct,
        year: int | None,
        progress: bool,
    ) -> None:
        self.source, self.store, self.workers = source, store, workers
        self.product, self.year, self.progress = product, year, progress
        self.failures: dict[str, str] = {}
        self.decoded = 0

    def run(self, worldcover: Path | Iterable[Path], base_url: str | None) -> Labelled:
        """Read footprints, count their pixels, and write the file."""
        missing = self._find_missing(self._tile_names(worldcover))
        footprints, boxes = self._locate(self._read_footprints(missing))
        cover = find_cover(
            *(worldcover, self.product, self.year, boxes, self.workers),
            *(base_url, self.progress),
        )
        plan = Plan(boxes, cover.tiles)
        bare = np.flatnonzero(plan.first < 0).tolist()
        lost = reasons(cover, boxes, bare, self.product, self.year)
        ids = footprints['id'].combine_chunks()
        self.failures |= {ids[row].as_py(): reason for row, reason in lost.items()}

        tiles = self._tile_names(worldcover)  # with those that were downloaded
        self.store.start_counting(tiles)
        wanted = self.source.ids.take(missing)
        uncounted = ~_absent(ids, wanted) & self._uncounted(ids)
        uncounted[list(lost)] = False
        new = self._count(plan, footprints, uncounted)

        without = wanted.filter(pa.array(self._uncounted(wanted))).to_pylist()
        unknown = [name for name in without if name not in self.failures]
        if unknown:
            raise RuntimeError(
                f'workers gave no result for {len(unknown)} patches, such as '
                f'{", ".join(unknown[:3])}. What is done is kept: start again to go on'
            )
        rows = self.store.write(self.source.ids, footprints, self.failures, tiles)
        valid = pq.read_table(self.store.path, columns=['valid'])['valid'].to_numpy()
        partial = int(((valid > 0) & (valid < 1)).sum())
        return Labelled(
            self.store.path, rows, new, self.failures, self.decoded, partial
        )

    def _tile_names(self, worldcover: Path | Iterable[Path]) -> list[str]:
        """Return the names of the tiles that are there, none if they are on a server."""
        if remote_bucket(worldcover) is not None:
            return []
        try:
            files = find_year(worldcover, self.product, self.year)
            return sorted(map(os.path.basename, files))
        except FileNotFoundError:
            return []

    def _find_missing(self, tiles: list[str]) -> pa.Array:
        """Return the positions of patches that are not in the file, or lack data there."""
        ids, labels = self.source.ids, self.store.labels()
        if labels is None:
            return pa.array(np.arange(len(ids)))
        done = labels['id'].combine_chunks()
        strange = done.filter(pa.array(_absent(done, ids)))
        if len(strange):
            raise ValueError(
                f'{self.store.path} has {len(strange)} ids that the archive has not, such '
                f'as {", ".join(strange[:3].to_pylist())}. {REMEDY}'
            )
        if not set(tiles) <= set(self.store.about()['tiles']):
            # More tiles may have data where there was none
            done = done.filter(pc.equal(labels['valid'].combine_chunks(), 1))
        return pa.array(np.flatnonzero(_absent(ids, done)))

    def _uncounted(self, ids: pa.Array) -> npt.NDArray[np.bool_]:
        """Tell which patches have no counts in parts, of shape (N,)."""
        return _absent(ids, self.store.read_parts('counts')['id'])

    def _read_footprints(self, missing: pa.Array) -> pa.Table:
        """Read the footprints of the patches that are not in the file."""
        tables = [self.store.read_parts('footprints')]
        # Those of a table are in memory, and so are not in parts
        images = isinstance(self.source, Images)
        if images:
            unread = _absent(self.source.ids.take(missing), tables[0]['id'])
            missing = missing.filter(pa.array(unread))
        with self._bar(len(missing) if images else 0, 'images') as bar:
            for part in self.workers.map(read, self.source.units(missing)):
                if images:
                    self.store.append('footprints', part.table)
                tables.append(part.table)
                self.failures |= part.failures
                bar.update(len(part.table) + len(part.failures))
        return pa.concat_tables(tables).unify_dictionaries()

    def _locate(self, footprints: pa.Table) -> tuple[pa.Table, Floats]:
        """Return the footprints that are on Earth, and their boxes in degrees."""
        boxes = np.full((len(footprints), 4), np.nan)
        for start in range(0, len(footprints), _CHUNK):
            shapes = outlines(footprints.slice(start, _CHUNK))
            boxes[start : start + len(shapes)] = shapely.bounds(shapes)
        placed = (abs(boxes) <= (540, 90, 540, 90)).all(1)  # and not NaN
        for name in footprints['id'].filter(pa.array(~placed)).to_pylist():
            self.failures[name] = 'has no place in longitude and latitude'
        return footprints.filter(pa.array(placed)), boxes[placed]

    def _count(
        self, plan: Plan, footprints: pa.Table, todo: npt.NDArray[np.bool_]
    ) -> int:
        """Count the pixels of footprints."""
        codes, no_data = self.product.codes, self.product.no_data
        units = plan.units(footprints, todo, codes, self.workers.count, no_data)
        done = 0
        with self._bar(int(todo.sum()), 'patches') as bar:
            for ids, result in self.workers.map(count_unit, units):
                table = counts_table(ids, result)
                self.store.append('counts', table)
                for row, reason in result.reasons.items():
                    self.failures[ids[row].as_py()] = reason
                self.decoded += result.decoded
                done += len(table)
                bar.update(len(ids))
        return done

    def _bar(self, total: int, unit: str) -> Any:
        hidden = not (self.progress and total)
        return tqdm(total=total, unit=f' {unit}', disable=hidden, smoothing=0.1)
