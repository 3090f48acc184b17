# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Models for timm's registry, with the weights of SoftCon, DINO-MC and DINO-TP.

Under these names, everything that creates models with timm can have them pretrained, for
any of their bands: TorchGeo's tasks with ``weights: true``, ``tu-`` encoders of
segmentation_models_pytorch, ``timm.create_model(..., pretrained=True, in_chans=12)``.

Nothing but timm is imported here: this module is loaded whenever timm is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from .._checks import require
from ..bands import (
    SENTINEL1_BANDS,
    SENTINEL2_BANDS,
    SENTINEL2_SUBSETS,
    bands_of_count,
    normalize_band_names,
)
from .convert import is_head, plain_name

#: Members of the enums by the tags of timm, and their bands. The first is the default.
_SOFTCON = {'sentinel2_softcon': SENTINEL2_BANDS, 'sentinel1_softcon': SENTINEL1_BANDS}
_DINO_MC = {
    'sentinel2_rgb_dinomc': SENTINEL2_SUBSETS[3],
    'sentinel2_rgb_dinotp': SENTINEL2_SUBSETS[3],
}

#: Start of the URLs that stand for members of the enums.
_SCHEME = 'torchgeo-softcon:'
#: Where a configuration of timm may say, besides a URL, that weights come from.
_SOURCES = ('file', 'state_dict', 'hf_hub_id')

# As in timm's own models of these families
_LAYERS = {
    'resnet': {'first_conv': 'conv1', 'classifier': 'fc'},
    'vit': {'first_conv': 'patch_embed.proj', 'classifier': 'head'},
    'swin': {'first_conv': 'patch_embed.proj', 'classifier': 'head.fc'},
}
#: For images of other sizes, which TorchGeo's tasks have no argument for.
_ANY_SIZE: dict[str, dict[str, Any]] = {
    'resnet': {},
    'vit': {'img_size': 224, 'dynamic_img_size': True, 'dynamic_img_pad': True},
    'swin': {'img_size': 224, 'strict_img_size': False},
}

#: Enums with the weights of timm's models.
_ENUMS = {
    'resnet50': 'ResNet50_Weights',
    'wide_resnet50_2': 'WideResNet50_2_Weights',
    'swin_tiny_patch4_window7_224': 'Swin_T_Weights',
    'vit_small_patch8_224': 'ViTSmall8_Weights',
    'vit_small_patch14_dinov2': 'ViTSmall14_DINOv2_Weights',
    'vit_base_patch14_dinov2': 'ViTBase14_DINOv2_Weights',
    'vit_small_patch16_224': 'ViTSmall16_Weights',
    'vit_base_patch16_224': 'ViTBase16_Weights',
}


