# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Images of SSL4EO-S12 per second: TorchGeo's reader, ours, and the packed form.

Those of v1.1 are compared with the loader that its authors publish (webdataset and zarr,
which must be installed): it decodes all four dates of a location, of which one is used.

    python -m tests.benchmarks.loading

Makes an archive of patches with the published sizes (264, 132 and 44 pixels), so that
all files are in memory, and reads it in turns in one process with one thread. Printed
are medians and their ratio to TorchGeo. Without workers, seconds are those of the CPU.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from torch.utils.data import DataLoader, Subset, default_collate
from torchgeo.datasets import SSL4EOS12

from tests.ssl4eo.archives import write_archive
from tests.ssl4eo.zarr_archives import write_shards
from torchgeo_softcon.datamodules.ssl4eo_s12_ml import collate
from torchgeo_softcon.datasets import SSL4EOS12ML, WorldCoverScenes
from torchgeo_softcon.datasets.scene_pack import pack_scenes
from torchgeo_softcon.ssl4eo.pack import pack


def per_second(run: Callable[[], int], clock: Callable[[], float]) -> float:
    """Images per second of a function that returns how many it read."""
    start = clock()
    images = run()
    return images / (clock() - start)


def compare(
    title: str,
    runs: dict[str, Callable[[], int]],
    rounds: int,
    clock: Callable[[], float],
) -> None:
    """Print one line per form, the first is the reference."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            rate = per_second(run, clock)
            if turn:  # the first is a warm-up
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    reference = next(iter(medians.values()))
    print(f'\n{title}')
    for name, median in medians.items():
        print(
            f'  {name:44} {median:9.0f} images/s {median / reference:8.1f}', flush=True
        )


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=256)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--epochs', type=int, default=4, help='of packed forms')
    parser.add_argument('--workers', type=int, nargs='*', default=(0, 1))
    parser.add_argument('--folder', help='for the files, by default a temporary one')
    args = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root, packed = Path(folder, 'tiff'), Path(folder, 'packed')
        names = [f'{i:07}' for i in range(args.images)]
        write_archive(root, {'s2c': {name: ['20200604'] for name in names}})
        start = time.process_time()
        pack(root, packed)
        seconds = time.process_time() - start
        print(f'{args.images} images, packed at {args.images / seconds:.0f} images/s')
        run(args, root, packed)
        run_shards(args, root, Path(folder))
        run_scenes(args, Path(folder, 'scenes'))


def run_shards(args: argparse.Namespace, tiff: Path, folder: Path) -> None:
    """Read SSL4EO-S12 v1.1: one random date of each location."""
    import numcodecs
    import webdataset
    import zarr
    from fsspec import filesystem

    numcodecs.blosc.set_nthreads(1)
    root, packed = folder / 'v1.1', folder / 'v1.1 packed'
    root.mkdir()
    locations = [f'{i:07}' for i in range(max(args.images // 8, 4))]
    write_shards(root, ['S2L1C'], [locations], size=264, smooth=True)
    start = time.process_time()
    pack(root, packed)
    seconds = time.process_time() - start
    count = 4 * len(locations)
    print(f'\n{count} images of v1.1, packed at {count / seconds:.0f} images/s')
    (shard,) = root.rglob('*.tar')

    def decode(key: str, value: bytes) -> Any:
        mapper = filesystem('zip', fo=io.BytesIO(value)).get_mapper('')
        group: Any = zarr.open_consolidated(mapper, mode='r', zarr_format=2)
        return group['bands'][...]

    def published() -> int:
        dataset = webdataset.WebDataset(str(shard), shardshuffle=False)
        batches = dataset.decode(decode).batched(8)
        return sum(len(torch.from_numpy(one['zarr.zip'])[:, 0]) for one in batches)

    def at_once(dataset: Any, epochs: int) -> Callable[[], int]:
        order = torch.randperm(len(dataset) * epochs).tolist()
        batches = [order[i : i + 8] for i in range(0, len(order), 8)]
        return lambda: sum(
            len(dataset.__getitems__(b).collate()['records']['s2c']) for b in batches
        )

    theirs: Any = SSL4EOS12(tiff, 's2c')
    few = range(min(args.images, 32))
    compare(
        'v1.1, one of four dates of each location, batch 8',
        {
            "TorchGeo's SSL4EOS12 of 2022, 13 files": lambda: len(
                [theirs[i] for i in few]
            ),
            'webdataset and zarr, as published': published,
            'ours, shards in place': at_once(SSL4EOS12ML(root), 1),
            'ours, packed': at_once(SSL4EOS12ML(packed), 8 * args.epochs),
        },
        args.rounds,
        time.process_time,
    )


def run_scenes(args: argparse.Namespace, folder: Path) -> None:
    """Read windows of own scenes with a cold cache of GDAL."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    side, corner = 1320, (500000, 5400000)
    waves = np.sin(np.arange(side) / 20)[:, None] + np.sin(np.arange(side) / 30)
    profile: Any = {'driver': 'GTiff', 'crs': 'EPSG:32632', 'compress': 'deflate'}
    profile |= {
        'width': side,
        'height': side,
        'transform': from_origin(*corner, 10, 10),
    }
    profile |= {'tiled': True, 'blockxsize': 512, 'blockysize': 512}
    for number in range(4):
        noise = rng.integers(0, 200, (13, side, side))
        values = (1500 + 400 * waves + noise).astype(np.uint16)
        path = folder / f'2021060{number + 1}.tif'
        with rasterio.open(path, 'w', count=13, dtype='uint16', **profile) as file:
            file.write(values)
    name = 'ESA_WorldCover_10m_2021_v200_N48E009_Map.tif'
    codes = rng.choice([10, 30, 40, 50, 80], (400, 600)).astype(np.uint8)
    grid: Any = {'crs': 'EPSG:4326', 'transform': from_origin(8.9, 48.8, 5e-4, 5e-4)}
    with rasterio.open(
        folder / name, 'w', 'GTiff', 600, 400, 1, dtype='uint8', **grid
    ) as file:
        file.write(codes, 1)
    start = time.process_time()
    pack_scenes(folder, folder.with_name('scenes packed'), folder / name)
    print(
        f'\n4 scenes of 13 x {side} x {side}, packed in {time.process_time() - start:.1f} s'
    )
    with rasterio.Env(GDAL_CACHEMAX=8 * 2**20):
        direct = WorldCoverScenes(folder, folder / name)
        packed = WorldCoverScenes(folder.with_name('scenes packed'))
        assert torch.equal(direct[0]['image'], packed[0]['image'])
        compare(
            'own scenes, windows of 13 x 264 x 264, GDAL cache of 8 MB',
            {
                'rasters': lambda: len([direct[i] for i in range(32)]),
                'packed': lambda: len([packed[i] for i in range(128)]),
            },
            args.rounds,
            time.process_time,
        )


