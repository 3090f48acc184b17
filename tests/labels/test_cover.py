# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine

from torchgeo_softcon import label_archive
from torchgeo_softcon.labels.cover import LandCover, remote_bucket
from torchgeo_softcon.landcover import download
from torchgeo_softcon.landcover.products import WORLDCOVER

from ..helpers import TILE_PROFILE
from .helpers import CODES, grid, write_image

RES = 1 / 12000


class Bucket:
    """A web server on this machine that sends ranges of files.

    Attributes:
        requests: Paths that were asked for.
        broken: Parts of paths for which there is an error of the server.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.broken = '-'
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_HEAD(self) -> None:
                bucket.answer(self, False)

            def do_GET(self) -> None:
                bucket.answer(self, True)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def answer(self, handler: Any, send: bool) -> None:
        self.requests.append(handler.path)
        file = self.root / handler.path.strip('/')
        if self.broken in handler.path:
            handler.send_error(501)
            return
        if not file.is_file():
            handler.send_error(404)
            return
        body = file.read_bytes()
        wanted = handler.headers.get('Range')
        start, stop = 0, len(body)
        if wanted:
            first, _, last = wanted.removeprefix('bytes=').partition('-')
            start, stop = int(first), min(int(last or stop) + 1, stop)
            handler.send_response(206)
            handler.send_header(
                'Content-Range', f'bytes {start}-{stop - 1}/{len(body)}'
            )
        else:
            handler.send_response(200)
        handler.send_header('Accept-Ranges', 'bytes')
        handler.send_header('Content-Length', str(stop - start))
        handler.end_headers()
        if send:
            handler.wfile.write(body[start:stop])


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiles of official size, of which only some blocks have data."""
    root = tmp_path_factory.mktemp('bucket')
    for west in (6, 9):
        path = root / WORLDCOVER.file_path(f'N45E{west:03}', 2021)
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path,
            'w',
            width=36000,
            height=36000,
            transform=Affine(RES, 0, west, 0, -RES, 48),
            **TILE_PROFILE,
        ) as dst:
            codes = np.random.default_rng(west).choice(CODES, (64, 64)).repeat(16, 0)
            for left in (0, 35 * 1024):
                block = codes.repeat(16, 1)[:, : 36000 - left]
                dst.write(block, 1, window=((0, 1024), (left, left + block.shape[1])))
    return root