class _Model:
    """A model that timm and TorchGeo create by a call."""

    def __init__(self, name: str, timm_name: str) -> None:
        """Initialize a new _Model instance."""
        self.timm_name, self.enum = timm_name, _ENUMS[timm_name]
        self.family = next(family for family in _LAYERS if family in timm_name)
        self.bands = _SOFTCON if name.startswith('softcon_') else _DINO_MC
        self.options = dict(_ANY_SIZE[self.family])
        if name.endswith('_256'):
            self.options['img_size'] = 256
        # What timm registers it by, and what TorchGeo finds by get_model_weights
        self.__name__ = self.__qualname__ = name
        self.__doc__ = f'Create {timm_name} for the weights of {self.enum}.'
        self.weights = [f'{self.enum}.{tag.upper()}' for tag in self.bands]

    def __call__(
        self,
        weights: Any = None,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        bands: Sequence[str] | None = None,
        cache_dir: Any = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Create the model.

        Args:
            weights: Member of the enum, which TorchGeo's get_model hands over first.
            pretrained: Whether to load weights.
            pretrained_cfg: Tag or configuration of the weights, by default the first with
                the bands. timm loads those of a configuration from elsewhere.
            pretrained_cfg_overlay: See timm. If it names other weights, timm loads them.
            bands: Names of the bands that the model shall see, by default those that the
                number *in_chans* stands for.
            cache_dir: Folder to download to.
            **kwargs: Arguments of timm's model, such as *in_chans* (default: as many as
                the weights have), *num_classes* (default: 0), *img_size*.
        """
        if weights is not None:
            require(
                str(weights) in self.weights,
                f'weights must be one of get_model_weights({self.__name__!r}), got {weights}',
            )
            pretrained, pretrained_cfg = True, weights.name.lower()
        channels = kwargs.pop('in_chans', None)
        if bands is not None:
            bands = normalize_band_names(bands)
            require(
                channels in (None, len(bands)),
                f'in_chans must be the number of bands, {len(bands)}, got {channels}',
            )
            channels = len(bands)
        asked = self._own_tag(pretrained_cfg)
        require(
            asked is None or asked in self.bands,
            f'{self.__name__} must have one of the tags {[*self.bands]}, got {asked!r}',
        )
        elsewhere = pretrained_cfg is not None and asked is None
        tag = asked or self._choose_tag(channels if bands is None else bands)
        channels = len(self.bands[tag]) if channels is None else channels
        kwargs = {**self.options, **kwargs}

        cfg = {**self.cfg(tag, channels), 'architecture': self.__name__, 'tag': tag}
        overlay = dict(pretrained_cfg_overlay or {})
        foreign = elsewhere or any(overlay.get(key) for key in ('url', *_SOURCES))
        created = timm.create_model(
            self.timm_name,
            pretrained=pretrained and foreign,
            pretrained_cfg=pretrained_cfg if elsewhere else cfg,
            pretrained_cfg_overlay=overlay,
            cache_dir=cache_dir,
            in_chans=channels,
            **kwargs,
        )
        if pretrained and not foreign:
            chosen = bands or bands_of_count(channels, self.bands[tag])
            state_dict = self._read(tag, chosen, kwargs.get('img_size'), cache_dir)
            _load(created, state_dict, bool(kwargs.get('features_only')))
        return created

    def cfg(self, tag: str, channels: int) -> dict[str, Any]:
        """Return what timm wants to know of pretrained weights."""
        rgb = self.bands is _DINO_MC
        size = self.options.get('img_size', 224)
        return {
            # Says to timm that there are weights; _read gets them
            'url': f'{_SCHEME}{self.enum}.{tag.upper()}',
            'input_size': (channels, size, size),
            'num_classes': 0,
            'mean': IMAGENET_DEFAULT_MEAN if rgb else (0.0,) * channels,
            'std': IMAGENET_DEFAULT_STD if rgb else (1.0,) * channels,
            'origin_url': 'https://github.com/'
            + ('WennyXY/DINO-MC' if rgb else 'zhu-xlab/softcon'),
            'paper_ids': 'arXiv:2303.06670' if rgb else 'arXiv:2405.20462',
            'pool_size': None if self.family == 'vit' else (7, 7),
            **_LAYERS[self.family],
        }

    def _own_tag(self, cfg: Any) -> str | None:
        """Return the tag that is asked for, None for weights from elsewhere."""
        if cfg is None or isinstance(cfg, str):
            return cfg
        cfg = cfg if isinstance(cfg, Mapping) else vars(cfg)
        elsewhere = any(cfg.get(key) for key in _SOURCES)
        if elsewhere or not str(cfg.get('url')).startswith(_SCHEME):
            return None
        enum, _, member = cfg['url'].removeprefix(_SCHEME).partition('.')
        require(
            enum == self.enum,
            f'pretrained_cfg must be of {self.enum} for {self.__name__}, got {enum}.'
            f'{member}. Leave it out, or choose the model that it is for',
        )
        return str(member.lower())

    def _choose_tag(self, bands: Sequence[str] | int | None) -> str:
        """Return the first weights that have the bands, else the first ones."""
        if isinstance(bands, int):
            fitting = [tag for tag, known in self.bands.items() if len(known) == bands]
        else:
            fitting = [
                t for t, known in self.bands.items() if {*(bands or ())} <= {*known}
            ]
        return (fitting or [*self.bands])[0]

    def _read(
        self, tag: str, bands: Sequence[str], img_size: Any, cache_dir: Any
    ) -> dict[str, Tensor]:
        """Read the parameters."""
        from . import weights  # which imports TorchGeo

        member: weights.EncoderWeights = getattr(weights, self.enum)[tag.upper()]
        patch, size = weights.patch_side(self.timm_name), None
        if patch and isinstance(img_size, int):  # else _load resamples positions
            size = max(1, img_size // patch) * patch
        return member.get_state_dict(
            bands=bands, img_size=size, layout='timm', model_dir=cache_dir
        )


#: The models by their names. An entry point names each of them as well. Those of 256
#: pixels have the grid of patch 14, and therefore its features.
_MODELS = {
    name: _Model(name, timm_name)
    for name, timm_name in (
        ('softcon_resnet50', 'resnet50'),
        ('softcon_vit_small_patch14_224', 'vit_small_patch14_dinov2'),
        ('softcon_vit_base_patch14_224', 'vit_base_patch14_dinov2'),
        ('softcon_vit_small_patch16_224', 'vit_small_patch16_224'),
        ('softcon_vit_base_patch16_224', 'vit_base_patch16_224'),
        ('softcon_vit_small_patch16_256', 'vit_small_patch16_224'),
        ('softcon_vit_base_patch16_256', 'vit_base_patch16_224'),
        ('dinomc_resnet50', 'resnet50'),
        ('dinomc_wide_resnet50_2', 'wide_resnet50_2'),
        ('dinomc_vit_small_patch8_224', 'vit_small_patch8_224'),
        ('dinomc_swin_tiny_patch4_window7_224', 'swin_tiny_patch4_window7_224'),
    )
}
globals().update(_MODELS)

#: timm reads this when a model of this module is registered.
default_cfgs = generate_default_cfgs(
    {
        f'{name}.{tag}': model.cfg(tag, len(bands))
        for name, model in _MODELS.items()
        for tag, bands in model.bands.items()
    }
)


def timm_name(model: str) -> str:
    """Return the name of timm's model of the same architecture, without a tag."""
    name = model.split('/')[-1].split('.')[0]
    return _MODELS[name].timm_name if name in _MODELS else name


