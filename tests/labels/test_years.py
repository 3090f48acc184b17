# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Years of images and of maps, and labels that join them."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio

from torchgeo_softcon.datasets import WorldCoverScenes
from torchgeo_softcon.geo.dates import name_year
from torchgeo_softcon.labels import label_archive
from torchgeo_softcon.landcover.files import find_map_files, map_year
from torchgeo_softcon.landcover.products import WORLDCOVER, find_product

from .helpers import grid, write_codes, write_image, write_tile

TAGS = {
    'time_start': '2020-01-01T00:00:00Z',
    'title': 'ESA WorldCover product at 10m resolution for year 2020',
}


@pytest.mark.parametrize(
    ('name', 'year'),
    [
        ('S2A_MSIL2A_20200630T101031_N0500_R022_T32UNE_20220101T1.SAFE/B02.jp2', 2020),
        ('s2c/0000200/20210604T054639_20210604T054831_T43RCP/B2.tif', 2021),
        ('2020/site_7/a.tif', None),
        ('2020/a.tif', 2020),
        ('median_2020_Q3.tif', 2020),
        ('2020-06-30.tif', 2020),
        ('img.2020.tif', None),
        ('change_2020_2021.tif', None),
        ('tile_2048.tif', None),
        ('x2020y.tif', None),
        ('20201399.tif', None),
        ('2021/S1A_IW_GRDH_1SDV_20200607T010800_VV.tif', 2020),
    ],
)
def test_year_of_an_image(name: str, year: int | None) -> None:
    assert name_year(name) == year


class TestYearOfAMap:
    @pytest.mark.parametrize(
        ('name', 'year'),
        [
            ('ESA_WorldCover_10m_2020_v100_N51E003_Map.tif', 2020),
            ('ESA_WorldCover_10m_2021_v200_N51E003_Map_clip.tif', 2021),
            ('worldcover_2020_bavaria.tif', 2020),
            ('WorldCover-V100.tif', 2020),
            ('clip_v200.TIF', 2021),
            ('change_2020_2021.tif', None),
            ('clip_20200630.tif', None),
            ('clip_2019.tif', None),
            ('clip.tif', None),
        ],
    )
    def test_names(self, name: str, year: int | None) -> None:
        assert map_year(name, WORLDCOVER) == year

    @pytest.mark.parametrize('tag', [*TAGS, 'TIFFTAG_IMAGEDESCRIPTION'])
    def test_metadata_that_clips_keep(self, tmp_path: Path, tag: str) -> None:
        path = write_codes(
            tmp_path / 'clip.tif',
            np.full((8, 8), 10, np.uint8),
            rasterio.Affine.scale(2),
        )
        assert map_year(str(path), WORLDCOVER) is None
        with rasterio.open(path, 'r+') as out:
            out.update_tags(**{tag: TAGS.get(tag, TAGS['title'])})
        assert map_year(str(path), WORLDCOVER) == 2020

    def test_product_without_years(self) -> None:
        assert map_year('clip_2020.tif', find_product('dynamicworld')) is None

    def test_clips_of_other_years_are_left_out(self, tmp_path: Path) -> None:
        names = ('wc_2020.tif', 'wc_2021.tif', 'clip.tif')
        for name in names:
            (tmp_path / name).write_text('')
        for year in (2020, 2021):
            files = find_map_files(tmp_path, WORLDCOVER, year)
            assert [Path(file).name for file in files] == ['clip.tif', f'wc_{year}.tif']
        (tmp_path / 'clip.tif').unlink()
        (tmp_path / 'wc_2021.tif').unlink()
        with pytest.raises(FileNotFoundError, match='of 2021, but tiles of 2020'):
            find_map_files(tmp_path, WORLDCOVER, 2021)


def label(out: Path, tiles: Path, year: Any, **archive: Any) -> dict[str, Any]:
    labels = label_archive(
        worldcover=tiles, out=out, year=year, workers=1, progress=False, **archive
    )
    return {row['id']: row for row in pq.read_table(labels.path).to_pylist()}


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    for year in (2020, 2021):
        write_tile(tmp_path / 'tiles', 9, 45, year)
    # Beside it, there is one year only
    write_tile(tmp_path / 'tiles', 12, 45, 2021)
    return tmp_path / 'tiles'


#: Names of images with the year of the map that they are to have.
IMAGES = {
    '20200630_a.tif': 2020,
    '20210630_b.tif': 2021,
    '2018/c.tif': 2020,
    '2024/d.tif': 2021,
    'e.tif': 2021,
}


