# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Products from outside of the package go everywhere that ESA WorldCover goes."""

import dataclasses
import pickle
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
import yaml
from affine import Affine

from torchgeo_softcon import (
    ESAWorldCover,
    WorldCoverMultiLabel,
    WorldCoverScenes,
    WorldCoverScenesDataModule,
    label_archive,
)
from torchgeo_softcon.__main__ import main
from torchgeo_softcon.landcover import (
    LandCoverClass,
    LandCoverProduct,
    TileGrid,
    find_product,
    products,
    register,
)
from torchgeo_softcon.landcover.download import tiles_of
from torchgeo_softcon.landcover.files import find_map_files
from torchgeo_softcon.landcover.products import (
    DYNAMICWORLD,
    WORLDCOVER,
    WORLDCOVER_CODES,
    find_legend,
)

from ..tasks.helpers import make_task, make_trainer

#: Everything that WorldCover has in another way: 0 is a class, two codes are no data, the
#: order is not that of the codes, and the newest year is another one.
YAML = """\
name: toy
title: Toy cover
resolution: 1 km
years: {2018: r1, 2019: r2}
no_data: [9, 8]
path: maps/{version}/Toy_{year}_{tile}_cover.tif
url: https://toy.example
tiles: {degrees: 5, pixels: 500}
classes:
  - {code: 4, name: Marsh, color: '#123456'}
  - {code: 0, name: Dune}
  - {code: 2, name: Heath}
mappings:
  dynamicworld: {4: 3, 0: 7, 2: 5}
"""

TOY = LandCoverProduct(
    'toy',
    [
        LandCoverClass(4, 'Marsh', '#123456'),
        LandCoverClass(0, 'Dune'),
        LandCoverClass(2, 'Heath'),
    ],
    'Toy cover',
    '1 km',
    {2018: 'r1', 2019: 'r2'},
    (9, 8),
    'maps/{version}/Toy_{year}_{tile}_cover.tif',
    'https://toy.example',
    TileGrid(5, 500),
    {'dynamicworld': {4: 3, 0: 7, 2: 5}},
)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / 'toy.yaml'
    path.write_text(YAML)
    return path


@pytest.fixture(params=['file', 'object', 'name'])
def product(request: pytest.FixtureRequest, toy: Path) -> Iterator[Any]:
    """The same toy in all ways that users can give it."""
    if request.param == 'name':
        register(TOY)
    yield {'file': str(toy), 'object': TOY, 'name': 'toy'}[request.param]
    products._PRODUCTS.pop('toy', None)


def write(path: Path, values: Any) -> None:
    """Write a raster on the pixels of the toy from 10° E, 50° N on."""
    values = np.asarray(values, np.uint8).reshape(-1, *np.shape(values)[-2:])
    count, height, width = values.shape
    transform = Affine(0.01, 0, 10, 0, -0.01, 50)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {'count': count, 'height': height, 'width': width, 'dtype': 'uint8'}
    with rasterio.open(
        path, 'w', 'GTiff', crs='EPSG:4326', transform=transform, **profile
    ) as dst:
        dst.write(values)


@pytest.fixture
def codes(tmp_path: Path) -> Any:
    """Codes of the toy, on disk under an official name beside files not to be taken."""
    codes = np.random.default_rng(0).choice([0, 2, 4, 8, 9], (500, 500))
    write(tmp_path / 'maps' / 'Toy_2019_N45E010_cover.tif', codes)
    write(tmp_path / 'maps' / 'Toy_2018_N45E010_cover.tif', np.full((500, 500), 2))
    write(tmp_path / 'maps' / 'Toy_2019_N45E010_quality.tif', np.full((500, 500), 77))
    write(tmp_path / 'images' / 'a.tif', np.full((3, 96, 96), 100))
    return codes


def shares(codes: Any) -> list[float]:
    counts = [np.count_nonzero(codes == code) for code in TOY.codes]
    return (np.array(counts) / sum(counts)).tolist()


