# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The sections of the page of a run."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from ..evaluation.features import prepare
from ..evaluation.probes import evaluate
from ..evaluation.verdict import Finding
from ..models import is_vit
from ..models.checkpoints import read_checkpoint
from ..models.encoders import Encoder
from ..tasks import loading as tasks
from .page import Section
from .pictures import (
    feature_similarities,
    label_similarities,
    patch_tokens,
    plot_classes,
    plot_components,
    plot_map,
    plot_neighbours,
    plot_similarities,
    plot_views,
)
from .samples import Gallery

#: Neighbours that are asked for the label of an image.
_NEIGHBOURS = 10

_TRAINED_ON = (
    'This is ground that the run was trained on: what is seen here says little about other '
    'places. Keep some apart, such as by --data.val_fraction 0.25.'
)


def load_task(checkpoint: str, content: Mapping[str, Any]) -> Any:
    """Rebuild the task of a checkpoint in training mode, None if it is of something else.

    With the augmentations of the run, which checkpoints do not have, if a *config.yaml*
    beside tells them. *content* is what was read of the checkpoint.
    """
    config = Path(checkpoint).absolute().parent.parent / 'config.yaml'
    run = yaml.safe_load(config.read_text()) if config.is_file() else None
    model = run.get('model') if isinstance(run, dict) else None
    chosen = ((model or {}).get('init_args') or {}).get('augmentations')
    path = str(chosen.get('class_path')) if isinstance(chosen, dict) else ''
    options: dict[str, Any] = {}
    # Nothing else is imported because a file says so
    if path.startswith('torchgeo_softcon.'):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument('--augmentations', type=nn.Module)
        parsed = parser.parse_object({'augmentations': chosen})
        options = parser.instantiate_classes(parsed).as_dict()
    return tasks.load_task(checkpoint, content, **options)


def has_other_augmentations(content: Mapping[str, Any], task: Any) -> bool:
    """Tell whether a checkpoint notes other augmentations than the rebuilt task has."""
    own = task.unsaved()['augmentations']
    return bool(content.get('unsaved', {}).get('augmentations', own) != own)


@torch.no_grad()
def picture_sections(
    gallery: Gallery,
    encoder: Encoder,
    checkpoint: str | None = None,
    start: Gallery | None = None,
) -> Iterator[Section]:
    """Draw what an encoder makes of images.

    With the views of the task if the encoder is from a *checkpoint*, and beside what it
    made of the same images at the *start* of the run.
    """
    yield _views(gallery, checkpoint)
    yield from _comparisons(gallery, start)
    yield _map(gallery)
    yield _components(gallery, encoder)
    yield _classes(gallery)


def judge_features(gallery: Gallery) -> list[Finding]:
    """Tell whether features find labels of other images better than colours do.

    By the mean average precision, or accuracy, of each image from its nearest neighbours
    among those of other places.
    """
    known = gallery.labelled()
    question = 'Do the features tell labels better than the colours of the images?'
    if known.labels is None or int(known.apart.sum(1).min()) < _NEIGHBOURS:
        return [Finding(question, None, 'there are too few labelled images apart')]
    labels = known.labels if known.labels.ndim == 2 else F.one_hot(known.labels)
    values = []
    scale = known.statistics.std(0).clamp_min(1e-12)
    for features in (known.features, known.statistics / scale):
        similarity = feature_similarities(features)
        similarity[~known.apart] = -math.inf
        nearest = similarity.topk(_NEIGHBOURS).indices
        values.append(evaluate(labels[nearest].float().mean(1), known.labels))
    ours, colours = values
    reason = (
        f'{ours:.3g} by the {_NEIGHBOURS} nearest of {len(labels)} images of the '
        f'{gallery.split} split by features, {colours:.3g} by mean and standard deviation '
        'of the bands'
    )
    return [Finding(question, ours > colours, reason)]


def _views(gallery: Gallery, checkpoint: str | None) -> Section:
    section = Section(
        'views',
        'Views as the model sees them',
        'The checkpoint is not of a task of this package that draws views.',
    )
    if checkpoint is None:
        return section
    content = read_checkpoint(checkpoint)
    task = load_task(checkpoint, content)
    if task is None:
        return section
    torch.manual_seed(0)
    labelled = [sample for sample in gallery.samples if 'label' in sample]
    samples = (labelled or gallery.samples)[:6]
    batch: dict[str, Tensor] = {
        key: torch.stack([torch.as_tensor(sample[key]) for sample in samples])
        for key in ('image', 'label')
        if key in samples[0]
    }
    try:
        figure = plot_views(task, batch, gallery.bands)
    except ValueError as error:
        return replace(section, text=f'The views could not be drawn: {error}')
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
    text += f'{gallery.show.caption}, on one scale.'
    alt = f'Two or more views of each of {len(samples)} images, and their boxes'
    return replace(section, text=text, figure=figure, alt=alt)


