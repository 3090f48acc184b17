# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""What files of the real world say of themselves, in the layouts of those who write them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.control
from affine import Affine

from tests.geo.layouts import PRODUCT, numbers, scenes, write
from torchgeo_softcon.datasets import ImageMaskFolder
from torchgeo_softcon.geo.sentinel2 import Products


class TestOffset:
    @pytest.mark.parametrize(
        ('name', 'expected'),
        [
            (f'{PRODUCT.format("0400")}.SAFE/B02.tif', -1000),
            (f'{PRODUCT.format("0510")}.SAFE/GRANULE/x/R10m/B02.tif', -1000),
            (f'{PRODUCT.format("0301")}.SAFE/B02.tif', 0),
            (f'{PRODUCT.format("9999")}_26_57/{PRODUCT.format("9999")}_B02.tif', 0),
            ('site_N1200_E0300/B02.tif', 0),
            ('IMG_N2024_x.tif', 0),
            ('a_N0400_b.tif', 0),
        ],
    )
    def test_of_a_name(self, tmp_path: Path, name: str, expected: float) -> None:
        assert Products().offset(str(tmp_path / name)).value == expected

    def test_same_by_whole_path_from_inside_and_through_a_link(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / f'{PRODUCT.format("0510")}.SAFE'
        write(folder / 'B02.tif', numbers(1))
        (tmp_path / 'link').symlink_to(folder)
        images = [scenes(folder)[0]['image'], scenes(tmp_path / 'link')[0]['image']]
        monkeypatch.chdir(folder)
        images.append(scenes(Path())[0]['image'])
        assert all((image == images[0]).all() for image in images)
        assert not (images[0] == scenes(folder, offset=0)[0]['image']).any()

    @pytest.mark.parametrize(
        ('element', 'baseline', 'expected'),
        [
            ('<BOA_ADD_OFFSET band_id="0">-1000</BOA_ADD_OFFSET>', '9999', -1000),
            ('<RADIO_ADD_OFFSET band_id="0">0</RADIO_ADD_OFFSET>', '0510', 0),
            ('', '0510', 0),
        ],
    )
    def test_metadata_count_before_the_name(
        self, tmp_path: Path, element: str, baseline: str, expected: float
    ) -> None:
        folder = tmp_path / f'{PRODUCT.format(baseline)}.SAFE'
        path = folder / 'GRANULE' / 'L2A_T32UNE' / 'IMG_DATA' / 'R10m' / 'B02.jp2'
        path.parent.mkdir(parents=True)
        xml = f'<n1:Product xmlns:n1="https://psd"><a>{element}</a></n1:Product>'
        (folder / 'MTD_MSIL2A.xml').write_text(xml)
        offset = Products().offset(str(path))
        assert offset.value == expected
        assert (offset.source or '').endswith('MTD_MSIL2A.xml')

    def test_damaged_metadata(self, tmp_path: Path) -> None:
        (tmp_path / 'MTD_MSIL1C.xml').write_text('<n1:Product')
        with pytest.raises(
            ValueError, match=r'MTD_MSIL1C.xml cannot be read, .*offset'
        ):
            Products().offset(str(tmp_path / 'B02.tif'))


class TestScale:
    @pytest.mark.parametrize('dtype', ['uint16', 'int16', 'float32'])
    def test_reflectance_becomes_digital_numbers(
        self, tmp_path: Path, dtype: str
    ) -> None:
        path = write(tmp_path / 'a.tif', numbers(2, 1500).astype(dtype), ('B2', 'B3'))
        plain = write(tmp_path / 'plain' / 'a.tif', numbers(2, 500), ('B2', 'B3'))
        with rasterio.open(path, 'r+') as out:
            out.scales, out.offsets = (1e-4,) * 2, (-0.1,) * 2
        expected = scenes(plain)[0]['image']
        actual = scenes(path, value_range='softcon')[0]['image']
        np.testing.assert_allclose(actual, expected, atol=1e-6)
        # A range of the user's own is one of what the file declares
        image = scenes(path, value_range=(0, 0.1))[0]['image']
        np.testing.assert_allclose(image, 0.5, atol=1e-5)
        # Numbers as they are stored
        image = scenes(path, value_range=(0, 3000), offset=0)[0]['image']
        np.testing.assert_allclose(image, 0.5, atol=1e-6)

    def test_radar_in_hundredths_of_a_decibel(self, tmp_path: Path) -> None:
        values = np.full((2, 32, 32), -1500, np.int16)
        path = write(tmp_path / 'a.tif', values, ('VV', 'VH'))
        with pytest.raises(ValueError, match=r'-1500 to -1500, which is not .* in dB'):
            scenes(path)
        with rasterio.open(path, 'r+') as out:
            out.scales = (0.01,) * 2
        other = write(tmp_path / 'b' / 'a.tif', values / np.float32(100), ('VV', 'VH'))
        expected = scenes(other)[0]['image']
        np.testing.assert_allclose(scenes(path)[0]['image'], expected, atol=1e-5)


@pytest.mark.parametrize('inside', [True, False])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16'])
def test_masks_of_files(tmp_path: Path, inside: bool, dtype: str) -> None:
    values = np.full((3, 32, 32), 90, dtype)
    valid = np.full((32, 32), 255, np.uint8)
    valid[:, :10] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside):
        path = write(tmp_path / 'images' / 'a.tif', values)
        with rasterio.open(path, 'r+') as out:
            out.write_mask(valid)
    assert inside != (tmp_path / 'images' / 'a.tif.msk').exists()
    write(tmp_path / 'masks' / 'a.tif', np.full((1, 32, 32), 30, np.uint8))
    folder = ImageMaskFolder(tmp_path, value_range=(0, 100), transforms=lambda s: s)
    for sample in (scenes(path, value_range=(0, 100))[0], folder[0]):
        assert (sample['image'][:, :, :10] == 0).all()
        assert (sample['image'][:, :, 10:] == np.float32(0.9)).all()
        assert (sample['mask'][:, :10] == 0).all()
    assert (folder[0]['mask'][:, 10:] == 30).all()


