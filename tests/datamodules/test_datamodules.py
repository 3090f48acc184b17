# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import csv
import pickle
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from PIL import Image

from tests.datamodules.helpers import DATA, make_two_zones, write_raster
from tests.datasets.test_image_masks import save
from torchgeo_softcon._compat import HAS_TASKS, Sample
from torchgeo_softcon.datamodules import (
    ImageMaskFolderDataModule,
    SSL4EOS12MLDataModule,
    SyntheticScenesDataModule,
    WorldCoverScenesDataModule,
)
from torchgeo_softcon.datamodules.base import DrawDataModule, target_transform
from torchgeo_softcon.transforms.worldcover import WORLDCOVER_CODES

from ..tasks.helpers import make_trainer


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_two_zones(tmp_path_factory)


def scenes(root: Path, **kwargs: Any) -> WorldCoverScenesDataModule:
    options: dict[str, Any] = {'patch_size': 32, 'batch_size': 4} | kwargs
    return WorldCoverScenesDataModule(
        str(root / 'images'), str(root / 'worldcover'), **options
    )


def loaders(datamodule: DrawDataModule) -> dict[str, Any]:
    for stage in ('fit', 'test', 'predict'):
        datamodule.setup(stage)
    return {
        split: getattr(datamodule, f'{split}_dataloader')()
        for split in ('train', 'val', 'test', 'predict')
    }


