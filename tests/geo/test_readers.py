# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What files say of themselves counts in every reader: patches, archives, land cover."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import Transformer
from rasterio.enums import ColorInterp, Resampling
from rasterio.warp import reproject

from torchgeo_softcon.datasets import ESAWorldCover, ImageMaskFolder, WorldCoverScenes
from torchgeo_softcon.datasets.scaling import ValueRange
from torchgeo_softcon.labels import label_archive
from torchgeo_softcon.landcover.products import WORLDCOVER_CODES
from torchgeo_softcon.ssl4eo.tiffs import TiffArchive

from .test_real_files import PRODUCT, numbers, scenes, write

RNG = np.random.default_rng(0)


def edit(path: Path, **values: Any) -> None:
    with rasterio.open(path, 'r+') as out:
        for name, value in values.items():
            setattr(out, name, value)


def digital(count: int, dtype: str = 'uint16') -> Any:
    return RNG.integers(300, 3000, (count, 32, 32)).astype(dtype)


def declared(path: Path, dtype: str, scale: float, offset: float) -> None:
    write(path, digital(2, dtype), ('B2', 'B3'))
    edit(path, scales=(scale,) * 2, offsets=(offset,) * 2)


def masked(path: Path, inside: bool) -> None:
    write(path, digital(2), ('B2', 'B3'))
    valid = np.full((32, 32), 255, np.uint8)
    valid[5:20, :10] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(path, 'r+') as out:
        out.write_mask(valid)


def transparent(path: Path, dtype: str) -> None:
    values = digital(4, dtype)
    values[3] = 255
    values[3, 5:20, :10] = 0
    write(path, values, ('B2', 'B3', 'B4', None))
    edit(path, colorinterp=[*[ColorInterp.gray] * 3, ColorInterp.alpha])


def without_data(path: Path, value: float, dtype: str) -> None:
    values = digital(2, dtype)
    values[:, 5:20, :10] = value
    values[0, 0] = value
    write(path, values, ('B2', 'B3'), nodata=value)


def colored(path: Path, clear: int = 255) -> None:
    """Write a picture with a colour table, one colour of which may be transparent."""
    write(path, RNG.integers(0, 3, (1, 32, 32)).astype(np.uint8))
    table = {0: (10, 20, 30, 255), 1: (200, 0, 100, 255), 2: (7, 8, 9, clear)}
    with rasterio.open(path, 'r+') as out:
        out.write_colormap(1, table)


PATCHES: dict[str, Callable[[Path], Any]] = {
    'scale of uint16': lambda p: declared(p, 'uint16', 1e-4, -0.1),
    'scale of int16': lambda p: declared(p, 'int16', 1e-4, 0),
    'scale of float32': lambda p: declared(p, 'float32', 1e-4, -0.1),
    'offset alone': lambda p: declared(p, 'uint16', 1, -1000),
    'internal mask': lambda p: masked(p, True),
    'mask beside': lambda p: masked(p, False),
    'alpha of bytes': lambda p: transparent(p, 'uint8'),
    'alpha of uint16': lambda p: transparent(p, 'uint16'),
    'no data of int16': lambda p: without_data(p, -9999, 'int16'),
    'no data of 0': lambda p: without_data(p, 0, 'uint16'),
    'no data of float': lambda p: without_data(p, np.nan, 'float32'),
    'zeros that are not declared': lambda p: write(p, digital(2) % 5, ('B2', 'B3')),
    'descriptions': lambda p: write(p, digital(3), ('B4_mean', 'B3_mean', 'B2_mean')),
    'descriptions of radar': lambda p: write(
        p, -digital(2, 'float32') / 150, ('Sigma0_VV_db', 'Sigma0_VH_db')
    ),
    'all bands': lambda p: write(
        p, digital(13), [f'B{i}' for i in (1, 2, 3, 4, 5, 6, 7, 8, '8A', 9, 10, 11, 12)]
    ),
    'colours': lambda p: colored(p),
    'a transparent colour': lambda p: colored(p, clear=0),
    'baseline in the name': lambda p: write(
        p.parent / PRODUCT.format('0510') / 'B02_x.tif', digital(1), ('B2',)
    ),
    'no baseline': lambda p: write(
        p.parent / PRODUCT.format('9999') / 'B02_x.tif', digital(1), ('B2',)
    ),
}


