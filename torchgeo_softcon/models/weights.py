# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pretrained weights of SoftCon, DINO-MC and DINO-TP."""

import os
import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal, cast

import torch
import torchvision.transforms.v2 as T
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .._checks import check_choice, require
from .._compat import Weights, WeightsEnum, host_weights
from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS, SENTINEL2_SUBSETS
from ..transforms.unit_range import ToUnitRange
from .checkpoints import Branch, check_architecture, dino_mc_encoder, read_checkpoint
from .convert import (
    choose_bands,
    drop_head,
    fresh,
    resample_positions,
    swin_to_timm,
    to_patch_size,
)
from .hub import find_file


def patch_side(model: str) -> int | None:
    """Return the patch size of a Vision Transformer by its name, None of others."""
    match = re.match(r'vit_.+_patch(\d+)_', model)
    return int(match[1]) if match else None


class EncoderWeights(WeightsEnum):
    """Weights that are brought into the layout of the model they are for."""

    def get_state_dict(
        self,
        *,
        progress: bool = True,
        check_hash: bool = False,
        weights_only: bool = True,
        bands: Sequence[str] | None = None,
        img_size: int | None = None,
        branch: Branch | None = None,
        layout: Literal['host', 'timm'] = 'host',
        root: str | os.PathLike[str] | None = None,
        model_dir: str | os.PathLike[str] | None = None,
        map_location: Any = None,
    ) -> dict[str, Tensor]:
        """Read the parameters, from a folder, the cache or the network.

        Args:
            progress: Whether to show the progress of a download.
            check_hash: Whether to check the file, if its name has a part of its hash.
            weights_only: Without effect: files are never loaded unsafely.
            bands: Names of the bands that the model shall see, in any order. Defaults to
                ``meta['bands']``.
            img_size: Side of the images in pixels that a Vision Transformer is built
                for. Defaults to ``meta['img_size']``.
            branch: ``'teacher'`` (the default, as evaluated in the paper) or
                ``'student'``, of DINO-MC and DINO-TP only.
            layout: ``'host'`` for the model of the same name in TorchGeo, which is
                timm's for all but *swin_t*, or ``'timm'``.
            root: Folder with the file, see :func:`~torchgeo_softcon.models.hub.find_file`.
            model_dir: Folder to download to. Defaults to the cache of torch.hub.
            map_location: Device, the CPU by default.

        Raises:
            ValueError: If an argument or the file does not fit the weights.
            RuntimeError: If the download fails.
        """
        model, method = self.meta['model'], self.meta['ssl_method']
        require(
            method != 'softcon' or branch is None,
            f'branch must be left out for {self}, of which one is published, got {branch!r}',
        )
        check_choice('layout', layout, ('host', 'timm'))
        grid = self._grid(img_size)

        path = find_file(
            self.url, self.meta.get('file'), root, model_dir, check_hash, progress
        )
        state_dict: Any = read_checkpoint(path)
        if method != 'softcon':
            state_dict = dino_mc_encoder(state_dict, branch or 'teacher')
        state_dict = drop_head(state_dict)
        source, names = self.meta.get('converted_from', model), self.meta['bands']
        size = None if grid is None else 224  # of the file
        hint = 'Remove the file if it is not the published one'
        what = f'{path} of {self}'
        check_architecture(state_dict, source, len(names), size, what, hint)
        if source != model:
            state_dict = to_patch_size(state_dict, cast(int, patch_side(model)), grid)
        elif grid is not None:
            state_dict = resample_positions(state_dict, grid)
        if bands is not None:
            state_dict = choose_bands(state_dict, names, bands)
        if layout == 'timm' and model == 'swin_t':
            state_dict = swin_to_timm(state_dict)
        return fresh(state_dict, map_location or 'cpu')

    def _grid(self, img_size: int | None) -> int | None:
        """Return the number of patches along each side, None without patches."""
        model, native = self.meta['model'], self.meta['img_size']
        size = native if img_size is None else img_size
        require(
            isinstance(size, Integral),
            f'img_size must be a side as a number, such as 224, got {img_size!r}',
        )
        if (patch := patch_side(model)) is None:
            return None
        require(
            size >= patch and size % patch == 0,
            f'img_size must be a multiple of the patch size {patch} of {model}, got {size}. '
            f'The nearest one is {max(1, round(size / patch)) * patch}',
        )
        return int(size // patch)


def _softcon(enum: str, model: str | None = None) -> tuple[Weights, Weights]:
    """Describe the weights of Sentinel-2 and Sentinel-1 in an enum of the host.

    Converted to *model*, if it is given. Transforms lead to the range of the pretraining;
    the host's are z-scores.
    """

    def describe(member: str, bands: tuple[str, ...]) -> Weights:
        host = host_weights(enum, member)
        # https://github.com/zhu-xlab/softcon/blob/main/LICENSE
        ours = {'license': 'Apache-2.0', 'value_range': (0, 1)}
        meta = {'img_size': 224, **host.meta, **ours}
        if model is not None:
            meta.update(model=model, converted_from=meta['model'])
        transforms = nn.Sequential(
            T.Resize((256, 256)), T.CenterCrop(224), ToUnitRange.of(bands)
        )
        return Weights(url=host.url, transforms=transforms, meta=meta)

    return (
        describe('SENTINEL2_ALL_SOFTCON', SENTINEL2_BANDS),
        describe('SENTINEL1_GRD_SOFTCON', SENTINEL1_BANDS),
    )


def _dino_mc(model: str, mc_id: str, tp_id: str) -> tuple[Weights, Weights]:
    """Describe the training checkpoints of DINO-MC and DINO-TP on Google Drive.

    Their ids are those of https://github.com/WennyXY/DINO-MC#readme. URLs of this form do
    not ask for confirmation before large files.
    """

    def describe(method: str, drive_id: str) -> Weights:
        return Weights(
            url=(
                'https://drive.usercontent.google.com/download'
                f'?id={drive_id}&export=download&confirm=t'
            ),
            transforms=nn.Sequential(
                T.Resize(256, T.InterpolationMode.BICUBIC),
                T.CenterCrop(224),
                T.ToDtype(torch.float32),
                T.Normalize([0.0], [255.0]),
                T.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ),
            meta={
                'dataset': 'SeCo Dataset',
                'in_chans': 3,
                'img_size': 224,
                'model': model,
                'publication': 'https://arxiv.org/abs/2303.06670',
                'repo': 'https://github.com/WennyXY/DINO-MC',
                'ssl_method': method,
                'bands': [*SENTINEL2_SUBSETS[3]],
                # The code is MIT; the links say nothing
                'license': 'MIT (code), not stated (weights)',
                'value_range': (0, 1),
                'mean': IMAGENET_DEFAULT_MEAN,
                'std': IMAGENET_DEFAULT_STD,
                'file': f'{method.replace("-", "")}_{model}.pth',
            },
        )

    return describe('dino-mc', mc_id), describe('dino-tp', tp_id)


class ResNet50_Weights(EncoderWeights):
    """ResNet-50 weights of SoftCon, DINO-MC and DINO-TP, for timm's *resnet50*.

    SoftCon: the files that TorchGeo hosts. Digital numbers (Sentinel-2) or dB
    (Sentinel-1) in, see *transforms*.

    DINO-MC and DINO-TP: training checkpoints of 8-bit RGB images (red first). How the
    authors made 8 bit of reflectance is not published; the quantiles of SeCo, whose
    images they used, are the best guess: 3 to 88, 2 to 103 and 0 to 129 for B2, B3 and
    B4 in the values of SeCo's files.

    If you use these weights in your research, please cite the following papers:

    * https://arxiv.org/abs/2405.20462 (SoftCon)
    * https://arxiv.org/abs/2303.06670 (DINO-MC, DINO-TP)
    """

    SENTINEL2_SOFTCON, SENTINEL1_SOFTCON = _softcon('ResNet50_Weights')
    SENTINEL2_RGB_DINOMC, SENTINEL2_RGB_DINOTP = _dino_mc(
        'resnet50',
        '1Tku4QoQDc3BU1BOr8PzQWFPyVStUDsVE',
        '1mHR9uv5G7-9FpEzGBvdEOcJcWbnHOGEV',
    )


class WideResNet50_2_Weights(EncoderWeights):
    """Weights of DINO-MC and DINO-TP for timm's *wide_resnet50_2*, as those of ResNet-50."""

    SENTINEL2_RGB_DINOMC, SENTINEL2_RGB_DINOTP = _dino_mc(
        'wide_resnet50_2',
        '1WlNDoks3Uo_Al5pUHWrhQpljDrt4Ip__',
        '1MoclNnRlSGOKhudm5lreDYSxYJqciQar',
    )


class Swin_T_Weights(EncoderWeights):
    """Swin-T weights of DINO-MC and DINO-TP, see :class:`ResNet50_Weights`.

    For torchvision's *swin_t*, which TorchGeo's model of this name is, and with
    ``get_state_dict(layout='timm')`` for timm's *swin_tiny_patch4_window7_224*, which is
    equal at 224 pixels only.
    """

    SENTINEL2_RGB_DINOMC, SENTINEL2_RGB_DINOTP = _dino_mc(
        'swin_t',
        '1rod3PxdZ2OGqNJxLp5CAtXm7vIsLO7us',
        '1E00rYPB2wFvnq7exmQwVRe1koQ98BECL',
    )


class ViTSmall8_Weights(EncoderWeights):
    """Weights of DINO-MC and DINO-TP for timm's *vit_small_patch8_224*."""

    SENTINEL2_RGB_DINOMC, SENTINEL2_RGB_DINOTP = _dino_mc(
        'vit_small_patch8_224',
        '18RqKqZYzigOjwbyNzLsys8bmwqxrNhyt',
        '1BIRR56wCwTDlB4_eQTA0DpYYPHACHfxN',
    )


class ViTSmall14_DINOv2_Weights(EncoderWeights):
    """ViT-S/14 weights of SoftCon, the files that TorchGeo hosts.

    For timm's *vit_small_patch14_dinov2* with ``img_size=224``, and for
    *softcon_vit_small_patch14_224* where no size can be given.
    """

    SENTINEL2_SOFTCON, SENTINEL1_SOFTCON = _softcon('ViTSmall14_DINOv2_Weights')


class ViTBase14_DINOv2_Weights(EncoderWeights):
    """ViT-B/14 weights of SoftCon, as those of :class:`ViTSmall14_DINOv2_Weights`."""

    SENTINEL2_SOFTCON, SENTINEL1_SOFTCON = _softcon('ViTBase14_DINOv2_Weights')


class ViTSmall16_Weights(EncoderWeights):
    """ViT-S/16 weights, converted from SoftCon's ViT-S/14 while they are loaded.

    For timm's *vit_small_patch16_224*. SoftCon has not published patch 16; see
    :func:`~torchgeo_softcon.models.convert.to_patch_size` for what is exact in the
    conversion and what is not. At 224 pixels, these are the features of the original at
    196 pixels. The features of the original at 224 pixels need 256 pixels:
    ``get_state_dict(img_size=256)`` and a model that is built with ``img_size=256``.
    """

    SENTINEL2_SOFTCON, SENTINEL1_SOFTCON = _softcon(
        'ViTSmall14_DINOv2_Weights', 'vit_small_patch16_224'
    )


class ViTBase16_Weights(EncoderWeights):
    """ViT-B/16 weights, converted as those of :class:`ViTSmall16_Weights`."""

    SENTINEL2_SOFTCON, SENTINEL1_SOFTCON = _softcon(
        'ViTBase14_DINOv2_Weights', 'vit_base_patch16_224'
    )
