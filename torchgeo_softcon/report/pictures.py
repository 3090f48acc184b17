# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pictures of what an encoder makes of images."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from ..bands import shown_channels
from ..landcover import LandCoverProduct
from ..landcover.products import WORLDCOVER
from ..tasks import PretrainingTask

Array = npt.NDArray[Any]

#: Share of the pixels that are darker than black and brighter than white.
_CLIPPED = 0.02

#: Colours of boxes, told apart also by those who see no red or no green, and on land.
#: https://jfly.uni-koeln.de/color/
_COLOURS = [
    *('#d55e00', '#56b4e9', '#f0e442', '#cc79a7', '#009e73'),
    *('#e69f00', '#0072b2', '#882255', '#000000'),
]

#: Colour of masked pixels, which no land has.
_PINK = (0.93, 0.35, 0.75)


#: Titles of matrices of similarities.
_MATRICES = {
    'label': 'label similarity',
    'embedding': 'embedding similarity',
    'start': 'embedding similarity at the start',
    'now': 'embedding similarity now',
}

#: Side in degrees of the squares of ground that a map shows side by side, and how many.
_SQUARE, _SQUARES = 0.5, 6


class Display:
    """Shows images of any bands in colours, all on one scale."""

    def __init__(self, images: Tensor, bands: Sequence[str] | None = None) -> None:
        """Take the scale from images (B, C, H, W).

        Pixels without data do not count: NaN, or 0 in all bands.
        """
        self.channels = shown_channels(bands, images.shape[1])
        shown = images[:, self.channels].float().movedim(1, -1)  # (B, H, W, 1 or 3)
        seen = shown[~(images.isnan().any(1) | (images == 0).all(1))]
        limits = np.tile([[0.0], [1.0]], len(self.channels))
        if len(seen):
            limits = np.quantile(seen.numpy(), (_CLIPPED, 1 - _CLIPPED), axis=0)
        self.limits = list(zip(*limits.tolist(), strict=True))

    @property
    def caption(self) -> str:
        """Sentence that tells which bands are shown."""
        names = ', '.join(str(channel + 1) for channel in self.channels)
        if len(self.channels) == 1:
            return f'Shown is the band number {names}'
        return f'Shown are the bands number {names} as red, green and blue'

    def __call__(self, image: Tensor) -> Array:
        """Return the colours in [0, 1], (H, W, 3), of an image of shape (C, H, W)."""
        low, high = torch.tensor(self.limits).T
        shown = image[self.channels].float().movedim(0, -1) - low
        colours = (shown / (high - low).clamp_min(1e-12)).clamp(0, 1)
        return np.array(colours.expand(-1, -1, 3))


