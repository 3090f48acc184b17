# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Finding the encoder in whatever a training has left, and building it."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from .._compat import get_weight
from ..bands import spell_band_name
from .checkpoints import Branch, dino_mc_encoder, read_checkpoint
from .convert import is_torchvision_swin, swin_to_timm
from .input_layer import input_layer

#: Where the encoder is in checkpoints of tasks: in BYOL and segmentation of TorchGeo, in
#: MAE, in MoCo and SimCLR, in others, and in a plain state dict.
_PREFIXES = ('model.backbone.model.', 'backbone.vit.', 'backbone.', 'model.', '')


class TrainedEncoder(NamedTuple):
    """The parameters of an encoder in a file, and what the file tells of them."""

    #: In timm's layout, with a classifier if there is one.
    state_dict: dict[str, Tensor]
    #: timm name of the encoder, if the file tells.
    model: str | None
    #: Which of two encoders it is, None if there is one.
    branch: Branch | None
    #: All of the file.
    checkpoint: dict[str, Any]

    @property
    def hparams(self) -> Mapping[str, Any]:
        """Hyperparameters of the task that the file is from."""
        hparams = self.checkpoint.get('hyper_parameters')
        return hparams if isinstance(hparams, Mapping) else {}


def noted_unit_range(checkpoint: Mapping[str, Any]) -> bool | None:
    """Whether a checkpoint tells that images were scaled as :class:`.ToUnitRange` does.

    Args:
        checkpoint: All of a file.

    Returns:
        True if :class:`.UnitRange` or a task of this package has noted it, else None.
    """
    noted = 'UnitRange' in checkpoint.get('callbacks', {})
    return True if noted or checkpoint.get('unit_range') else None


