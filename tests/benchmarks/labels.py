# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Land-cover labels of random patches, and what else counts them.

    python -m tests.benchmarks.labels speed --folder DIR
    python -m tests.benchmarks.labels memory --folder DIR

*speed* compares, in CPU time of one core and in turns, on new random places every round:
the naive form (open the tile, read a window, warp it onto the patch, ``np.unique``), the
same with one open WarpedVRT per patch, TorchGeo's own RasterDataset in UTM, and ours. The
decode floor is what reading every block under the patches once takes, and nothing else.

*memory* labels archives of growing size with the command, and prints patches per second
and the most memory that all its processes had together.

Both make their own tile: smooth blobs of 11 classes, 1024 x 1024 blocks, DEFLATE.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import shapely
from affine import Affine
from pyproj import CRS, Transformer
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject, transform_bounds

from torchgeo_softcon.geo.footprints import make_footprints, outlines
from torchgeo_softcon.geo.mosaic import open_tile
from torchgeo_softcon.labels.counting import count_pixels
from torchgeo_softcon.labels.plan import Plan
from torchgeo_softcon.landcover.products import WORLDCOVER_CODES

UTM = 'EPSG:32632'
WEST, NORTH, RES, BLOCK = 9, 48, 1 / 12000, 1024
CODES = np.array(WORLDCOVER_CODES, np.uint8)

Counts = npt.NDArray[np.int64]


def make_tile(folder: Path, size: int) -> Path:
    """Write a tile of blobs, unless it is there."""
    path = folder / f'blobs_{size}.tif'
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    blocks = [_blobs(rng) for _ in range(24)]
    options = {'tiled': True, 'blockxsize': BLOCK, 'blockysize': BLOCK}
    with rasterio.open(
        path,
        'w',
        'GTiff',
        width=size,
        height=size,
        count=1,
        dtype='uint8',
        crs='EPSG:4326',
        transform=Affine(RES, 0, WEST, 0, -RES, NORTH),
        compress='deflate',
        **options,
    ) as dst:
        for _, window in dst.block_windows(1):
            codes = blocks[rng.integers(len(blocks))]
            codes = np.rot90(codes, int(rng.integers(4)))
            dst.write(codes[: window.height, : window.width], 1, window=window)
    return path


