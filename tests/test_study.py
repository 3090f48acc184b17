# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The study of the examples, at the smallest size."""

import importlib.util
import json
import subprocess
import sys
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
    return study.stack(list(zip(images, masks, strict=True)))


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


@pytest.mark.parametrize(
    'row',
    [
        'statistics',
        'start',
        'SoftCon soft_weight=3 labels=shuffled',
        'SoftCon labels=constant',
        'classifier',
    ],
)
def test_run(study: ModuleType, row: str, tmp_path: Path) -> None:
    grounds = [make_ground(study, seed) for seed in (0, 1)]
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = torch.rand(40, 3, 64, 64, generator=random) + labels[:, None, None, None]
    others = [
        study.Scored('a', images, labels),
        study.Scored('b', images, torch.stack([labels, 1 - labels], 1)),
    ]
    threads = torch.get_num_threads()
    try:
        run = study.Run(row, 0, steps=2, windows=100)
        result = study.execute(run, grounds, others)
    finally:
        torch.set_num_threads(threads)
    assert (result['seconds'] > 0) == (row not in ('statistics', 'start'))
    assert json.loads(json.dumps(result))['row'] == row
    scores = result['scores']
    assert scores['a k-NN'] == scores['b linear'] == 1
    assert 0 < scores['k-NN mAP'] <= 1
    if row == 'statistics':  # which tell how much there is of a class
        assert scores['linear mAP'] > 0.85


def test_options_of_a_row(study: ModuleType) -> None:
    run = study.Run('SoftCon soft_weight=3 labels=constant', 0, steps=516)
    task, labels = run.task(3)
    assert (task.hparams['soft_weight'], labels, run.epochs) == (3, 'constant', 12)
    assert study.Run('contrast', 0).task(3)[0].hparams['soft_weight'] == 0
    label = torch.eye(3)
    assert study.alike(label, label).unique() == pytest.approx(1 / 3)


def test_goes_on_from_weights(study: ModuleType, tmp_path: Path) -> None:
    first = study.Run('start', 0).task(3)[0].model
    torch.save(first.state_dict(), tmp_path / 'start.pth')
    torch.manual_seed(5)
    task, _ = study.Run('SoftCon', 1, weights=str(tmp_path / 'start.pth')).task(3)
    for one, other in zip(first.parameters(), task.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert task.hparams['lr'] == study.LR['continual']


def test_table(study: ModuleType) -> None:
    def line(row: str, seed: int, score: float | None) -> dict[str, Any]:
        scores = {} if score is None else {'k-NN mAP': score}
        return {**study.Run(row, seed)._asdict(), 'scores': scores, 'seconds': 10.4}

    results = [
        line('contrast', 0, 0.6),
        line('contrast', 1, 0.7),
        line('SoftCon', 1, 0.77),
        line('SoftCon', 0, 0.65),
        line('DINO-MC', 0, None),
    ]
    title, _, header, _, *rows, _ = study.table(results).split('\n')
    assert 'test_resnet, start: random, 200 steps of 128' in title
    assert header == '| row | seeds | k-NN mAP | CPU s |'
    assert rows == [
        '| contrast | 2 | 0.650 ± 0.071 | 10 |',
        '| SoftCon | 2 | 0.710 ± 0.085 (+0.060 ± 0.014) | 10 |',
        '| DINO-MC | 1 | diverged | 10 |',
    ]


def test_unknown_labels_are_left_out(study: ModuleType) -> None:
    ground = make_ground(study, 0)
    ground.masks[0] = 0
    windows = study.Windows(ground, 80, 0)
    features, labels = study.encode(study.Statistics(), windows)
    assert len(features) == len(labels) < 80
    assert labels.any(1).all()


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--rows SimCLR', 'unknown method SimCLR'),
        ('--rows SoftCon soft_wait=1', "unexpected keyword argument 'soft_wait'"),
        ('--folder HERE --held-out x', 'leave 2 images to train on and 0 to test on'),
    ],
)
def test_arguments_that_do_not_fit(
    study: ModuleType,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: Any,
    argument: str,
    message: str,
) -> None:
    write_folder(tmp_path, 'a', 'b')
    option, _, rest = argument.partition(' ')
    words = [option, rest] if option == '--rows' else argument.split()
    words = [word.replace('HERE', str(tmp_path)) for word in words]
    words += ['--results', str(tmp_path / 'none.jsonl')]
    monkeypatch.setattr('sys.argv', ['study.py', *words])
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


def test_goes_on_where_it_stopped(
    study: ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    write_folder(tmp_path, 'a1', 'a2', 'b1')
    other = tmp_path / 'other'
    (other / 'images').mkdir(parents=True)
    rows = ['file,label\n']
    for i in range(20):
        values = np.full((32, 32), 100 * (i % 2) + i, np.uint8)
        Image.fromarray(values).save(other / f'images/{i}.png')
        rows.append(f'{i}.png,{i % 2}\n')
    (other / 'labels.csv').write_text(''.join(rows))
    out = tmp_path / 'results.jsonl'
    words = ['--folder', str(tmp_path), '--places', '(.)(.)', '--held-out', '^b']
    words += ['--score', str(other), '--windows', '40', '--results', str(out)]
    words += ['--jobs', '1', '--rows', 'statistics']
    for seeds in (1, 2):
        monkeypatch.setattr(
            'sys.argv', ['study.py', *words, 'start', '--seeds', str(seeds)]
        )
        study.main()
    lines = study.read(out)
    assert [(line['row'], line['seed']) for line in lines] == [
        ('statistics', 0),
        ('start', 0),
        ('statistics', 1),
        ('start', 1),
    ]
    printed = capsys.readouterr().out
    assert '| statistics | 2 |' in printed
    assert 'other k-NN' in printed
    monkeypatch.setattr('sys.argv', ['study.py', '--table', '--results', str(out)])
    study.main()
    assert capsys.readouterr().out in printed


def test_processes_share_the_data(tmp_path: Path) -> None:
    write_folder(tmp_path, 'a', 'b')
    out = tmp_path / 'results.jsonl'
    words = f'--folder {tmp_path} --held-out b --seeds 1 --jobs 1 --windows 40'
    command = [sys.executable, str(PATH), *words.split(), '--results', str(out)]
    command += ['--jobs', '2', '--rows', 'statistics']
    printed = subprocess.check_output(command, text=True)
    assert '| statistics | 1 |' in printed
