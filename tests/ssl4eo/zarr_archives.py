# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Made-up archives in the layouts of SSL4EO-S12 v1.1 and TerraMesh, written by xarray."""

import io
import tarfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

#: Bands as the files name them.
NAMES = {
    'S1GRD': ['vv', 'vh'],
    'S1RTC': ['vv', 'vh'],
    'S2L1C': [*(f'B{n:02}' for n in range(1, 9)), 'B8A', 'B09', 'B10', 'B11', 'B12'],
    'S2L2A': [*(f'B{n:02}' for n in range(1, 9)), 'B8A', 'B09', 'B11', 'B12'],
    'S2RGB': ['R', 'G', 'B'],
    'LULC': ['LULC'],
}

#: Dates of a location.
DATES = ('2020-03-01', '2020-06-04', '2020-09-02', '2020-12-01')


def pixels(
    modality: str, shape: Sequence[int], rng: np.random.Generator, smooth: bool = False
) -> Any:
    """Numbers like those of a modality, without an offset, shape (..., C, H, W).

    If they are *smooth*, they are compressed about as well as real ones.
    """
    if smooth:
        *_, height, width = shape
        waves = np.sin(np.arange(height) / 20)[:, None] + np.sin(np.arange(width) / 30)
        noise = rng.integers(0, 200, shape)
        values = (1500 + 500 * waves + noise).astype(np.int16)
        values[..., 10, :, :] //= 100
        return values
    if modality == 'LULC':
        return rng.choice([1, 2, 4, 5, 7, 11], shape).astype(np.uint8)
    if modality == 'S2RGB':
        return rng.integers(0, 256, shape).astype(np.uint8)
    if modality.startswith('S1'):
        return rng.normal(-15, 4, shape).astype(np.float16)
    values = rng.integers(50, 5000, shape).astype(np.int16)
    if modality == 'S2L1C':
        values[..., 10, :, :] = rng.integers(1, 60, values[..., 0, :, :].shape)
    return values


def sample(
    modality: str,
    location: str,
    rng: np.random.Generator,
    steps: int = 4,
    size: int = 24,
    smooth: bool = False,
) -> xr.Dataset:
    """A location, as a member of a shard holds it."""
    names = NAMES[modality]
    times = [np.datetime64(f'{day}T05:46:39', 'ns') for day in DATES[:steps]]
    if modality.startswith('S1'):
        times = [time + np.timedelta64(3, 'D') for time in times]
    compact = [str(time)[:19].replace('-', '').replace(':', '') for time in times]
    sar = 'S1A_IW_GRDH_1SDV_{}_{}_032906_03CFB6_0E5A'
    ids = [
        sar.format(text, text) if modality.startswith('S1') else f'{text}_{text}_T32TQM'
        for text in compact
    ]
    shape = steps, len(names), size, size
    left, top = 500000 + 10 * int(location[-4:]), 5400000
    return xr.Dataset(
        {
            'bands': (('time', 'band', 'y', 'x'), pixels(modality, shape, rng, smooth)),
            'center_lat': ((), 48.7),
            'center_lon': ((), 9.0),
            'crs': ((), np.int64(32632)),
            'file_id': (('time',), np.array(ids)),
            **(
                {
                    'cloud_mask': (
                        ('time', 'y', 'x'),
                        # More clouds from date to date
                        (
                            rng.random((steps, size, size))
                            < np.arange(steps)[:, None, None] / 4
                        ).astype(np.uint8)
                        * 4,
                    )
                }
                if modality.startswith('S2')
                else {}
            ),
        },
        {
            'band': names,
            'sample': location,
            'time': ('time', np.array(times)),
            'x': left + 5 + 10.0 * np.arange(size),
            'y': top - 5 - 10.0 * np.arange(size),
        },
    )


def zip_bytes(dataset: xr.Dataset, folder: Path, chunks: Mapping[str, Any]) -> bytes:
    """A dataset as a ZIP file of Zarr 2 with consolidated metadata."""
    path = folder / 'one.zarr.zip'
    encoding: dict[str, Any] = {
        'time' if 'time_' not in dataset else 'time_': {
            'units': 'nanoseconds since 1970-01-01',
            'dtype': 'int64',
        }
    }
    for name, sizes in chunks.items():
        encoding[name] = {'chunks': sizes}
    with warnings.catch_warnings(), zarr.storage.ZipStore(path, mode='w') as store:
        warnings.simplefilter('ignore')  # attributes are written twice
        dataset.to_zarr(store, zarr_format=2, consolidated=True, encoding=encoding)
    content = path.read_bytes()
    path.unlink()
    return content


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(f'{name}.zarr.zip')
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_shards(
    root: Path,
    modalities: Sequence[str] = ('S2L1C', 'S2L2A', 'S1GRD', 'S2RGB', 'LULC'),
    shards: Sequence[Sequence[str]] = (('0000001', '0000002'), ('0000000',)),
    **kwargs: Any,
) -> dict[tuple[str, str], xr.Dataset]:
    """Write shards of some locations, and return what is in them."""
    rng = np.random.default_rng(0)
    samples = {}
    for modality in modalities:
        for number, locations in enumerate(shards, 1):
            members = {}
            for location in locations:
                one = samples[modality, location] = sample(
                    modality, location, rng, **kwargs
                )
                shape = one['bands'].shape
                chunks = {'bands': (1, *shape[1:])}
                members[f'ssl4eos12_train_{location}'] = zip_bytes(one, root, chunks)
            folder = root / 'train' / modality
            write_tar(folder / f'ssl4eos12_shard_{number:06}.tar', members)
    return samples


def write_chunk_files(
    root: Path, samples: Mapping[tuple[str, str], xr.Dataset], offset: int = 1000
) -> None:
    """Write samples once more as chunk files, with the offset in optical numbers."""
    for modality in dict.fromkeys(name for name, _ in samples):
        ours = [one for (name, _), one in samples.items() if name == modality]
        joined = xr.concat(
            [
                one.rename(x='x_', y='y_', time='time_').drop_vars(
                    ('x_', 'y_', 'time_')
                )
                for one in ours
            ],
            'sample',
        )
        joined = joined.rename(
            {d: d[0] if d in ('x_', 'y_') else 'time' for d in ('x_', 'y_', 'time_')}
        )
        for name in ('x', 'y'):
            values = np.stack([one[name].values for one in ours])
            joined[f'{name}_'] = (('sample', name), values)
        joined['time_'] = (
            ('sample', 'time'),
            np.stack([one['time'].values for one in ours]),
        )
        joined = joined.assign_coords(time=np.arange(joined.sizes['time']))
        if modality in ('S2L1C', 'S2L2A'):
            joined['bands'] = joined['bands'] + np.int16(offset)
        folder = root / 'train' / modality
        folder.mkdir(parents=True, exist_ok=True)
        count, shape = len(ours), joined['bands'].shape
        content = zip_bytes(joined, root, {'bands': (count, 1, *shape[2:])})
        (folder / 'ssl4eos12_train_seasonal_data_000001.zarr.zip').write_bytes(content)
