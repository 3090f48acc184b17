# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import CRS
from rasterio.mask import mask
from rasterio.warp import reproject

from torchgeo_softcon.geo.footprints import make_footprints, to_crs
from torchgeo_softcon.labels import blocks, counting
from torchgeo_softcon.labels.counting import Counted, count_pixels
from torchgeo_softcon.landcover.products import WORLDCOVER_CODES

from .helpers import (
    BLOCK,
    CODES,
    SIZE,
    WGS84,
    centres,
    codes_at,
    grid,
    histogram,
    open_tiles,
    table_of,
    write_codes,
    write_tile,
)

RES = 3 / SIZE


@pytest.fixture(scope='module')
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles around places that are hard, and none elsewhere."""
    folder = tmp_path_factory.mktemp('world')
    corners = [(6, 45), (9, 45), (6, 48), (9, 48)]
    corners += [(177, 66), (-180, 66), (15, 78), (-63, 78), (6, 0), (6, -3)]
    for west, south in corners:
        write_tile(folder, west, south)
    return folder


def count(folder: Path, table: pa.Table) -> Counted:
    counted = count_pixels(table, open_tiles(folder), WORLDCOVER_CODES)
    assert not counted.reasons
    return counted


GRIDS = {
    'inside': ('EPSG:32632', 7.2, 46.3, 100, 0, (40, 60)),
    'fine': ('EPSG:32632', 7.2, 46.3, 10, 0, (264, 264)),
    'coarse': ('EPSG:32632', 7.2, 46.3, 900, 0, (50, 40)),
    'rotated': ('EPSG:32632', 7.2, 46.3, 100, 30, (50, 70)),
    'one pixel': ('EPSG:32632', 7.2, 46.3, 10, 0, (1, 1)),
    'one row': ('EPSG:32632', 7.2, 46.3, 100, 0, (1, 90)),
    'two tiles': ('EPSG:32632', 8.98, 46.3, 100, 0, (40, 60)),
    'four tiles': ('EPSG:32632', 8.95, 48.03, 200, 10, (50, 60)),
    'another zone': ('EPSG:32631', 8.99, 46.3, 100, 0, (40, 60)),
    'antimeridian': ('EPSG:32660', 179.9, 67.5, 200, 0, (50, 60)),
    'antimeridian from the east': ('EPSG:32601', 179.9, 67.5, 200, 0, (50, 60)),
    'Svalbard': ('EPSG:32633', 16.1, 79.1, 60, 0, (80, 80)),
    'polar': ('EPSG:3413', -61, 80, 100, 0, (90, 50)),
    'polar at the antimeridian': ('EPSG:3995', 179.8, 68, 300, 0, (60, 60)),
    'equator': ('EPSG:32632', 7, 0.02, 100, 0, (50, 50)),
    'Mercator': ('EPSG:3857', 7.1, 47.1, 150, 0, (50, 60)),
    'equal area': ('EPSG:3035', 7.1, 47.1, 100, 0, (50, 60)),
}


class TestGrid:
    @pytest.mark.parametrize('name', GRIDS)
    def test_every_pixel_has_the_class_at_its_centre(
        self, world: Path, name: str
    ) -> None:
        crs, lon, lat, res, rotation, shape = GRIDS[name]
        transform = grid(crs, lon, lat, res, rotation)
        counted = count(world, table_of(crs, transform, *shape))
        assert counted.pixels.tolist() == [math.prod(shape)]
        expected = histogram(codes_at(*centres(crs, transform, *shape)))
        assert counted.counts[0].tolist() == expected

    def test_half_at_sea(self, world: Path) -> None:
        # 60 columns of 0.01 degrees, of which the last 20 are east of all tiles
        table = table_of('EPSG:4326', Affine(0.01, 0, 11.6, 0, -0.01, 47), 10, 60)
        counted = count(world, table)
        assert counted.pixels.tolist() == [600]
        assert counted.counts.sum() == 400
        lon, lat = centres('EPSG:4326', Affine(0.01, 0, 11.6, 0, -0.01, 47), 10, 40)
        assert counted.counts[0].tolist() == histogram(codes_at(lon, lat))

    def test_no_data_of_the_map_is_not_counted(self, tmp_path: Path) -> None:
        codes = np.full((64, 64), 10, np.uint8)
        codes[:, 32:] = 0
        write_codes(tmp_path / 'a.tif', codes, Affine(0.01, 0, 7, 0, -0.01, 47))
        table = table_of('EPSG:4326', Affine(0.01, 0, 7.1, 0, -0.01, 46.9), 20, 40)
        counted = count(tmp_path, table)
        assert counted.counts[0].tolist() == [20 * 22, *[0] * 10]
        assert counted.pixels.tolist() == [800]

    def test_the_grid_of_the_map_gives_its_pixels(self, world: Path) -> None:
        transform = Affine(RES, 0, 6 + 100 * RES, 0, -RES, 48 - 200 * RES)
        with rasterio.open(world / open_tiles(world)[2].path) as src:
            left, top = src.bounds.left, src.bounds.top
            expected = src.read(1, window=((200, 300), (100, 250)))
        transform = Affine(RES, 0, left + 100 * RES, 0, -RES, top - 200 * RES)
        counted = count(world, table_of('EPSG:4326', transform, 100, 150))
        assert counted.counts[0].tolist() == histogram(expected)

    @pytest.mark.parametrize('west', [179.9, -180.1])
    def test_degrees_beyond_the_antimeridian(self, world: Path, west: float) -> None:
        transform = Affine(0.004, 0, west, 0, -0.004, 67)
        counted = count(world, table_of('EPSG:4326', transform, 30, 60))
        lon, lat = centres('EPSG:4326', transform, 30, 60)
        assert counted.counts[0].tolist() == histogram(codes_at(lon, lat))
        inside = Affine(0.004, 0, 181, 0, -0.004, 67)
        counted = count(world, table_of('EPSG:4326', inside, 30, 60))
        lon, lat = centres('EPSG:4326', inside, 30, 60)
        assert counted.counts[0].tolist() == histogram(codes_at(lon, lat))

    @pytest.mark.parametrize('rotation', [-45, 45, 135])
    def test_rotated_degrees_across_the_antimeridian(
        self, world: Path, rotation: float
    ) -> None:
        # At -45, two opposite corners are on one side, and another is on the other
        transform = (
            Affine.translation(179.98, 67)
            @ Affine.rotation(rotation)
            @ Affine.scale(0.004, -0.004)
        )
        counted = count(world, table_of('EPSG:4326', transform, 32, 32))
        lon, lat = centres('EPSG:4326', transform, 32, 32)
        assert counted.counts[0].tolist() == histogram(codes_at(lon, lat))

    def test_large_grids_are_counted_in_pieces(
        self, world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        transform = grid('EPSG:32632', 7.2, 47.5, 200, 5)
        table = table_of('EPSG:32632', transform, 250, 180)
        whole = count(world, table)
        monkeypatch.setattr(counting, '_MAX_PIXELS', 5000)
        pieces = count(world, table)
        assert whole.counts.tolist() == pieces.counts.tolist()
        assert pieces.pixels.tolist() == [250 * 180]

    def test_a_clip_in_another_projection(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        codes = rng.choice(CODES, (90, 80))
        transform = grid('EPSG:32632', 7.2, 46.3, 100)
        write_codes(tmp_path / 'a.tif', codes, transform, 'EPSG:32632')
        counted = count(tmp_path, table_of('EPSG:32632', transform, 90, 80))
        assert counted.counts[0].tolist() == histogram(codes)

    def test_overlapping_clips_fill_the_gaps_of_the_first(self, tmp_path: Path) -> None:
        transform = Affine(0.01, 0, 7, 0, -0.01, 47)
        first = np.full((50, 50), 10, np.uint8)
        first[:, 25:] = 0
        write_codes(tmp_path / 'a.tif', first, transform)
        write_codes(tmp_path / 'b.tif', np.full((50, 50), 80, np.uint8), transform)
        table = table_of('EPSG:4326', Affine(0.01, 0, 7.1, 0, -0.01, 46.9), 10, 20)
        counted = count(tmp_path, table)
        expected = {10: 150, 80: 50}
        assert counted.counts[0].tolist() == [
            expected.get(c, 0) for c in WORLDCOVER_CODES
        ]

    def test_as_gdal_warps(self, tmp_path: Path) -> None:
        # The resolution of WorldCover: GDAL is off by up to an eighth of a pixel
        rng = np.random.default_rng(0)
        codes = rng.choice(CODES, (300, 300)).repeat(8, 0).repeat(8, 1)
        path = tmp_path / 'a.tif'
        write_codes(path, codes, Affine(1 / 12000, 0, 7, 0, -1 / 12000, 47))
        systems = ['EPSG:32631', 'EPSG:32632', 'EPSG:3857', 'EPSG:3035'] * 6
        transforms, expected = [], []
        with rasterio.open(path) as src:
            for crs in systems:
                lon, lat = rng.uniform((7.04, 46.86), (7.15, 46.96))
                transform = grid(
                    crs, lon, lat, rng.uniform(8, 12), rng.uniform(-45, 45)
                )
                warped = np.zeros((128, 128), np.uint8)
                reproject(
                    rasterio.band(src, 1), warped, dst_transform=transform, dst_crs=crs
                )
                transforms.append(transform[:6])
                expected.append(histogram(warped))
        table = make_footprints(
            map(str, range(24)), systems, transforms, [(128, 128)] * 24
        )
        counts = count(tmp_path, table).counts
        assert abs(counts - expected).sum() / 2 < 1e-3 * counts.sum()
        limit = 0.05 * 128**2
        assert ((counts >= limit) == (np.array(expected) >= limit)).all()

    def test_fast_way_is_the_way_of_the_mosaic(
        self, world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = _many(200)
        fast = count(world, table)
        monkeypatch.setattr(counting._Counter, '_placed', lambda *args: None)
        slow = count(world, table)
        # The mosaic leaves out what moves a place by less than 1e-5 pixels
        assert abs(fast.counts - slow.counts).sum() <= 4


def _many(number: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    places = rng.uniform((6.1, 45.1), (11.7, 50.8), (number, 2))
    transforms = [grid('EPSG:32632', lon, lat, 100)[:6] for lon, lat in places]
    return make_footprints(
        map(str, range(number)),
        ['EPSG:32632'] * number,
        transforms,
        [(48, 48)] * number,
    )


class TestBlocks:
    def test_every_block_is_decoded_once(self, world: Path) -> None:
        transform = Affine(RES, 0, 6 + 10 * RES, 0, -RES, 48 - 10 * RES)
        steps = [(row, col) for row in range(0, 1300, 90) for col in range(0, 1300, 70)]
        transforms = [
            (transform @ Affine.translation(col, row))[:6] for row, col in steps
        ]
        table = make_footprints(
            map(str, steps),
            ['EPSG:4326'] * len(steps),
            transforms,
            [(100, 100)] * len(steps),
        )
        met: set[tuple[int, int]] = set()
        side = -(-1024 // BLOCK) * BLOCK
        for row, col in steps:
            for y in (row + 10, row + 109):
                for x in (col + 10, col + 109):
                    met.add((y // side, x // side))
        assert len(met) == 4
        assert count(world, table).decoded == len(met)

    def test_memory_is_bounded(
        self, world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blocks, '_CELL', BLOCK)
        table = _many(150)
        whole = count(world, table)
        monkeypatch.setattr(blocks, '_MAX_BYTES', 3 * BLOCK**2)
        kept = []
        real = blocks.BlockMosaic._cell

        def cell(self: blocks.BlockMosaic, *args: object) -> object:
            out = real(self, *args)  # type: ignore[arg-type]
            kept.append(sum(cell.nbytes for cell in self._cells.values()))
            return out

        monkeypatch.setattr(blocks.BlockMosaic, '_cell', cell)
        few = count(world, table)
        assert max(kept) <= 3 * BLOCK**2
        assert few.decoded > whole.decoded
        np.testing.assert_array_equal(few.counts, whole.counts)

    @pytest.mark.parametrize(
        'profile', [{'tiled': False}, {'blockxsize': 256, 'blockysize': 16}]
    )
    def test_blocks_of_any_shape(self, tmp_path: Path, profile: dict[str, Any]) -> None:
        write_tile(tmp_path, 6, 45, **profile)
        transform = grid('EPSG:32632', 7.2, 46.3, 200)
        table = table_of('EPSG:32632', transform, 264, 264)
        expected = histogram(codes_at(*centres('EPSG:32632', transform, 264, 264)))
        assert count(tmp_path, table).counts[0].tolist() == expected


class TestPolygon:
    @pytest.mark.parametrize('crs', ['EPSG:4326', 'EPSG:32632', 'EPSG:3035'])
    def test_as_rasterio_masks(self, world: Path, crs: str) -> None:
        rng = np.random.default_rng(0)
        polygons, expected, pixels = [], [], []
        target = CRS.from_user_input(crs)
        with rasterio.open(next(world.glob('*N45E006*'))) as src:
            for _ in range(8):
                centre = shapely.Point(rng.uniform((6.2, 45.2), (8.8, 47.8)))
                round_ = centre.buffer(rng.uniform(0.002, 0.1), quad_segs=16)
                polygon = to_crs(round_, WGS84, target)
                polygons.append(shapely.to_wkb(polygon))
                inside, _ = mask(src, [to_crs(polygon, target, WGS84)], nodata=255)
                expected.append(histogram(inside[0]))
                pixels.append(int((inside[0] != 255).sum()))
        table = make_footprints(map(str, range(8)), [crs] * 8, polygons=polygons)
        counted = count(world, table)
        np.testing.assert_array_equal(counted.counts, expected)
        assert counted.pixels.tolist() == pixels

    @pytest.mark.parametrize('size', [2**22, 2000])
    def test_over_tiles_and_sea(
        self, world: Path, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(counting, '_MAX_PIXELS', size)
        # Ends between pixels: 100 x 50 of them in and around four tiles and the sea
        box = shapely.box(
            12 - 40.2 * RES, 48 - 20.2 * RES, 12 + 60.2 * RES, 48 + 30.2 * RES
        )
        table = make_footprints(['a'], ['EPSG:4326'], polygons=[shapely.to_wkb(box)])
        counted = count(world, table)
        assert counted.pixels.tolist() == [5000]
        col, row = np.meshgrid(np.arange(-40, 0) + 0.1, np.arange(-20, 30) + 0.1)
        expected = histogram(codes_at(12 + col * RES, 48 + row * RES))
        # 40 columns of centres from -40 on are in tiles
        assert counted.counts.sum() == 40 * 50
        assert counted.counts[0].tolist() == expected

    @pytest.mark.parametrize('halves', [False, True])
    def test_antimeridian(self, world: Path, halves: bool) -> None:
        west, east = 180 - 30.2 * RES, 180 + 20.2 * RES
        south, north = 67 - 10.2 * RES, 67 + 10.2 * RES
        box = shapely.box(west, south, east, north)
        if halves:
            box = shapely.union(
                shapely.box(west, south, 180, north),
                shapely.box(-180, south, east - 360, north),
            )
        table = make_footprints(['a'], ['EPSG:4326'], polygons=[shapely.to_wkb(box)])
        counted = count(world, table)
        col, row = np.meshgrid(np.arange(-30, 20) + 0.1, np.arange(-10, 10) + 0.1)
        assert counted.pixels.tolist() == [1000]
        expected = histogram(codes_at(180 + col * RES, 67 + row * RES))
        assert counted.counts[0].tolist() == expected

    def test_long_edges_are_bent(self) -> None:
        box = shapely.box(3e5, 5.1e6, 7e5, 5.2e6)
        bent = to_crs(box, CRS.from_epsg(32632), WGS84)
        assert shapely.get_num_coordinates(bent) > 100
        small = to_crs(box.buffer(-49_000), CRS.from_epsg(32632), WGS84)
        assert shapely.get_num_coordinates(small) < 200

    def test_no_tile_at_all(self) -> None:
        box = shapely.box(0, 0, 0.01, 0.02)
        table = make_footprints(['a'], ['EPSG:4326'], polygons=[shapely.to_wkb(box)])
        counted = count_pixels(table, [], WORLDCOVER_CODES)
        assert counted.pixels.tolist() == [120 * 240]
        assert counted.counts.sum() == 0


class TestBadTiles:
    def table(self) -> pa.Table:
        transforms = [(RES, 0, west, 0, -RES, 47) for west in (6.1, 8.5)]
        return make_footprints(
            ['a', 'b'], ['EPSG:4326'] * 2, transforms, [(20, 20)] * 2
        )

    def test_a_damaged_block_fails_what_is_on_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blocks, '_CELL', BLOCK)
        path = write_tile(tmp_path, 6, 45)
        with rasterio.open(path) as src:
            row, col = 500 // BLOCK, int((6.1 - 6) / RES) // BLOCK
            offset = int(src.get_tag_item(f'BLOCK_OFFSET_{col}_{row}', 'TIFF', bidx=1))
        with path.open('r+b') as file:
            file.seek(offset)
            file.write(b'damaged' * 20)
        counted = count_pixels(self.table(), open_tiles(tmp_path), WORLDCOVER_CODES)
        assert list(counted.reasons) == [0]
        assert 'truncated or damaged' in counted.reasons[0]
        assert path.name in counted.reasons[0]
        assert counted.counts[1].sum() == 400

    def test_a_crs_that_is_not_on_earth(self, tmp_path: Path) -> None:
        write_tile(tmp_path, 6, 45)
        table = make_footprints(
            ['a', 'b'],
            ['LOCAL_CS["here",UNIT["metre",1]]', 'EPSG:4326'],
            [(RES, 0, 6.1, 0, -RES, 47)] * 2,
            [(20, 20)] * 2,
        )
        counted = count_pixels(table, open_tiles(tmp_path), WORLDCOVER_CODES)
        assert list(counted.reasons) == [0]
        assert counted.counts[1].sum() == 400

    def test_foreign_codes(self, tmp_path: Path) -> None:
        path = write_tile(tmp_path, 6, 45)
        with rasterio.open(path, 'r+') as dst:
            dst.write(np.array([[15]], np.uint8), 1, window=((505, 506), (60, 61)))
        counted = count_pixels(self.table(), open_tiles(tmp_path), WORLDCOVER_CODES)
        assert list(counted.reasons) == [0]
        assert 'got also 15' in counted.reasons[0]

    @pytest.mark.parametrize(
        ('dtype', 'value', 'nodata'),
        [
            ('uint8', 255, None),
            ('uint8', 255, 255),
            ('int16', -1, -1),
            ('uint8', 60, 60),
        ],
    )
    def test_other_values_for_no_data(
        self, tmp_path: Path, dtype: str, value: int, nodata: float | None
    ) -> None:
        codes = np.full((100, 100), 10, dtype)
        codes[:50] = value
        write_codes(
            tmp_path / 'a.tif', codes, Affine(0.01, 0, 6, 0, -0.01, 47), nodata=nodata
        )
        table = table_of('EPSG:4326', Affine(0.01, 0, 6.1, 0, -0.01, 46.7), 40, 10)
        counted = count(tmp_path, table)
        assert counted.counts[0].tolist() == [200, *[0] * 10]
        assert counted.pixels.tolist() == [400]