def _blobs(rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A block of blobs of several sizes, with ragged edges."""
    fields = np.zeros((BLOCK, BLOCK), np.float32)
    for step, weight in ((256, 1.0), (64, 0.6), (16, 0.25), (4, 0.12)):
        nodes = rng.standard_normal((BLOCK // step + 2, BLOCK // step + 2))
        at = np.arange(BLOCK) / step
        low = at.astype(int)
        part = (at - low)[:, None]
        rows = nodes[low] * (1 - part) + nodes[low + 1] * part
        fields += weight * (rows[:, low] * (1 - part.T) + rows[:, low + 1] * part.T)
    classes = rng.permutation(CODES)[: rng.integers(4, 9)]
    levels = np.quantile(fields, np.linspace(0, 1, len(classes) + 1)[1:-1])
    return np.asarray(classes[np.digitize(fields, levels)], np.uint8)


class Places:
    """Random patches in UTM inside of the tile."""

    def __init__(self, tile_size: int, patch: int, number: int, seed: int) -> None:
        """Draw patches."""
        rng = np.random.default_rng(seed)
        reach = tile_size * RES
        # Far enough from the edges: a patch is 0.02 to 0.04 degrees wide
        margin = 0.05 * patch / 264
        low, high = margin, reach - margin
        lon, lat = (
            WEST + rng.uniform(low, high, number),
            NORTH - rng.uniform(low, high, number),
        )
        to_utm = Transformer.from_crs('EPSG:4326', UTM, always_xy=True)
        x, y = to_utm.transform(lon, lat)
        zero = np.zeros(number)
        self.patch = patch
        self.transforms = np.stack(
            [zero + 10, zero, x.round(), zero, zero - 10, y.round()], 1
        )

    def table(self) -> Any:
        """The patches as footprints."""
        number = len(self.transforms)
        shapes = np.full((number, 2), self.patch)
        return make_footprints(
            map(str, range(number)), [UTM] * number, self.transforms, shapes
        )

    def bounds(self, row: int) -> tuple[float, float, float, float]:
        """Left, bottom, right and top of a patch."""
        x, y = self.transforms[row, 2], self.transforms[row, 5]
        return x, y - 10 * self.patch, x + 10 * self.patch, y


def naive(path: Path, places: Places, rows: range) -> Counts:
    """Open, windowed read, warp, np.unique."""
    out = np.zeros((len(rows), 11), np.int64)
    for i, row in enumerate(rows):
        with rasterio.open(path) as src:
            bounds = transform_bounds(UTM, src.crs, *places.bounds(row))
            window = src.window(*bounds).round_offsets().round_lengths(op='ceil')
            window = rasterio.windows.Window(
                window.col_off - 1,
                window.row_off - 1,
                window.width + 2,
                window.height + 2,
            )
            codes = src.read(1, window=window)
            warped = np.zeros((places.patch, places.patch), np.uint8)
            reproject(
                codes,
                warped,
                src_transform=src.window_transform(window),
                src_crs=src.crs,
                dst_transform=Affine(*places.transforms[row]),
                dst_crs=UTM,
            )
        values, counts = np.unique(warped, return_counts=True)
        out[i, np.searchsorted(CODES, values)] = counts
    return out


def box(path: Path, places: Places, rows: range) -> Counts:
    """Open, windowed read, np.unique: other pixels than those of the patch."""
    out = np.zeros((len(rows), 11), np.int64)
    for i, row in enumerate(rows):
        with rasterio.open(path) as src:
            bounds = transform_bounds(UTM, src.crs, *places.bounds(row))
            window = src.window(*bounds).round_offsets().round_lengths()
            values, counts = np.unique(src.read(1, window=window), return_counts=True)
        out[i, np.searchsorted(CODES, values)] = counts
    return out


def virtual(path: Path, places: Places, rows: range) -> Counts:
    """A WarpedVRT per patch on a tile that stays open."""
    out = np.zeros((len(rows), 11), np.int64)
    with rasterio.open(path) as src:
        for i, row in enumerate(rows):
            with WarpedVRT(
                src,
                crs=UTM,
                transform=Affine(*places.transforms[row]),
                height=places.patch,
                width=places.patch,
            ) as vrt:
                codes = vrt.read(1)
            out[i] = np.bincount(codes.ravel(), minlength=256)[CODES]
    return out


def torchgeo(path: Path, places: Places, rows: range) -> Counts:
    """TorchGeo's raster dataset in UTM with 10 m pixels."""
    from torchgeo_softcon._compat import RasterDataset

    class Map(RasterDataset):  # type: ignore[misc]
        filename_glob = path.name
        is_image = False

    dataset = Map(path.parent, crs=CRS.from_user_input(UTM), res=10)
    out = np.zeros((len(rows), 11), np.int64)
    for i, row in enumerate(rows):
        left, bottom, right, top = places.bounds(row)
        codes = dataset[left:right, bottom:top]['mask'].numpy()
        out[i] = np.bincount(codes.ravel(), minlength=256)[CODES]
    return out


def ours(path: Path, places: Places, decoded: list[int]) -> Counts:
    """Units of this package, one after the other, and how many blocks they decoded."""
    table, tile = places.table(), open_tile(str(path))
    number = len(table)
    plan = Plan(shapely.bounds(outlines(table)), [tile])
    out = np.zeros((number, 11), np.int64)
    decoded.append(0)
    for unit in plan.units(table, np.ones(number, bool), WORLDCOVER_CODES, 1):
        counted = count_pixels(unit.table, unit.tiles, unit.codes)
        assert not counted.reasons
        out[np.array(unit.table['id'].to_pylist(), int)] = counted.counts
        decoded[-1] += counted.decoded
    return out


def floor(path: Path, blocks: int) -> float:
    """CPU seconds to decode a block, from so many blocks."""
    with rasterio.Env(GDAL_CACHEMAX=16), rasterio.open(path) as src:
        windows = [window for _, window in src.block_windows(1)][:blocks]
        start = time.process_time()
        for window in windows:
            src.read(1, window=window)
        return (time.process_time() - start) / len(windows)


class Times:
    """CPU seconds per patch of several methods, and how far their counts are apart."""

    def __init__(self) -> None:
        """Start without any."""
        self.seconds: dict[str, list[float]] = {}
        self.pixels: dict[str, list[float]] = {}
        self.labels: dict[str, list[float]] = {}
        self.reference: Counts = np.zeros((0, 11), np.int64)

    def measure(self, name: str, run: Callable[[], Counts]) -> None:
        """Run a method on as many patches as it gives counts for."""
        start = time.process_time()
        counts = run()
        taken = (time.process_time() - start) / len(counts)
        self.seconds.setdefault(name, []).append(taken)
        if name == 'ours':
            self.reference = counts
        mine, theirs = (
            c / c.sum(1, keepdims=True) for c in (self.reference[: len(counts)], counts)
        )
        moved = abs(mine - theirs).sum(1).mean() / 2
        self.pixels.setdefault(name, []).append(1 - moved)
        same = ((mine >= 0.05) == (theirs >= 0.05)).all(1).mean()
        self.labels.setdefault(name, []).append(same)

    def show(self) -> None:
        """Print a line per method."""
        print(f'{"":14}{"patches/s":>10}{"ours is":>9}{"pixels":>10}{"labels":>9}')
        fast = statistics.median(self.seconds['ours'])
        for name, times in self.seconds.items():
            taken = statistics.median(times)
            line = f'{name:14}{1 / taken:10.0f}{taken / fast:8.2f}x'
            if name in self.pixels:
                line += f'{statistics.mean(self.pixels[name]):10.5f}'
                line += f'{statistics.mean(self.labels[name]):9.4f}'
            print(line, flush=True)


def compare(path: Path, number: int, args: argparse.Namespace) -> None:
    """Print one line per method."""
    times = Times()
    decoded: list[int] = []
    rows = range(min(args.few, number))
    methods = {
        'naive': naive,
        'naive, box': box,
        'WarpedVRT': virtual,
        'TorchGeo': torchgeo,
    }
    for turn in range(args.rounds):
        places = Places(args.tile, args.patch, number, 1000 * turn + number)
        times.measure('ours', partial(ours, path, places, decoded))
        for name, method in methods.items():
            times.measure(name, partial(method, path, places, rows))
        taken = floor(path, 120) * decoded[-1] / number
        times.seconds.setdefault('decode floor', []).append(taken)
    print(f'\n{number} patches of {args.patch} px')
    times.show()
    taken = statistics.median(times.seconds['decode floor']) * number
    rate = BLOCK**2 * decoded[-1] / taken
    print(
        f'{decoded[-1]} blocks, decoded at {rate / 1e6:.0f} MB/s of one core',
        flush=True,
    )


def speed(args: argparse.Namespace) -> None:
    """Print one line per density and method."""
    path = make_tile(args.folder, args.tile)
    print(f'tile {args.tile} x {args.tile}, {path.stat().st_size / 1e6:.0f} MB')
    for number in args.numbers:
        compare(path, number, args)


def memory(args: argparse.Namespace) -> None:
    """Print one line per size of archive."""
    path = make_tile(args.folder, args.tile)
    for number in args.numbers:
        places = Places(args.tile, args.patch, number, number)
        left, top = places.transforms[:, 2], places.transforms[:, 5]
        table = args.folder / f'patches_{number}.csv'
        side = 10 * args.patch
        with table.open('w') as file:
            file.write('id,crs,left,bottom,right,top,height,width\n')
            for row, (x, y) in enumerate(zip(left.tolist(), top.tolist(), strict=True)):
                file.write(
                    f'{row},{UTM},{x},{y - side},{x + side},{y},{args.patch},{args.patch}\n'
                )
        out = args.folder / f'labels_{number}.parquet'
        command = [
            sys.executable,
            '-m',
            'torchgeo_softcon',
            'labels',
            '--quiet',
            '--overwrite',
        ]
        command += ['--footprints', str(table), '--worldcover', str(path)]
        command += ['--out', str(out), '--workers', str(args.workers)]
        start, before = time.monotonic(), os.times()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        most = 0
        while process.poll() is None:
            most = max(most, _memory(process.pid))
            time.sleep(0.2)
        assert process.returncode == 0
        wall, after = time.monotonic() - start, os.times()
        cpu = after.children_user + after.children_system
        cpu -= before.children_user + before.children_system
        print(
            f'{number:9} patches: {number / wall:6.0f}/s with {args.workers} processes, '
            f'{number / cpu:6.0f} per CPU second, at most {most / 1e6:.0f} MB, '
            f'file {out.stat().st_size / 1e6:.0f} MB',
            flush=True,
        )
        table.unlink()
        out.unlink()


def _memory(pid: int) -> int:
    """Proportional memory of a process and its children in bytes."""
    total = 0
    waiting = [pid]
    while waiting:
        folder = Path('/proc') / str(waiting.pop())
        try:
            for line in (folder / 'smaps_rollup').read_text().splitlines():
                if line.startswith('Pss:'):
                    total += 1024 * int(line.split()[1])
            for task in (folder / 'task').iterdir():
                waiting += map(int, (task / 'children').read_text().split())
        except OSError:
            continue  # it has ended
    return total


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=('speed', 'memory'))
    parser.add_argument('--folder', type=Path, required=True)
    parser.add_argument('--tile', type=int, default=36000, help='pixels of a side')
    parser.add_argument('--patch', type=int, default=264)
    parser.add_argument('--numbers', type=int, nargs='+')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--few', type=int, default=60, help='patches of slow methods')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args()
    if args.what == 'speed':
        args.numbers = args.numbers or [250, 1000, 10_000]
        speed(args)
    else:
        args.numbers = args.numbers or [10_000, 100_000, 1_000_000]
        memory(args)


if __name__ == '__main__':
    main()
