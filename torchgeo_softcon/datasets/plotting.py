# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A look at a sample."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from .._compat import Sample
from ..bands import shown_channels


def plot_sample(
    sample: Sample, bands: Sequence[str] | None = None, suptitle: str | None = None
) -> Figure:
    """Plot the image of each season, and the mask if there is one.

    Args:
        sample: *image* in [0, 1] of shape (C, H, W) or (T, C, H, W), and possibly a
            *mask* of shape (H, W).
        bands: Names of the bands. Without red, green and blue among them, the first
            three bands are shown, or the first alone if there are fewer.
        suptitle: Title of the figure.
    """
    image: Tensor = sample['image']
    seasons = image[None] if image.ndim == 3 else image
    channels = shown_channels(bands, seasons.shape[1])
    columns = len(seasons) + ('mask' in sample)
    figure, axes = plt.subplots(1, columns, figsize=(4 * columns, 4), squeeze=False)
    for axis, season in zip(axes[0], seasons, strict=False):
        axis.imshow(
            season[channels].permute(1, 2, 0).numpy(), vmin=0, vmax=1, cmap='gray'
        )
    if 'mask' in sample:
        axes[0, -1].imshow(sample['mask'].numpy(), interpolation='none')
    for axis in axes[0]:
        axis.axis('off')
    if suptitle is not None:
        figure.suptitle(suptitle)
    return figure