def model_for(enum: str, tag: str) -> str:
    """Return the name, with its tag, of our model with the weights of an enum."""
    models = _MODELS.items()
    return next(f'{n}.{tag}' for n, m in models if m.enum == enum and tag in m.bands)


def _load(model: nn.Module, state_dict: dict[str, Tensor], features_only: bool) -> None:
    """Load parameters, all but classifiers strictly.

    timm's own loader adapts input layers of other than 3 bands at random and, in some
    versions, takes a Swin Transformer without classifier for one of another layout.
    """
    own = model.state_dict()
    names = {key: plain_name(key) for key in own}
    missing = sorted(n for n in names.values() if not (n in state_dict or is_head(n)))
    lost = sorted(state_dict.keys() - set(names.values()))
    require(
        not missing and (features_only or not lost),
        f'the arguments of the model leave no place for the weights {lost[:3]}, or need '
        f'others {missing[:3]}. Leave out what changes the layers',
    )
    loaded = {k: state_dict[name] for k, name in names.items() if name in state_dict}
    for key, value in loaded.items():
        if key.endswith('pos_embed') and value.shape != own[key].shape:
            vit: Any = model.model if key.startswith('model.') else model
            loaded[key] = resample_abs_pos_embed(value, list(vit.patch_embed.grid_size))
    model.load_state_dict(loaded, strict=False)
