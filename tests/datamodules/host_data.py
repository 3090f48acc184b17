# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Small data sets in the layouts that TorchGeo reads, of made-up numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import rasterio
from rasterio.transform import from_origin
from torchgeo.datasets import SSL4EOS12, BigEarthNet, EuroSAT

from torchgeo_softcon.bands import BAND_STATISTICS, SENTINEL2_SUBSETS


def write(path: Path, array: npt.NDArray[Any], resolution: float = 10) -> None:
    """A GeoTIFF of shape (C, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    with rasterio.open(
        *(path, 'w', 'GTiff', width, height, count),
        crs='EPSG:32633',
        transform=from_origin(0, 0, resolution, resolution),
        dtype=array.dtype,
    ) as file:
        file.write(array)


def spectrum(number: int, bands: tuple[str, ...], rng: np.random.Generator) -> Any:
    """Means of bands that tell ten classes apart, in standard deviations from -1 to 1."""
    shift = np.random.default_rng(number).uniform(-1, 1, len(bands))
    shift += rng.normal(0, 0.05, len(bands))
    mean, std = np.array([BAND_STATISTICS[b] for b in bands]).T
    return mean + shift * std


def make_eurosat(root: Path, train: int = 4, other: int = 2) -> Path:
    """EuroSAT with a few tiles per class. B8A is its last band."""
    rng = np.random.default_rng(0)
    bands = (*(b for b in SENTINEL2_SUBSETS[13] if b != 'B8A'), 'B8A')
    for split, count in (('train', train), ('val', other), ('test', other)):
        names = [(c, f'Class{c}_{split}{i}') for c in range(10) for i in range(count)]
        root.mkdir(parents=True, exist_ok=True)
        text = '\n'.join(f'{name}.jpg' for _, name in names)
        (root / f'eurosat-{split}.txt').write_text(text)
        for label, name in names:
            level = spectrum(label, bands, rng)[:, None, None]
            tile = rng.normal(level, 20, (13, 64, 64)).clip(0, 65535)
            path = root / EuroSAT.base_dir / f'Class{label}' / f'{name}.tif'
            write(path, tile.astype('uint16'))
    return root


def make_bigearthnet(root: Path, train: int = 20, other: int = 4) -> Path:
    """BigEarthNet, the version 1 of Sentinel-2 and Sentinel-1."""
    rng = np.random.default_rng(0)
    classes = BigEarthNet.class_sets[43]
    for split, count in (('train', train), ('val', other), ('test', other)):
        lines = []
        for i in range(count):
            s2, s1 = (f'S{n}_patch_{split}_{i}' for n in (2, 1))
            lines.append(f'{s2},{s1}')
            # Of the 19 classes: urban fabric, and one of broad-leaved or mixed forest
            labels = [classes[1], classes[22 if i % 2 else 24]]
            for sensor, name, bands, kind in (
                ('s2', s2, SENTINEL2_SUBSETS[12], 'int16'),
                ('s1', s1, ('VV', 'VH'), 'float32'),
            ):
                folder = root / BigEarthNet.metadata[sensor]['directory'] / name
                for band, level in zip(bands, spectrum(i % 2, bands, rng), strict=True):
                    file = band if len(band) != 2 or sensor == 's1' else f'B0{band[1]}'
                    tile = rng.normal(level, 2, (1, 120, 120)).astype(kind)
                    write(folder / f'{name}_{file}.tif', tile)
                text = json.dumps({'labels': labels})
                (folder / f'{name}_labels_metadata.json').write_text(text)
        (root / f'bigearthnet-{split}.csv').write_text('\n'.join(lines))
    return root


def make_bigearthnet_v2(root: Path, train: int = 4, other: int = 2) -> Path:
    """BigEarthNet v2 with small files, which its dataset enlarges."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (('train', train), ('validation', other), ('test', other)):
        for i in range(count):
            s2 = f'S2A_MSIL2A_T33UUP_{split}{i}_00'
            s1 = f'S1A_IW_33UUP_{split}{i}_00_00'
            rows.append((s2, s1, split, ['Pastures', 'Mixed forest'][: 1 + i % 2]))
            for folder, name, bands, kind in (
                ('BigEarthNet-S2', s2, SENTINEL2_SUBSETS[12], 'uint16'),
                ('BigEarthNet-S1', s1, ('VV', 'VH'), 'float32'),
            ):
                parts = 2 if kind == 'uint16' else 3
                tile = '_'.join(name.split('_')[:-parts])
                path = root / folder / tile / name
                for band, level in zip(bands, spectrum(i % 2, bands, rng), strict=True):
                    file = (
                        f'B0{band[1]}' if kind == 'uint16' and len(band) == 2 else band
                    )
                    values = rng.normal(level, 2, (1, 12, 12)).astype(kind)
                    write(path / f'{name}_{file}.tif', values)
            tile = '_'.join(s2.split('_')[:-2])
            path = root / 'Reference_Maps' / tile / s2 / f'{s2}_reference_map.tif'
            write(path, np.full((1, 120, 120), 313, np.uint16))
    columns = ['patch_id', 's1_name', 'split', 'labels']
    pd.DataFrame(rows, columns=columns).to_parquet(root / 'metadata.parquet')
    return root


def make_ssl4eo_s12(root: Path, split: Any, places: int = 4) -> Path:
    """SSL4EO-S12 with four dates of a few places. TorchGeo expects 251,079."""
    rng = np.random.default_rng(0)
    start = 'S1A_IW_GRDH_1SDV_' if split == 's1' else ''
    kind = 'float32' if split == 's1' else 'uint16'
    for place in range(places):
        for month in (1, 4, 7, 10):
            date = root / split / f'{place:07}' / f'{start}2020{month:02}01T000000_a_b'
            for band in SSL4EOS12.metadata[split]['bands']:
                mean, std = BAND_STATISTICS[band]
                tile = rng.normal(mean, std, (1, 264, 264)).clip(-100, 65535)
                write(date / f'{band}.tif', tile.astype(kind))
    return root
