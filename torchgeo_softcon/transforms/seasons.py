# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Images of one or several seasons in one layout."""

import functools

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from .._checks import require

# Each message once
_tell_once = functools.cache(rank_zero_info)
_warn_once = functools.cache(rank_zero_warn)


def split_seasons(image: Tensor, in_channels: int, expected: bool = True) -> Tensor:
    """Bring a batch of images to one layout.

    Args:
        image: Images of shape (B, C, H, W), seasons stacked in channels of shape
            (B, T * C, H, W), or (B, T, C, H, W).
        in_channels: Number of bands C of one image.
        expected: Whether something asked for several seasons. Otherwise, a warning says
            once that stacked ones may be the bands of one image.

    Returns:
        The images, shape (B, T, C, H, W), T = 1 for single images.

    Raises:
        ValueError: If the number of bands does not fit, or if there are no pixels.
    """
    require(
        image.numel(),
        "batch['image'] must have images, and these pixels, got the shape "
        f'{tuple(image.shape)}: look at size and batch_size of the datamodule',
    )
    if image.ndim == 4 and (channels := image.shape[1]) % in_channels == 0:
        seasons = channels // in_channels
        reading = (
            f'Images of {channels} channels are read as {seasons} seasons of '
            f'in_channels = {in_channels} bands'
        )
        if seasons > 1 and expected:
            _tell_once(f'{reading}.')
        elif seasons > 1:
            _warn_once(
                f'{reading}, one of which is drawn for a view. If they are images of one '
                f'date, set in_channels to their number of bands, {channels}.'
            )
        return image.unflatten(1, (seasons, in_channels))
    if image.ndim == 5 and image.shape[2] == in_channels:
        return image
    raise ValueError(
        f"batch['image'] must have the shape (B, C, H, W), (B, T * C, H, W) or "
        f'(B, T, C, H, W) with C = in_channels = {in_channels}, got '
        f'{tuple(image.shape)}. Set in_channels to the number of bands of the dataset, '
        'or choose its bands'
    )