def read_trained(
    path: str | os.PathLike[str], branch: Branch | None = None
) -> TrainedEncoder:
    """Find the encoder in a file.

    Args:
        path: A checkpoint of SoftConTask or DINOMCTask, of another task of TorchGeo, a
            training checkpoint of the authors of DINO-MC, or a state dict.
        branch: Of two encoders, ``'student'``, which is trained, or ``'teacher'``, its
            moving average. Defaults to the one that the paper evaluates: the student of
            SoftCon, the teacher of DINO-MC.

    Returns:
        The encoder.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read safely, or has no such branch.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist, or is no file')
    if branch not in (None, 'student', 'teacher'):
        raise ValueError(f"branch must be 'student' or 'teacher', got {branch!r}")
    checkpoint = read_checkpoint(str(path))
    hparams = checkpoint.get('hyper_parameters')
    model = hparams.get('model') if isinstance(hparams, Mapping) else None
    if 'state_dict' not in checkpoint and {'student', 'teacher'} <= checkpoint.keys():
        branch = branch or 'teacher'
        encoder = dino_mc_encoder(checkpoint, branch)
    else:
        state = checkpoint.get('state_dict', checkpoint)
        prefix, branch = _locate(state, branch, path)
        encoder = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
    if is_torchvision_swin(encoder):
        encoder = swin_to_timm(encoder)
        model = None if model == 'swin_t' else model
    return TrainedEncoder(encoder, model, branch, checkpoint)


def _locate(
    state: Mapping[str, Tensor], branch: Branch | None, path: str | os.PathLike[str]
) -> tuple[str, Branch | None]:
    """What the keys of an encoder start with, and which of two encoders that is."""
    parts = {str(key).partition('.')[0] for key in state}
    if not parts & {'student', 'teacher'}:
        if branch is not None:
            raise ValueError(
                f'branch={branch!r} is for files with two encoders, but {path} has one. '
                'Leave branch out'
            )
        found = (p for p in _PREFIXES if any(k.startswith(p) for k in state))
        return next(found, ''), None
    # `model` is the encoder to use; beside it is the other branch
    names: dict[Branch, str] = {'student': 'model', 'teacher': 'teacher'}
    default: Branch = 'student'
    if 'student' in parts:
        names, default = {'teacher': 'model', 'student': 'student'}, 'teacher'
    branch = branch or default
    if names[branch] not in parts:
        raise ValueError(
            f'branch={branch!r} is not in {path}, which has {sorted(parts)}. Choose '
            'another branch'
        )
    return f'{names[branch]}.', branch


@dataclass(frozen=True)
class Encoder:
    """A trained encoder, ready for use.

    Attributes:
        model: A timm model that pools its features.
        name: Its timm name.
        in_channels: Number of bands.
        size: Side of the images that it was trained with in pixels, if it is known.
        bands: Their names, if they are known.
        unit_range: Whether it expects bands as :class:`.ToUnitRange` scales them, None
            if that is not known.
    """

    model: nn.Module
    name: str
    in_channels: int
    size: int | None
    bands: tuple[str, ...] | None = None
    unit_range: bool | None = None


def _spelled(bands: Sequence[str]) -> list[str]:
    return [spell_band_name(band) for band in bands]


def open_encoder(
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str | None = None,
    model: str | None = None,
    bands: Sequence[str] | None = None,
    unit_range: bool | None = None,
) -> Encoder:
    """Build the encoder that is in a file, or that the name of its weights tells.

    Args:
        checkpoint: See :func:`read_trained`.
        weights: Name of a weight enum member.
        model: timm name of the encoder, if the checkpoint does not have it.
        bands: Names of the bands of the images: chosen from those of *weights* of this
            package, and of a *checkpoint* that does not tell them, all in its order.
        unit_range: Whether it expects bands as :class:`.ToUnitRange` scales them, if
            *weights* or *checkpoint* do not tell.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        ValueError: If not exactly one of *checkpoint* and *weights* is given, or if it
            has no encoder, or if *bands* are not among those of *weights*, or not those
            that *checkpoint* was trained with.
        OSError: If there is no such file, or *weights* cannot be downloaded.
    """
    # Late, as it is the one that reads files by the functions above
    from .loading import create_encoder, is_vit, load_encoder
    from .weights import EncoderWeights

    if (checkpoint is None) == (weights is None):
        raise ValueError(
            'one of checkpoint and weights must be given, got '
            f'checkpoint = {checkpoint} and weights = {weights}'
        )
    if weights is not None:
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
        name, size = meta.get('model'), meta.get('img_size')
        bands = bands or meta.get('bands')
        # Those of DINO-MC are standardized after that
        if unit_range is None:
            unit_range = meta.get('value_range') == (0, 1) and 'mean' not in meta
        if is_torchvision_swin(state):
            state, name = swin_to_timm(state), 'swin_tiny_patch4_window7_224'
    else:
        trained = read_trained(cast(str, checkpoint))
        state, hparams = trained.state_dict, trained.hparams
        name, size = trained.model, hparams.get('size')
        known = hparams.get('bands')
        if bands and known and _spelled(bands) != _spelled(known):
            raise ValueError(
                f'bands must be those that {checkpoint} was trained with, '
                f'{tuple(known)}, got {tuple(bands)}. Leave bands out, and choose and '
                'order those of the dataset'
            )
        bands = bands or known
        if unit_range is None:
            unit_range = noted_unit_range(trained.checkpoint)
    name = model or name
    if not name:
        raise ValueError(
            f'{checkpoint or weights} does not tell its architecture. Set model to the '
            'name of a timm model'
        )

    layer = input_layer(create_encoder(name))[0]
    weight = state.get(f'{layer}.weight')
    if weight is None:
        raise ValueError(
            f'{checkpoint or weights} has no parameters of a {name}: {layer}.weight is '
            'not among them. Set model to the name of its architecture'
        )
    in_channels = int(weight.shape[1])
    encoder: Any = create_encoder(name, in_channels)
    positions = state.get('pos_embed')
    if is_vit(encoder) and positions is not None:
        prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
        side = math.isqrt(positions.shape[1] - prefix)
        if side != encoder.patch_embed.grid_size[0]:
            # Not resampled to timm's native size and back
            encoder.set_input_size(side * encoder.patch_embed.patch_size[0])
    load_encoder(encoder, state)
    return Encoder(
        encoder.eval(),
        name,
        in_channels,
        size or None,
        None if bands is None else tuple(bands),
        unit_range,
    )
