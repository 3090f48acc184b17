# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""``pretrain`` and ``recipe``: what a newcomer runs first."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchgeo.main import main as torchgeo

from tests.ssl4eo.archives import write_archive
from tests.ssl4eo.zarr_archives import write_shards
from torchgeo_softcon import SoftConTask
from torchgeo_softcon.__main__ import main
from torchgeo_softcon.cli import pretrain_plan
from torchgeo_softcon.cli.pretrain_plan import Found, find_data, plan
from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.datasets.scene_pack import pack_scenes

EXAMPLES = Path(__file__).parents[2] / 'examples'

SMALL = [
    *('--model.model', 'test_resnet', '--model.size', '32', '--model.hidden_dim=16'),
    *('--model.output_dim', '8', '--data.batch_size', '4', '--data.patch_size', '32'),
    *('--trainer.accelerator', 'cpu', '--trainer.enable_progress_bar', 'false'),
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['torchgeo'])
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def weights(run: str) -> dict[str, Any]:
    """The last weights of a run."""
    (path,) = Path(run).rglob('step=4.ckpt')
    state: dict[str, Any] = torch.load(path, weights_only=True)['state_dict']
    return state


def test_scenes(
    scenes: SyntheticScenes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A killed run goes on, and all is what ``torchgeo fit`` makes of config.yaml."""
    step = SoftConTask.training_step

    def killed(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    root = str(scenes.images.parent)
    args = ['pretrain', root, '--out', 'run', *SMALL, '--trainer.max_steps', '4']
    with monkeypatch.context() as patch:
        patch.setattr(SoftConTask, 'training_step', killed)
        assert main(args) == 130
    out, err = capsys.readouterr()
    assert 'has 4 scenes of 13 bands' in out
    assert 'Method: SoftCon, there is land cover' in out
    assert err.endswith('interrupted, start again to go on\n')

    # Options of another run are refused, not left out
    assert main(args) == 2
    assert 'leave out --model.model' in capsys.readouterr().err
    assert main(args[:4]) == 0
    out = capsys.readouterr().out
    assert 'Going on from step 2' in out
    assert 'report.html' in out
    assert 'torchgeo-softcon embed --checkpoint run/checkpoints/step=4.ckpt' in out
    assert [*Path('run').glob('metrics-until-2.csv')]

    config = yaml.safe_load(Path('run/config.yaml').read_text())
    assert 'ckpt_path' not in config
    config['trainer']['logger']['init_args']['save_dir'] = 'stock'
    Path('stock.yaml').write_text(yaml.safe_dump(config))
    torchgeo(['fit', '--config', 'stock.yaml'])
    stock = weights('stock')
    assert all(torch.equal(v, stock[k]) for k, v in weights('run').items())

    # And once more: nothing is left to do
    monkeypatch.setattr('torchgeo_softcon.cli.pretrain._finish', lambda run: 0)
    assert main(['pretrain', root, '--out', 'run']) == 0
    assert 'step=4.ckpt is of the last step' in capsys.readouterr().out


def write_patches(root: Path, count: int, side: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        for kind, shape in (('images', (side, side, 3)), ('masks', (side, side))):
            (root / kind).mkdir(parents=True, exist_ok=True)
            values = rng.choice([10, 80], shape).astype('uint8')
            Image.fromarray(values).save(root / kind / f'{number}.png')


class TestFinding:
    def test_patches_with_masks(self) -> None:
        write_patches(Path('data'), 60, 40)
        found = find_data(Path('data'), None, False, Path('run'))
        assert found.text == '60 patches of 40 x 40 pixels or more, with masks'
        config, _ = plan(found)
        options = config['data']['init_args']
        assert options['val_fraction'] == 0.1
        assert options['size'] == 40
        assert config['model']['init_args']['size'] == 32
        assert config['model']['init_args']['in_channels'] == 3

    def test_archive(self) -> None:
        days = {f'{place:07}': ['20200604'] for place in range(4)}
        write_archive(Path('data'), {'s2a': days})
        found = find_data(Path('data'), None, False, Path('run'))
        assert found.text == 'SSL4EO-S12, split s2a, as published'
        assert not found.labels
        config, reasons = plan(found)
        assert config['model']['class_path'] == 'DINOMCTask'
        assert config['model']['init_args']['in_channels'] == 12
        assert 'no land cover was found (--worldcover DIR' in reasons[0]

    @pytest.mark.parametrize(
        ('modalities', 'split'), [(['S2RGB'], 's2rgb'), (['S1GRD', 'S2RGB'], 's1')]
    )
    def test_shards(self, modalities: list[str], split: str) -> None:
        Path('data').mkdir()
        write_shards(Path('data'), [*modalities, 'LULC'])
        found = find_data(Path('data'), None, False, Path('run'))
        expected = f'split {split}, as published, with the labels of LULC'
        assert found.text == f'SSL4EO-S12, {expected}'

    def test_scenes_without_land_cover(self, scenes: SyntheticScenes) -> None:
        found = find_data(scenes.images, None, False, Path('run'))
        assert not found.labels
        assert found.text.endswith('and no WorldCover')
        named = find_data(scenes.images, scenes.worldcover, False, Path('run'))
        assert named.labels

    def test_packed_scenes(self, scenes: SyntheticScenes) -> None:
        pack_scenes(scenes.images, 'bare')
        assert not find_data(Path('bare'), None, False, Path('run')).labels
        shutil.move('bare', 'packed')
        pack_scenes(scenes.images, 'packed', scenes.worldcover)
        found = find_data(Path('packed'), None, False, Path('run'))
        assert found.text.endswith('and packed land cover')
        assert found.options == {'root': 'packed'}
        config, reasons = plan(found)
        assert reasons[0] == 'Method: SoftCon, there is land cover'
        assert config['data']['init_args']['root'] == 'packed'

    def test_download(
        self, scenes: SyntheticScenes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def fetch(names: list[str], root: Path) -> Any:
            asked.extend(names)
            shutil.copytree(scenes.worldcover, root)
            return pretrain_plan.TileDownload(downloaded=names)

        monkeypatch.setattr(pretrain_plan, 'download_tiles', fetch)
        found = find_data(scenes.images, None, True, Path('run'))
        assert asked == ['N45E012']
        assert found.options['worldcover'] == ['run/worldcover']

    @pytest.mark.parametrize('exists', [True, False])
    def test_nothing(self, exists: bool, capsys: pytest.CaptureFixture[str]) -> None:
        if exists:
            Path('data').mkdir()
        assert main(['pretrain', 'data']) == 2
        expected = 'must have georeferenced rasters' if exists else 'does not exist'
        assert expected in capsys.readouterr().err

    @pytest.mark.parametrize('option', ['--nonsense', '--model.size'])
    def test_wrong_options(
        self, option: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(['pretrain', '.', option]) == 2
        assert option in capsys.readouterr().err


@pytest.mark.parametrize(
    ('images', 'gigabytes', 'labels', 'expected'),
    [
        (56, 0, True, ('SoftConTask', 'resnet18', 32, 300)),
        (56, 0, False, ('DINOMCTask', 'test_resnet', 32, 300)),
        (2_000, 16, True, ('SoftConTask', 'resnet50', 32, 6200)),
        (100_000, 140, True, ('SoftConTask', 'vit_small_patch16_224', 256, 39_000)),
        (100_000, 16, False, ('DINOMCTask', 'vit_small_patch16_224', 8, 100_000)),
    ],
)
def test_rule(
    images: int,
    gigabytes: int,
    labels: bool,
    expected: tuple[str, str, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Device:
        total_memory = gigabytes * 1e9

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gigabytes > 0)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda index: Device)
    monkeypatch.setattr(pretrain_plan, '_count', lambda *args: (images, 13))
    found = Found('scenes', 'WorldCoverScenesDataModule', labels, 5000, 5000)
    config, reasons = plan(found)
    model = config['model']
    assert (
        model['class_path'],
        model['init_args']['model'],
        config['data']['init_args']['batch_size'],
        config['trainer']['max_steps'],
    ) == expected
    assert f'for {images} images' in reasons[1]
    assert len(config['trainer']['callbacks']) == 2 + labels


class TestRecipe:
    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(['recipe']) == 0
        lines = capsys.readouterr().out.splitlines()
        names = [line.split()[0] for line in lines]
        assert names == sorted(path.stem for path in EXAMPLES.glob('*.yaml'))
        assert all(len(line) < 120 for line in lines)

    def test_write(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(['recipe', 'sar']) == 0
        text = Path('sar.yaml').read_text()
        original = (EXAMPLES / 'sar.yaml').read_text()
        assert yaml.safe_load(text) == yaml.safe_load(original)
        assert '#   torchgeo fit --config sar.yaml' in text
        assert main(['recipe', 'sar']) == 2
        assert 'sar.yaml exists' in capsys.readouterr().err
        assert main(['recipe', 'sar', '--overwrite']) == 0

    def test_unknown(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(['recipe', 'nonsense']) == 2
        assert 'quickstart' in capsys.readouterr().err
