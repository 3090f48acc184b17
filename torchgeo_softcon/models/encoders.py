# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders that were read from checkpoints or from published weights."""

import functools
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import timm
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from .._checks import check_choice
from .._compat import WeightsEnum, get_weight
from ..bands import SENTINEL2_SUBSETS, normalize_band_names, spell_band_name
from .checkpoints import Branch, dino_mc_encoder, read_checkpoint
from .convert import is_torchvision_swin, swin_to_timm
from .input_layer import COLOURS, InputLayerInit, Normalization, input_layer
from .loading import POSITIONS, create_encoder, load_encoder, match_grid
from .timm_models import model_for, timm_name
from .weights import EncoderWeights

#: Where the encoder is in checkpoints of tasks: in BYOL and segmentation of TorchGeo, in
#: MAE, in MoCo and SimCLR, in others; in files of MoCo v3 and v2 as their authors (and
#: SSL4EO-S12) write them, with and without data parallelism; and in a plain state dict.
_PREFIXES = (
    *('model.backbone.model.', 'backbone.vit.', 'backbone.', 'model.'),
    *('module.base_encoder.', 'module.encoder_q.', 'base_encoder.', 'encoder_q.'),
    *('module.encoder.', 'module.', ''),
)

#: What files of MAE have beside the encoder.
_OF_MAE = ('decoder_', 'mask_token')