@pytest.mark.parametrize('case', PATCHES)
def test_patches_are_read_as_scenes(tmp_path: Path, case: str) -> None:
    PATCHES[case](tmp_path / 'images' / 'a.tif')
    (image,) = (tmp_path / 'images').rglob('*.tif')
    mask = tmp_path / 'masks' / image.relative_to(tmp_path / 'images')
    write(mask, np.full((1, 32, 32), 30, np.uint8))
    with rasterio.open(image) as source:
        floats = source.dtypes[0].startswith('float') and 'radar' not in case
    value_range: ValueRange = 'softcon' if floats else None
    expected = scenes(tmp_path / 'images', value_range=value_range)
    dataset = ImageMaskFolder(
        tmp_path, value_range=value_range, transforms=lambda sample: sample
    )
    assert (dataset.bands, dataset.value_range) == (
        expected.bands,
        expected.value_range,
    )
    sample = dataset[0]
    assert np.array_equal(sample['image'], expected[0]['image'])
    # Whatever it is, some pixels are neither 0 nor 1
    assert ((sample['image'] > 0) & (sample['image'] < 1)).any()
    if any(word in case for word in ('mask', 'alpha', 'no data')):
        assert (sample['mask'][5:20, :10] == 0).all()
        assert (sample['image'][:, 5:20, :10] == 0).all()
        assert (sample['mask'][25:] == 30).all()


def test_colours_are_those_of_the_table(tmp_path: Path) -> None:
    colored(tmp_path / 'a.tif', clear=0)
    with rasterio.open(tmp_path / 'a.tif') as source:
        index, table = source.read(1), source.colormap(1)
    colors = np.array([table[i] for i in range(256)])[index].transpose(2, 0, 1)
    expected = np.where(colors[3] == 0, 0, colors[:3]) / np.float32(255)
    image = scenes(tmp_path)[0]['image']
    np.testing.assert_allclose(image, expected, atol=1e-6)
    # As they are stored, and one colour alone
    indices = scenes(tmp_path, all_bands=['x'], value_range=(0, 255))[0]['image']
    np.testing.assert_allclose(indices[0], index / np.float32(255), atol=1e-6)
    green = scenes(tmp_path, bands=['G'])[0]['image']
    np.testing.assert_allclose(green[0], expected[1], atol=1e-6)


