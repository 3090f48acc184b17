# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Small images in the layouts of those who write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine

from torchgeo_softcon.bands import SENTINEL2_SUBSETS
from torchgeo_softcon.datasets import WorldCoverScenes

PRODUCT = 'S2A_MSIL2A_20230601T101031_N{}_R022_T32UNE_20230601T120000'


def write(
    path: Path, values: Any, names: Any = None, res: float = 10, **options: Any
) -> Path:
    values = np.asarray(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        'driver': 'GTiff',
        'width': values.shape[2],
        'height': values.shape[1],
        'count': len(values),
        'dtype': str(values.dtype),
        'crs': 'EPSG:32632',
        'transform': Affine(res, 0, 600000, 0, -res, 5600000),
    }
    with rasterio.open(path, 'w', **(profile | options)) as out:
        out.write(values)
        if names:
            out.descriptions = tuple(names)
    return path


def numbers(count: int, value: int = 1500) -> Any:
    return np.full((count, 32, 32), value, np.uint16)


def scenes(path: Path, **options: Any) -> WorldCoverScenes:
    return WorldCoverScenes(
        path,
        None,
        patch_size=32,
        transforms=lambda sample: sample,
        allow_unlabelled=True,
        **options,
    )


def noise(count: int, low: float, high: float, dtype: str, size: int = 48) -> Any:
    """Random numbers, other ones for each count and range."""
    rng = np.random.default_rng([count, int(abs(low * 7)), int(abs(high * 7))])
    return rng.uniform(low, high, (count, size, size)).astype(dtype)


def metadata(level: str, offset: int | None) -> str:
    """Metadata of a product, with an offset for each band since baseline 04.00."""
    name = 'BOA_ADD_OFFSET' if level == 'L2A' else 'RADIO_ADD_OFFSET'
    added = '' if offset is None else f'<{name} band_id="0">{offset}</{name}>' * 2
    return (
        f'<n1:Level-2A_User_Product xmlns:n1="https://psd"><a><list>{added}</list></a>'
        '</n1:Level-2A_User_Product>'
    )


