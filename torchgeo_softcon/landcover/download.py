# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Download the tiles of a land-cover product."""

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import rasterio
import requests
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window
from tqdm import tqdm

from .._checks import check_counts, check_positive, require
from ..geo.grid import Bounds
from ..storage.lock import exclusive
from .product import LandCoverProduct
from .products import ProductLike, find_product
from .tiles import TileGrid

#: How often a tile is tried, and seconds before the second time. They double every time.
_ATTEMPTS, _BACKOFF = 5, 1.0

#: Seconds between looks at the progress, and at files that another process writes.
_POLL = 0.2

#: Bytes that are read at once, and the most that are lost if a connection ends.
_CHUNK = 2**16

#: Bytes of a file that are not pixels, at most.
_HEADERS = 2**22

#: How TIFF and BigTIFF begin, in both byte orders.
_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')

#: Answers that may be better later: wrong ranges, busy and broken servers.
_RETRIED = (206, 408, 416, 429, 500, 502, 503, 504)

#: What may become of a tile.
Outcome = Literal['downloaded', 'kept', 'absent']


@dataclass
class TileDownload:
    """Outcome of a download: the tiles that were asked for.

    Attributes:
        downloaded: Names of tiles that were downloaded.
        kept: Names of tiles that were there already.
        absent: Names of tiles that do not exist, as only sea is there.
        failed: Names of tiles that could not be downloaded, and why.
    """

    downloaded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the counts in one line, and a line for every failure."""
        counts = (
            f'{len(self.downloaded)} downloaded, {len(self.kept)} already there, '
            f'{len(self.absent)} without land, {len(self.failed)} failed'
        )
        return '\n'.join([counts, *(f'{k}: {why}' for k, why in self.failed.items())])


def tiles_of(
    bounds: Bounds | Iterable[Sequence[float]], product: ProductLike = 'worldcover'
) -> list[str]:
    """Return the names of the tiles under boxes, see :meth:`.TileGrid.names_under`."""
    return find_product(product).grid.names_under(bounds)


def download_tiles(
    names: Iterable[str],
    root: str | os.PathLike[str],
    year: int | None = None,
    base_url: str | None = None,
    workers: int = 4,
    timeout: float = 30,
    progress: bool = True,
    product: ProductLike = 'worldcover',
) -> TileDownload:
    """Download tiles of a product (some 50 MB each for WorldCover), each as a whole.

    A tile gets its name when it is complete, of the official size and place, and every
    pixel of it has been read. Tiles that are there and open without an error are kept,
    of whatever size; others are replaced. What an interruption leaves of a tile is
    continued by the next call, if the server still has the same file. Several processes
    may download to one folder.

    Args:
        names: Names of tiles, as :func:`tiles_of` returns them.
        root: Folder to download to. It is made if it does not exist.
        year: Year of the map, by default the last one.
        base_url: Address of another server with the same paths, by default that of the
            product.
        workers: Number of tiles that are downloaded at once.
        timeout: Seconds without an answer or a byte, after which a server is asked again.
            It also bounds how long an interruption by the keyboard may take.
        progress: Whether to show a progress bar.
        product: A product, its name, or its YAML file.

    Returns:
        The names of the tiles by what became of them. A tile fails after five attempts.

    Raises:
        ValueError: If an argument is invalid, with its name.
    """
    product = find_product(product)
    year = product.check_year(year)
    tiles = sorted({*names})
    for tile in tiles:
        product.grid.bounds(tile)
    check_counts(workers=workers)
    check_positive(timeout=timeout)
    base_url = product.url if base_url is None else base_url
    require(
        base_url.startswith(('https://', 'http://')),
        f'base_url must start with https:// or http://, got {base_url!r}',
    )
    folder = Path(root).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f'root must be a folder, got {str(folder)!r}') from error

    fetch = _Fetch(folder, product, year, base_url.rstrip('/'), timeout)
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(
            total=len(tiles), desc=product.title, unit='tile', disable=not progress
        ) as bar,
    ):
        futures = {tile: pool.submit(fetch.tile, tile) for tile in tiles}
        pending: set[Future[Outcome]] = {*futures.values()}
        try:
            # Short waits: the main thread is the one that an interruption reaches
            while pending:
                done, pending = wait(pending, _POLL, FIRST_COMPLETED)
                bar.set_postfix_str(f'{fetch.received / 1e6:.0f} MB', refresh=not done)
                bar.update(len(done))
        except BaseException:
            fetch.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    result = TileDownload()
    for tile, future in futures.items():
        try:
            getattr(result, future.result()).append(tile)
        except OSError as error:
            result.failed[tile] = str(error) or repr(error)
    return result


@dataclass
class _Fetch:
    """State that the downloads of all tiles share."""

    folder: Path
    product: LandCoverProduct
    year: int | None
    base_url: str
    timeout: float
    stop: threading.Event = field(default_factory=threading.Event)
    received: int = 0

    def __post_init__(self) -> None:
        """Read the addresses of tiles that do not exist, which are not asked for again."""
        name = f'{self.product.title.replace(" ", "_")}_absent.txt'
        self.absent_file = self.folder / name
        known = self.absent_file.read_text() if self.absent_file.exists() else ''
        self.absent = {*known.split()}

    def tile(self, tile: str) -> Outcome:
        """Get a tile, or raise an OSError that says why it cannot be downloaded."""
        url = f'{self.base_url}/{self.product.file_path(tile, self.year)}'
        path = self.folder / self.product.file_name(tile, self.year)
        # The bytes that have come, which are also the lock on the tile
        partial = path.with_name(f'.{path.name}.part')
        while not is_readable(path):
            if url in self.absent:
                return 'absent'
            try:
                with exclusive(partial, path):
                    return self._get(tile, url, path, partial)
            except BlockingIOError:
                self._check_stop(_POLL)
        return 'kept'

    def _get(self, tile: str, url: str, path: Path, partial: Path) -> Outcome:
        """Get a tile that nobody else gets at the same time, in several attempts."""
        moved = False
        try:
            if is_readable(path):  # another process has just finished it
                os.truncate(partial, 0)
                return 'kept'
            for attempt in range(_ATTEMPTS):
                if attempt:
                    self._check_stop(_BACKOFF * 2 ** (attempt - 1))
                try:
                    if self._receive(url, partial):
                        check_official(str(partial), tile, self.product.grid)
                        _etag_file(partial).unlink(missing_ok=True)
                        os.replace(partial, path)
                        moved = True
                        return 'downloaded'
                    # One short write to the end: processes do not disturb each other
                    with self.absent_file.open('a') as stream:
                        stream.write(f'{url}\n')
                    return 'absent'
                except requests.RequestException as error:
                    reason = str(error)
                except (RasterioError, ValueError) as error:
                    os.truncate(partial, 0)
                    reason = f'what came is not a tile of {self.product.title}: {error}'
            raise OSError(f'{url}: {reason} ({_ATTEMPTS} attempts)')
        finally:
            # What has its name by now may be of another process, else nothing is lost
            if not moved and not partial.stat().st_size:
                for file in (_etag_file(partial), partial):
                    file.unlink(missing_ok=True)

    def _receive(self, url: str, partial: Path) -> bool:
        """Append a file, or the rest of it, to what has come, False if it does not exist."""
        etag_file, size = _etag_file(partial), partial.stat().st_size
        headers = {'Accept-Encoding': 'identity'}
        if size and etag_file.exists():
            # The whole file if it is another one by now
            headers |= {'Range': f'bytes={size}-', 'If-Range': etag_file.read_text()}
        with requests.get(
            url, headers=headers, stream=True, timeout=self.timeout
        ) as response:
            code, place = response.status_code, response.headers.get('Content-Range')
            continues = code == 206 and f'{place}'.startswith(f'bytes {size}-')
            # Else what has come is of another file
            if code in (200, 206, 404, 416) and not continues:
                os.truncate(partial, 0)
                etag_file.unlink(missing_ok=True)
            if code == 404:
                return False
            if code == 200:
                etag = response.headers.get('ETag', '')
                if etag.startswith('"'):  # weak ones are not good for ranges
                    etag_file.write_text(etag)
            elif not continues:
                status = f'{code} {response.reason}'
                if code in _RETRIED:
                    raise requests.RequestException(status)
                raise OSError(f'{url}: {status}')
            self._append(response, partial)
        return True

    def _append(self, response: requests.Response, partial: Path) -> None:
        """Write the body of an answer behind the bytes that there are."""
        # Classes take less than half a byte per pixel, also with overviews
        limit = self.product.grid.pixels**2 // 2 + _HEADERS
        with partial.open('ab') as stream:
            announced = stream.tell() + (response.raw.length_remaining or 0)
            for chunk in response.iter_content(_CHUNK):
                self._check_stop()
                if not stream.tell() and not chunk.startswith(_TIFF):
                    raise ValueError(f'it begins with {chunk[:4]!r}, a TIFF does not')
                if max(stream.tell() + len(chunk), announced) > limit:
                    stream.truncate(0)
                    raise OSError(f'{response.url}: a tile cannot have so many bytes')
                stream.write(chunk)
                self.received += len(chunk)
            if stream.tell() < announced:  # before version 2, urllib3 accepts that
                raise requests.RequestException(f'{announced} bytes were announced')
            stream.flush()
            os.fsync(stream.fileno())

    def _check_stop(self, seconds: float = 0) -> None:
        """Wait, and raise an error if the main thread was interrupted."""
        if self.stop.wait(seconds):
            raise OSError('interrupted')


def _etag_file(partial: Path) -> Path:
    """Return the file with the server's mark (ETag) of what has come."""
    return partial.with_name(f'{partial.name}.etag')


