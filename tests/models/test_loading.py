# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchgeo.models import ResNet50_Weights
from torchvision.models._api import Weights, WeightsEnum

from torchgeo_softcon.bands import SENTINEL2_BANDS
from torchgeo_softcon.models import create_encoder, is_vit, load_encoder, read_weights


class TestCreateEncoder:
    @pytest.mark.parametrize(
        ('model', 'size', 'width'),
        [
            ('test_vit', 96, 64),
            ('vit_small_patch14_dinov2', 98, 384),
            ('deit_tiny_patch16_224', 96, 192),
            ('test_vit3', 96, 96),
            ('resnet18', 75, 512),
            ('swin_tiny_patch4_window7_224', 112, 768),
        ],
    )
    def test_any_size_and_bands(self, model: str, size: int, width: int) -> None:
        encoder = create_encoder(model, 5).eval()
        assert encoder(torch.randn(1, 5, size, size)).shape == (1, width)

    def test_parameters_are_those_of_timm(self) -> None:
        for model in ('test_vit', 'resnet18'):
            theirs = timm.create_model(model, in_chans=5, num_classes=0).state_dict()
            ours = create_encoder(model, 5).state_dict()
            assert {k: v.shape for k, v in ours.items()} == {
                k: v.shape for k, v in theirs.items()
            }

    def test_native_size_is_timm_exactly(self) -> None:
        theirs = timm.create_model('test_vit', num_classes=0).eval()
        ours = create_encoder('test_vit').eval()
        ours.load_state_dict(theirs.state_dict())
        image = torch.randn(1, 3, 160, 160)
        assert torch.equal(ours(image), theirs(image))

    def test_drop_path(self) -> None:
        encoder: Any = create_encoder('test_vit', drop_path_rate=0.1)
        rates = [getattr(b.drop_path1, 'drop_prob', 0.0) for b in encoder.blocks]
        torch.testing.assert_close(
            torch.tensor(rates), torch.linspace(0, 0.1, 6), rtol=0, atol=1e-6
        )

    def test_no_drop_path_unless_asked_for(self) -> None:
        # timm's own default is 0.1
        encoder = create_encoder('swin_tiny_patch4_window7_224')
        assert max(getattr(m, 'drop_prob', 0) for m in encoder.modules()) == 0

    def test_unknown_name(self) -> None:
        with pytest.raises(
            ValueError, match=r"'vit_tiny_patch16'.*vit_tiny_patch16_224"
        ):
            create_encoder('vit_tiny_patch16')

    def test_hybrid_is_no_plain_vit(self) -> None:
        assert not is_vit(create_encoder('vit_tiny_r_s16_p8_224'))

    def test_is_vit(self) -> None:
        assert is_vit(create_encoder('test_vit'))
        assert not is_vit(create_encoder('resnet18'))


def random_state(model: str, **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return timm.create_model(model, **kwargs).state_dict()


class TestLoadEncoder:
    @pytest.mark.parametrize('model', ['resnet18', 'test_vit'])
    def test_all_but_the_classifier(self, model: str) -> None:
        state = random_state(model, in_chans=13)
        encoder = create_encoder(model, 13)
        load_encoder(encoder, state)
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, state[key])

    def test_classifier_of_another_name(self) -> None:
        encoder = create_encoder('mobilenetv3_small_050')
        load_encoder(encoder, random_state('mobilenetv3_small_050'))

    @pytest.mark.parametrize('init', ['random', 'rgb', 'timm'])
    def test_only_the_input_layer_is_adapted(self, init: Any) -> None:
        state = random_state('test_vit')
        encoder = create_encoder('test_vit', 13)
        load_encoder(encoder, state, init, SENTINEL2_BANDS)
        for key, value in encoder.state_dict().items():
            if key != 'patch_embed.proj.weight':
                assert torch.equal(value, state[key])
        red = state['patch_embed.proj.weight'][:, 0] * 3 / 13
        new = encoder.state_dict()['patch_embed.proj.weight']
        same = {'random': [], 'rgb': [3], 'timm': [0, 3, 6, 9, 12]}[init]
        for i in range(13):
            assert torch.allclose(new[:, i], red) == (i in same)

    def test_same_bands_are_kept(self) -> None:
        state = random_state('resnet18', in_chans=13)
        encoder = create_encoder('resnet18', 13)
        load_encoder(encoder, state, 'random')
        assert torch.equal(encoder.state_dict()['conv1.weight'], state['conv1.weight'])

    def test_position_embedding_of_another_grid(self) -> None:
        # DINOv2 at 224 px, as SoftCon's authors publish it, with a mask token
        state = random_state('vit_small_patch14_dinov2', img_size=224, num_classes=0)
        state['mask_token'] = torch.zeros(1, 384)
        encoder = create_encoder('vit_small_patch14_dinov2')
        load_encoder(encoder, state)
        reference = timm.create_model(
            'vit_small_patch14_dinov2', img_size=224, num_classes=0
        ).eval()
        del state['mask_token']
        reference.load_state_dict(state)
        image = torch.randn(2, 3, 224, 224)
        ours, theirs = encoder.eval()(image), reference(image)
        assert nn.functional.cosine_similarity(ours, theirs).min() > 0.99

    @pytest.mark.parametrize(
        ('model', 'other'),
        [('resnet18', 'resnet34'), ('resnet18', 'test_vit'), ('test_vit', 'test_vit2')],
    )
    def test_other_architecture(self, model: str, other: str) -> None:
        with pytest.raises(ValueError, match='weights are of another architecture'):
            load_encoder(create_encoder(model), random_state(other))


class LocalWeights(WeightsEnum):  # type: ignore[misc]
    A = Weights('file:///nowhere.pth', None, {})

    def get_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {'a': torch.ones(1)}


class TestReadWeights:
    def test_enum(self) -> None:
        assert read_weights(LocalWeights.A) == {'a': torch.ones(1)}

    def test_state_dict_file(self, tmp_path: Path) -> None:
        state = random_state('resnet18')
        torch.save(state, tmp_path / 'a.pth')
        torch.save({'state_dict': state}, tmp_path / 'b.pth')
        for name in ('a.pth', 'b.pth'):
            loaded = read_weights(str(tmp_path / name))
            assert loaded.keys() == state.keys()
            assert torch.equal(loaded['fc.bias'], state['fc.bias'])

    def test_neither_file_nor_name(self) -> None:
        with pytest.raises(
            ValueError, match=r"existing file or the name .*'nope.ckpt'"
        ):
            read_weights('nope.ckpt')

    def test_error_of_a_download_is_not_hidden(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        member = ResNet50_Weights.SENTINEL2_ALL_MOCO

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise ValueError('hash mismatch')

        monkeypatch.setattr(type(member), 'get_state_dict', fail)
        with pytest.raises(ValueError, match='hash mismatch'):
            read_weights(str(member))

    def test_unreadable_file(self, tmp_path: Path) -> None:
        path = tmp_path / 'broken.ckpt'
        path.write_bytes(b'not a checkpoint')
        with pytest.raises(ValueError, match=r'broken\.ckpt is not a checkpoint'):
            read_weights(str(path))
        torch.save([1, 2], path)
        with pytest.raises(ValueError, match=r'must hold a state dict, got a list'):
            read_weights(str(path))