class TestWorldCoverScenesDataModule:
    def test_batches(self, root: Path) -> None:
        for split, loader in loaders(scenes(root)).items():
            batch = next(iter(loader))
            assert set(batch) == {'image', 'label'}, split
            assert batch['image'].shape == (4, 2, 32, 32)
            # The metrics of the host's classification want whole numbers
            assert batch['label'].shape == (4, 11)
            assert batch['label'].dtype == torch.long

    def test_seasons(self, root: Path) -> None:
        batches = {
            split: next(iter(loader))
            for split, loader in loaders(scenes(root, seasons=2)).items()
        }
        assert batches['train']['image'].shape == (4, 2, 2, 32, 32)
        assert batches['train']['label'].shape == (4, 11)
        # Features are of single images
        assert batches['predict']['image'].shape == (4, 2, 32, 32)

    def test_fractions(self, root: Path) -> None:
        batch = next(iter(loaders(scenes(root, fractions=True))['train']))
        torch.testing.assert_close(batch['label'].sum(1), torch.ones(4))

    def test_masks_are_ordinal(self, root: Path) -> None:
        batch = next(iter(loaders(scenes(root, target='mask'))['train']))
        assert batch['mask'].shape == (4, 32, 32)
        # Cropland and built-up
        assert set(batch['mask'].unique().tolist()) <= {4, 5}
        with pytest.raises(ValueError, match="'label' or 'mask', got 'masks'"):
            scenes(root, target='masks')

    @pytest.mark.parametrize(
        ('value', 'message'),
        [
            (4, 'looks like ordinals'),
            (300, 'got also 255'),
            (-10, 'got also 255'),
            (10.5, 'interpolated'),
        ],
    )
    def test_masks_that_hold_no_codes(self, value: float, message: str) -> None:
        transform = target_transform('mask', 0.05, False)
        with pytest.raises(ValueError, match=message):
            transform({'mask': torch.full((4, 4), value)})
        ordinals = transform({'mask': torch.tensor([[0.0, 10.0, 100.0]])})['mask']
        assert ordinals.tolist() == [[0, 1, 11]]

    def test_places_that_overlap_are_not_kept_apart(self, tmp_path: Path) -> None:
        def setup(left: int, val_fraction: float = 0.25) -> None:
            # As Sentinel-2 tiles of neighbouring zones, these are not on one grid
            write_raster(tmp_path / 'b.tif', values, origin=(500000 + left, 5540000))
            WorldCoverScenesDataModule(
                str(tmp_path),
                None,
                patch_size=4,
                val_fraction=val_fraction,
                allow_unlabelled=True,
            ).setup('fit')

        values = np.ones((1, 40, 20), np.uint8)
        write_raster(tmp_path / 'a.tif', values)
        with pytest.warns(UserWarning, match=r'1 pairs .*a\.tif and .*b\.tif'):
            setup(190)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            setup(200)
            setup(190, val_fraction=0)

    def test_offset_is_passed_on(self, root: Path) -> None:
        plain = next(iter(loaders(scenes(root, min_valid=0))['train']))['image']
        moved = next(iter(loaders(scenes(root, offset=10))['train']))['image']
        torch.testing.assert_close(moved, plain + 10 / 255)

    def test_parts_share_no_row(self, root: Path) -> None:
        datamodule = scenes(root, val_fraction=0.34, patch_size=30)
        loaders(datamodule)
        rows = [
            getattr(datamodule, f'{split}_dataset')._rows
            for split in ('train', 'val', 'test')
        ]
        assert rows == [[(0, 31)] * 2, [(31, 63)] * 2, [(63, 96)] * 2]
        with pytest.raises(ValueError, match=r'val_fraction must be in \[0, 0.5\)'):
            scenes(root, val_fraction=0.5)

    def test_validation_windows_are_fixed_and_other_ones(self, root: Path) -> None:
        parts = loaders(scenes(root))
        first, again = (next(iter(parts['val']))['image'] for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, next(iter(parts['test']))['image'])
        assert not torch.equal(first, next(iter(parts['train']))['image'])

    def test_an_epoch_has_at_least_one_batch(self, root: Path) -> None:
        assert len(loaders(scenes(root, batch_size=50))['train']) == 1
        with pytest.raises(ValueError, match='batch_size must be at most 20'):
            loaders(scenes(root, batch_size=50, length=20))

    def test_images_are_passed_on_as_they_are(self, root: Path) -> None:
        datamodule = pickle.loads(pickle.dumps(scenes(root, seasons=2)))
        seen = []

        class Model(LightningModule):
            def training_step(self, batch: Sample, batch_idx: int) -> None:
                seen.append(batch['image'])

            def configure_optimizers(self) -> None:
                return None

        trainer = make_trainer(root, max_epochs=1, max_steps=1, limit_train_batches=1)
        trainer.fit(Model(), datamodule)
        expected = next(iter(loaders(scenes(root, seasons=2))['train']))
        assert torch.equal(seen[0], expected['image'])

    @pytest.mark.parametrize(
        'argument', [{'batch_size': 0}, {'num_workers': -1}], ids=str
    )
    def test_bad_argument(self, root: Path, argument: dict[str, int]) -> None:
        with pytest.raises(ValueError, match='batch_size must be at least 1'):
            scenes(root, **argument)
        with pytest.raises(ValueError, match='seed must be at least 0, got -1'):
            scenes(root, seed=-1)

    @pytest.mark.parametrize('length', [0, -5])
    def test_bad_length(self, root: Path, length: int) -> None:
        with pytest.raises(ValueError, match=f'length must be .* 1, got {length}'):
            loaders(scenes(root, length=length))

    def test_masks_have_no_shares(self, root: Path) -> None:
        with pytest.raises(ValueError, match='fractions must be left out'):
            scenes(root, target='mask', fractions=True)
        with pytest.raises(ValueError, match='min_fraction'):
            scenes(root, target='mask', min_fraction=7)


