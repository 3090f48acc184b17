# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pixels and printed lines of what is downloaded in practice, against rasterio alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.enums import Resampling

from tests.datamodules.helpers import write_raster
from tests.geo import layouts
from tests.geo.layouts import PRODUCT, metadata, noise, numbers, scenes, write
from torchgeo_softcon.bands import (
    BAND_STATISTICS,
    LEVEL2A_STATISTICS,
    SENTINEL2_BANDS,
    SENTINEL2_SUBSETS,
)
from torchgeo_softcon.datasets import ImageMaskFolder
from torchgeo_softcon.geo.sentinel2 import Products


def in_unit_range(
    path: Path, index: int, band: str, level: str, offset: float, side: int
) -> Any:
    """A band of a file in [0, 1] by rasterio, interpolated to the size of the finest."""
    with rasterio.open(path) as source:
        values = source.read(
            index,
            out_shape=(side, side),
            resampling=Resampling.bilinear,
            out_dtype='float64',
        )
        scale, added = source.scales[index - 1], source.offsets[index - 1]
    if scale != 1:  # declared reflectance
        values, offset = values * scale * 10_000, added * 10_000
    statistics = LEVEL2A_STATISTICS if level == 'L2A' else BAND_STATISTICS
    mean, std = statistics.get(band) or BAND_STATISTICS[band]
    return ((values + offset - (mean - 2 * std)) / (4 * std)).clip(0, 1)


class Layout(NamedTuple):
    make: Callable[[Path], Path]
    line: str
    bands: tuple[str, ...]
    level: str = 'L2A'
    offset: float = 0
    side: int = 48
    options: dict[str, Any] = {}  # noqa: RUF012