class TestNames:
    @pytest.mark.parametrize(
        ('names', 'expected'),
        [
            (('B2_median', 'B3_median', 'NDVI'), ('B2', 'B3', 'NDVI')),
            (('0_B2', '0_B8A'), ('B2', 'B8A')),
            (('Sigma0_VV_db', 'Sigma0_VH_db'), ('VV', 'VH')),
            (('elevation', 'slope'), None),
            (('0_B2', '1_B2'), None),
            (tuple(f'feature {i}' for i in range(12)), None),
            (tuple(f'feature {i}' for i in range(13)), None),
        ],
    )
    def test_descriptions_count(
        self, tmp_path: Path, names: tuple[str, ...], expected: Any
    ) -> None:
        values = np.full((len(names), 32, 32), -10, np.float32)
        write(tmp_path / 'a.tif', values, names)
        assert scenes(tmp_path, value_range=(-20, 0)).bands == expected

    def test_number_counts_without_descriptions_only(self, tmp_path: Path) -> None:
        write(tmp_path / 'a.tif', numbers(12))
        bands = scenes(tmp_path).bands
        assert bands is not None
        assert len(bands) == 12
        assert 'B10' not in bands


@pytest.mark.parametrize(
    'others',
    [
        ('AOT', 'SCL', 'WVP', 'TCI'),
        ('SCL', 'visual', 'preview'),
        ('cloud_mask',),
        ('T32UNE_20210601T101031_SCL_20m', 'QA60', 'x_udm2', 'x_reference_map'),
    ],
)
def test_layers_beside_bands_are_left_out(
    tmp_path: Path, others: tuple[str, ...]
) -> None:
    for band in ('B02', 'B03', 'B04'):
        write(tmp_path / f'{band}.tif', numbers(1))
    for other in others:
        write(tmp_path / f'{other}.tif', np.full((1, 16, 16), 4, np.uint8))
    assert scenes(tmp_path).bands == ('B2', 'B3', 'B4')
    # A layer that nobody knows, if bands say what is wanted
    write(tmp_path / 'dem.tif', np.full((1, 16, 16), 4, np.uint8))
    dataset = scenes(tmp_path, bands=['B4', 'B3'])
    assert dataset.bands == ('B4', 'B3')
    assert len(dataset.places) == 1


@pytest.mark.parametrize('top', [0.2, 40.0, 3000.0])
def test_radar_that_is_not_in_decibels(tmp_path: Path, top: float) -> None:
    values = np.linspace(0.01, top, 2 * 32 * 32, dtype=np.float32).reshape(2, 32, 32)
    write(tmp_path / 'a.tif', values, ('VV', 'VH'))
    with pytest.raises(
        ValueError, match='not radar backscatter in dB: convert it by 10'
    ):
        scenes(tmp_path)
    assert scenes(tmp_path, value_range=(0, top))[0]['image'].max() > 0.9


