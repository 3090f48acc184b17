# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Damaged files are left out, counted and named, if that is wanted."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from tests.datamodules.helpers import write_raster
from tests.ssl4eo.archives import season, write_archive
from torchgeo_softcon.datamodules import ImageMaskFolderDataModule
from torchgeo_softcon.datasets import (
    SSL4EOS12ML,
    ImageMaskFolder,
    SyntheticScenes,
    WorldCoverScenes,
)
from torchgeo_softcon.datasets.base import DrawnImages
from torchgeo_softcon.datasets.scene_pack import pack_scenes
from torchgeo_softcon.geo.rasters import DamagedFileError
from torchgeo_softcon.ssl4eo.pack import pack


def patches(root: Path, places: int = 6, dates: int = 1) -> Path:
    """Write patches whose value tells which one they are."""
    noise = np.random.default_rng(0).integers(0, 40, (3, 32, 32), np.uint8)
    for place in range(places):
        for date in range(dates):
            name = f'{place}/{date}.tif'
            write_raster(root / 'images' / name, noise + 30 * place + date)
            write_raster(root / 'masks' / name, np.full((1, 32, 32), 10, np.uint8))
    return root


def cut(path: Path) -> str:
    """Cut a file, so that it opens, but cannot be read to the end."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return str(path)


def spoil(path: Path) -> str:
    """Write something that is no image."""
    path.write_text('404: not found')
    return str(path)


def empty(path: Path) -> str:
    path.write_bytes(b'')
    return str(path)


def folder(root: Path, **options: Any) -> ImageMaskFolder:
    return ImageMaskFolder(root, transforms=nn.Identity(), **options)


def read_all(dataset: DrawnImages, rounds: int = 3) -> list[float]:
    indices = range(rounds * len(dataset))
    return [float(dataset[index]['image'].mean()) for index in indices]


class TestImageMaskFolder:
    @pytest.mark.parametrize('harm', [cut, spoil, empty])
    @pytest.mark.parametrize('kind', ['images', 'masks'])
    def test_other_samples_are_taken(
        self, tmp_path: Path, harm: Callable[[Path], str], kind: str
    ) -> None:
        whole = read_all(folder(patches(tmp_path)), 1)
        name = harm(tmp_path / kind / '2' / '0.tif')
        with pytest.raises(DamagedFileError, match=re.escape(name)):
            read_all(folder(tmp_path))
        dataset = folder(tmp_path, on_error='skip')
        means = read_all(dataset)
        assert len(means) == 3 * (6 if harm is cut else 5)
        assert {*means} == {*whole[:2], *whole[3:]}
        # Again, in another process, and whatever was read before
        again = pickle.loads(pickle.dumps(dataset))
        assert [float(again[i]['image'].mean()) for i in (8, 2)] == [means[8], means[2]]
        assert dataset.damage is not None
        with pytest.warns(
            UserWarning, match=rf'1 files are damaged .*: {name}\. Fetch'
        ):
            dataset.damage.tell_files()

    def test_places_that_lack_a_date_by_damage(self, tmp_path: Path) -> None:
        patches(tmp_path, places=3, dates=2)
        spoil(tmp_path / 'images' / '1' / '0.tif')
        dataset = folder(tmp_path, seasons=2, on_error='skip')
        assert dataset.places == ['0', '2']
        (tmp_path / 'images' / '2' / '0.tif').unlink()
        with pytest.raises(ValueError, match='1 of 2 places have fewer: 2'):
            folder(tmp_path, seasons=2, on_error='skip')

    def test_so_much_damage_that_it_is_something_else(self, tmp_path: Path) -> None:
        patches(tmp_path, places=2)
        for place in '01':
            cut(tmp_path / 'images' / place / '0.tif')
        dataset = folder(tmp_path, on_error='skip')
        with pytest.raises(DamagedFileError, match='cannot read'):
            dataset[0]
        for place in '01':
            spoil(tmp_path / 'images' / place / '0.tif')
        with pytest.raises(OSError, match='all 2 images or masks are damaged, such as'):
            folder(tmp_path, on_error='skip')

    def test_predictions_are_of_their_own_image(self, tmp_path: Path) -> None:
        patches(tmp_path)
        cut(tmp_path / 'images' / '2' / '0.tif')
        images = folder(tmp_path, on_error='skip').images()
        with pytest.raises(DamagedFileError):
            images[2]

    def test_bad_argument(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"on_error must be .*'ignore'"):
            folder(patches(tmp_path), on_error='ignore')

    def test_a_cache_has_no_damage(self, tmp_path: Path) -> None:
        options: Any = {'cache': tmp_path / 'cache'}
        with pytest.raises(ValueError, match=r"on_error='skip' must be left out with"):
            folder(patches(tmp_path), on_error='skip', **options)
        name = cut(tmp_path / 'images' / '2' / '0.tif')
        with pytest.raises(DamagedFileError, match=f'cannot read {re.escape(name)}'):
            folder(tmp_path, **options)


class Reads(LightningModule):
    """A task that keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen += batch['image'].mean((1, 2, 3)).tolist()
        return self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize('workers', [0, 2])