LAYOUTS = {
    'safe': Layout(
        layouts.safe,
        '7 files, Sentinel-2 L2A, offset -1000 from MTD_MSIL2A.xml, scaled by L2A statistics',
        ('B1', 'B2', 'B3', 'B4', 'B5', 'B8', 'B11'),
        offset=-1000,
        side=240,
    ),
    'planetary_computer': Layout(
        layouts.planetary_computer,
        '4 files, Sentinel-2 L2A, offset -1000 from the STAC item, scaled by L2A statistics',
        ('B2', 'B3', 'B4', 'B8'),
        offset=-1000,
    ),
    'earth_engine': Layout(
        layouts.earth_engine,
        '1 file, Sentinel-2 L2A, scaled by L2A statistics',
        ('B4', 'B3', 'B2', 'B8'),
        options={'bands': ['B4', 'B3', 'B2', 'B8']},
    ),
    'snap': Layout(
        layouts.snap, '1 file, Sentinel-1, dB, scaled by statistics in dB', ('VH', 'VV')
    ),
    'reben': Layout(
        layouts.reben,
        '4 files, Sentinel-2 L2A, offset 0 from the name of the product, scaled by L2A',
        ('B1', 'B2', 'B3', 'B8A'),
        side=120,
    ),
    'major_tom': Layout(
        layouts.major_tom,
        '4 files, Sentinel-2 L2A, scaled by L2A statistics',
        ('B2', 'B4', 'B5', 'B12'),
    ),
    'scaled_cog': Layout(
        layouts.scaled_cog,
        '1 file, Sentinel-2 L2A, reflectance, scale 0.0001 and offset -0.1 of the files, '
        'scaled by L2A statistics',
        ('B2', 'B3', 'B4', 'B8'),
    ),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layout(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    root = layout.make(tmp_path)
    dataset = scenes(root, **layout.options)
    dataset.patch_size = layout.side
    dataset = dataset.with_windows()
    assert dataset.bands == layout.bands
    ((line, scene),) = dataset.kinds
    assert line.startswith(layout.line)
    image = dataset[0]['image'].numpy()
    assert image.shape == (len(layout.bands), layout.side, layout.side)
    files = [(layer.path, index) for layer in scene.layers for index in layer.indexes]
    for band, (path, index), pixels in zip(layout.bands, files, image, strict=True):
        # The band that is named so, at its finest
        if len(files) > 1 == len(scene.layers[0].indexes):
            assert re.search(f'{band[0]}0?{band[1:]}(_|$)', Path(path).stem)
        right = in_unit_range(
            Path(path), index, band, layout.level, layout.offset, layout.side
        )
        # GDAL rounds what it interpolates
        np.testing.assert_allclose(pixels, right, atol=3e-4)
    assert image.std() > 0.02


def test_what_files_are_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = layouts.scaled_cog(tmp_path)
    with caplog.at_level('INFO'):
        kinds = [scenes(path).kinds for _ in range(2)]
    assert kinds[0] == kinds[1]
    assert [m for m in caplog.messages if 'L2A statistics' in m] == [kinds[0][0][0]]


class TestLevel:
    """Metadata, then tags and items, names of bands, names of products."""

    @pytest.mark.parametrize(
        ('path', 'tags', 'bands', 'expected', 'source'),
        [
            ('S2A_MSIL1C_x/B02.tif', {}, (), 'L1C', 'names'),
            ('l1c/S2A_MSIL2A_x/B02.tif', {}, (), 'L2A', 'names'),
            ('sentinel-2-l2a/B02.tif', {}, (), 'L2A', 'names'),
            ('Core-S2L1C/B02.tif', {}, (), 'L1C', 'names'),
            ('COPERNICUS_S2_SR_HARMONIZED/a.tif', {}, (), 'L2A', 'names'),
            ('S2_HARMONIZED/a.tif', {}, (), 'L1C', 'names'),
            ('HLS.S30.T32UNE.2021152T101031.v2.0.B02.tif', {}, (), 'L2A', 'names'),
            ('a.tif', {'PROCESSING_LEVEL': 'Level-2A'}, ('B10',), 'L2A', 'tags'),
            ('S2A_MSIL2A_x.tif', {'PRODUCT_TYPE': 'S2MSI1C'}, (), 'L1C', 'tags'),
            ('a.tif', {'processing:level': 'L2A'}, (), 'L2A', 'tags'),
            ('a.tif', {'PRODUCT_TYPE': 'GRD'}, (), None, ''),
            ('a_L2A.tif', {}, ('B2', 'B10'), 'L1C', 'the band B10'),
            ('S2A_MSIL1C_x.tif', {}, ('B2', 'SCL'), 'L2A', 'the band SCL'),
            ('a.tif', {}, SENTINEL2_SUBSETS[12], 'L2A', 'all bands but B10'),
            ('L1C/a.tif', {}, SENTINEL2_SUBSETS[12], 'L1C', 'names'),
            ('XL2A.tif', {}, ('B2',), None, ''),
        ],
    )
    def test_order(
        self,
        tmp_path: Path,
        path: str,
        tags: dict[str, str],
        bands: tuple[str, ...],
        expected: str | None,
        source: str,
    ) -> None:
        found = Products().level(str(tmp_path / path), tags, bands)
        assert found == (expected, source)

    def test_metadata_go_first(self, tmp_path: Path) -> None:
        (tmp_path / 'MTD_MSIL1C.xml').write_text(metadata('L1C', 0))
        found = Products().level(
            str(tmp_path / 'x_L2A.tif'), {'LEVEL': 'L2A'}, ('SCL',)
        )
        assert found == ('L1C', 'MTD_MSIL1C.xml')

    def test_mixed_levels_are_scaled_each_by_its_own(self, tmp_path: Path) -> None:
        values = numbers(2, 2500)
        for number, level in enumerate(('L1C', 'L2A')):
            folder = tmp_path / f'S2A_MSI{level}_20210601T101031_N0300_R022_T32UNE_1'
            for band in ('B01', 'B02'):
                # One is a little further east
                at = rasterio.Affine(10, 0, 600000 + number * 1e5, 0, -10, 5600000)
                write(folder / f'{band}.tif', values[:1], transform=at)
        dataset = scenes(tmp_path)
        lines = [line for line, _ in dataset.kinds]
        assert ['scaled by L1C' in lines[0], 'scaled by L2A' in lines[1]] == [True] * 2
        seen = {round(float(dataset[i]['image'][0, 0, 0]), 5) for i in range(20)}
        right = set()
        for mean, std in (BAND_STATISTICS['B1'], LEVEL2A_STATISTICS['B1']):
            right.add(round((2500 - mean + 2 * std) / (4 * std), 5))
        assert seen == right
        assert len({line for line, _ in scenes(tmp_path, level='L2A').kinds}) == 1

    def test_unknown_level_is_said(self, tmp_path: Path) -> None:
        write(tmp_path / 'a.tif', numbers(2), ('B2', 'B3'))
        ((line, _),) = scenes(tmp_path).kinds
        assert 'Sentinel-2 of unknown level, scaled by L1C statistics' in line
        ((line, _),) = scenes(tmp_path, value_range=(0, 4000), offset=-7).kinds
        assert 'Sentinel-2, offset -7 as given, scaled by value_range' in line


class TestOffsetOfTags:
    @pytest.mark.parametrize(
        ('tags', 'expected'),
        [
            ({'PROCESSING_BASELINE': '05.09'}, -1000),
            ({'PROCESSING_BASELINE': '03.01'}, 0),
            ({'PROCESSING_BASELINE': '99.99'}, 0),
            ({'BOA_ADD_OFFSET': '-1000', 'PROCESSING_BASELINE': '02.00'}, -1000),
            ({'PRODUCT_URI': f'{PRODUCT.format("0510")}.SAFE'}, -1000),
            ({'AREA_OR_POINT': 'Area'}, 0),
        ],
    )
    def test_tags(self, tmp_path: Path, tags: dict[str, str], expected: float) -> None:
        path = write(tmp_path / 'a.tif', numbers(1), ('B2',))
        with rasterio.open(path, 'r+') as out:
            out.update_tags(**tags)
        dataset = scenes(path, value_range=(0, 4000))
        assert dataset.places[0].scenes[0].layers[0].offset == (expected,)

    @pytest.mark.parametrize(
        ('properties', 'expected'),
        [
            ({'s2:processing_baseline': '04.00'}, -1000),
            (
                {
                    's2:processing_baseline': '05.09',
                    'earthsearch:boa_offset_applied': True,
                },
                0,
            ),
            ({'s2:product_uri': f'{PRODUCT.format("0301")}.SAFE'}, 0),
        ],
    )
    @pytest.mark.parametrize('name', ['item', 'a'])
    def test_item(
        self, tmp_path: Path, properties: dict[str, Any], expected: float, name: str
    ) -> None:
        path = write(tmp_path / 'a.tif', numbers(1), ('B2',))
        item = {'stac_version': '1.0.0', 'properties': properties}
        (tmp_path / f'{name}.json').write_text(json.dumps(item))
        offset = Products().offset(str(path))
        assert offset.value == expected
        assert offset.source == 'the STAC item'

    @pytest.mark.parametrize('text', ['[1, 2]', '{"properties": {}}', 'no JSON'])
    def test_other_json(self, tmp_path: Path, text: str) -> None:
        (tmp_path / 'item.json').write_text(text)
        assert Products().offset(str(tmp_path / 'a.tif')).source is None


class TestUnits:
    @pytest.mark.parametrize('dtype', ['float32', 'float64'])
    @pytest.mark.parametrize('factor', [1e-4, 1])
    def test_reflectance_and_digital_numbers_in_floats(
        self, tmp_path: Path, dtype: str, factor: float
    ) -> None:
        values = noise(2, 200, 4000, 'uint16')
        write(tmp_path / 'a' / 'L2A.tif', values, ('B2', 'B3'))
        path = tmp_path / 'b' / 'L2A.tif'
        write(path, (values * factor).astype(dtype), ('B2', 'B3'))
        expected, actual = (
            scenes(tmp_path / name).read_middle(scenes(tmp_path / name).kinds[0][1])
            for name in 'ab'
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
        ((line, _),) = scenes(path).kinds
        assert (', reflectance,' in line) == (factor != 1)

    def test_a_dark_image_has_the_unit_of_others(self, tmp_path: Path) -> None:
        at = rasterio.Affine(10, 0, 700000, 0, -10, 5600000)
        write(tmp_path / 'a.tif', noise(2, 200, 4000, 'float32'), ('B11', 'B12'))
        dark = noise(2, 3, 40, 'float32')
        path = write(tmp_path / 'b.tif', dark, ('B11', 'B12'), transform=at)
        assert len(scenes(tmp_path).kinds) == 1
        with pytest.raises(ValueError, match=r'value_range must be given .*float32'):
            scenes(path)
        assert scenes(path, value_range='softcon')[0]['image'].shape == (2, 32, 32)

    def test_an_image_with_data_in_a_corner(self, tmp_path: Path) -> None:
        values = np.full((2, 256, 256), np.nan, np.float32)
        values[:, :90, :90] = noise(2, 0.02, 0.4, 'float32', 90)
        write(tmp_path / 'a.tif', values, ('B2', 'B3'))
        ((line, _),) = scenes(tmp_path).kinds
        assert ', reflectance,' in line

    @pytest.mark.parametrize('factor', [1e-4, 1])
    def test_radar_and_reflectance_in_one_file(
        self, tmp_path: Path, factor: float
    ) -> None:
        radar, optical = noise(2, -22, -5, 'f4', 32), noise(2, 100, 3000, 'f4', 32)
        values = np.concatenate([radar, optical * factor]).astype('f4')
        dataset = scenes(write(tmp_path / 'L2A.tif', values, ('VV', 'VH', 'B2', 'B3')))
        read = dataset.read_middle(dataset.kinds[0][1])
        np.testing.assert_allclose(read, np.concatenate([radar, optical]), rtol=1e-5)

    def test_radar_in_bytes(self, tmp_path: Path) -> None:
        path = write(tmp_path / 'a.tif', noise(2, 0, 255, 'uint8'), ('VV', 'VH'))
        assert scenes(path).value_range == ((0, 255),) * 2

    def test_complex_numbers(self, tmp_path: Path) -> None:
        values = noise(1, 0, 9, 'f4').astype('complex64')
        path = write(tmp_path / 'slc.tif', values, ('VV',))
        with pytest.raises(ValueError, match=r'slc.tif has complex numbers: make'):
            scenes(path)

    @pytest.mark.parametrize('scale', [1 / 255, 1 / 65535])
    def test_bytes_that_declare_reflectance(self, tmp_path: Path, scale: float) -> None:
        dtype = 'uint8' if scale > 1e-3 else 'uint16'
        values = noise(2, 0.05 / scale, 0.4 / scale, dtype)
        path = write(tmp_path / 'a.tif', values, ('B2', 'B3'), nodata=0)
        with rasterio.open(path, 'r+') as out:
            out.scales = (scale,) * 2
        image = scenes(path).read_middle(scenes(path).kinds[0][1])
        np.testing.assert_allclose(image, values * scale * 10_000, rtol=1e-4)

    def test_nearly_everything_clipped_is_said(self, tmp_path: Path) -> None:
        # Reflectance times 65535, as some browsers export it
        path = write(tmp_path / 'a.tif', noise(2, 5000, 60000, 'uint16'), ('B2', 'B3'))
        with pytest.warns(UserWarning, match=r'are clipped .* give value_range'):
            scenes(path)

    def test_quantiles_of_radar(self, tmp_path: Path) -> None:
        values = noise(2, -30, 0, 'float32', 32)
        path = write(tmp_path / 'images' / 'a.tif', values, ('VV', 'VH'))
        image = scenes(path, radar_quantiles=True)[0]['image'].numpy()
        for band, pixels, name in zip(values, image, ('VV', 'VH'), strict=True):
            mean, std = BAND_STATISTICS[name]
            right = band.clip(*np.quantile(band, (0.01, 0.99)))
            right = ((right - mean + 2 * std) / (4 * std)).clip(0, 1)
            np.testing.assert_allclose(pixels, right, atol=1e-5)
        assert abs(image - scenes(path)[0]['image'].numpy()).max() > 0.005
        write_raster(tmp_path / 'masks' / 'a.tif', np.full((1, 32, 32), 10, np.uint8))
        for cache in (None, tmp_path / 'cache'):
            folder = ImageMaskFolder(tmp_path, radar_quantiles=True, cache=cache)
            np.testing.assert_array_equal(folder[0]['image'].numpy(), image)

    @pytest.mark.parametrize(
        ('names', 'low', 'high'), [(('VV', 'VH'), -20, -8), (('B2', 'B3'), 0.1, 0.4)]
    )
    def test_frame_of_zeros_around_floats(
        self, tmp_path: Path, names: tuple[str, ...], low: float, high: float
    ) -> None:
        values = noise(2, low, high, 'float32', 32)
        values[:, :, :8] = 0
        values[0, 0, 20] = 0  # one band alone is data
        path = write(tmp_path / 'a.tif', values, names)
        empty = np.isnan(scenes(path).read_middle(scenes(path).kinds[0][1]))
        assert empty[:, :, :8].all()
        assert not empty[:, :, 8:].any()
        sample = scenes(path, nodata=-9999)[0]
        assert (sample['image'][:, :, :8] > 0).all()

    def test_an_offset_that_was_applied_before(self, tmp_path: Path) -> None:
        folder = tmp_path / PRODUCT.format('0509')
        path = write(folder / 'a.tif', noise(2, 300, 1500, 'uint16'), ('B2', 'B3'))
        with pytest.warns(
            UserWarning, match=r'negative with offset -1000 from .*offset=0'
        ):
            scenes(path)

    @pytest.mark.parametrize('dtype', ['int16', 'float64'])
    def test_an_offset_that_is_not_applied(self, tmp_path: Path, dtype: str) -> None:
        path = tmp_path / PRODUCT.format('0509') / 'a.tif'
        ((line, scene),) = scenes(
            write(path, noise(2, 300, 1500, dtype), ('B2', 'B3'))
        ).kinds
        assert f'no offset as they are {dtype}, though the name of the product' in line
        assert scene.layers[0].offset == (0, 0)

    @pytest.mark.parametrize(
        ('name', 'hints'),
        [
            ('S2B_MSIL2A_20230601T103629_R008_T32UNE_20230601T170010/B02.tif', 1),
            ('20230601T101031_20230601T101123_T32UNE_B02.tif', 1),
            ('S2B_MSIL2A_20200601T103629_R008_T32UNE_20230601T170010/B02.tif', 0),
            ('20230601_B02.tif', 0),
        ],
    )
    def test_hint_at_an_unknown_offset(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, hints: int
    ) -> None:
        write(tmp_path / name, numbers(1))
        with caplog.at_level('INFO', logger='lightning.pytorch'):
            scenes(tmp_path)
        assert caplog.text.count('give offset=-1000') == hints


class TestOrder:
    """Bands without names, whose order their brightness tells."""

    def test_eurosat(self, tmp_path: Path) -> None:
        levels = [
            1353,
            1117,
            1041,
            946,
            1199,
            2003,
            2374,
            2301,
            732,
            12,
            1820,
            1118,
            2599,
        ]
        values = np.array(levels, np.uint16)[:, None, None] * np.ones((32, 32), 'u2')
        dataset = scenes(write(tmp_path / 'a.tif', values))
        assert dataset.bands == (*SENTINEL2_BANDS[:8], *SENTINEL2_BANDS[9:], 'B8A')
        level1c = [*levels[:8], levels[12], *levels[8:12]]
        values = np.array(level1c, np.uint16)[:, None, None] * np.ones((32, 32), 'u2')
        assert scenes(write(tmp_path / 'b.tif', values)).bands == SENTINEL2_BANDS

    @pytest.mark.parametrize('linear', [False, True])
    @pytest.mark.parametrize('vh_first', [False, True])
    def test_radar(self, tmp_path: Path, linear: bool, vh_first: bool) -> None:
        values = np.stack([noise(1, -14, -6, 'f4')[0], noise(1, -24, -16, 'f4')[0]])
        values = values[::-1] if vh_first else values
        values = 10 ** (values / 10) if linear else values
        path = write(tmp_path / 'a.tif', values)
        bands = scenes(path, value_range=(-30, 10)).bands
        assert bands == (('VH', 'VV') if vh_first else ('VV', 'VH'))

    def test_names_of_snap(self, tmp_path: Path) -> None:
        path = layouts.snap(tmp_path)
        with rasterio.open(path) as source:
            assert source.descriptions == (None, None)
        assert scenes(path).bands == ('VH', 'VV')


class TestNamesOfFiles:
    @pytest.mark.parametrize(
        'pattern',
        [
            'T32UNE_{}_10m_clip.tif',
            '2023-06-01-00_00_2023-06-01-23_59_Sentinel-2_L2A_{}_(Raw).tiff',
            'S2A_{}.resampled.tif',
            'site 4 {} (copy).tif',
        ],
    )
    def test_a_band_in_the_middle(self, tmp_path: Path, pattern: str) -> None:
        for number, band in enumerate(('B02', 'B8A', 'B11')):
            write(tmp_path / pattern.format(band), numbers(1, 1000 + number))
        dataset = scenes(tmp_path, value_range=(1000, 1010))
        assert dataset.bands == ('B2', 'B8A', 'B11')
        assert (dataset[0]['image'][:, 0, 0] * 10).round().tolist() == [0, 1, 2]

    def test_assets_of_a_catalogue(self, tmp_path: Path) -> None:
        folder = tmp_path / 'S2B_32UNE_20230601_0_L2A'
        for number, name in enumerate(('red', 'nir08', 'coastal')):
            write(folder / f'{name}.tif', numbers(1, 1000 + number))
        for name in ('scl', 'aot', 'udm2'):
            write(folder / f'{name}.tif', np.full((1, 32, 32), 4, np.uint8))
        dataset = scenes(tmp_path, value_range=(1000, 1010))
        assert dataset.bands == ('B1', 'B4', 'B8A')
        assert (dataset[0]['image'][:, 0, 0] * 10).round().tolist() == [2, 0, 1]

    def test_radar_of_planetary_computer(self, tmp_path: Path) -> None:
        folder = tmp_path / 'S1A_IW_GRDH_1SDV_20210601T052638_rtc' / 'measurement'
        for band in ('vv', 'vh'):
            power = noise(1, 0.01, 0.3, 'float32')
            write(folder / f'iw-{band}.rtc.tiff', power, nodata=-32768)
        with pytest.raises(ValueError, match=r'VV .*not radar backscatter in dB'):
            scenes(tmp_path)
        assert scenes(tmp_path, value_range=(0, 1)).bands == ('VV', 'VH')

    def test_numbers_of_places_are_no_bands(self, tmp_path: Path) -> None:
        for number in range(1, 4):
            at = rasterio.Affine(10, 0, 600000 + number * 1e5, 0, -10, 5600000)
            path = tmp_path / f'plot_B{number}_2023.tif'
            write(path, numbers(1), transform=at)
        dataset = scenes(tmp_path, value_range=(0, 3000))
        assert len(dataset.places) == 3
        assert dataset.bands is None

    @pytest.mark.parametrize('name', ['B2_stdDev', 'B2_count', 'B2_variance'])
    def test_statistics_of_a_band_are_not_the_band(
        self, tmp_path: Path, name: str
    ) -> None:
        path = write(tmp_path / 'a.tif', numbers(2), (name, 'B3_median'))
        assert scenes(path, value_range=(0, 1)).bands == (name.upper(), 'B3')

    def test_left_out_is_said(self, tmp_path: Path) -> None:
        folder = layouts.safe(tmp_path)
        dataset = scenes(folder, bands=['B2', 'B3'])
        reasons = {Path(path).name: why for path, why in dataset.left_out.items()}
        assert 'not a band' in reasons['T32UNE_20230601T101031_SCL_20m.jp2']
        assert 'at least as fine' in reasons['T32UNE_20230601T101031_B02_20m.jp2']
        assert 'B11 is not wanted' in reasons['T32UNE_20230601T101031_B11_20m.jp2']


@pytest.mark.parametrize('form', ['bigtiff', 'jp2', 'vrt'])
def test_forms_of_files(tmp_path: Path, form: str) -> None:
    values = noise(2, 300, 3000, 'uint16')
    plain = write(tmp_path / 'a' / 'L2A.tif', values, ('B2', 'B3'))
    if form == 'bigtiff':
        path = write(tmp_path / 'b' / 'L2A.tif', values, ('B2', 'B3'), BIGTIFF='YES')
    elif form == 'jp2':
        options: dict[str, Any] = {
            'driver': 'JP2OpenJPEG',
            'QUALITY': 100,
            'REVERSIBLE': 'YES',
        }
        path = write(tmp_path / 'b' / 'L2A.jp2', values, **options)
    else:
        path = tmp_path / 'b' / 'L2A.vrt'
        path.parent.mkdir()
        with rasterio.open(plain) as source:
            rasterio.shutil.copy(source, path, driver='VRT')
    first, second = (
        scenes(p, all_bands=['B2', 'B3']).read_middle(
            scenes(p, all_bands=['B2', 'B3']).kinds[0][1]
        )
        for p in (plain, path)
    )
    np.testing.assert_array_equal(first, second)
