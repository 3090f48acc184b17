# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Download of ESA WorldCover tiles from the public bucket."""

import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import requests
from rasterio.errors import RasterioError
from tqdm import tqdm

from .._checks import check_counts
from .tiles import (
    BUCKET,
    check_official,
    check_year,
    is_readable,
    tile_corner,
    tile_file,
    tile_path,
    tiles_of,
)

__all__ = ('ABSENT', 'BUCKET', 'TileDownload', 'download_tiles', 'tiles_of')

#: File in the folder of the tiles with the addresses that have none, one per line: tiles
#: of open sea. They are not asked for again, unless somebody removes the line.
ABSENT = 'ESA_WorldCover_absent.txt'

#: How often a tile is tried, and seconds before the second time. They double every time.
_ATTEMPTS, _BACKOFF = 5, 1.0

#: Seconds between looks at the progress, and at files that another process writes.
_POLL = 0.2

#: Bytes that are read at once, and the most that are lost if a connection ends.
_CHUNK = 2**16

#: Answers of servers that may be better later: too many requests, and errors of theirs.
_BUSY = (408, 429, 500, 502, 503, 504)


#: What may become of a tile.
Outcome = Literal['downloaded', 'kept', 'absent']


@dataclass
class TileDownload:
    """What became of the tiles that were asked for.

    Attributes:
        downloaded: Names of tiles that were downloaded.
        kept: Names of tiles that were there already.
        absent: Names of tiles that do not exist, as only sea is there.
        failed: Names of tiles that could not be had, and why.
    """

    downloaded: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Counts in one line, and a line for every failure."""
        counts = (
            f'{len(self.downloaded)} downloaded, {len(self.kept)} already there, '
            f'{len(self.absent)} without land, {len(self.failed)} failed'
        )
        return '\n'.join(
            [counts, *(f'{tile}: {why}' for tile, why in self.failed.items())]
        )


def download_tiles(
    names: Iterable[str],
    root: str | os.PathLike[str],
    year: Literal[2020, 2021] = 2021,
    base_url: str = BUCKET,
    workers: int = 4,
    timeout: float = 30,
    progress: bool = True,
) -> TileDownload:
    """Download tiles of ESA WorldCover, some 50 MB each, all or nothing of every tile.

    A tile gets its name when it is complete, of the official size and place, and every
    pixel of it has been read. Tiles that are there and open without an error are kept,
    of whatever size; others are replaced. What an interruption leaves of a tile is
    continued by the next call, if the server still has the same file. Two processes may
    download to one folder.

    Args:
        names: Names of tiles, as :func:`tiles_of` gives them.
        root: Folder to download to. It is made if it does not exist.
        year: Year of the map.
        base_url: Address of the bucket, or of another server with the same paths.
        workers: Number of tiles that are downloaded at once.
        timeout: Seconds without an answer or a byte, after which a server is asked again.
            It also bounds how long an interruption by the keyboard may take.
        progress: Whether to show a progress bar.

    Returns:
        What was downloaded, was there, does not exist, and failed after five attempts.

    Raises:
        ValueError: If *names* has other names than those of tiles, if *year* is unknown,
            if *root* is no folder, if *base_url* is no address, or if *workers* or
            *timeout* are not positive.
    """
    check_year(year)
    tiles = sorted({*names})
    for tile in tiles:
        tile_corner(tile)
    check_counts(workers=workers)
    if not timeout > 0:
        raise ValueError(f'timeout must be positive, got {timeout}')
    if not base_url.startswith(('https://', 'http://')):
        raise ValueError(
            f'base_url must start with https:// or http://, got {base_url!r}'
        )
    folder = Path(root).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f'root must be a folder, got {str(folder)!r}') from error

    fetch = _Fetch(folder, year, base_url.rstrip('/'), timeout)
    result = TileDownload()
    threads: list[int] = []
    with (
        ThreadPoolExecutor(
            min(workers, max(len(tiles), 1)),
            initializer=lambda: threads.append(threading.get_native_id()),
        ) as pool,
        tqdm(
            total=len(tiles), desc='WorldCover', unit='tile', disable=not progress
        ) as bar,
    ):
        futures = {pool.submit(fetch.tile, tile): tile for tile in tiles}
        pending: set[Future[Outcome]] = {*futures}
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

    _wait_for_end(threads)
    for future, tile in futures.items():
        try:
            getattr(result, future.result()).append(tile)
        except OSError as error:
            result.failed[tile] = str(error) or repr(error)
    return result


def _wait_for_end(threads: Iterable[int]) -> None:
    """Wait until threads have ended for the system, which is after Python has joined them.

    As they end, PROJ closes the database that it has opened for each. A process that is
    forked meanwhile waits for its locks forever. Where there is no ``/proc``, none forks.

    Args:
        threads: Native identifiers of threads.
    """
    end = time.monotonic() + 5
    paths = [f'/proc/self/task/{thread}' for thread in threads]
    while any(map(os.path.exists, paths)) and time.monotonic() < end:
        time.sleep(0.001)


class _Again(Exception):
    """A failure that another attempt may mend."""


class _Fetch:
    """What the downloads of all tiles share."""

    def __init__(self, folder: Path, year: int, base_url: str, timeout: float) -> None:
        self.folder, self.year = folder, year
        self.base_url, self.timeout = base_url, timeout
        self.stop = threading.Event()
        self.received = 0
        absent = folder / ABSENT
        self.absent = {*absent.read_text().split()} if absent.exists() else set()

    def tile(self, tile: str) -> Outcome:
        """Get a tile.

        Args:
            tile: Its name.

        Returns:
            The attribute of the result that the tile belongs to.

        Raises:
            OSError: If the tile cannot be had.
        """
        url = f'{self.base_url}/{tile_path(tile, self.year)}'
        path = self.folder / tile_file(tile, self.year)
        if is_readable(path):
            return 'kept'
        if url in self.absent:
            return 'absent'

        with self._partial(path) as partial:
            try:
                if is_readable(path):  # another process has finished it meanwhile
                    partial.truncate(0)
                    return 'kept'
                if not self._persist(url, tile, partial):
                    partial.truncate(0)
                    self._remember(url)
                    return 'absent'
                os.fsync(partial.fileno())
                _version(partial).unlink(missing_ok=True)
                os.replace(partial.name, path)
                return 'downloaded'
            finally:
                if not _size(partial):  # nothing to continue
                    _version(partial).unlink(missing_ok=True)
                    os.remove(partial.name)

    def _persist(self, url: str, tile: str, partial: BinaryIO) -> bool:
        """Receive a file, with several attempts, and check it.

        Args:
            url: Its address.
            tile: Name of the tile that it must be.
            partial: What has come of it, open to append.

        Returns:
            Whether there is such a file.

        Raises:
            OSError: If all attempts fail, or another would.
        """
        for attempt in range(_ATTEMPTS):
            if attempt:
                self._check_stop(_BACKOFF * 2 ** (attempt - 1))
            try:
                if not self._receive(url, partial):
                    return False
                check_official(partial.name, tile)
                return True
            except (_Again, requests.RequestException) as error:
                reason = str(error)
            except (RasterioError, ValueError) as error:
                partial.truncate(0)
                reason = f'no tile of WorldCover came: {error}'
        raise OSError(f'{url}: {reason} ({_ATTEMPTS} attempts)')

    @contextmanager
    def _partial(self, path: Path) -> Iterator[BinaryIO]:
        """Open the file for what has come of a tile, for nobody else at the same time."""
        while True:
            with open(path.with_name(f'.{path.name}.part'), 'ab') as stream:
                if _lock(stream):
                    yield stream
                    return
            self._check_stop(_POLL)

    def _receive(self, url: str, partial: BinaryIO) -> bool:
        """Receive a file, or the rest of it.

        Args:
            url: Its address.
            partial: What has come of it, open to append.

        Returns:
            Whether there is such a file.

        Raises:
            OSError: If the server refuses, or the disk is full.
            requests.RequestException: If the connection fails.
            _Again: If the server is busy, or sends too little.
        """
        version, size = _version(partial), _size(partial)
        headers = {'Accept-Encoding': 'identity'}
        if size and version.exists():
            # The whole file if it is another one by now
            headers |= {'Range': f'bytes={size}-', 'If-Range': version.read_text()}

        with requests.get(
            url, headers=headers, stream=True, timeout=self.timeout
        ) as response:
            if response.status_code == 404:
                return False
            if response.status_code in _BUSY:
                raise _Again(f'{response.status_code} {response.reason}')
            if response.status_code == 416:  # there is no rest
                partial.truncate(0)
                raise _Again('the server does not continue the file')
            if response.status_code not in (200, 206):
                raise OSError(f'{url}: {response.status_code} {response.reason}')

            start = f'bytes {size}-'
            if response.status_code != 206:
                size = 0
                partial.truncate(0)
                etag = response.headers.get('ETag', '')
                version.unlink(missing_ok=True)
                if etag.startswith('"'):  # weak ones are not good for ranges
                    version.write_text(etag)
            elif not response.headers.get('Content-Range', '').startswith(start):
                partial.truncate(0)
                raise _Again('the server continues the file at another place')

            length = response.headers.get('Content-Length')
            try:
                for chunk in response.iter_content(_CHUNK):
                    self._check_stop()
                    partial.write(chunk)
                    self.received += len(chunk)
            finally:
                partial.flush()
            received = _size(partial) - size
            if length is not None and received != int(length):
                raise _Again(f'{received} of {length} bytes came')
        return True

    def _remember(self, url: str) -> None:
        """Note that there is no such tile."""
        # One short write to the end of a file: processes do not disturb each other
        with open(self.folder / ABSENT, 'a') as stream:
            stream.write(f'{url}\n')

    def _check_stop(self, seconds: float = 0) -> None:
        """Wait, and raise an error if the main thread was interrupted."""
        if self.stop.wait(seconds) if seconds else self.stop.is_set():
            raise OSError('interrupted')


def _lock(partial: BinaryIO) -> bool:
    """Lock a file until it is closed, or the process ends in whatever way."""
    try:
        fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who had it before may have given it another name, or thrown it away
        return os.path.samestat(os.fstat(partial.fileno()), os.stat(partial.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def _size(partial: BinaryIO) -> int:
    """Bytes that have come of a tile."""
    return os.fstat(partial.fileno()).st_size


def _version(partial: BinaryIO) -> Path:
    """File with the server's mark (ETag) of the file that a part is of."""
    return Path(f'{partial.name}.etag')
