# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The encoder of a task, and its features."""

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.loading import has_class_token
from ..transforms.seasons import split_seasons

#: Where TorchGeo's self-supervised tasks keep their encoder: MoCo and SimCLR in
#: ``backbone``, MAE in ``backbone.vit``, BYOL in ``model.backbone.model``. Other tasks,
#: ours among them, have it in ``model``.
_NAMES = ('backbone', 'vit', 'model')


def find_encoder(task: nn.Module, name: str | None = None) -> nn.Module:
    """Find the encoder that a task of this package or of TorchGeo trains."""
    if name is not None:
        try:
            return task.get_submodule(name)
        except AttributeError as error:
            children = ', '.join(child for child, _ in task.named_children())
            raise ValueError(
                f'encoder must be a module of {type(task).__name__} ({children}), or in '
                f'one of them, got {name!r}'
            ) from error

    module: Any = task
    while not hasattr(module, 'forward_features'):
        found = [n for n in _NAMES if isinstance(getattr(module, n, None), nn.Module)]
        if not found:
            raise ValueError(
                f'{type(task).__name__} has no timm model in {" or ".join(_NAMES)}. Set '
                'encoder to the name of the attribute that has the encoder'
            )
        module = getattr(module, found[0])
    return cast(nn.Module, module)


def encode(encoder: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Encode images by all poolings that an encoder knows.

    Args:
        encoder: A timm model, or any module from (B, C, H, W) to (B, F).
        image: Images of shape (B, C, H, W).

    Returns:
        Features of shape (B, F): *cls* and *mean*, the class token and the mean of the
        patch tokens, of a Vision Transformer that has a class token, and *pooled* of any
        other encoder. The pooling that the encoder itself uses comes first, and equals
        its output before a classifier.
    """
    model: Any = encoder
    if not hasattr(model, 'forward_features'):
        return {'pooled': model(image).flatten(1)}
    return pool(encoder, model.forward_features(image))


def pool(encoder: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Pool what ``forward_features`` of a timm model gives, as :func:`encode` does."""
    model: Any = encoder
    own, *other = poolings(encoder)
    features = {own: model.forward_head(tokens, pre_logits=True).flatten(1)}
    for name in other:
        patches = tokens[:, model.num_prefix_tokens :]
        token = patches.mean(1) if name == 'mean' else tokens[:, 0]
        features[name] = model.fc_norm(token)
    return features


def poolings(encoder: nn.Module) -> tuple[str, ...]:
    """Return the names of the features that :func:`encode` gives of an encoder."""
    if not has_class_token(encoder) or encoder.global_pool not in ('token', 'avg'):
        return ('pooled',)
    return ('cls', 'mean') if encoder.global_pool == 'token' else ('mean', 'cls')


def resize(image: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Resize images to squares of *size* pixels, if they have another size."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    return F.interpolate(
        image, (size, size), mode='bilinear', antialias=antialias, align_corners=False
    )


def prepare(
    image: Tensor,
    in_channels: int | None,
    size: int | None,
    first: bool = False,
    view: Callable[[Tensor, int], Tensor] = resize,
) -> tuple[Tensor, int]:
    """Bring images to what an encoder takes.

    Args:
        image: Images of shape (B, C, H, W), (B, T * C, H, W) or (B, T, C, H, W).
        in_channels: Number of bands C, None if it is not known and T is 1.
        size: Side of the result in pixels, None for no change.
        first: Whether to take the first of several seasons only.
        view: Brings images to *size*.

    Returns:
        Images of shape (B * T, C, size, size), and T.
    """
    seasons = 1
    if in_channels is not None:
        image = split_seasons(image, in_channels)
        image = image[:, :1] if first else image
        seasons = image.shape[1]
        image = image.flatten(0, 1)
    return (image if size is None else view(image, size)), seasons
