# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import logging
from pathlib import Path

import numpy as np
import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_module
from PIL import Image

from tests.datamodules.helpers import make_two_zones
from tests.geo import layouts
from tests.geo.layouts import noise, numbers, write
from torchgeo_softcon.__main__ import main
from torchgeo_softcon.datasets.scene_pack import pack_scenes


@pytest.fixture(scope='module')
def zones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_two_zones(tmp_path_factory)


def test_product(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    product = layouts.safe(tmp_path)
    assert main(['inspect', str(product)]) == 0
    out, err = capsys.readouterr()
    assert err == ''
    lines = out.splitlines()
    assert lines[0].startswith('1 scene at 1 place, windows of 240 pixels, B1, B2, ')
    start = '7 files, Sentinel-2 L2A, offset -1000 from MTD_MSIL2A.xml, scaled by L2A '
    assert lines[1].startswith(start)
    assert '240 x 240 pixels of 10 metre in EPSG:32632, around 10.4' in out
    assert 'no data     0 in all bands' in out
    (blue,) = (line.split() for line in lines if line.startswith('  B2 '))
    assert blue[1:5] == ['T32UNE_20230601T101031_B02_10m.jp2', '1', 'uint16', '1']
    assert blue[5] == '-1000'
    # As stored: 1100 to 5000, and scaled by mean 884.30 and deviation 1155.15
    low, _, high, *scaled = blue[6:11]
    assert 1100 <= float(low) < 1110
    assert 4990 < float(high) <= 5000
    for stored, unit in ((low, scaled[0]), (high, '1')):
        right = (float(stored) - 1000 - 884.30 + 2 * 1155.15) / (4 * 1155.15)
        assert float(unit) == pytest.approx(min(right, 1), abs=1e-3)
    assert 'left out' in out
    assert 'T32UNE_20230601T101031_SCL_20m.jp2: by its name, not a band' in out


def test_land_cover_and_picture(
    zones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / 'windows.png'
    args = [str(zones / 'images'), '--worldcover', str(zones / 'worldcover')]
    more = ['--plot', str(picture), '--windows', '5', '--patch-size', '32']
    assert main(['inspect', *args, *more]) == 0
    out = capsys.readouterr().out
    assert out.startswith('4 scenes at 2 places, windows of 32 pixels')
    assert '4 files, 2 unnamed bands, 8 bit, scaled from 0 to 255' in out
    assert '  land cover  Cropland 5' in out or '  land cover  Built-up 5' in out
    assert f'{picture} shows 5 windows of 32 pixels' in out
    with Image.open(picture) as image:
        assert image.width > 1000


def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / 'good.tif', numbers(2), ('B2', 'B3'))
    values = noise(2, 0, 4000, 'uint16', 64)
    bad = write(
        tmp_path / 'bad.tif', values, ('B2', 'B3'), compress='deflate', blockysize=16
    )
    content = bytearray(bad.read_bytes())
    middle = len(content) // 2
    # More than a strip: within one, they may decode to something
    content[middle : middle + 5000] = b'\xff' * 5000
    bad.write_bytes(content)
    (tmp_path / 'empty.tif').touch()
    assert main(['inspect', str(tmp_path), '--check']) == 1
    out = capsys.readouterr().out
    assert out.startswith('2 of 3 files are damaged')
    assert f'cannot read {bad}, is it truncated or damaged?' in out
    assert f'cannot open {tmp_path / "empty.tif"} as a raster' in out
    # The rest is read
    assert '1 scene at 1 place' in out
    assert str(good) in out
    bad.unlink()
    (tmp_path / 'empty.tif').unlink()
    assert main(['inspect', str(tmp_path), '--check']) == 0
    (tmp_path / 'good.tif').write_bytes(b'')
    assert main(['inspect', str(tmp_path), '--check']) == 1
    # What training says without the check
    assert main(['inspect', str(tmp_path)]) == 2
    assert 'cannot open' in capsys.readouterr().err


@pytest.mark.parametrize('package', ['lightning.pytorch', 'pytorch_lightning'])
def test_notes_of_the_dataset(
    package: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whichever was imported last
    caplog.set_level('INFO', package)
    logger = logging.getLogger(f'{package}.utilities.rank_zero')
    monkeypatch.setattr(rank_zero_module, 'log', logger)
    path = write(tmp_path / 'a.tif', np.full((13, 8, 8), 60000, np.uint16))
    assert main(['inspect', str(path)]) == 0
    out, err = capsys.readouterr()
    notes = out.partition('\nnotes\n')[2]
    assert 'a.tif does not name its bands, they are taken for B1, B2' in notes
    assert '100% of the pixels in the middle of' in notes
    # Once, above
    assert out.count('scaled by L1C statistics') == 1
    assert err == ''


def test_images_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        image = noise(3, number, 255, 'uint8', 16).transpose(1, 2, 0)
        mask = np.full((16, 16), (10, 30, 80)[number], np.uint8)
        for folder, values in (('images', image), ('masks', mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / folder / f'{number}.png')
    picture = tmp_path / 'a.png'
    args = [str(tmp_path), '--check', '--plot', str(picture), '--windows', '3']
    assert main(['inspect', *args]) == 0
    out = capsys.readouterr().out
    assert out.startswith('0 of 6 files are damaged')
    assert '3 images with masks, R, G, B' in out
    assert 'size        16 x 16 pixels' in out
    assert picture.exists()
    assert main(['inspect', str(tmp_path), '--worldcover', 'x']) == 2
    assert '--worldcover must be left out' in capsys.readouterr().err


def test_packed_scenes(
    zones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, tiles, packed = zones / 'images', zones / 'worldcover', tmp_path / 'packed'
    assert pack_scenes(images, packed, tiles) == []

    def lines(*args: object) -> list[str]:
        assert main(['inspect', *map(str, args)]) == 0
        out = capsys.readouterr().out.splitlines()
        starts = ('4 scenes', '  size', '  land cover')
        return [line for line in out if line.startswith(starts)]

    expected = lines(images, '--worldcover', tiles)
    assert any(line.startswith('  land cover') for line in expected)
    assert lines(packed) == expected
