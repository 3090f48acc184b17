# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
from affine import Affine

from torchgeo_softcon import label_archive
from torchgeo_softcon.__main__ import main
from torchgeo_softcon._workers import Workers
from torchgeo_softcon.labels import archive, plan, store, write_json
from torchgeo_softcon.landcover.products import (
    DYNAMICWORLD,
    WORLDCOVER,
    WORLDCOVER_CODES,
    find_legend,
)

from ..ssl4eo.archives import season
from .helpers import centres, codes_at, grid, histogram, write_image, write_tile

pytestmark = pytest.mark.filterwarnings('ignore:.*official tile.*:UserWarning')

COUNTS = [f'count_{code}' for code in WORLDCOVER_CODES]
SEASONS = [season('s2c', day) for day in ('20210101', '20210401')]
FRACTIONS = [f'fraction_{code}' for code in WORLDCOVER_CODES]


@pytest.fixture(scope='module')
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('tiles')
    write_tile(folder, 6, 45)
    write_tile(folder, 9, 45)
    write_tile(folder, 6, 45, year=2020)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / 'images'
    for number in range(12):
        transform = grid('EPSG:32632', 6.3 + 0.4 * number, 46 + 0.1 * number, 100)
        write_image(
            folder / f'{number % 3}' / f'{number:02}.tif', 'EPSG:32632', transform
        )
    return folder


