# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from torch import nn

from tests.datamodules.helpers import write_raster
from torchgeo_softcon.datasets.image_masks import ImageMaskFolder
from torchgeo_softcon.datasets.scenes import WorldCoverScenes
from torchgeo_softcon.geo.find_files import find_files, pattern_root
from torchgeo_softcon.labels.sources import find_images, read
from torchgeo_softcon.landcover.files import find_map_files
from torchgeo_softcon.landcover.products import WORLDCOVER


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names(root: Path, paths: Any = None, **kwargs: Any) -> list[str]:
    found = find_files(root if paths is None else paths, **kwargs)
    return [os.path.relpath(path, root) for path in found]


class TestFindFiles:
    def test_folders_files_and_what_only_gdal_opens(self, tmp_path: Path) -> None:
        touch(tmp_path, 'b.TIF', 'a/c.jp2', 'a/d.txt', 'a-b/e.tiff')
        assert names(tmp_path) == ['a/c.jp2', 'a-b/e.tiff', 'b.TIF']
        assert names(tmp_path, suffixes=('.txt',)) == ['a/d.txt']
        named: list[Any] = [
            tmp_path / 'a/d.txt',
            '/vsizip/x.zip/a.tif',
            's3://bucket/b.tif',
        ]
        assert find_files([*named, tmp_path / 'a/d.txt']) == [str(p) for p in named]

    def test_paths_are_relative_if_they_were(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        touch(tmp_path, 'a/b.tif')
        monkeypatch.chdir(tmp_path)
        for paths in ('.', 'a', 'a/', '*/*.tif', '**/b.tif', './a/*'):
            assert find_files(paths) == ['a/b.tif']

    @pytest.mark.parametrize(
        ('pattern', 'expected'),
        [
            ('*', ['a.tif', 'a.txt']),
            ('**', ['a.tif', 'a.txt', 'b/a.tif', 'b/c/a.tif']),
            ('**/a.t?f', ['a.tif', 'b/a.tif', 'b/c/a.tif']),
            ('b/**/*.tif', ['b/a.tif', 'b/c/a.tif']),
            ('*/a.tif', ['b/a.tif']),
            ('*/*/a.tif', ['b/c/a.tif']),
            ('[ab]/[!b]/*', ['b/c/a.tif']),
            ('*.jp2', []),
        ],
    )
    def test_patterns(self, tmp_path: Path, pattern: str, expected: list[str]) -> None:
        touch(tmp_path, 'a.tif', 'a.txt', 'b/a.tif', 'b/c/a.tif', '.d/a.tif')
        assert names(tmp_path, tmp_path / pattern) == expected

    def test_a_name_that_looks_like_a_pattern_is_a_name(self, tmp_path: Path) -> None:
        touch(tmp_path, 'a[1].tif', 'a1.tif')
        assert names(tmp_path, tmp_path / 'a[1].tif') == ['a[1].tif']
        assert pattern_root('a/b*/c/*.tif') == pattern_root('a/b') == 'a'

    def test_links_are_followed_once(self, tmp_path: Path) -> None:
        root, other = tmp_path / 'root', tmp_path / 'other'
        touch(root, 'z/a.tif', 'z/b.tif')
        touch(other, 'c.tif', '.store/1f', 'd/e.tif')
        (root / 'again').symlink_to(root)
        (root / 'z' / 'up').symlink_to('..')
        (root / 'self').symlink_to('self')
        (root / 'gone.tif').symlink_to('nowhere')
        (root / 'first').symlink_to(other)
        (root / 'second').symlink_to(other)
        (root / 'same.tif').symlink_to('z/a.tif')
        # A store of contents: two files that happen to be equal
        (root / 'z' / 'p.tif').symlink_to(other / '.store' / '1f')
        (root / 'z' / 'q.tif').symlink_to(other / '.store' / '1f')
        z = ['z/a.tif', 'z/b.tif', 'z/p.tif', 'z/q.tif']
        assert names(root) == ['first/c.tif', 'first/d/e.tif', *z]
        assert names(root, root / 'again' / 'z' / '*.tif') == [
            f'again/{name}' for name in z
        ]
        # What a pattern says by the name of a link is no repetition
        assert names(root, root / '[f]irst' / '*.tif') == ['first/c.tif']

    def test_only_regular_files_that_are_not_hidden(self, tmp_path: Path) -> None:
        touch(tmp_path, 'a.tif', '._a.tif', '.git/b.tif', '.c/d/e.tif')
        os.mkfifo(tmp_path / 'pipe.tif')
        (tmp_path / 'piped.tif').symlink_to('pipe.tif')
        (tmp_path / 'folder.tif').mkdir()
        assert names(tmp_path) == names(tmp_path, tmp_path / '**') == ['a.tif']
        assert names(tmp_path, tmp_path / '.g*' / '*') == ['.git/b.tif']
        assert names(tmp_path, tmp_path / '._a.tif') == ['._a.tif']

    def test_odd_names_are_left_out_with_a_warning(self, tmp_path: Path) -> None:
        odd = os.fsdecode(os.fsencode(tmp_path) + b'/\xff.tif')
        os.close(os.open(odd, os.O_CREAT))
        touch(tmp_path, 'ü.tif')
        with pytest.warns(UserWarning, match=r'paths has .*\\xff\.tif, which is left'):
            assert names(tmp_path) == ['ü.tif']
        assert len(find_files(tmp_path, odd_names=True)) == 2
        assert find_files(odd) == [odd]

    def test_no_such_path(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match='images has a path that does not'):
            find_files(tmp_path / 'a.tif', option='images')


def scenes(root: Path) -> int:
    dataset = WorldCoverScenes(
        root / 'images', None, patch_size=4, allow_unlabelled=True, value_range=(0, 1)
    )
    return sum(len(place.scenes) for place in dataset.places)


def patches(root: Path) -> int:
    for folder in ('images', 'masks'):
        (root / 'folder').mkdir(exist_ok=True)
        (root / 'folder' / folder).symlink_to(root / 'images')
    return len(ImageMaskFolder(root / 'folder', transforms=nn.Identity()))


def labelled(root: Path) -> int:
    images = find_images(root / 'images')
    (unit,) = images.units(pa.array(range(len(images.ids))))
    return len(read(unit).table)


def tiles(root: Path) -> int:
    return len(find_map_files(root / 'images', WORLDCOVER, 2021))


@pytest.mark.filterwarnings('ignore:images has .*, which is left out:UserWarning')
@pytest.mark.filterwarnings('ignore:(masks|paths) has .*, which is left:UserWarning')
@pytest.mark.parametrize('count', [scenes, patches, labelled, tiles])
def test_every_reader_finds_the_same_files(
    tmp_path: Path, count: Callable[[Path], int]
) -> None:
    root = tmp_path / 'images'
    for number, folder in enumerate((root, root / 'b', tmp_path / 'other')):
        values = np.full((1, 8, 8), 10, np.uint8)
        write_raster(folder / f'{number}.tif', values, origin=(500000 + number, 5e6))
    (root / 'linked').symlink_to(tmp_path / 'other')
    (root / 'again').symlink_to(root)
    (root / '._0.tif').write_bytes(b'what macOS leaves behind')
    odd = os.fsencode(root) + b'/\xff.tif'
    os.link(root / '0.tif', odd)
    os.mkfifo(root / 'pipe.tif')
    assert count(tmp_path) == 3