class TestImageMaskFolderDataModule:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for i in range(10):
            save(tmp_path / f'images/p{i // 2}_{i}.png', np.full((8, 8, 3), i))
            save(tmp_path / f'masks/p{i // 2}_{i}.png', np.full((8, 8), 10))
        return tmp_path

    def test_an_epoch_is_a_permutation(self, folder: Path) -> None:
        parts = loaders(ImageMaskFolderDataModule(str(folder), batch_size=2))

        def seen(split: str) -> list[int]:
            batches = [batch['image'][:, 0, 0, 0] for batch in parts[split]]
            return (torch.cat(batches) * 255).round().int().tolist()

        first, second = seen('train'), seen('train')
        assert sorted(first) == sorted(second) == list(range(10)) == seen('predict')
        assert first != second

    def test_parts_share_no_place(self, folder: Path) -> None:
        datamodule = ImageMaskFolderDataModule(
            str(folder), batch_size=2, places=r'p\d', val_fraction=0.2
        )
        loaders(datamodule)
        datasets: list[Any] = [
            datamodule.train_dataset,
            datamodule.val_dataset,
            datamodule.test_dataset,
        ]
        places = [set(dataset.places) for dataset in datasets]
        assert [len(part) for part in places] == [3, 1, 1]
        assert len(set.union(*places)) == 5

    def test_a_folder_for_validation(self, folder: Path, tmp_path: Path) -> None:
        other = tmp_path / 'other'
        save(other / 'images/x.png', np.full((8, 8, 3), 51))
        save(other / 'masks/x.png', np.full((8, 8), 20))
        datamodule = ImageMaskFolderDataModule(
            str(folder), batch_size=2, places=r'p\d|x', val_root=str(other)
        )
        parts = loaders(datamodule)
        assert len(parts['train']) == 5
        for split in ('val', 'test'):
            (batch,) = parts[split]
            assert batch['image'].unique() == pytest.approx(0.2)
            assert batch['label'].nonzero().tolist() == [[0, 1]]
        with pytest.raises(ValueError, match='val_fraction must be left out'):
            ImageMaskFolderDataModule('x', val_root='y', val_fraction=0.1)

    def test_predictions_are_of_every_image(self, folder: Path) -> None:
        datamodule = ImageMaskFolderDataModule(
            str(folder), batch_size=2, places=r'p\d', seasons=2, size=4
        )
        images = [batch['image'] for batch in loaders(datamodule)['predict']]
        assert {image.shape for image in images} == {(2, 3, 4, 4)}
        values = torch.cat(images)[:, 0, 0, 0] * 255
        assert values.round().int().tolist() == list(range(10))


@pytest.fixture(scope='module')
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp('synthetic'))


class TestSyntheticScenesDataModule:
    def test_batches(self, cache: str) -> None:
        datamodule = SyntheticScenesDataModule(
            cache, size=64, dates=2, patch_size=32, batch_size=2, seasons=2
        )
        datamodule.prepare_data()
        batch = next(iter(loaders(datamodule)['train']))
        assert batch['image'].shape == (2, 2, 13, 32, 32)
        assert batch['label'].any(1).all()

    def test_options_to_fine_tune_on_the_same_data(self) -> None:
        def options(needed: int | None = None, **kwargs: Any) -> dict[str, str]:
            datamodule = SyntheticScenesDataModule(**kwargs)
            words = shlex.split(datamodule.finetune_options(needed))
            names = [word.removeprefix('--') for word in words[::2]]
            return dict(zip(names, words[1::2], strict=True))

        default = options()
        assert {name for name in default if name.startswith('data')} == {'data'}
        # All but what a task of classification determines
        given: dict[str, Any] = {
            'root': 'a folder',
            'places': 2,
            'size': 300,
            'dates': 3,
            'patch_size': 64,
            'length': 100,
            'min_fraction': 0.1,
            'min_valid': 0.25,
            'val_fraction': 0.2,
            'seed': 3,
        }
        expected = {f'data.{name}': str(value) for name, value in given.items()}
        bands = {'data.bands': '["B4", "B3"]'}
        assert options(bands=('B4', 'B3'), **given) == default | expected | bands
        assert options(224)['data.patch_size'] == '224'


