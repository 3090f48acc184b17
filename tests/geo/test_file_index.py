# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from torchgeo_softcon.geo import discovery, file_index
from torchgeo_softcon.geo.discovery import find_rasters, find_scenes
from torchgeo_softcon.geo.rasters import RasterReader


def write(path: Path, value: int, crs: str = 'EPSG:32632', count: int = 3) -> None:
    profile: dict[str, Any] = {'driver': 'GTiff', 'count': count, 'dtype': 'uint16'}
    profile |= {'width': 8, 'height': 8, 'crs': crs, 'nodata': value}
    profile |= {'transform': Affine(10, 0, 500000 + 80 * value, 0, -10, 5400000)}
    with rasterio.open(path, 'w', **profile) as file:
        file.write(np.full((count, 8, 8), value, np.uint16))


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened from now on, of which two are many."""
    monkeypatch.setenv('TORCHGEO_SOFTCON_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(file_index, '_MANY', 2)
    names: list[str] = []
    open_raster = discovery.open_raster

    def spy(path: str) -> Any:
        names.append(Path(path).name)
        return open_raster(path)

    monkeypatch.setattr(discovery, 'open_raster', spy)
    return names


def test_files_are_opened_once(tmp_path: Path, opened: list[str]) -> None:
    for number in range(3):
        write(tmp_path / f'{number}.tif', number, f'EPSG:3263{number + 1}')
    first = find_scenes(find_rasters(tmp_path))
    assert opened == ['0.tif', '1.tif', '2.tif']
    assert find_scenes(find_rasters(tmp_path)) == first
    assert len(opened) == 3
    # With other options, other things are found
    assert find_scenes(find_rasters(tmp_path), nodata=5) != first
    assert len(opened) == 6

    write(tmp_path / '1.tif', 7)
    write(tmp_path / '3.tif', 8)
    assert find_scenes(find_rasters(tmp_path))[1].layers[0].nodata == (7, 7, 7)
    assert opened[6:] == ['1.tif', '3.tif']


def test_a_bad_file_is_named_every_time(tmp_path: Path, opened: list[str]) -> None:
    write(tmp_path / '0.tif', 0)
    (tmp_path / '1.tif').write_bytes(b'II*\0')
    for _ in range(2):
        with pytest.raises(OSError, match=r'cannot open .*1\.tif as a raster'):
            find_scenes(find_rasters(tmp_path))
    # The other one is not opened again
    assert opened == ['0.tif', '1.tif', '1.tif']


@pytest.mark.parametrize('change', ['mask', 'nodata', 'place'])
def test_a_changed_side_file_counts(
    tmp_path: Path, opened: list[str], change: str
) -> None:
    """GDAL reads masks and metadata that lie beside a file, whose own time stays."""
    for number in range(3):
        write(tmp_path / f'{number}.tif', number)
    (tmp_path / '1.jpg').touch()
    first = find_scenes(find_rasters(tmp_path))
    side = {'mask': '.tif.msk', 'nodata': '.tif.aux.xml', 'place': '.tfw'}[change]
    if change == 'mask':
        write(tmp_path / '1.tif.msk', 0)
    elif change == 'nodata':
        band = '<PAMRasterBand band="{}"><NoDataValue>9</NoDataValue></PAMRasterBand>'
        bands = ''.join(band.format(index) for index in (1, 2, 3))
        text = f'<PAMDataset>{bands}</PAMDataset>'
        (tmp_path / '1.tif.aux.xml').write_text(text)
    else:
        (tmp_path / '1.tfw').write_text('10\n0\n0\n-10\n5\n5\n')
    second = find_scenes(find_rasters(tmp_path))
    assert opened[3:] == ['1.tif']
    (tmp_path / f'1{side}').unlink()
    assert find_scenes(find_rasters(tmp_path)) == first
    assert opened[4:] == ['1.tif']
    if change == 'nodata':
        assert second[1].layers[0].nodata == (9, 9, 9)


@pytest.mark.parametrize('changed', ['MTD_MSIL2A.xml', 'item.json'])
def test_metadata_are_read_anew(
    tmp_path: Path, opened: list[str], changed: str
) -> None:
    for band in ('B02', 'B03'):
        write(tmp_path / f'T32UNE_20230601T101031_{band}.tif', 0, count=1)
    texts = {
        'MTD_MSIL2A.xml': '<a><BOA_ADD_OFFSET>{}</BOA_ADD_OFFSET></a>',
        'item.json': '{{"stac_version": "1", "properties": {{"boa_add_offset": "{}"}}}}',
    }
    for offset in (-1000, -500):
        (tmp_path / changed).write_text(texts[changed].format(offset))
        (scene,) = find_scenes(find_rasters(tmp_path))
        assert [layer.offset for layer in scene.layers] == [(offset,), (offset,)]
    assert len(opened) == 2


def test_everything_that_a_file_tells_is_kept(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(('a', 'b')):
        path = tmp_path / f'{name}.tif'
        profile: dict[str, Any] = {'driver': 'GTiff', 'count': 3, 'dtype': 'float32'}
        profile |= {'width': 70, 'height': 40, 'crs': 'EPSG:32632', 'nodata': np.nan}
        profile |= {'transform': Affine(10, 0, 500000 + number, 0, -10, 5400000)}
        with rasterio.open(path, 'w', **profile) as file:
            file.write(np.random.default_rng(number).random((3, 40, 70), np.float32))
            file.descriptions = ('B2', 'B3', 'ü')
            file.scales, file.offsets = (1.0, 0.5, 2.0), (0.0, 0.1, -3.0)
            file.update_tags(PRODUCT_URI='x = y')
    # The same files by another name
    monkeypatch.chdir(tmp_path)
    opens = [
        file_index.open_each(discovery._open_file, files, None, None, True)
        for files in (
            ['a.tif', 'b.tif'],
            [str(tmp_path / n) for n in ('b.tif', 'a.tif')],
        )
    ]
    assert opened == ['a.tif', 'b.tif']
    direct = [
        discovery._open_file(str(tmp_path / n), None, None, True)
        for n in ('b.tif', 'a.tif')
    ]
    for kept, file in zip(opens[1], direct, strict=True):
        assert kept is not None
        assert file is not None
        assert kept.sample is not None
        assert file.sample is not None
        np.testing.assert_array_equal(kept.sample, file.sample)
        assert repr(kept._replace(sample=None)) == repr(file._replace(sample=None))


def test_a_long_integer_without_data(tmp_path: Path, opened: list[str]) -> None:
    nodata = -(2**63)
    for name in ('a', 'b'):
        profile: dict[str, Any] = {'driver': 'GTiff', 'count': 1, 'dtype': 'int64'}
        profile |= {'width': 4, 'height': 4, 'crs': 'EPSG:32632'}
        profile |= {'transform': Affine(10, 0, 500000, 0, -10, 5400000)}
        with rasterio.open(tmp_path / f'{name}.tif', 'w', **profile) as file:
            file.write(np.full((1, 4, 4), nodata, np.int64))
    for _ in range(2):
        scenes = find_scenes(find_rasters(tmp_path), nodata=nodata)
        assert np.isnan(RasterReader().read(scenes[0], 0, 0, 4, 4)).all()
    assert opened == ['a.tif', 'b.tif']


def test_damaged_files_are_remembered(tmp_path: Path, opened: list[str]) -> None:
    write(tmp_path / '0.tif', 0)
    (tmp_path / '1.tif').write_bytes(b'II*\0')
    for _ in range(2):
        damaged: list[str] = []
        assert len(find_scenes(find_rasters(tmp_path), damaged=damaged)) == 1
        assert [Path(path).name for path in damaged] == ['1.tif']
    assert opened == ['0.tif', '1.tif']