class TestNearest:
    def test_images(self, tmp_path: Path, tiles: Path) -> None:
        folder = tmp_path / 'images'
        for number, name in enumerate(IMAGES):
            where = grid('EPSG:32632', 10 + number / 10, 46)
            write_image(folder / name, 'EPSG:32632', where)
        write_image(folder / '20200101_f.tif', 'EPSG:32633', grid('EPSG:32633', 13, 46))
        single = {
            year: label(tmp_path / f'{year}.parquet', tiles, year, images=folder)
            for year in (2020, 2021)
        }
        with pytest.warns(
            UserWarning, match=r'1 of 6 patches such as e\.tif do not tell'
        ):
            rows = label(tmp_path / 'all.parquet', tiles, 'nearest', images=folder)
        for name, year in {**IMAGES, '20200101_f.tif': 2021}.items():
            assert rows[name] == single[year][name], name
        assert rows['20200630_a.tif']['product'] == 'ESA WorldCover 10 m 2020 v100'

        # More images later, and another year is another file
        write_image(folder / '20200630_g.tif', 'EPSG:32632', grid('EPSG:32632', 11, 46))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            more = label(tmp_path / 'all.parquet', tiles, 'nearest', images=folder)
        assert more.pop('20200630_g.tif')['product'].endswith('2020 v100')
        assert more == rows
        with pytest.raises(ValueError, match=r'of the nearest year, this run has'):
            label(tmp_path / 'all.parquet', tiles, 2021, images=folder)

    @pytest.mark.parametrize(
        ('column', 'values'),
        [
            ('date', ('2020-06-30', '2021-06-30', '')),
            ('year', ('2020', '2021', '')),
            ('DateTime', ('2020-06-30T10:11:12Z', '2021-01-01T00:00:00Z', '')),
        ],
    )
    def test_footprints(
        self, tmp_path: Path, tiles: Path, column: str, values: tuple[str, ...]
    ) -> None:
        table = tmp_path / 'patches.csv'
        rows = [
            f'{name},{date},10,46,10.01,46.01'
            for name, date in zip(('a', 'b', '20200101_c'), values, strict=True)
        ]
        header = f'id,{column},left,bottom,right,top'
        table.write_text('\n'.join([header, *rows]))
        found = label(tmp_path / 'a.parquet', tiles, 'nearest', footprints=table)
        years = [found[name]['product'].split()[4] for name in found]
        assert years == ['2020', '2021', '2020']

    def test_one_year_alone(self, tmp_path: Path, tiles: Path) -> None:
        for path in tiles.glob('*2020*'):
            path.unlink()
        where = grid('EPSG:32632', 10, 46)
        write_image(tmp_path / 'images' / '20200630.tif', 'EPSG:32632', where)
        options = {'images': tmp_path / 'images'}
        (row,) = label(tmp_path / 'a.parquet', tiles, 'nearest', **options).values()
        assert row['product'].endswith('2021 v200')
        with pytest.raises(ValueError, match="year must be 2020 or 2021, got 'newest'"):
            label(tmp_path / 'b.parquet', tiles, 'newest', **options)


class TestScenes:
    def mask(self, image: Path, tiles: Any, year: Any) -> Any:
        dataset = WorldCoverScenes(
            image,
            tiles,
            year,
            patch_size=32,
            value_range=(0, 1),
            transforms=lambda sample: sample,
        )
        return dataset[0]['mask'].numpy()

    @pytest.mark.parametrize('by', ['name', 'tag', 'item', 'nothing'])
    @pytest.mark.parametrize(
        ('date', 'year'),
        [('2020-06-30', 2020), ('2021-06-30', 2021), ('2017-01-01', 2020)],
    )
    def test_map_of_the_nearest_year(
        self, tmp_path: Path, tiles: Path, by: str, date: str, year: int
    ) -> None:
        name = f'{date}.tif' if by == 'name' else 'a.tif'
        path = write_image(
            tmp_path / 'images' / name, 'EPSG:32632', grid('EPSG:32632', 10, 46)
        )
        if by == 'tag':
            with rasterio.open(path, 'r+') as out:
                out.update_tags(ACQUISITIONDATETIME=f'{date}T10:10:31Z')
        if by == 'item':
            item = {
                'stac_version': '1.0.0',
                'properties': {'datetime': f'{date}T10:10Z'},
            }
            path.with_suffix('.json').write_text(json.dumps(item))
        expected = self.mask(path, tiles, 2021 if by == 'nothing' else year)
        assert (self.mask(path, tiles, 'nearest') == expected).all()
        named = sorted(map(str, tiles.iterdir()))
        assert (self.mask(path, named, 'nearest') == expected).all()

    def test_the_nearest_one_that_is_there(self, tmp_path: Path, tiles: Path) -> None:
        where = grid('EPSG:32633', 13, 46)
        path = write_image(tmp_path / '20200630.tif', 'EPSG:32633', where)
        expected = self.mask(path, tiles, 2021)
        assert (self.mask(path, tiles, 'nearest') == expected).all()
        assert expected.any()
