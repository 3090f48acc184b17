# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

from torchgeo_softcon.datasets import ESAWorldCover
from torchgeo_softcon.landcover import TileGrid, download
from torchgeo_softcon.landcover.download import TileDownload, download_tiles, tiles_of
from torchgeo_softcon.landcover.products import WORLDCOVER

tile_file, tile_path = WORLDCOVER.file_name, WORLDCOVER.file_path

from ..helpers import TILE_PROFILE

#: What a server does with a request, given the file that was asked for.
Answer = Callable[[Any, bytes], None]

ABSENT = 'ESA_WorldCover_absent.txt'
TILE, OTHER, SEA = 'N51E003', 'N51E006', 'N00W030'


def write_tile(
    path: Path, tile: str = TILE, left: float = 3, size: int = 36000
) -> bytes:
    """A tile of the official grid with some blocks of data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        'w',
        width=size,
        height=size,
        transform=from_origin(left, 54, 3 / size, 3 / size),
        **TILE_PROFILE,
    ) as dst:
        codes = np.random.default_rng(0).choice([10, 40, 80], (512, 1024))
        for row in (0, 1):
            window = Window(0, row * 1024, 1024, 512)
            dst.write(codes.astype('uint8'), 1, window=window)
    return path.read_bytes()


class Bucket:
    """A web server on this machine that breaks as it is told.

    Attributes:
        requests: Path and range of every request.
        answers: What to do for the next requests instead of sending the file.
        ranges: Whether parts of files are sent.
        etag: Version of the files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[tuple[str, str | None]] = []
        self.answers: list[Answer] = []
        self.ranges, self.etag = True, '"a"'
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                bucket.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def answer(self, handler: Any) -> None:
        wanted = handler.headers.get('Range')
        self.requests.append((handler.path, wanted))
        file = self.root / handler.path.strip('/')
        body = file.read_bytes() if file.is_file() else b''
        if self.answers:
            self.answers.pop(0)(handler, body)
        elif not body:
            handler.send_error(404)
        elif wanted and self.ranges and handler.headers['If-Range'] == self.etag:
            start = int(wanted.removeprefix('bytes=').removesuffix('-'))
            handler.send_response(206)
            place = f'bytes {start}-{len(body) - 1}/{len(body)}'
            handler.send_header('Content-Range', place)
            self.send(handler, body[start:])
        else:
            handler.send_response(200)
            self.send(handler, body)

    def send(self, handler: Any, body: bytes, sent: int | None = None) -> None:
        """Send a body, or only some bytes of it."""
        handler.send_header('ETag', self.etag)
        handler.send_header('Content-Length', str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:sent])
        handler.wfile.flush()


def status(code: int) -> Answer:
    return lambda handler, body: handler.send_error(code)