def test_counted_per_epoch_and_named_at_the_end(tmp_path: Path, workers: int) -> None:
    patches(tmp_path)
    names = [cut(tmp_path / 'images' / '4' / '0.tif')]
    names.append(spoil(tmp_path / 'images' / '1' / '0.tif'))

    def run(epochs: int, state: Any = None) -> tuple[list[float], list[str], Any]:
        data = ImageMaskFolderDataModule(
            str(tmp_path), batch_size=1, num_workers=workers, on_error='skip', seed=3
        )
        if state is not None:
            data.load_state_dict(state)
        trainer = Trainer(
            accelerator='cpu',
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        task = Reads()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            trainer.fit(task, data)
        texts = [str(w.message) for w in caught if 'damaged' in str(w.message)]
        return task.seen, texts, copy.deepcopy(data.state_dict())

    seen, texts, _ = run(3)
    assert len(seen) == 15
    *epochs, end = texts
    assert len(epochs) == 3
    assert all('draws of this epoch met damaged files' in text for text in epochs)
    assert '2 files are damaged' in end
    assert all(name in end for name in names)
    # One epoch, and two more
    first, _, state = run(1)
    second, *_ = run(2, state)
    assert first + second == seen


class TestSSL4EO:
    @pytest.mark.parametrize('harm', [cut, spoil, Path.unlink])
    def test_other_locations_are_taken(
        self, tmp_path: Path, harm: Callable[[Path], Any]
    ) -> None:
        days = {f'{number:07}': ['20200610', '20200905'] for number in range(4)}
        write_archive(tmp_path, {'s1': days})
        path = tmp_path / 's1' / '0000002' / season('s1', '20200905') / 'VH.tif'
        harm(path)
        whole = [SSL4EOS12ML(tmp_path, 's1')[i]['image'] for i in (0, 1, 3)]
        with pytest.raises(DamagedFileError, match=re.escape(str(path))):
            SSL4EOS12ML(tmp_path, 's1').__getitems__(range(40))
        dataset = SSL4EOS12ML(tmp_path, 's1', on_error='skip')
        batch = dataset.__getitems__([0, 1, 2, 3, 6, 10, 14, 18])
        assert batch[0]['image'].equal(whole[0])
        assert batch[1]['image'].equal(whole[1])
        assert batch[3]['image'].equal(whole[2])
        assert dataset[6]['image'].equal(batch[4]['image'])
        assert dataset.damage is not None
        with pytest.warns(UserWarning, match=f'1 files are damaged .*{path}'):
            dataset.damage.tell_files()
        with pytest.raises(DamagedFileError):
            dataset.images().__getitems__(range(8))

    def test_packed_files_are_checked_at_once(self, tmp_path: Path) -> None:
        write_archive(tmp_path / 'in', {'s1': {'0000000': ['20200610', '20200905']}})
        assert pack(tmp_path / 'in', tmp_path / 'out') == []
        name = cut(tmp_path / 'out' / 's1' / '00000.npy')
        with pytest.raises(ValueError, match=f'{re.escape(name)} .* cut off'):
            SSL4EOS12ML(tmp_path / 'out', 's1', on_error='skip')


def scratch(path: Path) -> str:
    """Spoil rows in the middle of a file, which opens and ends as it should."""
    with rasterio.open(path) as source:
        values, profile = source.read(), source.profile
    profile |= {'compress': 'deflate', 'blockysize': 4, 'tiled': False}
    with rasterio.open(path, 'w', **profile) as out:
        out.write(values)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    # More than a strip: within one, zeros may decode to something
    content[middle : middle + 800] = bytes(800)
    path.write_bytes(content)
    return str(path)


class TestScenes:
    def scenes(self, root: Path, **options: Any) -> WorldCoverScenes:
        return WorldCoverScenes(
            root / 'images',
            None,
            patch_size=16,
            transforms=nn.Identity(),
            allow_unlabelled=True,
            **options,
        )

    def test_scenes_that_cannot_be_opened(self, tmp_path: Path) -> None:
        patches(tmp_path, places=3)
        name = spoil(tmp_path / 'images' / '1' / '0.tif')
        with pytest.raises(DamagedFileError, match=f'cannot open {name}'):
            self.scenes(tmp_path)
        dataset = self.scenes(tmp_path, on_error='skip')
        # They are on one grid
        assert [Path(s.name).parent.name for s in dataset.places[0].scenes] == [
            '0',
            '2',
        ]
        assert dataset.damage is not None
        assert dataset.damage.left_out == [name]
        for place in '02':
            spoil(tmp_path / 'images' / place / '0.tif')
        with pytest.raises(OSError, match='all images are damaged, such as'):
            self.scenes(tmp_path, on_error='skip')

    def test_scenes_that_lack_a_band_by_damage(self, tmp_path: Path) -> None:
        values = np.full((1, 32, 32), 900, np.uint16)
        for scene in 'abc':
            for band in ('B02', 'B03'):
                write_raster(tmp_path / 'images' / scene / f'{band}.tif', values)
        spoil(tmp_path / 'images' / 'b' / 'B03.tif')
        (place,) = self.scenes(tmp_path, on_error='skip').places
        assert [Path(scene.name).name for scene in place.scenes] == ['a', 'c']
        assert [scene.bands for scene in place.scenes] == [('B2', 'B3')] * 2

    def test_other_windows_are_taken(self, tmp_path: Path) -> None:
        patches(tmp_path, places=2)
        name = scratch(tmp_path / 'images' / '0' / '0.tif')
        with pytest.raises(DamagedFileError, match=f'cannot read {name}'):
            read_all(self.scenes(tmp_path, length=40), 1)
        dataset = self.scenes(tmp_path, length=40, on_error='skip')
        means = read_all(dataset, 1)
        assert means == read_all(dataset, 1)
        assert dataset.damage is not None
        assert {*dataset.damage._noted()} == {name}
        # Other windows of the same rasters note in the same place
        assert dataset.with_windows(stream=1).damage is dataset.damage

    @pytest.mark.parametrize('kind', ['images', 'cover'])
    def test_packed(self, scenes: SyntheticScenes, tmp_path: Path, kind: str) -> None:
        """A file that is cut off after it was opened, as by a full disk, is left out."""
        pack_scenes(scenes.images, tmp_path, scenes.worldcover)
        dataset = WorldCoverScenes(
            tmp_path,
            patch_size=32,
            length=20,
            on_error='skip',
            transforms=nn.Identity(),
        )
        place = dataset.places[0]
        cover: Any = dataset.worldcover
        paths = {
            'images': place.scenes[0].name,
            'cover': cover.find(place.grid, place.name),
        }
        path = Path(paths[kind])
        dataset = pickle.loads(pickle.dumps(dataset))  # nothing is open
        cut(path)
        other = read_all(dataset, 1)
        assert other == read_all(dataset, 1)
        assert dataset.damage is not None
        assert {*dataset.damage._noted()} == {str(path)}