def test_bands_without_statistics_are_named(tmp_path: Path) -> None:
    values = np.stack([np.full((32, 32), v, np.float64) for v in (-12, -20, 38)])
    write(tmp_path / 'a.tif', values, ('VV', 'VH', 'angle'))
    with pytest.raises(ValueError, match=r"ANGLE: choose bands .*bands=\['VV', 'VH'\]"):
        scenes(tmp_path)
    assert scenes(tmp_path, bands=['VV', 'VH']).bands == ('VV', 'VH')


class TestNoPlaceOnEarth:
    @pytest.mark.parametrize(
        ('crs', 'west'),
        [
            ('LOCAL_CS["a",UNIT["metre",1],AXIS["E",EAST],AXIS["N",NORTH]]', 600000),
            (
                'ENGCRS["a",EDATUM["a"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["m",1]]',
                0,
            ),
            ('EPSG:4978', 600000),
            ('EPSG:32632', 1e12),
            ('EPSG:4326', 10),
        ],
    )
    def test_nowhere(self, crs: str, west: float, tmp_path: Path) -> None:
        path = write(tmp_path / 'odd.tif', numbers(1))
        with rasterio.open(path, 'r+') as out:
            out.crs = rasterio.CRS.from_user_input(crs)
            out.transform = Affine(10, 0, west, 0, -10, 5600000)
        with pytest.raises(ValueError, match=r'odd.tif is nowhere .*gdal_edit'):
            scenes(path)

    def test_polynomial_coefficients(self, tmp_path: Path) -> None:
        path = tmp_path / 'a.tif'
        options: dict[str, Any] = {'width': 32, 'height': 32, 'count': 1}
        with rasterio.open(path, 'w', 'GTiff', dtype='uint16', **options) as out:
            out.write(numbers(1))
            ones = {
                f'{x}_{y}_coeff': [1.0] * 20
                for x in ('line', 'samp')
                for y in ('num', 'den')
            }
            names = [
                f'{x}_{y}'
                for x in ('height', 'lat', 'line', 'long', 'samp')
                for y in ('off', 'scale')
            ]
            out.rpcs = rasterio.rpc.RPC(**dict.fromkeys(names, 1.0), **ones)
        with pytest.raises(ValueError, match=r'a.tif has polynomial .*gdalwarp -rpc'):
            scenes(path)

    def test_ground_control_points(self, tmp_path: Path) -> None:
        path = tmp_path / 's1.tif'
        points = [
            rasterio.control.GroundControlPoint(row, col, 10 + col, 50 - row)
            for row in (0, 32)
            for col in (0, 32)
        ]
        options: dict[str, Any] = {'width': 32, 'height': 32, 'count': 1}
        with rasterio.open(path, 'w', 'GTiff', dtype='uint16', **options) as out:
            out.write(numbers(1))
            out.gcps = points, rasterio.CRS.from_epsg(4326)
        with pytest.raises(
            ValueError, match=r's1.tif has ground control points .*warp'
        ):
            scenes(path)

    def test_pixels_without_a_size(self, tmp_path: Path) -> None:
        path = write(tmp_path / 'flat.tif', numbers(1))
        with rasterio.open(path, 'r+') as out:
            out.transform = Affine(10, 0, 600000, 0, 0, 5600000)
        with pytest.raises(ValueError, match=r'flat.tif has a georeference'):
            scenes(path)