def run(args: argparse.Namespace, root: Path, packed: Path) -> None:
    """Read in all ways."""
    theirs: Any = SSL4EOS12(root, 's2c')
    ours, fast = SSL4EOS12ML(root), SSL4EOS12ML(packed)
    assert torch.equal(theirs[3]['image'], fast[3]['image'][0])
    few = range(min(args.images, 32))
    order = torch.randperm(args.images * args.epochs).tolist()
    batches = [order[i : i + args.batch] for i in range(0, len(order), args.batch)]

    def one_by_one(dataset: Any) -> Callable[[], int]:
        return lambda: len([dataset[i]['image'] for i in few])

    def at_once(dataset: Any, decode: bool) -> Callable[[], int]:
        def read() -> int:
            for batch in batches:
                records = dataset.__getitems__(batch).collate()['records']
                if decode:
                    dataset.decode(records)
            return len(order)

        return read

    compare(
        f'direct, batch {args.batch}',
        {
            "TorchGeo's SSL4EOS12, 13 files": one_by_one(theirs),
            'ours, 13 files': one_by_one(ours),
            'ours, packed, as it is': at_once(fast, decode=False),
            'ours, packed, float32 at 10 m on the CPU': at_once(fast, decode=True),
        },
        args.rounds,
        time.process_time,
    )
    for workers in args.workers:

        def loaded(
            dataset: Any, indices: Any, collate_fn: Any, workers: int = workers
        ) -> Callable[[], int]:
            # Workers stay alive, and their start is in the warm-up
            loader = DataLoader(
                Subset(dataset, indices),
                args.batch,
                collate_fn=collate_fn,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
            return lambda: sum(args.batch for _ in loader)

        compare(
            f'DataLoader, batch {args.batch}, {workers} workers',
            {
                "TorchGeo's SSL4EOS12, 13 files": loaded(
                    theirs, range(args.images), default_collate
                ),
                'ours, 13 files': loaded(ours, range(args.images), collate),
                'ours, packed, as it is': loaded(fast, order, collate),
            },
            args.rounds,
            time.perf_counter if workers else time.process_time,
        )


if __name__ == '__main__':
    main()