class TestCLI:
    """The host's own tasks train on our datamodules, without code."""

    @pytest.mark.parametrize('target', ['label', 'mask'])
    def test_fit(self, cache: str, tmp_path: Path, target: str) -> None:
        from torchgeo.main import main

        if target == 'label':
            task = 'Classification' if HAS_TASKS else 'ClassificationTask'
            model = [f'--model={task}', '--model.model=resnet18']
            model += ['--model.task=multilabel', '--model.num_labels=11']
            model += ['--model.loss=bce', '--model.num_classes=11']
        else:
            task = 'SemanticSegmentation' if HAS_TASKS else 'SemanticSegmentationTask'
            model = [f'--model={task}', '--model.backbone=resnet18']
            model += ['--model.num_classes=12', '--model.ignore_index=0']
        module = 'torchgeo_softcon.datamodules.SyntheticScenesDataModule'
        arguments = [
            *model,
            '--model.in_channels=13',
            f'--data={module}',
            f'--data.root={cache}',
            '--data.size=64',
            '--data.dates=2',
            '--data.patch_size=32',
            '--data.batch_size=2',
            f'--data.target={target}',
            '--trainer.accelerator=cpu',
            '--trainer.fast_dev_run=true',
            f'--trainer.default_root_dir={tmp_path}',
        ]
        main(['fit', *arguments])

    def test_wrong_argument_is_found_before_anything_runs(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from torchgeo.main import main

        module = 'torchgeo_softcon.datamodules.WorldCoverScenesDataModule'
        arguments = [f'--data={module}', '--data.images=a', '--data.worldcover=b']
        arguments += ['--data.value_range=wrong']
        with pytest.raises(SystemExit):
            main(['fit', *arguments])
        assert 'value_range' in capsys.readouterr().err


class TestRealData:
    def test_delhi(self, tmp_path: Path) -> None:
        """Masks that come by location are those that come with the images."""
        source = DATA / 'delhi_s2rgb_worldcover'
        tiles = sorted((DATA / 'worldcover_tiles').glob('delhi_*.tif'))
        if not tiles or not source.is_dir():
            pytest.skip('no real data')
        pixel = 8.983152841195215e-05
        with open(source / 'labels.csv') as file:
            rows = list(csv.DictReader(file))[::3]
        for row in rows:
            with Image.open(source / 'images' / f'{row["name"]}.png') as image:
                values = np.moveaxis(np.asarray(image), -1, 0)
            lat, lon = float(row['lat']), float(row['lon'])
            write_raster(
                tmp_path / f'{row["name"]}.tif',
                values,
                'EPSG:4326',
                (lon - 64 * pixel, lat + 64 * pixel),
                pixel,
            )
        datamodule = WorldCoverScenesDataModule(
            str(tmp_path),
            [str(tile) for tile in tiles],
            patch_size=128,
            batch_size=32,
            fractions=True,
        )
        datamodule.setup('predict')
        dataset: Any = datamodule.predict_dataset
        names = [place.scenes[0].name for place in dataset.scenes.places]
        labels = torch.cat([b['label'] for b in datamodule.predict_dataloader()])
        assert labels.shape == (len(rows), 11)
        shares = dict(zip([Path(n).stem for n in names], labels, strict=True))

        expected = torch.tensor(
            [[float(r.get(f'wc_{c}', 0)) for c in WORLDCOVER_CODES] for r in rows]
        )
        actual = torch.stack([shares[row['name']] for row in rows])
        difference = (actual - expected).abs().mean(0)
        assert (difference < 0.02).all(), difference


#: Options that all datamodules of this package have.
SHARED = {'batch_size', 'num_workers', 'val_fraction', 'seed'}

#: Options of each, some of which are those of its dataset.
OPTIONS = {
    ImageMaskFolderDataModule: {
        *('root', 'images', 'masks', 'image_bands', 'mask_band', 'bands', 'nodata'),
        *('value_range', 'level', 'offset', 'seasons', 'places', 'size', 'on_error'),
        *('target', 'min_fraction', 'fractions', 'cache', 'val_root'),
        'radar_quantiles',
    },
    SSL4EOS12MLDataModule: {
        *('root', 'split', 'labels', 'seasons', 'require_labels', 'min_fraction'),
        *('fractions', 'value_range', 'on_error', 'offset', 'max_cloud'),
    },
    WorldCoverScenesDataModule: {
        *('images', 'worldcover', 'year', 'product', 'allow_unlabelled', 'bands'),
        *('all_bands', 'patch_size', 'length', 'seasons', 'min_valid', 'value_range'),
        *('nodata', 'offset', 'level', 'radar_quantiles', 'on_error'),
        *('root', 'target', 'min_fraction', 'fractions'),
    },
    SyntheticScenesDataModule: {
        *('root', 'places', 'size', 'dates', 'bands', 'patch_size', 'length'),
        *('seasons', 'min_valid', 'target', 'min_fraction', 'fractions'),
    },
}


@pytest.mark.parametrize('datamodule', OPTIONS)
def test_command_line_knows_the_options_of_the_dataset(datamodule: Any) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(datamodule, 'data', sub_configs=True)
    options = {a.dest.removeprefix('data.') for a in parser._actions}
    options = {o.removesuffix('.help') for o in options} - {'help', 'data'}
    assert options == OPTIONS[datamodule] | SHARED


@pytest.mark.parametrize('datamodule', OPTIONS)
def test_unknown_option_is_found_at_once(datamodule: Any) -> None:
    given: Any = {'images': 'a', 'worldcover': 'b'}
    required = given if datamodule is WorldCoverScenesDataModule else {}
    with pytest.raises(TypeError, match="'patchsize'"):
        datamodule(**required, patchsize=32)
