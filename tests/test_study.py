# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The study of the examples, at the smallest size."""

import csv
import importlib.util
import subprocess
import sys
from math import nan
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

PATH = Path(__file__).parents[1] / 'examples' / 'study.py'


@pytest.fixture(scope='module')
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location('study', PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses and pickle look for it
    sys.modules['study'] = module
    spec.loader.exec_module(module)
    return module


def make_ground(study: ModuleType, seed: int, channels: int = 3) -> Any:
    """Places whose bands are their land cover."""
    generator = torch.Generator().manual_seed(seed)
    masks = [
        torch.randint(1, 4, (2, 2), generator=generator)
        .repeat_interleave(50, 0)
        .repeat_interleave(50, 1)
        .mul(10)
        .to(torch.uint8)
        for _ in range(8)
    ]
    noise = torch.rand(8, 2, channels, 100, 100, generator=generator)
    images = [n * 0.1 + m / 100 for n, m in zip(noise, masks, strict=True)]
    return study.Ground(images, masks)


def test_windows_are_the_same_for_all(study: ModuleType) -> None:
    ground = make_ground(study, 0)
    windows = study.Windows(ground, 50, seed=1)
    shuffled = study.Windows(ground, 50, seed=1, shuffled=True)
    others = study.Windows(ground, 50, seed=2)
    assert torch.equal(windows[3]['image'], study.Windows(ground, 9, 1)[3]['image'])
    assert not torch.equal(windows[3]['image'], others[3]['image'])
    # The band tells the mask, unless it is of another window
    for i in range(5):
        sample, wrong = windows[i], shuffled[i]
        # With noise of 0.05 around 0.05
        found = (sample['image'].mean(0) * 10 - 0.5).round() * 10
        assert torch.equal(found.byte(), sample['mask'])
        assert torch.equal(sample['image'], wrong['image'])
    pairs = [(windows[i]['mask'], shuffled[i]['mask']) for i in range(20)]
    assert sum(torch.equal(a, b) for a, b in pairs) < 10


def test_epochs_do_not_repeat_windows(study: ModuleType) -> None:
    stream = study.Stream(3)
    assert [*stream, *stream] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize('method', ['band statistics', 'random start', 'SoftCon'])
def test_run(study: ModuleType, method: str) -> None:
    ground = [make_ground(study, seed) for seed in (0, 1)]
    threads = torch.get_num_threads()
    try:
        result = study.run(method, 0, 'test_resnet', 10, 100, *ground)
    finally:
        torch.set_num_threads(threads)
    assert (result.seconds > 0) == (method == 'SoftCon')
    assert result.method == method
    assert 0 < result.knn_map <= 1
    if method == 'band statistics':  # which tell how much there is of a class
        assert result.linear_map > 0.85


def test_table(study: ModuleType) -> None:
    results = [
        study.Result('contrast only', 0, 0.5, 0.6, 10, 64),
        study.Result('contrast only', 1, 0.5, 0.7, 10, 64),
        study.Result('SoftCon', 0, 0.6, 0.65, 20, 32),
        study.Result('SoftCon', 1, 0.8, 0.77, 20, 32),
        study.Result('DINO-MC', 0, nan, nan, 20, 32),
    ]
    lines = study.table(results).splitlines()
    assert lines[2] == '| contrast only | 0.500 ± 0.000 | 0.650 ± 0.071 |  | 64 | 10 |'
    assert lines[3] == (
        '| SoftCon | 0.700 ± 0.141 | 0.710 ± 0.085 | +0.060 ± 0.014 | 32 | 20 |'
    )
    assert lines[4] == '| DINO-MC | diverged | diverged | diverged | 32 | 20 |'


def test_unknown_labels_are_left_out(study: ModuleType) -> None:
    ground = make_ground(study, 0)
    ground.masks[0][:] = 0
    windows = study.Windows(ground, 80, 0)
    features, labels = study.encode(study.Statistics(), windows)
    assert len(features) == len(labels) < 80
    assert labels.any(1).all()


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        (['--steps', '15'], 'multiple of 10, got 15'),
        (['--folder', 'HERE', '--held-out', 'x'], 'leaves 2 for training, 0 to test'),
    ],
)
def test_arguments_that_do_not_fit(
    study: ModuleType,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
    argument: Any,
    message: str,
) -> None:
    write_folder(tmp_path, 'a', 'b')
    argument = [str(tmp_path) if word == 'HERE' else word for word in argument]
    monkeypatch.setattr('sys.argv', ['study.py', *argument])
    with pytest.raises(SystemExit):
        study.main()
    assert message in capsys.readouterr().err


def write_folder(root: Path, *names: str) -> None:
    random = np.random.default_rng(0)
    for kind, shape in (('images', (200, 200, 3)), ('masks', (200, 200))):
        (root / kind).mkdir()
        for name in names:
            values = random.integers(1, 5, shape, dtype=np.uint8) * 10
            values[:, :100] = 10
            Image.fromarray(values).save(root / kind / f'{name}.png')


def test_folder_in_processes(tmp_path: Path) -> None:
    write_folder(tmp_path, 'a', 'b')
    out = tmp_path / 'figures.csv'
    words = (
        f'--folder {tmp_path} --held-out b --seeds 1 --jobs 1 --windows 40 --out {out}'
    )
    command = [sys.executable, str(PATH), *words.split(), '--methods']
    command += ['band statistics', 'random start']
    printed = subprocess.check_output(command, text=True)
    assert '| random start |' in printed
    with out.open() as file:
        assert [row['seed'] for row in csv.DictReader(file)] == ['0', '0']