@pytest.fixture(scope='module')
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bucket with a tile, in both years."""
    root = tmp_path_factory.mktemp('bucket')
    body = write_tile(root / tile_path(TILE, 2021))
    for tile, year in ((TILE, 2020), ('N54E003', 2021)):
        path = root / tile_path(tile, year)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    write_tile(root / tile_path(OTHER, 2021), OTHER, left=6)
    return root


@pytest.fixture
def bucket(official: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setattr(download, '_BACKOFF', 0.001)
    monkeypatch.setattr(download, '_POLL', 0.01)
    bucket = Bucket(official)
    thread = threading.Thread(target=bucket.server.serve_forever, args=[0.01])
    thread.start()
    yield bucket
    bucket.server.shutdown()
    thread.join()
    bucket.server.server_close()


def fetch(
    bucket: Bucket, root: Path, *names: str, timeout: float = 5, **kwargs: Any
) -> TileDownload:
    return download_tiles(
        names or [TILE],
        root,
        base_url=bucket.url,
        timeout=timeout,
        progress=False,
        **kwargs,
    )


def body_of(bucket: Bucket, tile: str = TILE) -> bytes:
    return (bucket.root / tile_path(tile, 2021)).read_bytes()


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


class TestDownload:
    def test_tiles_of_boxes_and_only_once(self, bucket: Bucket, tmp_path: Path) -> None:
        root = tmp_path / 'new' / 'folder'
        boxes = [(5.9, 52, 6.1, 52.1), (-28, 1, -27.9, 1.1)]
        result = fetch(bucket, root, *tiles_of(boxes))
        assert result == TileDownload(downloaded=[TILE, OTHER], absent=[SEA])
        assert str(result) == (
            '2 downloaded, 0 already there, 1 without land, 0 failed'
        )
        names = [tile_file(TILE, 2021), tile_file(OTHER, 2021)]
        assert files(root) == sorted([*names, ABSENT])
        assert (root / names[0]).read_bytes() == body_of(bucket)
        dataset = ESAWorldCover(root)
        assert len(dataset.files) == 2

        bucket.requests.clear()
        again = fetch(bucket, root, *tiles_of(boxes))
        assert again == TileDownload(kept=[TILE, OTHER], absent=[SEA])
        assert not bucket.requests

    def test_year(self, bucket: Bucket, tmp_path: Path) -> None:
        result = fetch(bucket, tmp_path, year=2020)
        assert result.downloaded == [TILE]
        assert files(tmp_path) == ['ESA_WorldCover_10m_2020_v100_N51E003_Map.tif']

    def test_absent_tiles_are_those_of_one_server(
        self, bucket: Bucket, tmp_path: Path
    ) -> None:
        assert fetch(bucket, tmp_path, SEA).absent == [SEA]
        address = f'{bucket.url}/{tile_path(SEA, 2021)}'
        assert (tmp_path / ABSENT).read_text() == f'{address}\n'
        # Another server, another year, and somebody who wants to know it again
        assert fetch(bucket, tmp_path, SEA, year=2020).absent == [SEA]
        (tmp_path / ABSENT).unlink()
        assert fetch(bucket, tmp_path, SEA).absent == [SEA]
        assert len(bucket.requests) == 3

    def test_nothing(self, bucket: Bucket, tmp_path: Path) -> None:
        assert download_tiles([], tmp_path, base_url=bucket.url) == TileDownload()

    def test_progress(
        self, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        download_tiles([TILE], tmp_path, base_url=bucket.url)
        shown = capsys.readouterr().err
        assert 'WorldCover' in shown
        assert '1/1' in shown


class TestFailures:
    @pytest.mark.parametrize('code', [500, 503, 429])
    def test_busy_server(self, bucket: Bucket, tmp_path: Path, code: int) -> None:
        bucket.answers = [status(code)] * 2
        assert fetch(bucket, tmp_path).downloaded == [TILE]
        assert len(bucket.requests) == 3

    def test_broken_server(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.answers = [status(500)] * 5
        result = fetch(bucket, tmp_path, TILE, OTHER, workers=1)
        (reason,) = result.failed.values()
        assert list(result.failed) == [TILE]
        assert f'{tile_path(TILE, 2021)}: 500 Internal' in reason
        assert str(result).startswith(
            '1 downloaded, 0 already there, 0 without land, 1'
        )
        assert f'\n{TILE}: {reason}' in str(result)
        # One broken tile does not keep the next one from coming
        assert result.downloaded == [OTHER]
        assert files(tmp_path) == [tile_file(OTHER, 2021)]

    def test_forbidden_is_not_tried_again(self, bucket: Bucket, tmp_path: Path) -> None:
        bucket.answers = [status(403)]
        result = fetch(bucket, tmp_path)
        assert '403 Forbidden' in result.failed[TILE]
        assert len(bucket.requests) == 1
        assert files(tmp_path) == []

    def test_no_server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(download, '_BACKOFF', 0.001)
        result = download_tiles(
            [TILE], tmp_path, base_url='http://127.0.0.1:9', progress=False
        )
        assert 'refused' in result.failed[TILE]
        assert '5 attempts' in result.failed[TILE]

    def test_timeout(self, bucket: Bucket, tmp_path: Path) -> None:
        free = threading.Event()

        def stall(handler: Any, body: bytes) -> None:
            free.wait(5)

        bucket.answers = [stall]
        before = time.monotonic()
        assert fetch(bucket, tmp_path, timeout=0.2).downloaded == [TILE]
        free.set()
        assert time.monotonic() - before < 4

    def test_full_disk(
        self, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(stream: int) -> None:
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr(os, 'fsync', full)
        result = fetch(bucket, tmp_path)
        assert 'No space left' in result.failed[TILE]
        assert not (tmp_path / tile_file(TILE, 2021)).exists()
        assert len(bucket.requests) == 1


class TestTruncation:
    def test_goes_on_where_it_ended(self, bucket: Bucket, tmp_path: Path) -> None:
        def cut(handler: Any, body: bytes) -> None:
            handler.send_response(200)
            bucket.send(handler, body, 2**17)

        bucket.answers = [cut]
        assert fetch(bucket, tmp_path).downloaded == [TILE]
        assert [wanted for _, wanted in bucket.requests] == [None, 'bytes=131072-']
        path = tmp_path / tile_file(TILE, 2021)
        assert path.read_bytes() == body_of(bucket)
        assert files(tmp_path) == [path.name]

    @pytest.mark.parametrize('reason', ['no ranges', 'another file', 'no version'])
    def test_starts_again(self, bucket: Bucket, tmp_path: Path, reason: str) -> None:
        def cut(handler: Any, body: bytes) -> None:
            handler.send_response(200)
            bucket.etag = '"b"' if reason == 'another file' else bucket.etag
            bucket.send(handler, b'\0' * len(body), 2**17)
            bucket.etag = '"a"'

        bucket.ranges = reason != 'no ranges'
        bucket.etag = 'W/"a"' if reason == 'no version' else bucket.etag
        bucket.answers = [cut]
        assert fetch(bucket, tmp_path).downloaded == [TILE]
        path = tmp_path / tile_file(TILE, 2021)
        assert path.read_bytes() == body_of(bucket)

    @pytest.mark.parametrize('code', [206, 416])
    def test_server_that_continues_wrongly(
        self, bucket: Bucket, tmp_path: Path, code: int
    ) -> None:
        def cut(handler: Any, body: bytes) -> None:
            handler.send_response(200)
            bucket.send(handler, body, 2**17)

        def wrong(handler: Any, body: bytes) -> None:
            handler.send_response(code)
            handler.send_header('Content-Range', f'bytes 7-{len(body)}/{len(body)}')
            bucket.send(handler, body[7:])

        bucket.answers = [cut, wrong]
        assert fetch(bucket, tmp_path).downloaded == [TILE]
        assert [wanted for _, wanted in bucket.requests] == [
            None,
            'bytes=131072-',
            None,
        ]

    def test_without_a_length(self, bucket: Bucket, tmp_path: Path) -> None:
        def cut(handler: Any, body: bytes) -> None:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(body[:-1000])

        bucket.answers = [cut] * 5
        result = fetch(bucket, tmp_path)
        assert 'not a tile of ESA WorldCover: truncated after' in result.failed[TILE]
        assert files(tmp_path) == []
        bucket.answers = [cut]
        assert fetch(bucket, tmp_path).downloaded == [TILE]

    @pytest.mark.parametrize('announced', [True, False])
    def test_without_an_end(
        self, bucket: Bucket, tmp_path: Path, announced: bool
    ) -> None:
        def endless(handler: Any, body: bytes) -> None:
            handler.send_response(200)
            if announced:
                handler.send_header('Content-Length', str(10**12))
            handler.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    handler.wfile.write(body)

        small = dataclasses.replace(WORLDCOVER, tiles=TileGrid(3, 100))
        bucket.answers = [endless]
        result = fetch(bucket, tmp_path, product=small)
        assert 'cannot have so many bytes' in result.failed[TILE]
        assert len(bucket.requests) == 1
        assert files(tmp_path) == []

    def test_damaged_block(self, bucket: Bucket, tmp_path: Path) -> None:
        def damage(handler: Any, body: bytes) -> None:
            handler.send_response(200)
            bucket.send(handler, body[:-30_000] + bytes(10_000) + body[-20_000:])

        bucket.answers = [damage] * 5
        assert 'not a tile of' in fetch(bucket, tmp_path).failed[TILE]
        assert files(tmp_path) == []

    def test_other_place(self, bucket: Bucket, tmp_path: Path) -> None:
        # The server has N51E003 under this name
        result = fetch(bucket, tmp_path, 'N54E003')
        assert 'bounds (3, 54, 6, 57) expected, got (3' in result.failed['N54E003']
        assert files(tmp_path) == []

    @pytest.mark.parametrize('what', ['page', 'small'])
    def test_other_file(self, bucket: Bucket, tmp_path: Path, what: str) -> None:
        content = b'<html>Please log in</html>'
        if what == 'small':
            content = write_tile(tmp_path / 'small.tif', size=3000)

        def other(handler: Any, body: bytes) -> None:
            handler.send_response(200)
            bucket.send(handler, content)

        bucket.answers = [other] * 5
        reason = fetch(bucket, tmp_path / 'new').failed[TILE]
        assert ('a TIFF does not' if what == 'page' else 'got 3000 x 3000') in reason


class TestFiles:
    def test_of_any_size_are_kept(self, bucket: Bucket, tmp_path: Path) -> None:
        path = tmp_path / tile_file(TILE, 2021)
        body = write_tile(path, size=3000)
        assert fetch(bucket, tmp_path).kept == [TILE]
        assert path.read_bytes() == body
        assert not bucket.requests

    @pytest.mark.parametrize('what', ['truncated', 'empty', 'page'])
    def test_that_are_broken_are_replaced(
        self, bucket: Bucket, tmp_path: Path, what: str
    ) -> None:
        path = tmp_path / tile_file(TILE, 2021)
        body = body_of(bucket)
        content = {'truncated': body[:-1000], 'empty': b'', 'page': b'<html>'}[what]
        path.write_bytes(content)
        bucket.answers = [status(500)] * 5
        assert list(fetch(bucket, tmp_path).failed) == [TILE]
        assert path.read_bytes() == content  # nothing is lost before something is there
        assert fetch(bucket, tmp_path).downloaded == [TILE]
        assert path.read_bytes() == body


class TestInterruption:
    """Of this process, and by another one."""

    def stall(self, bucket: Bucket, started: threading.Event) -> Answer:
        """Send some of a file, and then nothing for a while."""

        def answer(handler: Any, body: bytes) -> None:
            handler.send_response(200)
            bucket.send(handler, body, 2**17)
            started.set()
            time.sleep(3)

        return answer

    def test_of_another_process(self, bucket: Bucket, tmp_path: Path) -> None:
        started = threading.Event()
        bucket.answers = [self.stall(bucket, started)]
        code = (
            'import sys; from torchgeo_softcon.landcover.download import '
            'download_tiles; download_tiles([sys.argv[1]], sys.argv[2], 2021, sys.argv[3])'
        )
        process = subprocess.Popen(
            [sys.executable, '-c', code, TILE, str(tmp_path), bucket.url],
            stderr=subprocess.DEVNULL,
        )
        assert started.wait(60)
        partial = tmp_path / f'.{tile_file(TILE, 2021)}.part'
        while partial.stat().st_size < 2**16:
            time.sleep(0.01)

        with ThreadPoolExecutor() as pool:
            result = pool.submit(fetch, bucket, tmp_path)
            # Not at once: the other one is at it
            assert not wait([result], 0.2).done
            process.send_signal(signal.SIGTERM)
            process.wait()
            assert result.result(5).downloaded == [TILE]
        assert [wanted is None for _, wanted in bucket.requests] == [True, False]
        assert files(tmp_path) == [tile_file(TILE, 2021)]
        body = (tmp_path / tile_file(TILE, 2021)).read_bytes()
        assert body == body_of(bucket)

    def test_by_the_keyboard(
        self, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started = threading.Event()
        bucket.answers = [self.stall(bucket, started)]

        def interrupt(*args: Any) -> None:
            assert started.wait(5)
            raise KeyboardInterrupt

        monkeypatch.setattr(download, 'wait', interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(bucket, tmp_path, TILE, OTHER, workers=1, timeout=0.5)
        # Nothing more was asked for
        assert len(bucket.requests) == 1
        assert not [*tmp_path.glob('ESA*')]
        monkeypatch.undo()
        assert fetch(bucket, tmp_path).downloaded == [TILE]

    def test_several_at_once(self, bucket: Bucket, tmp_path: Path) -> None:
        with ThreadPoolExecutor(3) as pool:
            runs = [pool.submit(fetch, bucket, tmp_path, TILE, OTHER) for _ in range(3)]
        results = [run.result() for run in runs]
        downloaded = [tile for result in results for tile in result.downloaded]
        assert sorted(downloaded) == [TILE, OTHER]
        for result in results:
            assert sorted(result.downloaded + result.kept) == [TILE, OTHER]
        assert len(bucket.requests) == 2
        assert files(tmp_path) == [tile_file(TILE, 2021), tile_file(OTHER, 2021)]

    def test_another_begins_when_one_has_finished(
        self, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace = os.replace
        later = tmp_path / f'.{tile_file(TILE, 2021)}.part'

        def replace_and_begin(source: Any, target: Any) -> None:
            replace(source, target)
            later.touch()

        monkeypatch.setattr(os, 'replace', replace_and_begin)
        assert fetch(bucket, tmp_path).downloaded == [TILE]
        # It is the lock of the other one
        assert later.exists()


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'names': ['N52E003']}, "names must be .* got 'N52E003'"),
        ({'year': 2022}, 'year must be 2020 or 2021, got 2022'),
        ({'workers': 0}, 'workers must be at least 1, got 0'),
        ({'timeout': 0}, 'timeout must be > 0, got 0'),
        ({'base_url': 's3://bucket'}, "base_url must start .* got 's3://bucket'"),
        ({'root': os.devnull}, f"root must be a folder, got '{os.devnull}'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        download_tiles(**{'names': [TILE], 'root': tmp_path, **kwargs})