def _comparisons(gallery: Gallery, start: Gallery | None) -> Iterator[Section]:
    """Compare labels and features of all images whose label is known."""
    known = gallery.labelled()
    before = start.labelled().features if start is not None else None
    name, title = 'similarities', 'Labels and embeddings'
    labels, features, apart = known.labels, known.features, known.apart
    if labels is None or len(labels) < 2:
        yield Section(name, title, f'The {gallery.split} split has no labels.')
        return
    number = f'{len(features)} images of the {gallery.split} split'
    warning = _TRAINED_ON if gallery.trained_on else ''
    figure, ranks = plot_similarities(features, labels, before)
    past = anew = ''
    if before is not None:
        past = f' (at the start: {ranks[0]:.2f})'
        anew = ' Weights that were random at the start of the run are drawn anew.'
    yield Section(
        name,
        title,
        f'Pairs among {number}. Label similarity is the cosine of multi-labels '
        '(or whether classes are the same), embedding similarity the cosine of '
        'features minus their mean. Blocks that are in both matrices, and medians '
        f'that rise, mean that the encoder finds the labels.{anew}',
        figure,
        f'Rank correlation of label and embedding similarity: {ranks[-1]:.2f}{past}',
        warning=warning,
    )
    title = 'Nearest neighbours'
    if not apart.any(1).all():
        yield Section('neighbours', title, 'All images are of one place.')
        return
    by_label = label_similarities(labels)
    similarity = feature_similarities(features).masked_fill(~apart, -math.inf)
    nearest = by_label.gather(1, similarity.argmax(1, keepdim=True)).mean()
    others = 'other places' if known.places else 'all others'
    yield Section(
        'neighbours',
        title,
        f'A few of {number}, and the five most similar of {others}. Below each: '
        'similarity of the embedding | of the label. '
        f'{gallery.show.caption}, all images on one scale.',
        plot_neighbours(known.thumbnails, features, labels, apart),
        f'Mean label similarity to the nearest neighbour: {nearest:.2f}, to any image: '
        f'{by_label[apart].mean():.2f}',
        warning=warning,
    )


def _map(gallery: Gallery) -> Section:
    name, title = 'map', 'Map of the embeddings'
    if gallery.centres is None:
        return Section(name, title, 'The data do not tell where images are.')
    text = (
        f'{len(gallery.centres)} images of the {gallery.split} split where they are, in '
        'colours of the first three principal components of their embeddings: what has '
        'the same colour is the same to the encoder. Colours that follow the land, and '
        'not the borders of the scenes, are a good sign.'
    )
    alt = f'Map of {len(gallery.centres)} images, coloured by their embeddings'
    return Section(name, title, text, plot_map(gallery.features, gallery.centres), alt)


def _components(gallery: Gallery, encoder: Encoder) -> Section:
    images = torch.stack([sample['image'] for sample in gallery.samples])
    images, _ = prepare(images, encoder.in_channels, None, first=True)
    if is_vit(encoder.model):
        vit: Any = encoder.model
        patch = vit.patch_embed.patch_size[0]
        side = int(-(-min(images.shape[-2:]) // patch) * patch)
        images = F.interpolate(images, (side, side), mode='bilinear')
    section = Section(
        'components',
        'Patch tokens',
        f'The last feature map of {encoder.name} is smaller than 4 x 4 for images of '
        f'{images.shape[-1]} pixels: too coarse to show.',
    )
    tokens = patch_tokens(encoder.model, images)
    if tokens is None:
        return section
    text = (
        'The first three principal components of the last tokens, over all images '
        'together, as red, green and blue: what has the same colour is the same to '
        'the encoder. Fields and shores that stand out are a good sign.'
    )
    figure = plot_components(tokens, gallery.thumbnails[: len(tokens)])
    alt = f'Principal components of the tokens of {len(tokens)} images, as colours'
    return replace(section, text=text, figure=figure, alt=alt)


def _classes(gallery: Gallery) -> Section:
    masks, product = gallery.masks, gallery.product
    known = {*product.no_data, *product.codes}
    if masks is None or any(
        m.ndim != 2 or {*m.unique().tolist()} - known for m in masks
    ):
        text = f'The data have no masks with codes of {product.title}.'
        return Section('classes', 'Land cover', text)
    text = f'What the labels are made of: {product.title} under the images.'
    figure = plot_classes(masks, gallery.thumbnails[: len(masks)], product)
    present = {int(code) for mask in masks for code in mask.unique()}
    names = [name for code, name in product.names.items() if code in present]
    alt = f'Land cover of {len(masks)} images: {", ".join(names)}'
    return Section('classes', 'Land cover', text, figure, alt)
