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


def write(path: Path, value: int, crs: str = 'EPSG:32632') -> None:
    profile: dict[str, Any] = {'driver': 'GTiff', 'count': 3, 'dtype': 'uint16'}
    profile |= {'width': 8, 'height': 8, 'crs': crs, 'nodata': value}
    profile |= {'transform': Affine(10, 0, 500000 + 80 * value, 0, -10, 5400000)}
    with rasterio.open(path, 'w', **profile) as file:
        file.write(np.full((3, 8, 8), value, np.uint16))


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