def is_readable(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is there and a raster that is not truncated."""
    try:
        with rasterio.open(path) as src:
            _check_blocks(src)
    except (RasterioError, ValueError):
        return False
    return True


def _check_blocks(src: DatasetReader) -> list[Window]:
    """Return the windows of the blocks that a file stores, all must be in it."""
    size = os.path.getsize(src.name)
    stored = []
    for (row, col), window in src.block_windows(1):
        offset, length = (
            src.get_tag_item(f'BLOCK_{item}_{col}_{row}', 'TIFF', bidx=1)
            for item in ('OFFSET', 'SIZE')
        )
        if offset is not None:  # else all pixels are 0, or it is no TIFF
            if int(offset) + int(length) > size:
                raise ValueError(f'truncated after {size} bytes')
            stored.append(window)
    return stored


def check_official(path: str, tile: str, grid: TileGrid) -> None:
    """Raise a ValueError or RasterioError if a file is not that of a tile."""
    with rasterio.open(path, driver='GTiff') as src:
        found = (src.width, src.height, src.count, src.dtypes[0])
        if found != (grid.pixels, grid.pixels, 1, 'uint8'):
            raise ValueError(
                f'{grid.pixels} x {grid.pixels} pixels, 1 band of uint8 expected, got '
                f'{found[0]} x {found[1]}, {found[2]} of {found[3]}'
            )
        if src.crs is None or src.crs.to_epsg() != 4326:
            raise ValueError(f'EPSG:4326 expected, got {src.crs}')
        # Less than a tenth of a pixel
        bounds = grid.bounds(tile)
        if not np.allclose(src.bounds, bounds, rtol=0, atol=1e-6):
            raise ValueError(f'bounds {bounds} expected, got {tuple(src.bounds)}')
        for window in _check_blocks(src):
            src.read(1, window=window)
