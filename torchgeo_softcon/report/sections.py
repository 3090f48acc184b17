# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The sections of the page of a run."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import nn

from ..models import is_vit
from ..models.checkpoints import read_checkpoint
from ..models.encoders import Encoder
from ..tasks import loading as tasks
from .page import Section
from .pictures import (
    patch_tokens,
    plot_classes,
    plot_components,
    plot_neighbours,
    plot_similarities,
    plot_views,
)
from .samples import Gallery, collect


def run_augmentations(config: Path) -> nn.Module | None:
    """The augmentations of a run, which its checkpoints do not have.

    Args:
        config: Configuration of the run, as the command line has saved it.

    Returns:
        The augmentations, None if the run had those of its task or if they are no part of
        this package.
    """
    if not config.is_file():
        return None
    content = yaml.safe_load(config.read_text())
    model = content.get('model') if isinstance(content, dict) else None
    options = (model or {}).get('init_args') or {}
    chosen = options.get('augmentations')
    # Nothing else is imported because a file says so
    if not isinstance(chosen, dict) or not re.match(
        r'torchgeo_softcon\.', str(chosen.get('class_path'))
    ):
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument('--augmentations', type=nn.Module)
    parsed = parser.parse_object({'augmentations': chosen})
    return cast(nn.Module, parser.instantiate_classes(parsed).augmentations)


def load_task(checkpoint: str, content: Mapping[str, Any]) -> Any:
    """Rebuild the task of a checkpoint with the augmentations of its run.

    Args:
        checkpoint: Path of the checkpoint.
        content: What is in it, from :func:`.read_checkpoint`.

    Returns:
        The task in training mode, or None if the checkpoint is of something else.
    """
    config = Path(checkpoint).absolute().parent.parent / 'config.yaml'
    augmentations = run_augmentations(config)
    options = {} if augmentations is None else {'augmentations': augmentations}
    return tasks.load_task(checkpoint, content, **options)


def has_other_augmentations(content: Mapping[str, Any], task: Any) -> bool:
    """Whether a run had other augmentations than the task that was made of it.

    Args:
        content: What is in a checkpoint of the run.
        task: From :func:`load_task`.

    Returns:
        True if the checkpoint tells so.
    """
    own = task.unsaved()['augmentations']
    return bool(content.get('unsaved', {}).get('augmentations', own) != own)


@torch.no_grad()
def picture_sections(
    encoder: Encoder,
    datamodule: LightningDataModule,
    checkpoint: str | None = None,
    split: str | None = None,
    count: int = 200,
) -> Iterator[Section]:
    """Pictures of what an encoder makes of data.

    Args:
        encoder: The encoder.
        datamodule: The data.
        checkpoint: Where the encoder is from, to show the views of its task.
        split: Part of the data, see :func:`.collect`.
        count: Number of images.

    Yields:
        Sections of the page.
    """
    gallery = collect(encoder, datamodule, split, count)
    yield _views(gallery, checkpoint)
    features, labels, thumbnails = gallery.labelled()
    number = f'{len(features)} images of the {gallery.split} split'
    if labels is None or len(labels) < 2:
        text = f'The {gallery.split} split has no labels.'
        yield Section('similarities', 'Labels and embeddings', text)
    else:
        yield Section(
            'similarities',
            'Labels and embeddings',
            f'Pairs among {number}. Label similarity is the cosine of multi-labels (or '
            'whether classes are the same), embedding similarity the cosine of features '
            'minus their mean. Blocks that are in both matrices, and medians that rise, '
            'mean that the encoder finds the labels.',
            plot_similarities(features, labels),
        )
        yield Section(
            'neighbours',
            'Nearest neighbours',
            f'Ten of {number}, and the five most similar among all. Below each: '
            'similarity of the embedding | of the label. '
            f'{gallery.show.caption}, all images on one scale.',
            plot_neighbours(thumbnails, features, labels),
        )
    yield _components(gallery, encoder)
    yield _classes(gallery)


def _views(gallery: Gallery, checkpoint: str | None) -> Section:
    title = 'Views as the model sees them'
    content = {} if checkpoint is None else read_checkpoint(checkpoint)
    task = None if checkpoint is None else load_task(checkpoint, content)
    figure = None
    if task is not None:
        torch.manual_seed(0)
        samples = [s for s in gallery.samples if 'label' in s][:6] or gallery.samples[
            :6
        ]
        batch: dict[str, Any] = {
            key: torch.stack([torch.as_tensor(sample[key]) for sample in samples])
            for key in ('image', 'label')
            if key in samples[0]
        }
        try:
            figure = plot_views(task, batch, gallery.bands)
        except ValueError as error:
            return Section('views', title, f'The views cannot be drawn: {error}')
    if figure is None:
        text = 'The checkpoint is not of a task of this package that draws views.'
        return Section('views', title, text)
    text = (
        'Drawn anew from the images on the left. The frame of a view has the colour of '
        'its box on the image. '
    )
    if has_other_augmentations(content, task):
        text += (
            'These are the default augmentations of the task: the run had others, which '
            'neither its checkpoint nor a config.yaml beside it has. '
        )
    if hasattr(task, 'masking'):
        text += 'Pink patches are masked. '
    return Section(
        'views', title, f'{text}{gallery.show.caption}, on one scale.', figure
    )


def _components(gallery: Gallery, encoder: Encoder) -> Section:
    title = 'Patch tokens'
    images = torch.stack([sample['image'] for sample in gallery.samples])
    images = images[:, : encoder.in_channels] if images.ndim == 4 else images[:, 0]
    if is_vit(encoder.model):
        vit: Any = encoder.model
        patch = vit.patch_embed.patch_size[0]
        side = int(-(-min(images.shape[-2:]) // patch) * patch)
        images = torch.nn.functional.interpolate(images, (side, side), mode='bilinear')
    tokens = patch_tokens(encoder.model, images)
    if tokens is None:
        text = (
            f'The last feature map of {encoder.name} is smaller than 4 x 4 for images of '
            f'{images.shape[-1]} pixels: too coarse to show.'
        )
        return Section('components', title, text)
    text = (
        'The first three principal components of the last tokens, over all images '
        'together, as red, green and blue: what has the same colour is the same to the '
        'encoder. Fields and shores that stand out are a good sign.'
    )
    figure = plot_components(tokens, gallery.thumbnails[: len(tokens)])
    return Section('components', title, text, figure)


def _classes(gallery: Gallery) -> Section:
    title = 'Land cover'
    masks, product = gallery.masks, gallery.product
    known = {*product.no_data, *product.codes}
    if masks is None or any(
        m.ndim != 2 or {*m.unique().tolist()} - known for m in masks
    ):
        text = f'The data have no masks with codes of {product.title}.'
        return Section('classes', title, text)
    text = f'What the labels are made of: {product.title} under the images.'
    figure = plot_classes(masks, gallery.thumbnails[: len(masks)], product)
    return Section('classes', title, text, figure)