def safe(root: Path) -> Path:
    """A product of ESA: JPEG 2000 in folders by resolution, with metadata."""
    product = root / f'{PRODUCT.format("0509")}.SAFE'
    folder = product / 'GRANULE' / 'L2A_T32UNE_A041482_20230601T101031' / 'IMG_DATA'
    sides = {
        'B02': 10,
        'B03': 10,
        'B04': 10,
        'B08': 10,
        'B05': 20,
        'B11': 20,
        'B01': 60,
    }
    for number, (band, res) in enumerate(sides.items()):
        for coarse in {res, max(res, 20)}:
            values = noise(1, 1100 + number, 5000, 'uint16', 240 * 10 // coarse)
            path = (
                folder / f'R{coarse}m' / f'T32UNE_20230601T101031_{band}_{coarse}m.jp2'
            )
            write(
                path,
                values,
                res=coarse,
                driver='JP2OpenJPEG',
                QUALITY=100,
                REVERSIBLE='YES',
            )
    scl = folder / 'R20m' / 'T32UNE_20230601T101031_SCL_20m.jp2'
    write(scl, noise(1, 0, 11, 'uint8', 120), res=20, driver='JP2OpenJPEG')
    quality = product / 'GRANULE' / 'L2A_T32UNE_A041482_20230601T101031' / 'QI_DATA'
    write(
        quality / 'MSK_CLDPRB_20m.jp2',
        noise(1, 0, 9, 'uint8', 120),
        res=20,
        driver='JP2OpenJPEG',
    )
    (product / 'MTD_MSIL2A.xml').write_text(metadata('L2A', -1000))
    return product


def planetary_computer(root: Path) -> Path:
    """Assets of an item, whose id has no baseline, with the item beside them."""
    name = 'S2B_MSIL2A_20230601T103629_R008_T32UNE_20230601T170010'
    folder = root / 'sentinel-2-l2a' / name
    for number, band in enumerate(('B02', 'B03', 'B04', 'B08')):
        path = folder / f'T32UNE_20230601T103629_{band}_10m.tif'
        write(path, noise(1, 1100 + number, 4000, 'uint16'), nodata=0)
    write(
        folder / 'T32UNE_20230601T103629_SCL_20m.tif',
        noise(1, 0, 11, 'uint8', 24),
        res=20,
    )
    write(folder / 'T32UNE_20230601T103629_TCI_10m.tif', noise(3, 0, 255, 'uint8'))
    properties = {'s2:processing_baseline': '05.09', 's2:product_type': 'S2MSI2A'}
    item = {'type': 'Feature', 'stac_version': '1.0.0', 'properties': properties}
    (folder / f'{name}.json').write_text(json.dumps(item))
    return folder


def earth_engine(root: Path) -> Path:
    """An export of COPERNICUS/S2_SR_HARMONIZED: every band in one file of doubles."""
    names = (*SENTINEL2_SUBSETS[12], 'AOT', 'WVP', 'SCL', 'QA60')
    return write(root / 'composite_2023.tif', noise(16, 1, 4000, 'float64'), names)


def snap(root: Path) -> Path:
    """Terrain-corrected Sentinel-1 in dB: VH first, names in a tag of SNAP alone."""
    values = np.concatenate(
        [noise(1, -24, -16, 'float32'), noise(1, -14, -6, 'float32')]
    )
    name = 'S1A_IW_GRDH_1SDV_20210601T052638_Orb_Cal_Spk_TC_dB.tif'
    path = write(root / name, values, nodata=0)
    add_snap_tag(path, ['Sigma0_VH_db', 'Sigma0_VV_db'])
    return path


def add_snap_tag(path: Path, names: list[str]) -> None:
    """Append a directory with SNAP's tag to a little-endian TIFF."""
    bands = ''.join(
        f'<Spectral_Band_Info><BAND_INDEX>{i}</BAND_INDEX><BAND_DESCRIPTION/>'
        f'<BAND_NAME>{name}</BAND_NAME></Spectral_Band_Info>'
        for i, name in enumerate(names)
    )
    text = f'<Dimap_Document><Image_Interpretation>{bands}</Image_Interpretation></Dimap_Document>\0'
    data = bytearray(path.read_bytes())
    assert data[:4] == b'II*\0'
    at = int.from_bytes(data[4:8], 'little')
    count = int.from_bytes(data[at : at + 2], 'little')
    entries = bytes(data[at + 2 : at + 2 + 12 * count])
    place = len(data) + len(data) % 2
    tag = (65000).to_bytes(2, 'little') + (2).to_bytes(2, 'little')
    tag += len(text).to_bytes(4, 'little') + place.to_bytes(4, 'little')
    data += bytes(len(data) % 2) + text.encode()
    data += bytes(len(data) % 2)
    data[4:8] = len(data).to_bytes(4, 'little')
    data += (count + 1).to_bytes(2, 'little') + entries + tag + bytes(4)
    path.write_bytes(data)


def reben(root: Path) -> Path:
    """A patch of BigEarthNet v2 beside its reference map."""
    base = 'S2A_MSIL2A_20170613T101031_N9999_R022_T32UNE'
    patch = f'{base}_26_57'
    for number, (band, side) in enumerate(
        {'B02': 120, 'B03': 120, 'B8A': 60, 'B01': 20}.items()
    ):
        path = root / 'BigEarthNet-S2' / base / patch / f'{patch}_{band}.tif'
        write(path, noise(1, 100 + number, 900, 'uint16', side), res=1200 / side)
    maps = root / 'Reference_Maps' / base / patch / f'{patch}_reference_map.tif'
    write(maps, noise(1, 111, 500, 'uint16', 120))
    return root


def major_tom(root: Path) -> Path:
    """A cell of Major-TOM Core-S2L2A, unpacked: bands with a mask of clouds."""
    cell = root / 'Core-S2L2A' / '562D' / '562D_94R'
    for number, (band, side) in enumerate(
        {'B02': 48, 'B04': 48, 'B05': 24, 'B12': 24}.items()
    ):
        write(
            cell / f'{band}.tif',
            noise(1, 50 + number, 3000, 'uint16', side),
            res=480 / side,
        )
    write(cell / 'cloud_mask.tif', noise(1, 0, 4, 'uint8'))
    return cell


def scaled_cog(root: Path) -> Path:
    """A cloud-optimized GeoTIFF of Level-2A that declares scale and offset."""
    path = root / 'S2B_32UNE_20230601_0_L2A.tif'
    write(
        path,
        noise(4, 1100, 4000, 'uint16'),
        ('blue B2', 'green B3', 'red B4', 'nir B8'),
        nodata=0,
    )
    with rasterio.open(path, 'r+') as out:
        out.scales, out.offsets = (1e-4,) * 4, (-0.1,) * 4
    return path