class TestLayersThatAreNoImage:
    """Companions of other satellites and of radar."""

    def test_masks_of_planet(self, tmp_path: Path) -> None:
        base = tmp_path / '20230601_101010_12_2473_3B'
        names = ('blue', 'green', 'red', 'nir')
        write(Path(f'{base}_AnalyticMS_SR_clip.tif'), numbers(4), names)
        names = ('clear', 'snow', 'shadow', 'cloud')
        write(Path(f'{base}_udm2_clip.tif'), numbers(4, 1).astype('uint8'), names)
        dataset = scenes(tmp_path, value_range=(0, 10000))
        assert dataset.bands == ('B', 'G', 'R', 'NIR')
        assert dataset.kinds[0][0].startswith('1 file')

    @pytest.mark.parametrize(
        'name', ['localIncidenceAngle', 'angle', 'incidence_angle']
    )
    def test_angle_in_a_file_of_its_own(self, tmp_path: Path, name: str) -> None:
        for band, level in (('vv', -10), ('vh', -17), (name, 38)):
            values = np.full((1, 32, 32), level, np.float32)
            write(tmp_path / f'S1A_20230601_{band}.tif', values)
        assert scenes(tmp_path).bands == ('VV', 'VH')

    def test_levels_in_one_folder(self, tmp_path: Path) -> None:
        for name in ('B02', 'B03', 'B02_10m', 'B03_10m', 'B03_20m'):
            path = tmp_path / f'T32UNE_20230601T103629_{name}.jp2'
            write(path, numbers(1), driver='JP2OpenJPEG')
        with pytest.raises(
            ValueError, match=r'B02.jp2 and .*B02_10m.jp2 have one band'
        ):
            scenes(tmp_path)

    def test_corrections_of_theia(self, tmp_path: Path) -> None:
        base = 'SENTINEL2A_20230601-105435-457_L2A_T31TCJ_D_V3-1'
        for band in ('B2', 'B3', 'B4'):
            write(tmp_path / f'{base}_FRE_{band}.tif', numbers(1, 2000))
            write(tmp_path / f'{base}_SRE_{band}.tif', numbers(1, 3000))
        write(tmp_path / 'MASKS' / f'{base}_CLM_R1.tif', numbers(1, 1).astype('uint8'))
        dataset = scenes(tmp_path)
        assert dataset.bands == ('B2', 'B3', 'B4')
        assert dataset.kinds[0][0].startswith('3 files, Sentinel-2 L2A')
        assert len(dataset.with_windows()) == 1


@pytest.mark.parametrize('dtype', ['uint16', 'float32'])
@pytest.mark.parametrize('nodata', [-9999, 65535, 0])
def test_no_data_beside_the_file(tmp_path: Path, nodata: int, dtype: str) -> None:
    """PAM metadata say what no data is, also a number that the pixels cannot be."""
    values = numbers(3).astype(dtype)
    if np.can_cast(np.min_scalar_type(nodata), dtype):
        values[:, :8] = nodata
    path = write(tmp_path / 'a.tif', values, ('B4', 'B3', 'B2'))
    bands = ''.join(
        f'<PAMRasterBand band="{i}"><NoDataValue>{nodata}</NoDataValue></PAMRasterBand>'
        for i in (1, 2, 3)
    )
    Path(f'{path}.aux.xml').write_text(f'<PAMDataset>{bands}</PAMDataset>')
    image = scenes(path).with_windows()[0]['image']
    assert (image[:, 8:] > 0).all()
    assert (image[:, :8] == 0).all() == bool((values[:, :8] == nodata).all())


@pytest.mark.parametrize('unit', ['metres', 'degrees', 'spelling'])
def test_dates_on_one_grid(tmp_path: Path, unit: str) -> None:
    """Grids of one place differ in the last digits, or in how their CRS is spelled."""
    proj4 = '+proj=utm +zone=32 +datum=WGS84 +units=m +no_defs'
    places: list[tuple[str, Affine]] = {
        'metres': [
            ('EPSG:32632', Affine(10, 0, 600000, 0, -10, 5600000)),
            ('EPSG:32632', Affine(10, 0, 600000.0001, 0, -10, 5599999.999999999)),
        ],
        'degrees': [
            (
                'EPSG:4326',
                Affine(8.983152841195215e-5, 0, 10, 0, -8.98315284119521e-5, 50),
            ),
            (
                'EPSG:4326',
                Affine(
                    8.98315284119521e-5, 0, 10.0000000001, 0, -8.983152841195215e-5, 50
                ),
            ),
        ],
        'spelling': [
            (crs, Affine(10, 0, 600000, 0, -10, 5600000))
            for crs in ('EPSG:32632', proj4)
        ],
    }[unit]
    for date, (crs, transform) in enumerate(places, 1):
        path = tmp_path / f'a_2023060{date}.tif'
        write(path, numbers(3), ('B4', 'B3', 'B2'), crs=crs, transform=transform)
    assert scenes(tmp_path, seasons=2)[0]['image'].shape == (2, 3, 32, 32)
