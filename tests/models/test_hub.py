# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from torchgeo_softcon.models import hub
from torchgeo_softcon.models.hub import WEIGHTS_VARIABLE, find_file

from .helpers import Server, serve

PAGE = b"""<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title>
</head><body><form action="https://drive.usercontent.google.com/download"></form>"""


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files on a server: good ones, one with another hash, and a page."""
    root = tmp_path_factory.mktemp('site')
    torch.save({'a': torch.ones(1000)}, root / 'good.pth')
    digest = hashlib.sha256((root / 'good.pth').read_bytes()).hexdigest()
    shutil.copy(root / 'good.pth', root / f'good-{digest[:8]}.pth')
    shutil.copy(root / 'good.pth', root / 'other-00000000.pth')
    (root / 'download').write_bytes(PAGE)
    (root / 'bom').write_bytes(b'\xef\xbb\xbf' + PAGE)
    (root / 'json').write_bytes(b'\n{"error": {"code": 403}}')
    return root


@pytest.fixture(scope='module')
def server(site: Path) -> Iterator[Server]:
    with serve(site) as running:
        yield running


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub."""
    monkeypatch.delenv(WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    return tmp_path / 'hub' / 'checkpoints'


def fetch(url: str, file: str | None = None, **kwargs: Any) -> Path:
    return Path(find_file(url, file, progress=False, **kwargs))


def hashed(site: Path) -> str:
    (path,) = site.glob('good-*')
    return path.name


class TestDownload:
    @pytest.mark.parametrize('check_hash', [False, True])
    def test_to_the_cache_and_only_once(
        self, site: Path, server: Server, cache: Path, check_hash: bool
    ) -> None:
        name = hashed(site)
        server.requests.clear()
        for _ in range(2):
            path = fetch(f'{server.url}/{name}?raw=1', check_hash=check_hash)
            assert path == cache / name
            assert path.read_bytes() == (site / name).read_bytes()
        assert len(server.requests) == 1

    def test_file_url(self, site: Path, cache: Path) -> None:
        assert fetch((site / 'good.pth').as_uri()) == cache / 'good.pth'

    def test_name_that_the_url_does_not_have(self, server: Server, cache: Path) -> None:
        assert fetch(f'{server.url}/good.pth?id=7', 'mine.pth') == cache / 'mine.pth'

    def test_to_another_folder(self, server: Server, tmp_path: Path) -> None:
        path = fetch(f'{server.url}/good.pth', model_dir=tmp_path / 'new')
        assert path == tmp_path / 'new' / 'good.pth'

    def test_to_a_folder_of_the_user(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv('HOME', str(tmp_path))
        path = fetch(f'{server.url}/good.pth', model_dir='~/new')
        assert path == tmp_path / 'new' / 'good.pth'

    @pytest.mark.parametrize('name', ['file', 'file/below'])
    def test_to_a_file(self, name: str, server: Server, tmp_path: Path) -> None:
        (tmp_path / 'file').touch()
        with pytest.raises(
            ValueError, match=rf'model_dir must be a folder, got .*{name}'
        ):
            fetch(f'{server.url}/good.pth', model_dir=tmp_path / name)

    @pytest.mark.parametrize(
        ('name', 'reason'),
        [
            ('none.pth', '404'),
            ('other-00000000.pth', r'SHA-256 of 00000000\.\.\., .* got [0-9a-f]{16}'),
            ('cut/good.pth', 'download it again'),
            ('download?id=7', "a web page 'Google Drive - Virus scan warning' instead"),
            ('bom', "a web page 'Google Drive - Virus scan warning' instead"),
            (
                'json',
                r"a message '\{\"error\": \{\"code\": 403\}\}' instead of the file",
            ),
        ],
    )
    def test_failure_leaves_no_trace(
        self, server: Server, cache: Path, name: str, reason: str
    ) -> None:
        match = rf'(?s)^a\S*\.pth could not be .*{reason}.* as a\S*\.pth, into .*{WEIGHTS_VARIABLE}'
        file = 'a-00000000.pth' if 'other' in name else 'a.pth'
        with pytest.raises(RuntimeError, match=match):
            fetch(f'{server.url}/{name}', file, check_hash=True)
        assert [*cache.iterdir()] == []
        # and does not keep the next one from being good
        assert fetch(f'{server.url}/good.pth', 'a.pth') == cache / 'a.pth'

    def test_no_server(self, cache: Path) -> None:
        with pytest.raises(
            RuntimeError, match=r'a\.pth could not be downloaded .*refused'
        ):
            fetch('http://127.0.0.1:9/a.pth')
        assert [*cache.iterdir()] == []

    def test_interruption_leaves_no_trace(
        self, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(url: str, path: Path, progress: bool) -> None:
            path.write_bytes(b'PK')
            raise KeyboardInterrupt

        monkeypatch.setattr(hub, '_fetch', interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(f'{server.url}/good.pth')
        assert [*cache.iterdir()] == []


class Endless(BaseHTTPRequestHandler):
    """A server that sends as it is told, and more."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path.startswith('/announced'):
            self.send_header('Content-Length', str(2**40))
        self.end_headers()
        start = {'silent': b'PK', 'page': PAGE}.get(
            self.path.split('.')[0][1:], b'PK\0'
        )
        try:
            self.wfile.write(start)
            while 'silent' not in self.path:
                self.wfile.write((b' ' if 'page' in self.path else b'\0') * 2**16)
            stop.wait(30)
        except OSError:  # the client has gone
            pass

    def log_message(self, *args: Any) -> None:
        pass


stop = threading.Event()


class TestHostileServer:
    @pytest.fixture(scope='class')
    def url(self) -> Iterator[str]:
        server = ThreadingHTTPServer(('127.0.0.1', 0), Endless)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        stop.set()
        server.shutdown()
        server.server_close()

    @pytest.mark.parametrize(
        ('name', 'reason'),
        [
            ('endless.pth', 'at most 1000000 bytes'),
            ('announced.pth', 'at most 1000000 bytes'),
            ('page.pth', "a web page 'Google Drive"),
            ('silent.pth', '[Tt]imed out'),
        ],
    )
    def test_download_ends(
        self,
        name: str,
        reason: str,
        url: str,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(hub, '_MOST', 1_000_000)
        monkeypatch.setattr(hub, '_TIMEOUT', 0.5)
        with pytest.raises(RuntimeError, match=rf'{name} could not be .*{reason}'):
            fetch(f'{url}/{name}')
        assert [*cache.iterdir()] == []

    def test_proxy(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        # The proxy takes the address of another host for a path of its own
        monkeypatch.setenv('http_proxy', server.url)
        server.requests.clear()
        with pytest.raises(RuntimeError, match='404'):
            fetch('http://example.invalid/good.pth')
        assert len(server.requests) == 1


@pytest.mark.parametrize('file', ['../x.pth', '/tmp/x.pth', '..', 'a\\b.pth'])
def test_name_with_folders(file: str, server: Server, tmp_path: Path) -> None:
    for options in ({}, {'root': tmp_path}):
        with pytest.raises(ValueError, match='file must be a name without folders'):
            fetch(f'{server.url}/good.pth', file, **options)


class TestFolder:
    @pytest.mark.parametrize('by', ['argument', 'variable'])
    def test_is_used_instead_of_the_network(
        self, by: str, site: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root: Path | None = site
        if by == 'variable':
            monkeypatch.setenv(WEIGHTS_VARIABLE, str(site))
            root = None
        path = fetch('http://127.0.0.1:9/x/good.pth?download=1', root=root)
        assert path == site / 'good.pth'
        path = fetch('http://127.0.0.1:9/download?id=7', 'good.pth', root=root)
        assert path == site / 'good.pth'

    def test_argument_comes_first(
        self, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(WEIGHTS_VARIABLE, str(site))
        shutil.copy(site / 'good.pth', tmp_path)
        url = 'http://127.0.0.1:9/good.pth'
        assert fetch(url, root=tmp_path) == tmp_path / 'good.pth'

    def test_without_the_file_the_cache_is_used(
        self, server: Server, cache: Path, tmp_path: Path
    ) -> None:
        assert fetch(f'{server.url}/good.pth', root=tmp_path) == cache / 'good.pth'

    def test_hash_is_checked(self, site: Path) -> None:
        url = 'http://127.0.0.1:9/other-00000000.pth'
        assert fetch(url, root=site) == site / 'other-00000000.pth'
        with pytest.raises(
            ValueError, match=r'other-00000000\.pth must have a SHA-256'
        ):
            fetch(url, root=site, check_hash=True)
        assert fetch(f'http://127.0.0.1:9/{hashed(site)}', root=site, check_hash=True)

    @pytest.mark.parametrize('by', ['root', WEIGHTS_VARIABLE])
    def test_is_no_folder(self, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
        root = '/nowhere'
        if by != 'root':
            monkeypatch.setenv(WEIGHTS_VARIABLE, root)
        with pytest.raises(ValueError, match=f"{by} must be a folder, got '/nowhere'"):
            fetch('file:///a.pth', root=root if by == 'root' else None)