def _grid(rows: int, columns: int, size: float = 1.6, extra: float = 0.0) -> Any:
    """Make axes for pictures of *size* inches, with *extra* inches below each."""
    figure = Figure((size * columns, (size + extra) * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def plot_views(
    task: PretrainingTask, batch: dict[str, Tensor], bands: Sequence[str] | None = None
) -> Figure:
    """Plot the views that a task draws of up to eight images, in a row per image."""
    boxes: list[Tensor] = []

    def keep_boxes(module: Any, args: Any, output: Any) -> None:
        found = getattr(module, 'boxes', [])
        boxes.extend(found if isinstance(found, list) else [found])

    hook = task.augmentations.register_forward_hook(keep_boxes)
    try:
        views = task.draw_for_report(batch)
    finally:
        hook.remove()
    boxed = len(boxes) == len(views)
    images = batch['image'] if batch['image'].ndim == 4 else batch['image'][:, 0]
    images = images[:, : views[0][1].shape[1]]
    resized = [F.interpolate(view, images.shape[-1]) for _, view in views]
    show = Display(torch.cat([images, *resized]), bands)
    figure, axes = _grid(len(images), 1 + len(views))
    axes[0, 0].set_title('image', fontsize='medium')
    for axis, image in zip(axes[:, 0], images, strict=True):
        axis.imshow(show(image))
    for number, (name, view) in enumerate(views):
        colour = _COLOURS[number % len(_COLOURS)]
        # A frame of the colour of its box on the image
        weight = 'bold' if boxed else 'normal'
        axes[0, 1 + number].set_title(name, fontsize='medium', fontweight=weight)
        for row, axis in enumerate(axes[:, 1 + number]):
            colours = show(view[row].nan_to_num())
            colours[view[row].isnan().any(0).numpy()] = _PINK
            axis.imshow(colours)
            if boxed:
                left, top, right, bottom = (boxes[number][row] - 0.5).tolist()
                outline = Rectangle((left, top), right - left, bottom - top)
                outline.set(fill=False, edgecolor=colour, linewidth=1.5, clip_on=False)
                axes[row, 0].add_patch(outline)
                axis.spines[:].set(visible=True, color=colour, linewidth=2)
    return figure


def label_similarities(labels: Tensor) -> Tensor:
    """Compare labels: cosine similarity of (N, K), or equality of class indices (N,)."""
    if labels.ndim == 1:
        return (labels[:, None] == labels).float()
    unit = F.normalize(labels.float())
    return unit @ unit.T


def feature_similarities(features: Tensor) -> Tensor:
    """Compare features of shape (N, F): cosine similarity after subtracting their mean.

    Without that, what all images share, such as the mean of a rectified layer, would
    make all of them look alike.
    """
    unit = F.normalize(features.float() - features.float().mean(0))
    return unit @ unit.T


def plot_similarities(
    features: Tensor, labels: Tensor, start: Tensor | None = None
) -> tuple[Figure, list[float]]:
    """Plot similarities of labels and of features, of all pairs of images.

    Matrices and a scatter plot of features (N, F), those of the *start* of the run if they
    are known, and labels (N, K) or (N,). Also returns their rank correlations with those
    of the labels.
    """
    # Images with the same label side by side
    keys = labels[:, None] if labels.ndim == 1 else labels
    order = torch.from_numpy(np.lexsort(keys.numpy().T[::-1]).copy())
    by_label = label_similarities(labels)[order][:, order]
    shown = (
        {'embedding': features} if start is None else {'start': start, 'now': features}
    )
    by_feature = {k: feature_similarities(v)[order][:, order] for k, v in shown.items()}

    figure = Figure((8, 7.6), layout='constrained')
    *matrices, scatter = figure.subplot_mosaic(
        'ab;cc' if start is None else 'ab;cd'
    ).values()
    for axis, (name, matrix) in zip(
        matrices, {'label': by_label, **by_feature}.items(), strict=True
    ):
        low, colours = (0, 'viridis') if name == 'label' else (-1, 'RdBu_r')
        picture = axis.imshow(matrix.numpy(), vmin=low, vmax=1, cmap=colours)
        axis.set_title(_MATRICES[name], fontsize='medium')
        axis.set_xlabel('images, sorted by label')
        figure.colorbar(picture, ax=axis, shrink=0.8)

    upper = np.triu_indices(len(order), 1)
    columns = {name: matrix.numpy()[upper] for name, matrix in by_feature.items()}
    pairs = pd.DataFrame({'x': by_label.numpy()[upper], **columns})
    pairs = pairs.rename(columns={pairs.columns[-1]: 'y'})
    ranks = pairs.rank().corr()['x'].drop('x').tolist()  # Spearman
    few = np.random.default_rng(0).permutation(len(pairs))[:4000]
    jitter = np.random.default_rng(1).uniform(-0.012, 0.012, len(few))
    alpha = min(0.8, max(0.15, 300 / len(few)))
    x, y = pairs['x'][few] + jitter, pairs['y'][few]
    scatter.scatter(x, y, s=8, alpha=alpha, linewidths=0)
    bins = pairs.groupby((pairs['x'] * 20).round() / 20)['y']
    medians = bins.median()[bins.count() >= 5]
    scatter.plot(medians.index, medians, color='black', marker='o', markersize=4)
    scatter.set_title(
        f'rank correlation {ranks[-1]:.2f}, black: median', fontsize='medium'
    )
    scatter.set(xlabel='label similarity', ylabel='embedding similarity')
    scatter.set_ylim(-1.03, 1.03)
    scatter.grid(alpha=0.3)
    return figure, ranks


def plot_neighbours(
    thumbnails: Sequence[Array],
    features: Tensor,
    labels: Tensor,
    apart: Tensor,
    count: int = 8,
) -> Figure:
    """Plot *count* images with their five nearest neighbours by features (N, F).

    Labels are multi-hot (N, K), or class indices (N,). Neighbours are among those that are
    *apart* (N, N).
    """
    by_label, similarity = label_similarities(labels), feature_similarities(features)
    similarity[~apart] = -math.inf
    neighbours = min(5, int(apart.sum(1).min()))
    queries = np.linspace(0, len(features) - 1, min(count, len(features))).astype(int)
    figure, axes = _grid(len(queries), 1 + neighbours, 1.3, 0.25)
    for row, query in zip(axes, queries, strict=True):
        nearest = similarity[query].topk(neighbours).indices.tolist()
        for axis, index in zip(row, [query, *nearest], strict=True):
            text, weight = 'image', 'bold'
            if index != query:
                text = f'{similarity[query, index]:.2f} | {by_label[query, index]:.2f}'
                weight = 'normal'
            axis.imshow(thumbnails[index])
            axis.set_xlabel(text, weight=weight, labelpad=2)
    return figure


def patch_tokens(encoder: nn.Module, image: Tensor) -> Tensor | None:
    """Return patch tokens, or the last feature map, of images of shape (B, C, H, W).

    Returns:
        Tokens of shape (B, h, w, F), None if there are fewer than 4 x 4.
    """
    model: Any = encoder
    tokens = model.forward_features(image)
    if tokens.ndim == 3:
        height, width = model.patch_embed.patch_size
        tokens = tokens[:, model.num_prefix_tokens :].unflatten(
            1, (image.shape[-2] // height, image.shape[-1] // width)
        )
    elif tokens.shape[1] == model.num_features:  # (B, F, h, w), not of Swin
        tokens = tokens.permute(0, 2, 3, 1)
    return tokens if min(tokens.shape[1:3]) >= 4 else None


def component_colours(features: Tensor) -> tuple[Array, float]:
    """Return three principal components of features (N, F) as colours (N, 3) in [0, 1].

    And the share of the variance that they have.
    """
    centred = features.float() - features.float().mean(0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    components = (centred @ right[:3].T).numpy()
    low, high = np.quantile(components, (_CLIPPED, 1 - _CLIPPED), axis=0)
    colours = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return colours, float(values[:3].square().sum() / values.square().sum())


def plot_map(features: Tensor, centres: Sequence[tuple[float, float]]) -> Figure:
    """Plot where images are, in colours of three components of their features (N, F).

    *centres* are longitudes and latitudes. Of images that are far apart, the squares of
    half a degree that have most of them are side by side.
    """
    colours, _ = component_colours(features)
    table = pd.DataFrame(centres, columns=['x', 'y'])
    squares = table.groupby([table['y'] // _SQUARE, table['x'] // _SQUARE]).groups
    largest = sorted(squares.values(), key=len, reverse=True)[:_SQUARES]
    columns = min(3, len(largest))
    rows = math.ceil(len(largest) / columns)
    figure = Figure((4 * columns, 4 * rows), layout='constrained')
    for number, members in enumerate(largest, 1):
        axis = figure.add_subplot(rows, columns, number)
        x, y = table['x'][members], table['y'][members]
        axis.scatter(x, y, c=colours[members], s=60, edgecolors='grey', linewidths=0.5)
        axis.set_aspect(1 / max(0.01, math.cos(math.radians(y.mean()))), 'datalim')
        axis.ticklabel_format(useOffset=False)
        axis.locator_params(nbins=4)
        axis.set(xlabel='longitude', ylabel='latitude')
    return figure


def plot_components(tokens: Tensor, thumbnails: Sequence[Array]) -> Figure:
    """Plot images, and below three principal components of their tokens (B, h, w, F)."""
    colours, share = component_colours(tokens.flatten(0, 2))
    pictures = [*colours.reshape(*tokens.shape[:3], 3)]
    label = f'components\n({share:.0%} of variance)'
    return plot_images(thumbnails, pictures, label)


def plot_classes(
    masks: Sequence[Tensor],
    thumbnails: Sequence[Array],
    product: LandCoverProduct = WORLDCOVER,
    columns: int | None = None,
) -> Figure:
    """Plot images, and below the classes of their masks (H, W), with a legend."""
    colours = np.ones((256, 4))  # white where there is no data
    colours[list(product.codes)] = [product.colors[code] for code in product.codes]
    colours[list(product.codes)] /= 255
    pictures = [colours[mask.long().numpy()] for mask in masks]
    extra = 0.2 if columns is None else 0.05
    figure = plot_images(thumbnails, pictures, product.title, extra, columns)
    present = {int(code) for mask in masks for code in mask.unique()}
    handles = [
        Patch(facecolor=tuple(colours[code]), edgecolor='grey', label=name)
        for code, name in product.names.items()
        if code in present
    ]
    figure.legend(
        handles=handles,
        loc='outside lower center',
        ncols=6 if columns is None else columns,
    )
    return figure


def plot_images(
    thumbnails: Sequence[Array],
    pictures: Sequence[Array] | None = None,
    label: str = '',
    extra: float = 0.0,
    columns: int | None = None,
) -> Figure:
    """Plot images, by default in a row, and a picture of each below."""
    columns = min(columns or len(thumbnails), len(thumbnails))
    blocks = [('image', thumbnails)]
    if pictures is not None:
        blocks.append((label, pictures))
    rows = math.ceil(len(thumbnails) / columns) * len(blocks)
    figure, axes = _grid(rows, columns, 1.5, extra)
    for row, (name, colours) in enumerate(blocks):
        for number, picture in enumerate(colours):
            line, column = divmod(number, columns)
            axis = axes[line * len(blocks) + row, column]
            axis.imshow(picture, interpolation='nearest' if row else None)
            if not column:
                axis.set_ylabel(name)
    return figure