def boxes(path: Path, number: int, seed: int = 0) -> Path:
    """Write a table of random grids over two tiles."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(3e5, 6e5, number).round()
    y = rng.uniform(5.0e6, 5.2e6, number).round()
    table = {'id': [f'p{i}' for i in range(number)], 'crs': 'EPSG:32632'}
    edges = {'left': x, 'bottom': y, 'right': x + 3200, 'top': y + 3200}
    pd.DataFrame({**table, **edges, 'height': 32, 'width': 32}).to_csv(
        path, index=False
    )
    return path


def run(**options: Any) -> archive.Labelled:
    return label_archive(**{'workers': 1, 'progress': False, **options})


def _interrupt(*args: Any) -> int:
    raise KeyboardInterrupt


class TestFile:
    def test_a_row_per_image(self, images: Path, tiles: Path, tmp_path: Path) -> None:
        out = tmp_path / 'labels.parquet'
        labelled = run(images=images / '**' / '*.tif', worldcover=tiles, out=out)
        assert (labelled.rows, labelled.new, labelled.failures) == (12, 12, {})
        table = geopandas.read_parquet(out).sort_values('id')
        paths = sorted(images.rglob('*.tif'))
        assert table.id.tolist() == [f'{p.parent.name}/{p.name}' for p in paths]
        for path, (_, row) in zip(paths, table.iterrows(), strict=True):
            number = int(path.stem)
            place = (
                'EPSG:32632',
                grid('EPSG:32632', 6.3 + 0.4 * number, 46 + 0.1 * number, 100),
                32,
                32,
            )
            lon, lat = centres(*place)
            assert row[COUNTS].tolist() == histogram(codes_at(lon, lat))
            assert row.geometry.covers(shapely.points(lon, lat)).all()
            assert row.geometry.area == pytest.approx(
                np.ptp(lon) * np.ptp(lat), rel=0.2
            )
        assert (table.valid == 1).all()
        assert (table.pixels == 1024).all()
        assert (table['product'] == 'ESA WorldCover 10 m 2021 v200').all()
        np.testing.assert_allclose(table[FRACTIONS].sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(table[FRACTIONS], table[COUNTS] / 1024, rtol=1e-6)
        frame = pd.read_parquet(out)
        assert set(frame.crs) == {'EPSG:32632'}
        assert not (tmp_path / 'labels.parquet.parts').exists()
        assert not (tmp_path / 'labels.failed.csv').exists()

    def test_the_year_is_chosen_and_never_mixed(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / 'labels.parquet'
        labelled = run(images=images, worldcover=tiles, out=out, year=2020)
        # Only one tile of 2020 is there
        table = pd.read_parquet(out)
        assert 0 < len(table) < 12
        assert set(table['product']) == {'ESA WorldCover 10 m 2020 v100'}
        assert 'ESA_WorldCover_10m_2020_v100_N45E009_Map.tif' in ''.join(
            labelled.failures.values()
        )
        lon, lat = centres('EPSG:32632', grid('EPSG:32632', 6.3, 46, 100), 32, 32)
        # In 2020, every pixel of the made-up world has the class before
        expected = np.roll(histogram(codes_at(lon, lat)), 1).tolist()
        assert table[COUNTS].iloc[0].tolist() == expected

    def test_named_tiles_of_other_years_are_left_out(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        named = sorted(tiles.glob('*.tif'))
        assert '_2020_' in named[0].name
        for name, worldcover in (('a', named), ('b', tiles)):
            out = tmp_path / f'{name}.parquet'
            run(images=images, worldcover=worldcover, out=out)
        ours, theirs = (tmp_path / f'{name}.parquet' for name in 'ab')
        assert ours.read_bytes() == theirs.read_bytes()
        with pytest.raises(
            FileNotFoundError, match='must have tiles of 2021, got only'
        ):
            run(images=images, worldcover=named[:1], out=tmp_path / 'c.parquet')

    def test_dynamic_world(self, images: Path, tiles: Path, tmp_path: Path) -> None:
        for classes in ('worldcover', 'dynamicworld'):
            run(
                images=images,
                worldcover=tiles,
                out=tmp_path / f'{classes}.parquet',
                classes=classes,
            )
        ours = pd.read_parquet(tmp_path / 'worldcover.parquet')
        theirs = pd.read_parquet(tmp_path / 'dynamicworld.parquet')
        for target in range(9):
            sources = [
                c for c, t in WORLDCOVER.mappings['dynamicworld'].items() if t == target
            ]
            assert sources
            expected = ours[[f'count_{code}' for code in sources]].sum(axis=1)
            assert (theirs[f'count_{target}'] == expected).all()
        about = json.loads(
            pq.read_schema(tmp_path / 'dynamicworld.parquet').metadata[b'labels']
        )
        assert list(about['classes'].values()) == list(DYNAMICWORLD.class_names)

    def test_boxes_across_the_antimeridian(self, tmp_path: Path) -> None:
        for west in (177, -180):
            write_tile(tmp_path / 'tiles', west, 66)
        table = tmp_path / 'a.csv'
        # 100 x 50 pixels of the map, half of them on either side
        rows = ''.join(
            f'p{x},{x - 0.1},67,{x + 0.1},67.1,50,100\n' for x in (180, -180)
        )
        table.write_text(f'id,left,bottom,right,top,height,width\n{rows}')
        out = tmp_path / 'a.parquet'
        run(footprints=table, worldcover=tmp_path / 'tiles', out=out)
        labels = pd.read_parquet(out)
        lon, lat = (
            180 + (np.arange(100) - 49.5) * 0.002,
            67 + (np.arange(50) + 0.5) * 0.002,
        )
        expected = histogram(codes_at(lon[None], lat[:, None]))
        assert labels[COUNTS].to_numpy().tolist() == [expected] * 2
        assert (labels.valid == 1).all()

    def test_json_of_ssl4eo_s12(self, tiles: Path, tmp_path: Path) -> None:
        for name in SEASONS:
            for band, res in (('B2', 100), ('B5', 200)):
                write_image(
                    tmp_path / 's2c' / '0000007' / name / f'{band}.tif',
                    'EPSG:32632',
                    grid('EPSG:32632', 7, 46, res),
                )
        out = tmp_path / 'ml.json'
        options = {'layout': ('ssl4eo-s12', tmp_path), 'worldcover': tiles, 'out': out}
        run(**options, min_fraction=0.09)
        table = pd.read_parquet(tmp_path / 'ml.parquet')
        assert table.id.tolist() == [f's2c/0000007/{name}' for name in SEASONS]
        assert (table.pixels == 32 * 32).all()
        present = [
            code for code in WORLDCOVER_CODES if table[f'fraction_{code}'][0] >= 0.09
        ]
        assert 0 < len(present) < 11
        seasons = dict.fromkeys(SEASONS, present)
        assert json.loads(out.read_text()) == {'0000007': seasons}
        # Other thresholds need no counting
        assert run(**options, min_fraction=0.001).new == 0
        assert json.loads(out.read_text())['0000007'][SEASONS[0]] == [*WORLDCOVER_CODES]

    def test_json_that_is_something_else(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / 'ml.json'
        out.write_text('published')
        options = {'images': images, 'worldcover': tiles, 'out': out}
        with pytest.raises(
            ValueError, match=r'ml\.json is there, but not .*ml\.parquet'
        ):
            run(**options)
        assert [*tmp_path.glob('ml.*')] == [out]
        assert out.read_text() == 'published'
        run(**options, overwrite=True)
        assert set(json.loads(out.read_text())) == {'0', '1', '2'}

    def test_json_loses_no_patch(self, tiles: Path, tmp_path: Path) -> None:
        for number, folder in enumerate('abcde'):
            transform = grid('EPSG:32632', 6.5 + number, 46, 100)
            name = 'y' if folder == 'e' else 'x'
            write_image(tmp_path / folder / name / '1.tif', 'EPSG:32632', transform)
        options = {'images': tmp_path / '*' / '*' / '1.tif', 'worldcover': tiles}
        match = (
            r'3 do not, such as b/x/1.tif \(as a/x/1.tif\), c/x.*, d/x/1.tif \(as a/'
        )
        with pytest.raises(ValueError, match=match):
            run(**options, out=tmp_path / 'ml.json')
        assert not [*tmp_path.glob('ml*')]
        run(**options, out=tmp_path / 'ml.parquet')
        with pytest.raises(ValueError, match='different classes for x'):
            write_json(tmp_path / 'ml.parquet', tmp_path / 'ml.json', 0.09)

    def test_json_of_two_products_of_an_image(
        self, tiles: Path, tmp_path: Path
    ) -> None:
        for product in ('s2a', 's2c'):
            path = tmp_path / product / '07' / SEASONS[0] / 'B2.tif'
            write_image(path, 'EPSG:32632', grid('EPSG:32632', 7, 46, 100))
        out = tmp_path / 'ml.json'
        run(layout=('ssl4eo-s12', tmp_path), worldcover=tiles, out=out)
        assert list(json.loads(out.read_text())['07']) == [SEASONS[0]]

    def test_delhi(self, shared: Path, tmp_path: Path) -> None:
        expected = pd.read_csv(
            shared / 'delhi_s2rgb_worldcover' / 'labels.csv'
        ).set_index('name')
        half = 64 * 8.98e-5
        pd.DataFrame(
            {
                'id': expected.index,
                'left': expected.lon - half,
                'bottom': expected.lat - half,
                'right': expected.lon + half,
                'top': expected.lat + half,
                'height': 128,
                'width': 128,
            }
        ).to_csv(tmp_path / 'delhi.csv', index=False)
        files = (shared / 'worldcover_tiles').glob('delhi*.tif')
        run(
            footprints=tmp_path / 'delhi.csv',
            worldcover=files,
            out=tmp_path / 'a.parquet',
        )
        table = (
            pd.read_parquet(tmp_path / 'a.parquet').set_index('id').loc[expected.index]
        )
        names = [name for name in expected.columns if name.startswith('wc_')]
        ours = table[[name.replace('wc_', 'fraction_') for name in names]]
        assert abs(ours.to_numpy() - expected[names].to_numpy()).max() < 0.02
        # The masks round this to four digits, and lie half a pixel elsewhere
        np.testing.assert_allclose(table.valid, expected.valid_fraction, atol=0.02)


class TestAgain:
    def test_only_what_is_missing(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        options = {'images': images, 'worldcover': tiles, 'out': tmp_path / 'a.parquet'}
        run(**options)
        first = (tmp_path / 'a.parquet').read_bytes()
        assert run(**options).new == 0
        assert (tmp_path / 'a.parquet').read_bytes() == first
        transform = grid('EPSG:32632', 7, 46.5, 100)
        write_image(images / '0' / '05.tif', 'EPSG:32632', transform)
        labelled = run(**options)
        assert (labelled.rows, labelled.new) == (13, 1)
        run(**{**options, 'out': tmp_path / 'b.parquet'})
        assert (tmp_path / 'a.parquet').read_bytes() == (
            tmp_path / 'b.parquet'
        ).read_bytes()

    def test_what_failed_is_tried_again(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        options = {'images': images, 'worldcover': tiles, 'out': tmp_path / 'a.parquet'}
        bad = images / '0' / 'bad.tif'
        bad.write_bytes(b'II*\0')
        assert list(run(**options).failures) == ['0/bad.tif']
        assert (tmp_path / 'a.failed.csv').exists()
        bad.unlink()
        write_image(bad, 'EPSG:32632', grid('EPSG:32632', 7, 46.5, 100))
        labelled = run(**options)
        assert (labelled.rows, labelled.new, labelled.failures) == (13, 1, {})
        assert not (tmp_path / 'a.failed.csv').exists()

    def test_more_tiles_fill_what_had_no_data(
        self, tiles: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / 'few'
        folder.mkdir()
        (name,) = (path.name for path in tiles.glob('*2021*N45E006*'))
        shutil.copy(tiles / name, folder)
        seam = grid('EPSG:32632', 8.99, 46, 100)
        write_image(tmp_path / 'images' / 'seam.tif', 'EPSG:32632', seam)
        beyond = grid('EPSG:32632', 10, 46, 100)
        write_image(tmp_path / 'images' / 'beyond.tif', 'EPSG:32632', beyond)
        options = {'images': tmp_path / 'images', 'out': tmp_path / 'a.parquet'}
        labelled = run(**options, worldcover=folder)
        assert 'N45E009' in labelled.failures['beyond.tif']
        assert labelled.partial == 1
        assert 0 < pd.read_parquet(tmp_path / 'a.parquet').valid[0] < 1
        labelled = run(**options, worldcover=tiles)
        assert (labelled.new, labelled.partial) == (2, 0)
        assert pd.read_parquet(tmp_path / 'a.parquet').valid.tolist() == [1, 1]

    def test_more_tiles_fill_what_an_interrupted_run_did_not_find(
        self, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / 'few'
        folder.mkdir()
        for path in tiles.glob('*2021*N45E006*'):
            shutil.copy(path, folder)
        for name, lon in (('inside', 7), ('seam', 8.99)):
            transform = grid('EPSG:32632', lon, 46, 100)
            write_image(tmp_path / 'images' / f'{name}.tif', 'EPSG:32632', transform)
        options = {'images': tmp_path / 'images', 'out': tmp_path / 'a.parquet'}
        with monkeypatch.context() as context:
            context.setattr(store.LabelStore, 'finish', _interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(**options, worldcover=folder)
        # What the tiles that were there covered is kept
        assert run(**options, worldcover=tiles).new == 1
        assert pd.read_parquet(tmp_path / 'a.parquet').valid.tolist() == [1, 1]

    def test_a_wrong_archive_does_no_harm(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        options = {'worldcover': tiles, 'out': tmp_path / 'a.parquet'}
        run(**options, images=images)
        with pytest.raises(ValueError, match='has 12 ids that the archive has not'):
            run(**options, footprints=boxes(tmp_path / 'a.csv', 3))
        labelled = run(**options, images=images)
        assert (labelled.rows, labelled.new) == (12, 0)

    def test_overwrite_keeps_the_file_until_there_is_another(
        self, images: Path, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / 'a.parquet'
        options = {'images': images, 'out': out}
        run(**options, worldcover=tiles)
        before = out.read_bytes()
        (tmp_path / 'bad.tif').write_text('no raster')
        with pytest.raises(OSError, match='truncated or no raster'):
            run(**options, worldcover=[tiles, tmp_path / 'bad.tif'], overwrite=True)
        assert out.read_bytes() == before

        other = {**options, 'worldcover': tiles, 'classes': 'dynamicworld'}
        with monkeypatch.context() as context:
            context.setattr(store.LabelStore, 'finish', _interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(**other, overwrite=True)
        assert out.read_bytes() == before
        # It goes on as it was started
        labelled = run(**other)
        assert (labelled.rows, labelled.new) == (12, 0)
        assert 'count_8' in pq.read_schema(out).names

    def test_an_interrupted_run_goes_on(
        self, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan, '_SMALLEST', 4)
        monkeypatch.setattr(plan, '_LARGEST', 4)
        table = boxes(tmp_path / 'a.csv', 80)
        options = {'footprints': table, 'worldcover': tiles}
        run(**options, out=tmp_path / 'whole.parquet')
        real, calls = store.LabelStore.append, []

        def append(self: store.LabelStore, *args: Any) -> None:
            calls.append(args)
            if len(calls) == 7:
                raise KeyboardInterrupt
            real(self, *args)

        monkeypatch.setattr(store.LabelStore, 'append', append)
        with pytest.raises(KeyboardInterrupt):
            run(**options, out=tmp_path / 'a.parquet')
        labelled = run(**options, out=tmp_path / 'a.parquet')
        assert labelled.rows == 80
        assert 20 < labelled.new < 70
        whole, ours = (tmp_path / name for name in ('whole.parquet', 'a.parquet'))
        assert whole.read_bytes() == ours.read_bytes()

    def test_parts_that_are_cut_off_are_done_again(
        self, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = {'footprints': boxes(tmp_path / 'a.csv', 20), 'worldcover': tiles}
        run(**options, out=tmp_path / 'whole.parquet')

        with monkeypatch.context() as context:
            context.setattr(store.LabelStore, 'finish', _interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(**options, out=tmp_path / 'a.parquet')
        (part,) = (tmp_path / 'a.parquet.parts').glob('counts-*')
        part.write_bytes(part.read_bytes()[:100])
        assert run(**options, out=tmp_path / 'a.parquet').new == 20
        whole, ours = (tmp_path / name for name in ('whole.parquet', 'a.parquet'))
        assert whole.read_bytes() == ours.read_bytes()


class TestKilled:
    @pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
    def test_the_file_is_that_of_an_undisturbed_run(
        self, tiles: Path, tmp_path: Path, kills: int
    ) -> None:
        table = boxes(tmp_path / 'a.csv', 3000)
        whole, out = tmp_path / 'whole.parquet', tmp_path / 'a.parquet'
        # Small units, so that there is something to go on with
        code = (
            'import sys; from torchgeo_softcon.cli.labels import main; '
            'from torchgeo_softcon.labels import plan; '
            'plan._SMALLEST = plan._LARGEST = 64; sys.exit(main(sys.argv[1:]))'
        )
        command = [sys.executable, '-W', 'ignore', '-c', code, '--quiet']
        command += [
            '--footprints',
            str(table),
            '--worldcover',
            str(tiles),
            '--workers',
            '2',
        ]
        start = time.monotonic()
        subprocess.run([*command, '--out', str(whole)], check=True)
        seconds = time.monotonic() - start
        rng = np.random.default_rng(0)
        pids = []
        for _ in range(kills):
            process = subprocess.Popen(
                [*command, '--out', str(out)], stderr=subprocess.DEVNULL
            )
            pids.append(process.pid)
            try:
                process.wait(rng.uniform(0.2, 0.9) * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
        subprocess.run([*command, '--out', str(out)], check=True)
        assert whole.read_bytes() == out.read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            'a.csv',
            'a.parquet',
            'whole.parquet',
        ]
        # No worker outlives its run
        deadline = time.monotonic() + 10
        while left := _with_group(pids):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def _with_group(pids: list[int]) -> list[str]:
    """Processes whose command line is that of runs of this test."""
    found = []
    for folder in Path('/proc').iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / 'cmdline').read_bytes()
        except OSError:
            continue
        if (
            b'plan._SMALLEST = plan._LARGEST = 64' in command
            and int(folder.name) not in pids
        ):
            found.append(folder.name)
    return found


class TestBadInput:
    def test_images_that_cannot_be_placed(
        self,
        images: Path,
        tiles: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        write_image(images / 'a.tif', None, Affine(10, 0, 0, 0, -10, 0))
        write_image(images / 'b.tif', 'EPSG:32632', Affine.identity())
        write_image(images / 'c.tif', 'EPSG:32632', grid('EPSG:32632', 20, 46, 100))
        (images / 'd.tif').write_text('no image')
        local = 'LOCAL_CS["here",UNIT["metre",1]]'
        write_image(images / 'e.tif', local, Affine(10, 0, 0, 0, -10, 0))
        out = tmp_path / 'labels.parquet'
        args = ['--images', f'{images}/**/*.tif', '--worldcover', str(tiles)]
        assert (
            main(['labels', *args, '--out', str(out), '--quiet', '--workers', '1']) == 1
        )
        captured = capsys.readouterr()
        assert '12 labels' in captured.out
        assert '5 patches have none' in captured.err
        with (tmp_path / 'labels.failed.csv').open() as file:
            reasons = {row['id']: row['reason'] for row in csv.DictReader(file)}
        assert list(reasons) == ['a.tif', 'b.tif', 'c.tif', 'd.tif', 'e.tif']
        assert 'has no CRS' in reasons['a.tif']
        assert 'no georeference' in reasons['b.tif']
        assert 'N45E018_Map.tif' in reasons['c.tif']
        assert 'd.tif as a raster' in reasons['d.tif']
        assert 'nowhere on Earth' in reasons['e.tif']
        assert len(pq.read_table(out)) == 12

    def test_results_that_are_lost(
        self, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lose(self: Workers, function: Any, units: Any) -> Any:
            results = list(map(function, units))
            return results[1:] if function is archive.count_unit else results

        monkeypatch.setattr(plan, '_SMALLEST', 32)
        monkeypatch.setattr(plan, '_LARGEST', 32)
        out = tmp_path / 'a.parquet'
        options: Any = {'footprints': boxes(tmp_path / 'a.csv', 64), 'out': out}
        with monkeypatch.context() as patch:
            patch.setattr(Workers, 'map', lose)
            with pytest.raises(
                RuntimeError, match=r'no result for \d+ patches, such as'
            ):
                run(**options, worldcover=tiles)
        assert not out.exists()
        assert run(**options, worldcover=tiles).rows == 64

    def test_interrupted_by_the_keyboard(
        self, tiles: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        table, out = boxes(tmp_path / 'a.csv', 300), tmp_path / 'a.parquet'
        # To the whole group as a terminal does, after the first of ten units
        code = (
            'import os, signal, sys\n'
            'from torchgeo_softcon.__main__ import main\n'
            'from torchgeo_softcon.labels import plan, store\n'
            'plan._SMALLEST = plan._LARGEST = 32\n'
            'append = store.LabelStore.append\n'
            'def interrupt(self, kind, table):\n'
            '    append(self, kind, table)\n'
            '    if kind == "counts":\n'
            '        os.killpg(0, signal.SIGINT)\n'
            'store.LabelStore.append = interrupt\n'
            'sys.exit(main(["labels", *sys.argv[1:]]))'
        )
        command = [sys.executable, '-W', 'ignore', '-c', code, '--quiet']
        command += ['--footprints', str(table), '--worldcover', str(tiles)]
        command += ['--out', str(out), '--workers', '2']
        process = subprocess.Popen(command, start_new_session=True)
        assert process.wait(300) == 130
        assert len(list(tmp_path.glob('a.parquet.parts/counts-*.parquet'))) == 1
        assert capfd.readouterr().err == 'interrupted, start again to go on\n'
        assert not out.exists()

    def test_interrupted_while_it_loads(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Loading(ModuleType):
            def __getattr__(self, name: str) -> None:
                raise (KeyboardInterrupt if name == 'label_archive' else AttributeError)

        name = 'torchgeo_softcon.labels.archive'
        monkeypatch.setitem(sys.modules, name, Loading(name))
        assert main(['labels', '--images', 'a', '--worldcover', 'b']) == 130
        assert capsys.readouterr().err == 'interrupted, start again to go on\n'

    def test_a_corrupt_tile_in_the_middle_of_a_run(
        self, tiles: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / 'tiles'
        shutil.copytree(tiles, folder)
        (path,) = folder.glob('*2021*N45E009*')
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        options = {
            'footprints': boxes(tmp_path / 'a.csv', 60),
            'out': tmp_path / 'a.parquet',
        }
        labelled = run(**options, worldcover=folder)
        assert 0 < len(labelled.failures) < 60
        assert labelled.rows == 60 - len(labelled.failures)
        assert all('N45E009' in reason for reason in labelled.failures.values())
        path.write_bytes(data)
        again = run(**options, worldcover=folder)
        assert (again.rows, again.new) == (60, len(labelled.failures))

    def test_disk_full(
        self, tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        table, out = boxes(tmp_path / 'a.csv', 40), tmp_path / 'a.parquet'
        parts = tmp_path / 'a.parquet.parts'
        parts.mkdir()
        # Takes a name and has no room for a byte
        (parts / 'counts-00000000.parquet.tmp').symlink_to('/dev/full')
        args = ['labels', '--footprints', str(table), '--worldcover', str(tiles)]
        args += ['--out', str(out), '--quiet', '--workers', '1']
        assert main(args) == 2
        error = capsys.readouterr().err
        assert 'No space left on device' in error
        assert 'make room and start again' in error
        assert not out.exists()
        assert main(args) == 0

    def test_another_run_is_writing(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / 'a.parquet'
        options = {'images': images, 'worldcover': tiles, 'out': out}
        name = f'images {os.path.abspath(images)}'
        first = store.LabelStore(
            out, name, *find_legend(WORLDCOVER), 2021, {2021: 'any'}
        )
        with (
            first.open(),
            pytest.raises(
                BlockingIOError, match=r'another run is writing .*a\.parquet'
            ),
        ):
            run(**options)
        assert run(**options).rows == 12

    @pytest.mark.parametrize(
        ('other', 'message'),
        [
            (
                {'year': 2020},
                r'has labels with product = .* 2021 v200, this run has .*v100',
            ),
            (
                {'classes': 'dynamicworld'},
                'legend = worldcover, this run has dynamicworld',
            ),
        ],
    )
    def test_output_of_another_map_or_legend(
        self, images: Path, tiles: Path, tmp_path: Path, other: Any, message: str
    ) -> None:
        options = {'images': images, 'worldcover': tiles, 'out': tmp_path / 'a.parquet'}
        run(**options)
        with pytest.raises(ValueError, match=message):
            run(**options, **other)
        run(**options, **other, overwrite=True)

    def test_output_of_another_archive(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        options = {'images': images, 'worldcover': tiles, 'out': tmp_path / 'a.parquet'}
        run(**options)
        for name in ('0/00.tif', '0/03.tif', '1/01.tif', '2/02.tif'):
            (images / name).unlink()
        match = 'has 4 ids that the archive has not, such as 0/00.tif, '
        with pytest.raises(ValueError, match=match):
            run(**options)

    def test_output_that_is_something_else(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / 'a.parquet'
        pd.DataFrame({'a': [1]}).to_parquet(out)
        with pytest.raises(ValueError, match='is there, but is no file of labels'):
            run(images=images, worldcover=tiles, out=out)
        assert not (tmp_path / 'a.parquet.parts').exists()

    def test_parts_of_another_run(self, tiles: Path, tmp_path: Path) -> None:
        parts = tmp_path / 'a.parquet.parts'
        parts.mkdir()
        (parts / 'origin.json').write_text(
            '{"year": 2021, "version": 1, "archive": "x"}'
        )
        (parts / 'counts-00000000.parquet').touch()
        with pytest.raises(
            ValueError, match='interrupted run with archive = x, not footprints'
        ):
            run(
                footprints=boxes(tmp_path / 'a.csv', 3),
                worldcover=tiles,
                out=tmp_path / 'a.parquet',
            )

    def test_duplicate_ids(self, tiles: Path, tmp_path: Path) -> None:
        frame = pd.read_csv(boxes(tmp_path / 'a.csv', 9))
        frame.id = ['a', 'b', 'c', 'a', 'b', 'c', 'd', 'd', 'e']
        frame.to_csv(tmp_path / 'a.csv', index=False)
        match = 'ids must be unique, 4 occur more than once, such as a, b, c'
        with pytest.raises(ValueError, match=match):
            run(
                footprints=tmp_path / 'a.csv',
                worldcover=tiles,
                out=tmp_path / 'a.parquet',
            )
        assert not (tmp_path / 'a.parquet.parts').exists()

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({}, 'one of images, footprints and layout must be given, got'),
            (
                {'images': 'a', 'footprints': 'b'},
                'one of images, footprints and layout',
            ),
            ({'images': 'a', 'year': 2019}, 'year must be 2020 or 2021, got 2019'),
            (
                {'images': 'a', 'classes': 'esri'},
                "classes must be one of .* got 'esri'",
            ),
            ({'images': 'a', 'workers': 0}, 'workers must be at least 1, got 0'),
            (
                {'images': 'a', 'min_fraction': 0},
                r'min_fraction must be in \(0, 1\], got 0',
            ),
            ({'images': 'a', 'min_valid': 2}, r'min_valid must be in \[0, 1\], got 2'),
            (
                {'images': 'a', 'format': 'csv'},
                "format must be parquet or json, got 'csv'",
            ),
            ({'layout': ('seco', 'a')}, "layout must be one of ssl4eo-s12, got 'seco'"),
        ],
    )
    def test_options(
        self, tiles: Path, tmp_path: Path, options: Any, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            run(worldcover=tiles, out=tmp_path / 'a.parquet', **options)

    def test_no_images_and_no_tiles(
        self, images: Path, tiles: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / 'a.parquet'
        with pytest.raises(FileNotFoundError, match='images must match at least one'):
            run(images=tmp_path / '*.jp2', worldcover=tiles, out=out)
        (tmp_path / 'empty').mkdir()
        with pytest.raises(FileNotFoundError, match='no ESA WorldCover tile of 2021'):
            run(images=images, worldcover=tmp_path / 'empty', out=out)
