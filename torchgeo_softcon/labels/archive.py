# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Land-cover labels of all patches of an archive."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from tqdm import tqdm

from .._checks import check_counts, check_fractions
from .._cores import count_cores
from .._workers import Workers, check_scheduler, open_workers
from ..geo.antimeridian import Floats
from ..geo.find_files import AnyPath as Path
from ..geo.footprints import outlines
from ..landcover.products import ProductLike, find_legend, find_product
from ..storage.resumable import REMEDY
from .cover import LandCover
from .plan import Plan, count_unit
from .sources import Images, Table, find_images, find_layout, read
from .store import LabelStore, check_locations, write_json
from .tables import read_footprints

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
    year: int | Literal['nearest'] | None = None,
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
        year: Year of the map, by default the last one. With ``'nearest'``, each patch has
            the map of the year it was taken in, or of the nearest year that has a tile
            there, and the column *product* tells which. Names of files and folders tell
            the year of an image, a column *date* or *year* that of a footprint. Where
            nothing does, it is the last one.
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
    nearest = year == 'nearest' and len(product.years) > 1
    years: Sequence[int | None]
    if nearest:
        # The last one first, which is taken where two are as near
        years = sorted(product.years, reverse=True)
    else:
        years = [product.check_year(cast(int | None, year))]
    legend, of_code = find_legend(product, classes)
    check_counts(workers=workers)
    if not 0 < min_fraction <= 1:
        raise ValueError(f'min_fraction must be in (0, 1], got {min_fraction}')
    check_fractions(min_valid=min_valid)
    path = FilePath(out)
    format = format or ('json' if path.suffix == '.json' else 'parquet')
    if format not in ('parquet', 'json'):
        raise ValueError(f'format must be parquet or json, got {format!r}')

    if scheduler is not None:
        check_scheduler(scheduler)
    url = (base_url or product.url) if download else None
    land_cover = LandCover(worldcover, product, url, progress)
    years = land_cover.find_years(years)
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
    # Of all years: one that is missing may be there in the next run
    of_years = product.years if nearest else years
    editions = {one: product.edition(one) for one in of_years}
    origin = 'nearest' if nearest else years[0]
    store = LabelStore(file, name, legend, of_code, origin, editions)
    count = workers or count_cores()
    with store.open(overwrite), open_workers(count, scheduler) as pool:
        labelled = _Run(source, store, pool, land_cover, years, progress).run()
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
    return ~pc.is_in(ids, among).to_numpy(zero_copy_only=False)


@dataclass
class _Run:
    """Labels the patches of an archive that are missing in a store."""

    source: Images | Table
    store: LabelStore
    workers: Workers
    land_cover: LandCover
    years: Sequence[int | None]
    progress: bool
    failures: dict[str, str] = field(default_factory=dict)
    decoded: int = 0

    def run(self) -> Labelled:
        """Read footprints, count their pixels, and write the file."""
        missing = self._find_missing(self.land_cover.names(self.years))
        footprints, boxes = self._locate(self._read_footprints(missing))
        ids = footprints['id'].combine_chunks()
        plans = []
        for year, rows in self._by_year(ids, boxes):
            cover = self.land_cover.cover(year, boxes[rows], self.workers)
            plan = Plan(boxes[rows], cover.tiles)
            bare = np.flatnonzero(plan.first < 0).tolist()
            lost = self.land_cover.reasons(cover, plan.boxes, bare, year)
            part = footprints.take(pa.array(rows))
            names = part['id'].take(pa.array([*lost], pa.int64())).to_pylist()
            self.failures |= dict(zip(names, lost.values(), strict=True))
            plans.append((year, plan, part, [*lost]))

        tiles = self.land_cover.names(self.years)  # with those that were downloaded
        self.store.start_counting(tiles)
        wanted = self.source.ids.take(missing)
        new = 0
        for year, plan, part, without_tile in plans:
            ids = part['id'].combine_chunks()
            uncounted = ~_absent(ids, wanted) & self._uncounted(ids)
            uncounted[without_tile] = False
            new += self._count(plan, part, uncounted, year)

        without = wanted.filter(pa.array(self._uncounted(wanted))).to_pylist()
        unknown = [name for name in without if name not in self.failures]
        if unknown:
            raise RuntimeError(
                f'workers gave no result for {len(unknown)} patches, such as '
                f'{", ".join(unknown[:3])}. What is done is kept: start again to go on'
            )
        total = self.store.write(self.source.ids, footprints, self.failures, tiles)
        valid = pq.read_table(self.store.path, columns=['valid'])['valid'].to_numpy()
        partial = int(((valid > 0) & (valid < 1)).sum())
        return Labelled(
            self.store.path, total, new, self.failures, self.decoded, partial
        )

    def _by_year(
        self, ids: pa.Array, boxes: Floats
    ) -> Iterator[tuple[int | None, npt.NDArray[np.int64]]]:
        """Yield each year of the map with the rows of footprints that it is for."""
        if len(self.years) == 1 or not len(ids):
            yield self.years[0], np.arange(len(ids))
            return
        years = np.array(self.years, np.float64)
        taken = np.array(self.source.years(ids), np.float64)  # NaN if unknown
        unknown = np.isnan(taken)
        if unknown.any():
            warnings.warn(
                f'{unknown.sum()} of {len(ids)} patches such as {ids[int(unknown.argmax())]} '
                f'do not tell their year, they have the map of {self.years[0]}',
                UserWarning,
                stacklevel=4,
            )
        gaps = abs(np.where(unknown, years[0], taken)[:, None] - years)  # (N, Y)
        for column, year in enumerate(self.years if self.land_cover.local else ()):
            tiles = self.land_cover.cover(year, boxes, self.workers).tiles
            gaps[Plan(boxes, tiles).first < 0, column] += 1e6
        chosen = gaps.argmin(1)
        for column, year in enumerate(self.years):
            if len(rows := np.flatnonzero(chosen == column)):
                yield year, rows

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
            run: Any = self.workers.map if images else map
            for part in run(read, self.source.units(missing)):
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
        self,
        plan: Plan,
        footprints: pa.Table,
        todo: npt.NDArray[np.bool_],
        year: int | None,
    ) -> int:
        """Count the pixels of footprints."""
        product = self.land_cover.product
        codes, no_data = product.codes, product.no_data
        units = plan.units(footprints, todo, codes, self.workers.count, no_data)
        done = 0
        with self._bar(int(todo.sum()), 'patches') as bar:
            for ids, result in self.workers.map(count_unit, units):
                done += self.store.append_counts(ids, result, year)
                for row, reason in result.reasons.items():
                    self.failures[ids[row].as_py()] = reason
                self.decoded += result.decoded
                bar.update(len(ids))
        return done

    def _bar(self, total: int, unit: str) -> Any:
        hidden = not (self.progress and total)
        return tqdm(total=total, unit=f' {unit}', disable=hidden, smoothing=0.1)