class TestPatches:
    def test_bands_are_found_by_name_in_each_file(self, tmp_path: Path) -> None:
        values = digital(3)
        write(tmp_path / 'images' / 'a.tif', values, ('B2', 'B3', 'B4'))
        write(tmp_path / 'images' / 'b.tif', values[::-1], ('B4', 'B3', 'B2'))
        for name in ('a', 'b'):
            write(tmp_path / 'masks' / f'{name}.tif', numbers(1, 30))
        for bands in (None, ('B4', 'B2')):
            dataset = ImageMaskFolder(tmp_path, bands=bands)
            assert dataset[0]['image'].equal(dataset[1]['image'])
        assert dataset[0]['image'].shape[0] == 2
        # Positions are those of the file, whatever it calls them
        by_position = ImageMaskFolder(
            tmp_path, image_bands=(1, 2), bands=('B3', 'B2'), value_range=(0, 1e4)
        )
        np.testing.assert_allclose(by_position[1]['image'], values[:0:-1] / 1e4)
        write(tmp_path / 'images' / 'b.tif', values, ('B5', 'B6', 'B7'))
        with pytest.raises(ValueError, match=r'b\.tif must have the bands B2, B3, B4'):
            ImageMaskFolder(tmp_path)

    def test_colours_with_and_without_a_table(self, tmp_path: Path) -> None:
        colored(tmp_path / 'images' / 'a.tif')
        values = RNG.integers(0, 255, (3, 32, 32)).astype(np.uint8)
        write(tmp_path / 'images' / 'b.tif', values, photometric='RGB')
        for name in ('a', 'b'):
            # The codes of a mask are no colours, whatever its table
            colored(tmp_path / 'masks' / f'{name}.tif')
        dataset = ImageMaskFolder(tmp_path, transforms=lambda sample: sample)
        assert dataset.bands == ('R', 'G', 'B')
        assert {*dataset[0]['mask'].unique().tolist()} == {0, 1, 2}
        np.testing.assert_allclose(dataset[1]['image'], values / np.float32(255))

    @pytest.mark.parametrize('kind', ['mask', 'alpha', 'no data', 'scale'])
    def test_masks_say_where_codes_are(self, tmp_path: Path, kind: str) -> None:
        write(tmp_path / 'images' / 'a.tif', digital(2), ('B2', 'B3'))
        path = tmp_path / 'masks' / 'a.tif'
        codes = RNG.choice(WORLDCOVER_CODES, (1, 32, 32)).astype(np.uint8)
        expected = codes[0].copy()
        expected[:, :10] = 0
        valid = np.uint8(255) * (expected > 0)
        if kind == 'alpha':
            write(path, np.stack([codes[0], valid]), alpha='YES')
        elif kind == 'scale':
            write(path, np.where(expected, codes // 5, 99), nodata=99)
            edit(path, scales=(5.0,))
        else:
            codes[0, :, :10] = 10 if kind == 'mask' else 200
            write(path, codes, nodata=None if kind == 'mask' else 200)
        if kind == 'mask':
            with rasterio.open(path, 'r+') as out:
                out.write_mask(valid)
        dataset = ImageMaskFolder(tmp_path, transforms=lambda sample: sample)
        assert np.array_equal(dataset[0]['mask'], expected)

    def test_radar_that_is_not_in_decibels(self, tmp_path: Path) -> None:
        write(tmp_path / 'images' / 'a.tif', digital(2, 'float32'), ('VV', 'VH'))
        write(tmp_path / 'masks' / 'a.tif', numbers(1, 30))
        with pytest.raises(ValueError, match='not radar backscatter in dB'):
            ImageMaskFolder(tmp_path)


#: Upper left corner of the map, and its pixels in degrees.
WEST, NORTH, STEP = 10.3, 50.6, 1 / 12000


def map_tile(path: Path, kind: str) -> tuple[Any, Any, Affine]:
    """Write a map that lacks its west, and return its codes, CRS and transform."""
    codes = RNG.choice(WORLDCOVER_CODES, (1, 900, 3000)).astype(np.uint8)
    expected = codes.copy()
    crs, transform = 'EPSG:4326', Affine(STEP, 0, WEST, 0, -STEP, NORTH)
    options: dict[str, Any] = {'nodata': 0}
    if kind == 'shifted':
        transform = transform @ Affine.translation(0.4, -0.3)
    if kind == 'other CRS':
        crs, transform = 'EPSG:3035', Affine(10, 0, 4345000, 0, -10, 3048000)
    if kind == 'blocks':
        options |= {'tiled': True, 'blockxsize': 256, 'blockysize': 256}
    expected[..., :1600] = 0
    valid = np.uint8(255) * (expected[0] > 0)
    if kind == 'alpha':
        codes, options = np.stack([codes[0], valid]), {'alpha': 'YES'}
    elif kind == 'scale':
        codes, options = np.where(expected, expected // 5, 77), {'nodata': 77}
    elif kind == 'no data':
        codes, options = np.where(expected, codes, 254), {'nodata': 254}
    elif 'mask' not in kind:
        codes = expected
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == 'internal mask'),
        rasterio.open(
            path,
            'w',
            'GTiff',
            width=3000,
            height=900,
            count=len(codes),
            dtype='uint8',
            crs=crs,
            transform=transform,
            **options,
        ) as out,
    ):
        out.write(codes.astype(np.uint8))
        if 'mask' in kind:
            out.write_mask(valid)
        if kind == 'scale':
            out.scales = (5.0,)
    return expected[0], crs, transform


@pytest.mark.parametrize(
    'kind',
    [
        'plain',
        'blocks',
        'internal mask',
        'mask beside',
        'alpha',
        'scale',
        'no data',
        'shifted',
        'other CRS',
    ],
)
def test_land_cover(tmp_path: Path, kind: str) -> None:
    """By the dataset and by labels of an archive, against GDAL's warp."""
    codes, crs, transform = map_tile(tmp_path / 'map' / 'clip.tif', kind)
    x, y = Transformer.from_crs('EPSG:4326', 'EPSG:32632', always_xy=True).transform(
        WEST + 1600 * STEP, NORTH - 400 * STEP
    )
    if kind == 'other CRS':
        x, y = Transformer.from_crs(crs, 'EPSG:32632', always_xy=True).transform(
            *(transform @ (1600, 400))
        )
    grid = Affine(10, 0, round(x) - 160, 0, -10, round(y) + 100)
    image = write(tmp_path / 'images' / 'a.tif', numbers(1))
    edit(image, transform=grid)
    expected = np.zeros((32, 32), np.uint8)
    reproject(
        codes,
        expected,
        src_transform=transform,
        src_crs=crs,
        dst_transform=grid,
        dst_crs='EPSG:32632',
        resampling=Resampling.nearest,
        tolerance=0,
    )
    assert 0.1 < (expected == 0).mean() < 0.9
    worldcover = ESAWorldCover(tmp_path / 'map')
    actual = worldcover.read_window('EPSG:32632', grid, 32, 32).numpy()
    # GDAL is off at the edge of a pixel now and then
    assert (actual == expected).mean() > 0.99
    assert ((actual == 0) == (expected == 0)).mean() > 0.99
    labels = label_archive(
        tmp_path / 'images',
        tmp_path / 'map',
        tmp_path / 'labels.parquet',
        workers=1,
        progress=False,
    )
    (row,) = pq.read_table(labels.path).to_pylist()
    counts = [row[f'count_{code}'] for code in WORLDCOVER_CODES]
    assert counts == [(actual == code).sum() for code in WORLDCOVER_CODES]
    # And an outline, whose pixels are those of the map
    outline = shapely.box(*rasterio.transform.array_bounds(32, 32, grid))
    table = tmp_path / 'outline.csv'
    table.write_text(f'id,crs,wkt\na,EPSG:32632,"{outline.wkt}"\n')
    labels = label_archive(
        footprints=table,
        worldcover=tmp_path / 'map',
        out=tmp_path / 'outline.parquet',
        workers=1,
        progress=False,
    )
    (row,) = pq.read_table(labels.path).to_pylist()
    assert row['valid'] == pytest.approx((actual > 0).mean(), abs=0.05)


@pytest.mark.parametrize('scale', [4.0, 0.1])
def test_scaled_map_that_has_no_codes(tmp_path: Path, scale: float) -> None:
    map_tile(tmp_path / 'clip.tif', 'plain')
    edit(tmp_path / 'clip.tif', scales=(scale,))
    worldcover = ESAWorldCover(tmp_path)
    grid = Affine(STEP, 0, WEST + 1700 * STEP, 0, -STEP, NORTH)
    with pytest.raises(ValueError, match=r'clip\.tif must hold the class codes'):
        worldcover.read_window('EPSG:4326', grid, 32, 32)


def test_labels_name_images_without_a_place(tmp_path: Path) -> None:
    map_tile(tmp_path / 'map' / 'clip.tif', 'plain')
    sound = write(tmp_path / 'images' / 'sound.tif', numbers(1))
    edit(sound, transform=Affine(10, 0, 600000, 0, -10, 5600000))
    local = write(tmp_path / 'images' / 'local.tif', numbers(1))
    crs = 'LOCAL_CS["here",UNIT["metre",1],AXIS["E",EAST],AXIS["N",NORTH]]'
    edit(local, crs=rasterio.CRS.from_wkt(crs))
    flat = write(tmp_path / 'images' / 'flat.tif', numbers(1))
    edit(flat, transform=Affine(10, 0, 600000, 0, 0, 5600000))
    points = [
        rasterio.control.GroundControlPoint(row, col, 10 + col, 50 - row)
        for row in (0, 32)
        for col in (0, 32)
    ]
    path = tmp_path / 'images' / 'points.tif'
    with rasterio.open(
        path, 'w', 'GTiff', width=32, height=32, count=1, dtype='uint8'
    ) as out:
        out.gcps = points, rasterio.CRS.from_epsg(4326)
    labels = label_archive(
        tmp_path / 'images',
        tmp_path / 'map',
        tmp_path / 'labels.parquet',
        workers=1,
        progress=False,
    )
    assert labels.rows == 1
    reasons = {name: labels.failures[f'{name}.tif'] for name in ('local', 'flat')}
    assert 'nowhere on Earth' in reasons['local']
    assert 'gdal_edit.py' in reasons['local']
    assert 'whose pixels have no size' in reasons['flat']
    assert 'gdalwarp -tps' in labels.failures['points.tif']


@pytest.mark.parametrize('kind', ['scale', 'offset', 'mask'])
def test_archive_with_what_records_do_not_hold(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / 's1' / '0000000'
    folder /= 'S1A_IW_GRDH_1SDV_20200607T010800_20200607T010825_032904_03CFB1_1A2B'
    for band in ('VV', 'VH'):
        write(folder / f'{band}.tif', -numbers(1).astype(np.float32))
    archive = TiffArchive(tmp_path, 's1')
    assert archive.read([0]).shape[0] == 1
    if kind == 'mask':
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            rasterio.open(folder / 'VH.tif', 'r+') as out,
        ):
            out.write_mask(np.eye(32, dtype=np.uint8))
    else:
        edit(folder / 'VH.tif', **{f'{kind}s': (0.1,)})
    with pytest.raises(ValueError, match=r'must be as published: .*VH\.tif'):
        archive.read([0])


def test_scenes_of_pictures(tmp_path: Path) -> None:
    """A land-cover map is no picture: its codes are not expanded to colours."""
    codes, _, transform = map_tile(tmp_path / 'map' / 'clip.tif', 'plain')
    with rasterio.open(tmp_path / 'map' / 'clip.tif', 'r+') as out:
        out.write_colormap(1, {10: (0, 100, 0, 255), 40: (240, 150, 255, 255)})
    image = write(tmp_path / 'images' / 'a.tif', numbers(3))
    edit(image, crs='EPSG:4326', transform=transform @ Affine.translation(1700, 9))
    dataset = WorldCoverScenes(
        image,
        tmp_path / 'map',
        patch_size=32,
        value_range=(0, 1e4),
        transforms=lambda sample: sample,
    )
    assert np.array_equal(dataset[0]['mask'], codes[9:41, 1700:1732])