@pytest.fixture
def bucket(root: Path) -> Iterator[Bucket]:
    bucket = Bucket(root)
    thread = threading.Thread(target=bucket.server.serve_forever, args=(0.01,))
    thread.start()
    yield bucket
    bucket.server.shutdown()
    bucket.server.server_close()
    thread.join()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Patches in one tile, over two, half at sea (no N48E006), and at sea."""
    places = {
        'one': (6.01, 47.99),
        'two': (8.998, 47.99),
        'coast': (6.01, 48.003),
        'sea': (6, 49),
    }
    for name, place in places.items():
        write_image(
            tmp_path / 'images' / f'{name}.tif',
            'EPSG:32632',
            grid('EPSG:32632', *place),
            64,
        )
    return tmp_path / 'images'


def run(images: Path, worldcover: Any, **options: Any) -> Any:
    out = images.parent / f'{options.pop("name", "labels")}.parquet'
    options = {'workers': 2, 'progress': False, **options}
    labelled = label_archive(images, worldcover, out, **options)
    return labelled, pd.read_parquet(out).set_index('id')


class TestDownload:
    def test_exactly_the_tiles_under_the_archive(
        self, bucket: Bucket, images: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / 'tiles'
        labelled, table = run(images, folder, download=True, base_url=bucket.url)
        assert labelled.failures == {}
        names = {'N45E006', 'N45E009', 'N48E006'}
        assert {*bucket.requests} == {
            f'/{WORLDCOVER.file_path(name, 2021)}' for name in names
        }
        found = {path.name for path in folder.glob('*.tif')}
        assert found == {
            Path(WORLDCOVER.file_path(n, 2021)).name for n in ('N45E006', 'N45E009')
        }
        # What is sea has pixels, and no data
        assert (table.pixels == 64 * 64).all()
        assert table.valid[['one.tif', 'two.tif', 'sea.tif']].tolist() == [1, 1, 0]
        assert 0.3 < table.valid['coast.tif'] < 0.7

        bucket.requests.clear()
        assert run(images, folder, download=True, base_url=bucket.url)[0].new == 0
        assert bucket.requests == []

    def test_a_tile_that_cannot_be_had(
        self,
        bucket: Bucket,
        images: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(download, '_BACKOFF', 0.001)
        bucket.broken = 'N45E009'
        options = {'download': True, 'base_url': bucket.url}
        labelled, table = run(images, tmp_path / 'tiles', **options)
        assert list(labelled.failures) == ['two.tif']
        assert 'N45E009_Map.tif cannot be downloaded' in labelled.failures['two.tif']
        assert len(table) == 3
        bucket.broken = '-'
        labelled, table = run(images, tmp_path / 'tiles', **options)
        assert (labelled.new, labelled.failures) == (1, {})
        assert table.valid['two.tif'] == 1

    def test_a_place_that_is_not_on_earth_stops_nothing(
        self, bucket: Bucket, tmp_path: Path
    ) -> None:
        table = tmp_path / 'a.csv'
        edges = ['a,6.1,45.1,6.11,45.11', 'b,6.1,100,6.11,101', 'c,600,45,601,46']
        table.write_text('\n'.join(['id,left,bottom,right,top', *edges]))
        labelled = label_archive(
            footprints=table,
            worldcover=tmp_path / 'tiles',
            out=tmp_path / 'a.parquet',
            workers=1,
            download=True,
            base_url=bucket.url,
            progress=False,
        )
        reason = 'has no place in longitude and latitude'
        assert (labelled.rows, labelled.failures) == (1, {'b': reason, 'c': reason})

    def test_one_folder(self, images: Path, root: Path) -> None:
        with pytest.raises(ValueError, match='worldcover must be one folder'):
            run(images, [root, images], download=True)


class TestRemote:
    def test_in_place_as_in_a_folder(
        self, bucket: Bucket, images: Path, root: Path
    ) -> None:
        labelled, there = run(images, root, name='there')
        assert list(labelled.failures) == ['sea.tif']
        labelled, table = run(images, f'/vsicurl/{bucket.url}')
        assert labelled.failures == {}
        assert table.valid['sea.tif'] == 0
        pd.testing.assert_frame_equal(table.drop('sea.tif'), there)

        tile = WORLDCOVER.file_path('N45E006', 2021)
        labelled, table = run(images, f'/vsicurl/{bucket.url}/{tile}', name='file')
        assert list(labelled.failures) == ['sea.tif']
        pd.testing.assert_frame_equal(table.loc[['one.tif']], there.loc[['one.tif']])

    def test_a_broken_server(self, bucket: Bucket, images: Path) -> None:
        bucket.broken = 'N45E009'
        labelled, _ = run(images, f'/vsicurl/{bucket.url}')
        assert list(labelled.failures) == ['two.tif']
        assert '501' in labelled.failures['two.tif']

    def test_404_in_the_address_is_not_sea(self, bucket: Bucket, images: Path) -> None:
        bucket.broken = 'N45E009'
        labelled, _ = run(images, f'/vsicurl/{bucket.url}/404')
        assert list(labelled.failures) == ['two.tif']

    def test_a_tile_of_another_year(self) -> None:
        tiles = [
            f'/vsicurl/https://a/{WORLDCOVER.file_path("N45E006", y)}'
            for y in (2020, 2021)
        ]
        assert LandCover(tiles, WORLDCOVER).files(2020) == tiles[:1]
        with pytest.raises(
            FileNotFoundError, match='only those of other years, such as'
        ):
            LandCover(tiles[:1], WORLDCOVER).files(2021)

    @pytest.mark.parametrize(
        ('path', 'expected'),
        [
            ('/vsicurl/https://a.b/', '/vsicurl/https://a.b'),
            ('https://a.b', '/vsicurl/https://a.b'),
            (['/vsis3/esa-worldcover'], '/vsis3/esa-worldcover'),
            ('/vsicurl/https://a.b/c.tif', None),
            ('folder', None),
            (['/vsis3/a', '/vsis3/b'], None),
        ],
    )
    def test_addresses(self, path: Any, expected: str | None) -> None:
        assert remote_bucket(path) == expected
