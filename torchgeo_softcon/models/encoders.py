# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders that were read from checkpoints or from published weights."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._compat import WeightsEnum, get_weight
from ..bands import spell_band_name
from .checkpoints import Branch, dino_mc_encoder, read_checkpoint
from .convert import is_torchvision_swin, swin_to_timm
from .input_layer import input_layer
from .loading import create_encoder, is_vit, load_encoder
from .weights import EncoderWeights

#: Where the encoder is in checkpoints of tasks: in BYOL and segmentation of TorchGeo, in
#: MAE, in MoCo and SimCLR, in others, and in a plain state dict.
_PREFIXES = ('model.backbone.model.', 'backbone.vit.', 'backbone.', 'model.', '')

#: Entry of a checkpoint in which a pretraining task notes its class, its method, and which
#: of its attributes hold the branches.
PRETRAINING = 'pretraining'

#: Methods of checkpoints that have no such note, and their papers.
_PAPERS = {
    'SoftCon': 'arXiv 2405.20462',
    'DINO-MC': 'arXiv 2303.06670',
    'DINO-TP': 'arXiv 2303.06670',
}


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder that was read: its parameters, and what its source tells of them.

    Attributes:
        state_dict: Parameters in timm's layout, with a classifier if there is one.
        name: timm name of the architecture, None if it is not known.
        size: Side of the images that it was trained with in pixels, if it is known.
        bands: Names of its bands, if they are known.
        unit_range: Whether it expects bands as :class:`.ToUnitRange` scales them, None
            if that is not known.
        method: Name of the method that trained it, if it is known.
        reference: Paper of the method, if it is known.
        branch: Which of the encoders of its task it is, None if that is not known.
        source: Path of the file, or name of the weights.
        checkpoint: All of the file, empty for published weights.
        options: What timm has to build *name* with, besides the number of bands.
    """

    state_dict: dict[str, Tensor]
    name: str | None = None
    size: int | None = None
    bands: tuple[str, ...] | None = None
    unit_range: bool | None = None
    method: str | None = None
    reference: str | None = None
    branch: Branch | None = None
    source: str = 'The module'
    checkpoint: Mapping[str, Any] = field(default_factory=dict, repr=False)
    options: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_module(
        cls,
        model: nn.Module,
        name: str,
        in_channels: int,
        size: int | None = None,
        bands: Sequence[str] | None = None,
        unit_range: bool | None = None,
    ) -> 'Encoder':
        """Describe a module that is built already.

        Args:
            model: Any module from (B, C, H, W) to (B, F).
            name: Name of its architecture.
            in_channels: Number of bands C.
            size: Side of the images that it was trained with in pixels.
            bands: Names of its bands.
            unit_range: Whether it expects bands as :class:`.ToUnitRange` scales them.
        """
        names = None if bands is None else tuple(bands)
        encoder = cls(model.state_dict(), name, size, names, unit_range)
        vars(encoder).update(model=model, in_channels=in_channels)
        return encoder

    @property
    def hparams(self) -> Mapping[str, Any]:
        """Hyperparameters of the task that the checkpoint is from."""
        return _mapping(self.checkpoint, 'hyper_parameters')

    @functools.cached_property
    def in_channels(self) -> int:
        """Number of bands."""
        layer = input_layer(create_encoder(self._known_name()))[0]
        weight = self.state_dict.get(f'{layer}.weight')
        if weight is None:
            raise ValueError(
                f'{self.source} has no parameters of a {self.name}: {layer}.weight is '
                'not among them. Set model to the name of its architecture'
            )
        return int(weight.shape[1])

    @functools.cached_property
    def model(self) -> nn.Module:
        """A timm model that pools its features, in evaluation mode."""
        encoder: Any = create_encoder(self._known_name(), self.in_channels)
        positions = self.state_dict.get('pos_embed')
        if is_vit(encoder) and positions is not None:
            prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
            side = math.isqrt(positions.shape[1] - prefix)
            if side != encoder.patch_embed.grid_size[0]:
                # Not resampled to timm's native size and back
                encoder.set_input_size(side * encoder.patch_embed.patch_size[0])
        load_encoder(encoder, self.state_dict)
        return encoder.eval()

    def _known_name(self) -> str:
        if not self.name:
            raise ValueError(
                f'{self.source} does not tell its architecture. Set model to the name of '
                'a timm model'
            )
        return self.name


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an entry of a file if it is a mapping, else an empty one."""
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def read_encoder(path: str | os.PathLike[str], branch: Branch | None = None) -> Encoder:
    """Read the encoder in a file.

    Args:
        path: A checkpoint of a pretraining task of this package or of another task of
            TorchGeo, a training checkpoint of the authors of DINO-MC, or a state dict.
        branch: Of two encoders, ``'student'``, which is trained, or ``'teacher'``, its
            moving average. Defaults to the one that the task exports: the student of
            SoftCon, the teacher of DINO-MC, as the papers evaluate them.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file cannot be read safely, or has no such branch.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist, or is no file')
    if branch not in (None, 'student', 'teacher'):
        raise ValueError(f"branch must be 'student' or 'teacher', got {branch!r}")
    checkpoint = read_checkpoint(str(path))
    hparams = _mapping(checkpoint, 'hyper_parameters')
    note = _mapping(checkpoint, PRETRAINING)
    name, method = hparams.get('model'), note.get('method')
    reference = note.get('reference')
    if 'state_dict' not in checkpoint and {'student', 'teacher'} <= checkpoint.keys():
        branch = branch or 'teacher'
        state_dict = dino_mc_encoder(checkpoint, branch)
    else:
        state = checkpoint.get('state_dict', checkpoint)
        attributes = {str(key).partition('.')[0] for key in state}
        branches: Any = _mapping(note, 'branches') or _guess_branches(attributes)
        prefix, branch = _locate(state, branches, branch, path)
        if branches and not method:
            method = _guess_method(branches, hparams)
            reference = _PAPERS[method]
        state_dict = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
    if is_torchvision_swin(state_dict):
        state_dict = swin_to_timm(state_dict)
        name = None if name == 'swin_t' else name
    bands = hparams.get('bands')
    in_unit_range = checkpoint.get('unit_range') or 'UnitRange' in _mapping(
        checkpoint, 'callbacks'
    )
    return Encoder(
        state_dict,
        name,
        hparams.get('size') or None,
        None if bands is None else tuple(bands),
        True if in_unit_range else None,
        method,
        reference,
        branch,
        str(path),
        checkpoint,
    )


def _guess_branches(attributes: set[str]) -> dict[Branch, str]:
    """Guess what holds the branches in a checkpoint that has no note of it.

    `model` is the encoder that the task exports; beside it is the other branch.
    """
    if 'student' in attributes:
        return {'teacher': 'model', 'student': 'student'}
    return {'student': 'model', 'teacher': 'teacher'} if 'teacher' in attributes else {}


def _guess_method(branches: Mapping[Branch, str], hparams: Mapping[str, Any]) -> str:
    """Guess the method of a checkpoint that has no note of it."""
    if branches.get('student') == 'model':
        return 'SoftCon'
    return 'DINO-TP' if hparams.get('views') == 'temporal' else 'DINO-MC'


def _locate(
    state: Mapping[str, Tensor],
    branches: Mapping[Branch, str],
    branch: Branch | None,
    path: str | os.PathLike[str],
) -> tuple[str, Branch | None]:
    """Return what the keys of an encoder start with, and which branch that is."""
    if not branches:
        if branch is not None:
            raise ValueError(
                f'branch={branch!r} is for files with two encoders, but {path} has one. '
                'Leave branch out'
            )
        found = (p for p in _PREFIXES if any(k.startswith(p) for k in state))
        return next(found, ''), None
    exported = next((b for b, name in branches.items() if name == 'model'), None)
    branch = branch or exported
    attributes = sorted({str(key).partition('.')[0] for key in state})
    if branch is None or branches.get(branch) not in attributes:
        raise ValueError(
            f'branch={branch!r} is not in {path}, which has {attributes}. Choose another '
            'branch'
        )
    return f'{branches[branch]}.', branch


def read_weights(weights: WeightsEnum | str) -> dict[str, Tensor]:
    """Read the parameters of an encoder.

    Args:
        weights: A weight enum, the name of one, or the path of a file, see
            :func:`read_encoder`.

    Returns:
        A state dict in timm's layout.

    Raises:
        ValueError: If *weights* is neither a file nor a known name, or is unreadable.
    """
    if isinstance(weights, str) and os.path.exists(weights):
        return read_encoder(weights).state_dict
    if isinstance(weights, str):
        try:
            weights = get_weight(weights)
        except ValueError as error:
            raise ValueError(
                f'weights must be an existing file or the name of a weight enum member '
                f'such as ResNet50_Weights.SENTINEL2_ALL_MOCO, got {weights!r}'
            ) from error
    state_dict = weights.get_state_dict(progress=True)
    if is_torchvision_swin(state_dict):
        return swin_to_timm(state_dict)
    return dict(state_dict)


def _of_weights(weights: str, bands: Sequence[str] | None) -> Encoder:
    """Read published weights."""
    member = get_weight(weights)
    if bands is not None and not isinstance(member, EncoderWeights):
        raise ValueError(
            f'bands are chosen from weights of this package only, got bands = '
            f'{tuple(bands)} and weights = {weights}. Leave bands out, and choose and '
            'order those of the dataset'
        )
    options: Any = {} if bands is None else {'bands': bands}
    try:
        state = dict(member.get_state_dict(progress=True, **options))
    except RuntimeError as error:  # no network, or another hash
        raise OSError(str(error)) from error
    meta = member.meta
    name, names = meta.get('model'), bands or meta.get('bands')
    if is_torchvision_swin(state):
        state, name = swin_to_timm(state), 'swin_tiny_patch4_window7_224'
    return Encoder(
        state,
        name,
        meta.get('img_size'),
        None if names is None else tuple(names),
        # Those of DINO-MC are standardized after that
        meta.get('value_range') == (0, 1) and 'mean' not in meta,
        meta.get('ssl_method'),
        source=weights,
    )


def open_encoder(
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    model: str | None = None,
    bands: Sequence[str] | None = None,
    unit_range: bool | None = None,
) -> Encoder:
    """Read and build the encoder in a file, or that of published weights.

    Args:
        checkpoint: See :func:`read_encoder`.
        weights: Name of a weight enum member.
        model: timm name of the encoder, if the checkpoint does not have it.
        bands: Names of the bands of the images: chosen from those of *weights* of this
            package, and of a *checkpoint* that does not tell them, all in its order.
        unit_range: Whether it expects bands as :class:`.ToUnitRange` scales them, if
            *weights* or *checkpoint* do not tell.

    Raises:
        ValueError: If not exactly one of *checkpoint* and *weights* is given, or if it
            has no encoder, or if *bands* are not among those of *weights*, or not those
            that *checkpoint* was trained with.
        OSError: If there is no such file, or *weights* cannot be downloaded.
    """
    if weights is not None and checkpoint is None:
        encoder = _of_weights(weights, bands)
    elif checkpoint is not None and weights is None:
        encoder = read_encoder(checkpoint)
        known = encoder.bands
        if bands and known and _spelled(bands) != _spelled(known):
            raise ValueError(
                f'bands must be those that {checkpoint} was trained with, {known}, got '
                f'{tuple(bands)}. Leave bands out, and choose and order those of the '
                'dataset'
            )
        if bands:
            encoder = replace(encoder, bands=tuple(bands))
    else:
        raise ValueError(
            'one of checkpoint and weights must be given, got '
            f'checkpoint = {checkpoint} and weights = {weights}'
        )
    if unit_range is None:
        unit_range = encoder.unit_range
    encoder = replace(encoder, name=model or encoder.name, unit_range=unit_range)
    encoder.model  # noqa: B018, raises what does not fit
    return encoder


def _spelled(bands: Sequence[str]) -> list[str]:
    return [spell_band_name(band) for band in bands]