#: Entry of a checkpoint in which a pretraining task notes its class, its method, and which
#: of its attributes hold the branches.
PRETRAINING = 'pretraining'


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder that was read: its parameters, and what its source tells of them.

    Attributes:
        state_dict: Parameters in timm's layout, with a classifier if there is one.
        name: timm name of the architecture. This and the next seven are None if unknown.
        size: Side of the images that it was trained with in pixels.
        bands: Names of its bands.
        unit_range: Whether it expects bands as :class:`.ToUnitRange` scales them.
        normalization: Mean and standard deviation of its bands by which images in [0, 1]
            were normalized, None also if they were not.
        method: Name of the method that trained it.
        reference: Paper of the method.
        branch: Which of the encoders of its task it is.
        source: Path of the file, or name of the weights.
        checkpoint: All of the file, empty for published weights.
        options: What timm has to build *name* with, besides the number of bands.
    """

    state_dict: dict[str, Tensor]
    name: str | None = None
    size: int | None = None
    bands: tuple[str, ...] | None = None
    unit_range: bool | None = None
    normalization: Normalization | None = None
    method: str | None = None
    reference: str | None = None
    branch: Branch | None = None
    source: str = ''
    checkpoint: Mapping[str, Any] = field(default_factory=dict, repr=False)
    options: Mapping[str, int] = field(default_factory=dict)

    @property
    def hparams(self) -> Mapping[str, Any]:
        """Hyperparameters of the task that the checkpoint is from."""
        return _mapping(self.checkpoint, 'hyper_parameters')

    @functools.cached_property
    def in_channels(self) -> int:
        """Number of bands."""
        key = f'{input_layer(create_encoder(self._known_name()))[0]}.weight'
        weight = self.state_dict.get(key)
        if weight is None:
            raise ValueError(
                f'{self.source} has no parameters of a {self.name}: {key} is not among '
                'them. Set model to the name of its architecture'
            )
        return int(weight.shape[1])

    @functools.cached_property
    def model(self) -> nn.Module:
        """A timm model that pools its features, in evaluation mode."""
        encoder = create_encoder(self._known_name(), self.in_channels)
        # Not resampled to timm's native size and back
        match_grid(encoder, self.state_dict.get('pos_embed'))
        load_encoder(encoder, self.state_dict)
        return encoder.eval()

    def has_bands(self, bands: Sequence[str]) -> bool:
        """Whether it has these bands, in any spelling and in this order."""
        return self.bands is not None and _spelled(self.bands) == _spelled(bands)

    def load_into(
        self, encoder: nn.Module, init: InputLayerInit, bands: Sequence[str] | None
    ) -> None:
        """Load it into an encoder for *bands*, see :func:`.load_encoder`."""
        if init == 'rgb' and self.normalization is None and not self.unit_range:
            rank_zero_info(
                f"in_layer_init='rgb' takes the values of images as they are: {self.source} "
                'does not tell a mean and standard deviation for images in [0, 1]. Those '
                'of timm (weights: true) and of DINO-MC do'
            )
        named = None if bands is not None and self.has_bands(bands) else bands
        load_encoder(encoder, self.state_dict, init, named, self.normalization)

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
            moving average. Defaults to the one that the task exports, as the papers
            evaluate them: the student of SoftCon, the teacher of DINO-MC.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist, or is no file')
    if branch is not None:
        check_choice('branch', branch, get_args(Branch))
    checkpoint = read_checkpoint(str(path))
    hparams = _mapping(checkpoint, 'hyper_parameters')
    note = _mapping(checkpoint, PRETRAINING)
    name, normalization = hparams.get('model'), None
    if 'state_dict' not in checkpoint and {'student', 'teacher'} <= checkpoint.keys():
        branch = branch or 'teacher'
        # In the code of DINO-MC and of DINO
        normalization = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        state_dict = dino_mc_encoder(checkpoint, branch)
    else:
        state = checkpoint.get('state_dict', checkpoint)
        if state is checkpoint and (inner := _mapping(checkpoint, 'model')):
            state = {k: v for k, v in inner.items() if not k.startswith(_OF_MAE)}
        attributes = {str(key).partition('.')[0] for key in state}
        note = note or _guess_note(attributes, hparams)
        if note:
            branches: Any = _mapping(note, 'branches')
            prefix, branch = _locate(branches, attributes, branch, path)
        elif branch is None:
            found = (p for p in _PREFIXES if any(k.startswith(p) for k in state))
            prefix = next(found, '')
        else:
            raise ValueError(
                f'branch={branch!r} is for files with two encoders, but {path} has one. '
                'Leave branch out'
            )
        state_dict = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        if prefix == 'model.' and POSITIONS in checkpoint:
            state_dict['pos_embed'] = checkpoint[POSITIONS]
    if is_torchvision_swin(state_dict):
        state_dict = swin_to_timm(state_dict)
        name = None if name == 'swin_t' else name
    bands = hparams.get('bands')
    callbacks = _mapping(checkpoint, 'callbacks')
    in_unit_range = checkpoint.get('unit_range') or 'UnitRange' in callbacks
    return Encoder(
        state_dict,
        name,
        hparams.get('size') or None,
        None if bands is None else tuple(bands),
        True if in_unit_range else None,
        normalization,
        note.get('method'),
        note.get('reference'),
        branch,
        str(path),
        checkpoint,
    )


def _guess_note(attributes: set[str], hparams: Mapping[str, Any]) -> Mapping[str, Any]:
    """Guess the note of a checkpoint from before there were any."""
    if 'student' in attributes:
        method = 'DINO-TP' if hparams.get('views') == 'temporal' else 'DINO-MC'
        reference, exported, other = 'arXiv 2303.06670', 'teacher', 'student'
    elif 'teacher' in attributes:
        method, reference = 'SoftCon', 'arXiv 2405.20462'
        exported, other = 'student', 'teacher'
    else:
        return {}
    branches = {exported: 'model', other: other}
    return {'method': method, 'reference': reference, 'branches': branches}


def _locate(
    branches: Mapping[Branch, str],
    attributes: set[str],
    branch: Branch | None,
    path: str | os.PathLike[str],
) -> tuple[str, Branch]:
    """Return what the keys of a branch start with (default: of the exported one)."""
    exported = next((b for b, name in branches.items() if name == 'model'), None)
    branch = branch or exported
    if branch is None or branches.get(branch) not in attributes:
        raise ValueError(
            f'branch={branch!r} is not in {path}, which has {sorted(attributes)}. Choose '
            'another branch'
        )
    return f'{branches[branch]}.', branch


def read_weights(weights: WeightsEnum | str) -> dict[str, Tensor]:
    """Read the parameters of an encoder in timm's layout.

    Args:
        weights: A member of a weight enum, its name, or a file, see :func:`read_encoder`.

    Raises:
        ValueError: If *weights* is neither a file nor a known name, or is unreadable.
    """
    return find_weights(weights).state_dict


def initial_weights(
    weights: WeightsEnum | str | bool,
    model: str,
    in_channels: int,
    bands: Sequence[str] | None = None,
) -> Encoder:
    """Read the encoder that a task starts from: True is what *model* stands for.

    Models of this package have weights for *in_channels* bands called *bands*, those of
    timm for RGB.
    """
    if not isinstance(weights, bool):
        return find_weights(weights)
    own = timm_name(model) != model.split('/')[-1].split('.')[0]
    if own:
        created: Any = timm.create_model(
            model, pretrained=True, in_chans=in_channels, bands=bands, num_classes=0
        )
    else:
        created = create_encoder(model, pretrained=True)
    mean, std = (created.pretrained_cfg[key] for key in ('mean', 'std'))
    if own and bands is not None and any(mean):
        names = [COLOURS.get(name, name) for name in normalize_band_names(bands)]
        order = [SENTINEL2_SUBSETS[3].index(name) for name in names]
        mean, std = ([values[i] for i in order] for values in (mean, std))
    return Encoder(
        dict(created.state_dict()),
        model,
        bands=tuple(bands) if own and bands is not None else None,
        normalization=(mean, std) if any(mean) else None,
        source=model,
    )


def find_weights(
    weights: WeightsEnum | str, bands: Sequence[str] | None = None
) -> Encoder:
    """Read an encoder, of an enum of this package for the *bands* of the images."""
    if isinstance(weights, str):
        if os.path.exists(weights):
            return read_encoder(weights)
        try:
            weights = get_weight(weights)
        except ValueError as error:
            raise ValueError(
                f'weights must be an existing file or the name of a weight enum member '
                f'such as ResNet50_Weights.SENTINEL2_ALL_MOCO, got {weights!r}'
            ) from error
    options: Any = {} if bands is None else {'bands': bands}
    state = dict(weights.get_state_dict(progress=True, **options))
    meta = weights.meta
    name, names = meta.get('model'), bands or meta.get('bands')
    if is_torchvision_swin(state):
        state, name = swin_to_timm(state), 'swin_tiny_patch4_window7_224'
    standardized = 'mean' in meta  # those of DINO-MC, from [0, 1]
    return Encoder(
        state,
        name,
        meta.get('img_size'),
        None if names is None else tuple(_spelled(names)),
        meta.get('value_range') == (0, 1) and not standardized,
        (meta['mean'], meta['std']) if standardized else None,
        meta.get('ssl_method'),
        source=str(weights),
    )


def own_weights(weights: Any) -> EncoderWeights | None:
    """Return weights of this package, given as they are or by name, None for others."""
    if isinstance(weights, str):
        with suppress(ValueError):  # a path
            weights = get_weight(weights)
    return weights if isinstance(weights, EncoderWeights) else None


def explain_misfit(task: Any) -> str | None:
    """Tell which model to use with the weights of a task that does not take them."""
    weights = own_weights(getattr(task, 'weights', None))
    if weights is None:
        return None
    options = [k for k in ('model', 'backbone') if task.hparams.get(k)]
    given = ' and '.join(f'{k} = {task.hparams[k]!r}' for k in options)
    fitting = model_for(type(weights).__name__, weights.name.lower())
    return (
        f'weights = {weights} do not fit {given}. '
        f'Set model to {fitting!r} (or backbone to {"tu-" + fitting!r}) and weights to '
        'true: that is the model with these weights, for images of any size'
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
        ValueError: If arguments do not fit each other or the encoder.
        OSError: If there is no such file, or *weights* cannot be downloaded.
    """
    if weights is not None and checkpoint is None:
        if bands is not None and not isinstance(get_weight(weights), EncoderWeights):
            raise ValueError(
                'bands are chosen from weights of this package only, got bands = '
                f'{tuple(bands)} and weights = {weights}. Leave bands out, and choose '
                'and order those of the dataset'
            )
        try:
            encoder = find_weights(weights, bands)
        except RuntimeError as error:  # no network, or another hash
            raise OSError(str(error)) from error
    elif checkpoint is not None and weights is None:
        encoder = read_encoder(checkpoint)
        if bands and encoder.bands and not encoder.has_bands(bands):
            raise ValueError(
                f'bands must be those that {checkpoint} was trained with, '
                f'{encoder.bands}, got {tuple(bands)}. Leave bands out, and choose and '
                'order those of the dataset'
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
