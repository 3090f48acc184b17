# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchgeo.datamodules import BigEarthNetDataModule, EuroSATDataModule
from torchgeo.datasets import EuroSAT

from torchgeo_softcon import SyntheticScenesDataModule
from torchgeo_softcon.__main__ import main
from torchgeo_softcon.bands import SENTINEL2_BANDS
from torchgeo_softcon.datasets import SyntheticScenes
from torchgeo_softcon.evaluation.evaluate import evaluate_encoder, extract_features
from torchgeo_softcon.evaluation.features import encode
from torchgeo_softcon.evaluation.samples import LabelledSamples
from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.models.encoders import Encoder
from torchgeo_softcon.models.features import last_block_features
from torchgeo_softcon.transforms import ToUnitRange
from torchgeo_softcon.transforms.views import center_view

from ..callbacks.helpers import Patches, PatchesDataModule
from ..datamodules.host_data import make_bigearthnet, make_eurosat
from ..models.helpers import WeightsFolder

PATCHES = 'tests.callbacks.helpers.PatchesDataModule'


class Spectrum(nn.Module):
    """Tells classes of made-up data by their mean spectrum, and keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return image.mean((2, 3)) - 0.5


def of_module(
    model: nn.Module,
    name: str,
    in_channels: int,
    size: int | None = None,
    bands: tuple[str, ...] | None = None,
    unit_range: bool | None = None,
) -> Encoder:
    encoder = Encoder(model.state_dict(), name, size, bands, unit_range)
    vars(encoder).update(model=model, in_channels=in_channels)
    return encoder


@pytest.fixture(scope='module')
def eurosat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_eurosat(tmp_path_factory.mktemp('eurosat'), 4, 1)


class TestEvaluate:
    def test_multiclass(self, eurosat: Path) -> None:
        model = Spectrum()
        encoder = of_module(model, 'spectrum', 13, 28, unit_range=True)
        datamodule: Any = EuroSATDataModule(root=eurosat, batch_size=7)
        values = evaluate_encoder(encoder, datamodule, k=(1, 3))
        assert (values['train_images'], values['test_images']) == (40, 10)
        assert values['chance_accuracy'] == pytest.approx(0.1)
        for name in ('knn1', 'knn3', 'linear'):
            assert values[f'{name}_accuracy_pooled'] == 1
        # What the papers show: the centre of the resized image, in SoftCon's range
        raw = torch.stack([datamodule.train_dataset[i]['image'] for i in range(7)])
        unit = ToUnitRange.of(datamodule.train_dataset.bands)(raw)
        torch.testing.assert_close(model.seen[0], center_view(unit, 28))

    def test_multilabels(self, tmp_path: Path) -> None:
        encoder = of_module(Spectrum(), 'spectrum', 12, None, unit_range=True)
        data = BigEarthNetDataModule(root=make_bigearthnet(tmp_path), bands='s2')
        values = evaluate_encoder(encoder, data, 'val', (3,), size=16)
        assert values['val_images'] == 4
        assert values['knn3_map_pooled'] == values['knn3_micro_map_pooled'] == 1
        assert values['chance_map'] == pytest.approx(0.5)

    def test_part_of_the_labels(self) -> None:
        encoder = of_module(create_encoder('test_vit', 4).eval(), 'test_vit', 4, 32)
        values = [
            evaluate_encoder(
                encoder, PatchesDataModule(kind='multiclass'), k=(2,), fraction=share
            )
            for share in (0.5, 0.5, 1.0)
        ]
        assert values[0] == values[1]
        assert [v['train_images'] for v in values] == [12, 12, 24]
        names = {name for name in values[0] if 'accuracy' in name}
        assert names == {
            'chance_accuracy',
            *(f'knn2_accuracy_{name}' for name in ('cls', 'mean')),
            *(f'linear_accuracy_{name}' for name in ('cls', 'mean', 'blocks')),
        }

    def test_images_are_encoded_once(self) -> None:
        model: Any = create_encoder('test_vit', 4).eval()
        sizes: list[int] = []
        model.patch_embed.register_forward_pre_hook(
            lambda module, args: sizes.append(len(args[0]))
        )
        samples = LabelledSamples(Patches(7), range(7), 'seven')
        encoder = of_module(model, 'test_vit', 4, 32)
        features, *_ = extract_features(encoder, samples, 32, torch.device('cpu'))
        assert sizes == [7]
        image = torch.stack([Patches(7)[i]['image'] for i in range(7)])
        image = center_view(image, 32)
        depth = min(4, len(model.blocks))
        with torch.inference_mode():
            expected = encode(model, image)
            expected['blocks'] = last_block_features(model, image, depth)
        assert list(features) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(features[name], value)

    def test_unlabelled_images_are_left_out(self) -> None:
        encoder = of_module(create_encoder('test_vit', 4).eval(), 'test_vit', 4, 32)
        values = evaluate_encoder(encoder, PatchesDataModule(kind='unknown'), k=(2,))
        assert values['train_images'] == values['test_images'] == 12

    def test_bands_in_another_order(self, eurosat: Path) -> None:
        """The classic mistake: EuroSAT has B8A last, SoftCon has not."""
        order = SENTINEL2_BANDS
        encoder = of_module(Spectrum(), 'spectrum', 13, 28, order, unit_range=True)
        datamodule: Any = EuroSATDataModule(root=eurosat)
        with pytest.raises(ValueError, match=r"must be those .*'B12', 'B8A'\). Choose"):
            evaluate_encoder(encoder, datamodule)
        spelled = [f'B0{b[1]}' if len(b) == 2 else b for b in order]
        datamodule = EuroSATDataModule(root=eurosat, bands=spelled)
        assert (
            evaluate_encoder(encoder, datamodule, k=(1,))['knn1_accuracy_pooled'] == 1
        )

    @pytest.mark.parametrize(
        ('data', 'options', 'match'),
        [
            ({}, {'split': 'train'}, "split must be 'test' or 'val', got 'train'"),
            ({}, {'k': (25,)}, r'k must be from 1 to .* 24, got \(25,\)'),
            ({}, {'fraction': 0}, 'fraction must be'),
            ({}, {'device': 'cuda:99'}, 'device must be one .* here, got cuda:99: '),
            ({'kind': 'mask'}, {}, 'training split must have samples with image and'),
            ({'bad': math.nan}, {}, 'features of the training split .* are NaN'),
        ],
    )
    def test_bad_input(
        self, data: dict[str, Any], options: dict[str, Any], match: str
    ) -> None:
        encoder = of_module(create_encoder('test_vit', 4).eval(), 'test_vit', 4, 32)
        with pytest.raises(ValueError, match=match):
            evaluate_encoder(encoder, PatchesDataModule(**data), **options)

    def test_training_images_are_no_test(self) -> None:
        encoder = of_module(create_encoder('test_vit', 4).eval(), 'test_vit', 4, 32)
        data: Any = PatchesDataModule()
        data.train_dataset = data.test_dataset = Patches()
        data.setup = lambda stage: None
        with pytest.raises(ValueError, match='PatchesDataModule has the images of its'):
            evaluate_encoder(encoder, data)

    @pytest.mark.parametrize('split', ['test', 'val'])
    def test_training_ground_is_no_test(
        self, split: str, scenes: SyntheticScenes
    ) -> None:
        """Windows of the same ground overlap: any encoder finds them."""
        encoder = of_module(Spectrum(), 'spectrum', 13, 32)
        args: dict[str, Any] = {'root': scenes.root, 'size': 96, 'dates': 2}
        args |= {'patch_size': 32, 'length': 16}
        data = SyntheticScenesDataModule(**args)
        with pytest.raises(ValueError, match=r'the same ground, .* by val_fraction'):
            evaluate_encoder(encoder, data, split, k=(2,))
        data = SyntheticScenesDataModule(**args, val_fraction=1 / 3)
        values = evaluate_encoder(encoder, data, split, k=(2,))
        # A third of two places of 96 pixels in windows of 32
        assert (values['train_images'], values[f'{split}_images']) == (16, 6)


class TestCommand:
    def test_published_weights(
        self,
        eurosat: Path,
        weights_folder: WeightsFolder,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        weights_folder.use(monkeypatch)
        out = tmp_path / 'result.json'
        status = main(
            [
                *('evaluate', '--weights', 'ResNet50_Weights.SENTINEL2_SOFTCON'),
                *(
                    '--data',
                    'EuroSATDataModule',
                    '--data.dict_kwargs.root',
                    str(eurosat),
                ),
                *('--size', '32', '--k', '[3]', '--device', 'cpu', '--out', str(out)),
                *('--bands', f'[{",".join(EuroSAT.all_band_names)}]'),
            ]
        )
        assert status == 0
        text = capsys.readouterr().out
        assert 'knn3_accuracy_pooled' in text
        result = json.loads(out.read_text())
        assert result['weights'] == 'ResNet50_Weights.SENTINEL2_SOFTCON'
        assert result['data']['class_path'].endswith('EuroSATDataModule')
        assert 0 <= result['linear_accuracy_pooled'] <= 1
        how = ('split', 'fraction', 'seed', 'temperature', 'unit_range')
        assert [result[name] for name in how] == ['test', 1, 42, 0.07, True]
        assert result['bands'][-1] == 'B8A'

    @pytest.mark.parametrize(
        ('args', 'message'),
        [
            (['--weights', 'ResNet50_Weights.SENTINEL2_SOFTCON'], 'data must be given'),
            (['--config', 'none.yaml'], 'config none.yaml does not exist'),
            (['--data', PATCHES], 'one of checkpoint and weights must be given'),
            (['--data', PATCHES, '--checkpoint', 'none.ckpt'], 'does not exist'),
            (['--data', PATCHES, '--out', 'none/a.json'], 'the folder of out = none/a'),
            (['--data', PATCHES, '--out', __file__], 'exists already. Set overwrite'),
        ],
    )
    def test_bad_input(
        self, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(['evaluate', *args]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize('command', ['evaluate', 'embed', 'report'])
    def test_no_network(
        self,
        command: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        monkeypatch.delenv('TORCHGEO_SOFTCON_WEIGHTS', raising=False)

        def refused(*args: Any, **kwargs: Any) -> None:
            raise ConnectionRefusedError('no network')

        monkeypatch.setattr('torchgeo_softcon.models.hub._fetch', refused)
        weights = ('--weights', 'ResNet50_Weights.SENTINEL2_SOFTCON')
        assert main([command, *weights, '--data', PATCHES]) == 2
        assert 'could not be downloaded' in capsys.readouterr().err
