# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from torchgeo_softcon.datasets import SyntheticScenes

from .models.helpers import WeightsFolder

if 'PYTEST_XDIST_WORKER' in os.environ:
    # Beside other processes of tests, more threads only wait for each other. The
    # variable is for the processes that tests start.
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)


@pytest.fixture(scope='session', autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for the tests alone, also for processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp('cache')
        patch.setenv('TORCHGEO_SOFTCON_CACHE', str(folder))
        yield


@pytest.fixture(autouse=True)
def plain_loaders() -> Iterator[None]:
    """Undo what Lightning does to data loaders, which it leaves if making one fails."""
    yield
    kinds = [DataLoader, BatchSampler]
    for kind in kinds:
        kinds += kind.__subclasses__()  # type: ignore[arg-type]
        for name in ('__init__', '__setattr__', '__delattr__'):
            if f'__old{name}' in kind.__dict__:
                setattr(kind, name, kind.__dict__[f'__old{name}'])
                delattr(kind, f'__old{name}')


@pytest.fixture(scope='session')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScenes:
    """Small synthetic scenes, written once."""
    root = tmp_path_factory.mktemp('scenes')
    return SyntheticScenes(root, size=96, seasons=2)


@pytest.fixture(scope='session')
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> WeightsFolder:
    """All files of pretrained weights, with the published keys and shapes."""
    return WeightsFolder(tmp_path_factory.mktemp('weights'))


@pytest.fixture
def own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights_folder: WeightsFolder
) -> Iterator[None]:
    """An empty folder, files of weights at hand, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['torchgeo'])
    weights_folder.use(monkeypatch)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope='session')
def shared() -> Path:
    """Folder of real samples, beside the repository where they are at hand."""
    folder = Path(__file__).parents[1].parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip('the real samples are not at hand')
    return folder