class TestToy:
    def test_dataset(self, product: Any, codes: Any, tmp_path: Path) -> None:
        dataset = ESAWorldCover(tmp_path / 'maps', product=product)
        assert dataset.year == 2019
        assert [Path(file).name for file in dataset.files] == [
            'Toy_2019_N45E010_cover.tif'
        ]
        expected = np.where(codes == 8, 9, codes)
        mask = dataset[:, :]['mask']
        np.testing.assert_array_equal(mask.numpy(), expected)
        grid = Affine(0.01, 0, 9.99, 0, -0.01, 50)
        assert (dataset.read_window('EPSG:4326', grid, 5, 5)[:, 0] == 9).all()
        assert dataset.tiles('EPSG:4326', (9, 46, 11, 47)) == [
            'Toy_2019_N45E005_cover.tif',
            'Toy_2019_N45E010_cover.tif',
        ]
        figure = dataset.plot({'mask': mask[:9, :9]})
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sorted(names) == ['0 Dune', '2 Heath', '4 Marsh', '9 No data']

        ordinal = ESAWorldCover(tmp_path / 'maps', ordinal=True, product=product)
        for number, code in enumerate(TOY.codes, 1):
            found = ordinal[:, :]['mask'].numpy() == number
            np.testing.assert_array_equal(found, codes == code)
        old = ESAWorldCover(tmp_path / 'maps', year=2018, product=product)
        assert set(old[:, :]['mask'].unique().tolist()) == {2}

    def test_transform(self, product: Any, codes: Any) -> None:
        transform = WorldCoverMultiLabel(fractions=True, product=product)
        label = transform({'mask': torch.from_numpy(codes)})['label']
        assert label.tolist() == pytest.approx(shares(codes))
        chosen = WorldCoverMultiLabel([0, 4], min_valid=0, product=product)
        assert chosen({'mask': torch.tensor([[0, 2]])})['label'].tolist() == [1, 0]
        with pytest.raises(ValueError, match='class codes 9, 8, 4, 0, 2, got also 37'):
            transform({'mask': torch.tensor([[4, 37]])})
        copy = pickle.loads(pickle.dumps(transform))
        assert copy({'mask': torch.tensor([[4]])})['label'].tolist() == [1, 0, 0]

    def test_scenes(self, product: Any, codes: Any, tmp_path: Path) -> None:
        scenes = WorldCoverScenes(
            tmp_path / 'images', tmp_path / 'maps', patch_size=96, product=product
        )
        expected = [float(share >= 0.05) for share in shares(codes[:96, :96])]
        assert scenes[0]['label'].tolist() == expected
        dataset = ESAWorldCover(tmp_path / 'maps', product=product)
        again = WorldCoverScenes(tmp_path / 'images', dataset, patch_size=96)
        assert again[0]['label'].tolist() == expected

    @pytest.mark.parametrize('target', ['label', 'mask'])
    def test_datamodule(
        self, product: Any, codes: Any, tmp_path: Path, target: Any
    ) -> None:
        datamodule = WorldCoverScenesDataModule(
            str(tmp_path / 'images'),
            str(tmp_path / 'maps'),
            patch_size=96,
            batch_size=1,
            target=target,
            product=product,
        )
        datamodule.setup('fit')
        batch = next(iter(datamodule.train_dataloader()))
        if target == 'label':
            assert batch['label'].tolist() == [[1, 1, 1]]
        else:
            for number, code in enumerate(TOY.codes, 1):
                found = batch['mask'][0].numpy() == number
                np.testing.assert_array_equal(found, codes[:96, :96] == code)

    def test_labels(self, product: Any, codes: Any, tmp_path: Path) -> None:
        out = tmp_path / 'labels.parquet'
        label_archive(
            tmp_path / 'images',
            tmp_path / 'maps',
            out,
            workers=1,
            progress=False,
            product=product,
        )
        (row,) = pd.read_parquet(out).to_dict('records')
        assert row['product'] == 'Toy cover 1 km 2019 r2'
        assert [row[f'fraction_{code}'] for code in TOY.codes] == pytest.approx(
            shares(codes[:96, :96])
        )
        valid = np.isin(codes[:96, :96], TOY.codes).mean()
        assert row['valid'] == pytest.approx(valid)

    def test_labels_command(self, toy: Path, codes: Any, tmp_path: Path) -> None:
        out = tmp_path / 'labels.parquet'
        command = ['labels', '--images', str(tmp_path / 'images'), '--quiet']
        command += ['--worldcover', str(tmp_path / 'maps'), '--out', str(out)]
        command += ['--workers', '1', '--product', str(toy)]
        assert main([*command, '--classes', 'dynamicworld', '--year', '2018']) == 0
        (row,) = pd.read_parquet(out).to_dict('records')
        assert row['count_5'] == 96 * 96
        assert 'count_8' in row
        # Other classes do not go into the same file
        assert main(command) == 2

    def test_report_command(
        self, toy: Path, codes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.strategy.connect(make_task(in_channels=3))
        trainer.save_checkpoint(tmp_path / 'last.ckpt')
        data = {'images': 'images', 'worldcover': 'maps', 'product': str(toy)}
        data |= {'patch_size': '32', 'batch_size': '2'}
        command = ['report', '--checkpoint', 'last.ckpt', '--out', 'out']
        command += ['--data', 'WorldCoverScenesDataModule']
        assert main([*command, *(f'--data.{k}={v}' for k, v in data.items())]) == 0
        text = (tmp_path / 'out' / 'report.html').read_text()
        assert 'Toy cover under the images' in text
        assert (tmp_path / 'out' / 'classes.webp').exists()


class TestProduct:
    def test_file_and_object_are_the_same(self, toy: Path) -> None:
        assert find_product(toy) == TOY
        assert find_product(TOY) is TOY

    def test_worldcover(self) -> None:
        assert WORLDCOVER_CODES == (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)
        assert WORLDCOVER.edition(2020) == 'ESA WorldCover 10 m 2020 v100'
        assert WORLDCOVER.check_year(None) == 2021
        assert find_product('worldcover') is WORLDCOVER

    def test_files_are_in_the_wheel(self) -> None:
        repository = Path(__file__).parents[2]
        package = repository / 'torchgeo_softcon'
        setup = tomllib.loads((repository / 'pyproject.toml').read_text())
        packed = {
            path
            for name, patterns in setup['tool']['setuptools']['package-data'].items()
            for pattern in patterns
            for path in repository.joinpath(*name.split('.')).glob(pattern)
            if not path.parent.is_symlink()  # the recipes
        }
        data = {
            path
            for path in package.rglob('*')
            if path.is_file() and path.suffix not in ('.py', '.pyc')
        }
        assert data == packed

    def test_legends(self) -> None:
        assert find_legend(TOY) == (TOY, {4: 4, 0: 0, 2: 2})
        legend, of_code = find_legend(TOY, 'dynamicworld')
        assert legend is DYNAMICWORLD
        assert list(of_code.items()) == [(4, 3), (0, 7), (2, 5)]
        with pytest.raises(ValueError, match="one of toy, dynamicworld, got 'other'"):
            find_legend(TOY, 'other')

    def test_least_that_is_needed(self, tmp_path: Path) -> None:
        path = tmp_path / 'least.yaml'
        path.write_text('{name: least, classes: [{code: 1, name: One}]}')
        product = find_product(path)
        assert product.check_year(None) is None
        assert product.edition(None) == 'least'
        assert set(product.colors) == {0, 1}
        write(tmp_path / 'clips' / 'any.tif', [[1, 0], [255, 1]])
        mask = ESAWorldCover(tmp_path / 'clips', product=product)[:, :]['mask']
        assert mask.tolist() == [[1, 0], [0, 1]]
        with pytest.raises(ValueError, match='year must be left out, got 2021'):
            ESAWorldCover(tmp_path / 'clips', year=2021, product=product)
        with pytest.raises(ValueError, match=r"must have tiles .* 'least' has none"):
            tiles_of((0, 0, 1, 1), product)

    def test_colours_without_a_choice_differ(self) -> None:
        classes = [LandCoverClass(code, str(code)) for code in range(1, 20)]
        assert len({*LandCoverProduct('many', classes).colors.values()}) == 20

    def test_names_are_unique(self) -> None:
        assert register(WORLDCOVER) is WORLDCOVER
        with pytest.raises(ValueError, match="name must be unique, got 'worldcover'"):
            register(dataclasses.replace(TOY, name='worldcover'))
        with pytest.raises(ValueError, match=r"corine or a \.yaml file, got 'toy'"):
            find_product('toy')
        with pytest.raises(FileNotFoundError, match=r'gone\.yaml'):
            find_product('gone.yaml')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'name': 'a b'}, "name must be made of letters, .* got 'a b'"),
        ({'name': None}, 'name must be a text, got None'),
        ({'colour': 1}, "the file has the unknown key 'colour': keys are name, "),
        ({'classes': []}, 'classes must not be empty'),
        ({'classes': 3}, 'classes must be a list, got 3'),
        ({'classes': [7]}, r'classes\[0\] must be a mapping with code, name, got 7'),
        ({'classes': [{'code': 7}]}, r"classes\[0\] must have the key 'name'"),
        ({'classes': [{'code': 7, 'name': ''}]}, r'\[0\].name must be a .* for code 7'),
        ({'classes': [{'code': 300, 'name': 'A'}]}, r'\[0\].code must be .* got 300'),
        ({'classes': [{'code': True, 'name': 'A'}]}, r'\[0\].code must be .* got True'),
        (
            {'classes': [{'code': 1, 'name': 'A'}, {'code': 1, 'name': 'B'}]},
            r"classes\[1\].code must be unique, got 1 for 'A' and for 'B': give each",
        ),
        (
            {'classes': [{'code': 1, 'name': 'A', 'color': 'red'}]},
            r"\[0\].color must be such as '#00ff00' \(in quotes\), got 'red'",
        ),
        ({'no_data': [2]}, "no_data must not be the code .* got 2, which is 'Heath'"),
        ({'no_data': []}, 'no_data must not be empty'),
        ({'no_data': 9}, 'no_data must be a list, got 9'),
        ({'years': ['19']}, "years must have four digits, got '19'"),
        ({'years': 2019}, 'years must be a list, or a mapping .* got 2019'),
        ({'years': []}, 'path must not have {year} without years, .*: add years'),
        ({'path': 'a/{date}_{tile}.tif'}, 'nothing but {year}, .*, got .*date'),
        ({'path': 'a/{tile}.png'}, 'path must end in .tif or .tiff, got'),
        ({'path': 'a/b.tif'}, "must have {tile} if there are tiles, got 'a/b.tif'"),
        ({'url': 'ftp://a'}, "url must start with https:// .* got 'ftp://a'"),
        ({'tiles': 5}, 'tiles must be a mapping with degrees, pixels, got 5'),
        (
            {'tiles': {'degrees': 7, 'pixels': 1}},
            'tiles.degrees must be a divisor .* 7',
        ),
        ({'tiles': {'degrees': 5, 'pixels': 0}}, 'tiles.pixels must be > 0, got 0'),
        ({'tiles': {'degrees': '5', 'pixels': 9}}, "must be a whole number, got '5'"),
        (
            {'tiles': {'degrees': 5, 'pixels': 9, 'south': 2}},
            'must be multiples of tiles.degrees .* got 2 and 90',
        ),
        ({'mappings': {'other': {4: 1, 0: 1, 2: 1}}}, "got 'other': register that"),
        ({'mappings': {'dynamicworld': {4: 1}}}, r'got \[4\]: add or take out 0, 2'),
        (
            {'mappings': {'dynamicworld': {4: 3, 0: 12, 2: 5}}},
            'mappings.dynamicworld.0 must be a code of dynamicworld, got 12: choose',
        ),
        ({'mappings': {'dynamicworld': 3}}, 'mappings.dynamicworld must map codes'),
    ],
)
def test_bad_file(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / 'bad.yaml'
    path.write_text(yaml.safe_dump({**yaml.safe_load(YAML), **changes}))
    with pytest.raises(ValueError, match=rf'bad\.yaml: .*{message}'):
        find_product(path)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'the file must be a mapping with name, classes, got None'),
        ('name: [', 'bad.yaml: while parsing'),
        ('name: a\nname: b\nclasses: []', 'the key name comes twice, again in line 2'),
        (f'{YAML}    1: 2\n', 'while parsing|mapping'),
        (YAML.replace('2: 5}', '4: 5}'), 'the key 4 comes twice, again in line 14'),
        ('name: toy', "the file must have the key 'classes'"),
    ],
)
def test_bad_text(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / 'bad.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_product(path)


_CGLS = (
    'PROBAV_LC100_global_v3.0.1_2017-conso_Discrete-Classification-map_EPSG-4326.tif'
)

#: Name of an official file of each product that is known, its year, and its classes.
KNOWN = {
    'worldcover': ('ESA_WorldCover_10m_2020_v100_N51E003_Map.tif', 2020, 11),
    'lcm10': ('LCFM_LCM-10_V100_2020_N48E003_MAP.tif', 2020, 11),
    'cgls': (f'E000N60_{_CGLS}', 2017, 22),
    'corine': ('U2012_CLC2006_V2020_20u1.tif', 2006, 44),
}


class TestKnownProducts:
    @pytest.mark.parametrize('name', KNOWN)
    def test_official_files(self, tmp_path: Path, name: str) -> None:
        file, year, count = KNOWN[name]
        (tmp_path / file).touch()
        product = find_product(name)
        assert len(product.classes) == count
        assert len({one.color for one in product.classes}) == count
        assert file.endswith(product.file_name(file.split('_')[-2], year))
        assert find_map_files(tmp_path, product, year) == [str(tmp_path / file)]
        for other in {*product.years} - {year}:
            with pytest.raises(FileNotFoundError, match=f'but tiles of {year}'):
                find_map_files(tmp_path, product, other)

    def test_one_family_of_classes(self) -> None:
        product = find_product('lcm10')
        names = {one.code: one.name for one in WORLDCOVER.classes}
        assert {
            one.code: names[product.mappings['worldcover'][one.code]]
            for one in product.classes
        } == {one.code: one.name for one in product.classes}

    def test_year_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r'year must be 2017 .* got 2016: Esri'):
            label_archive(tmp_path, tmp_path, product='esri', year=2016)

    def test_own_map(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        legend = tmp_path / 'own.yaml'
        legend.write_text(
            'name: own\nclasses:\n  - {code: 3, name: Vines}\n  - {code: 5, name: Oaks}\n'
            'no_data: [0]\n'
        )
        values = np.full((40, 40), 3, np.uint8)
        values[:10] = 5
        profile: Any = {
            'driver': 'GTiff',
            'width': 40,
            'height': 40,
            'count': 1,
            'dtype': 'uint8',
            'crs': 'EPSG:32632',
            'transform': Affine(10, 0, 500000, 0, -10, 5400000),
        }
        for name in ('map.tif', 'image.tif'):
            with rasterio.open(tmp_path / name, 'w', **profile) as file:
                file.write(values, 1)
        out = tmp_path / 'labels.parquet'
        arguments = [
            'labels',
            '--images',
            str(tmp_path / 'image.tif'),
            '--workers',
            '1',
        ]
        arguments += ['--map', str(tmp_path / 'map.tif'), '--legend', str(legend)]
        assert main([*arguments, '--out', str(out), '--quiet']) == 0
        (row,) = pd.read_parquet(out).to_dict('records')
        assert (row['count_3'], row['count_5'], row['product']) == (1200, 400, 'own')
        legend.write_text(legend.read_text().replace('code: 5', 'code: 3'))
        assert main([*arguments, '--out', str(tmp_path / 'b.parquet')]) == 2
        assert f'{legend}: classes[1].code must be unique' in capsys.readouterr().err
