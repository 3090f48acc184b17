# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""From masks of land-cover codes to multi-labels of whole images."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import check_fractions, check_types, require
from ..landcover.products import WORLDCOVER_CODES, ProductLike, find_product

#: Class codes are bytes.
_BINS = 256


def class_fractions(mask: Tensor, codes: Sequence[int] = WORLDCOVER_CODES) -> Tensor:
    """Return the share of every class among the valid pixels of a mask.

    Args:
        mask: Class codes of shape (..., H, W), any integer dtype. A floating point
            mask must hold whole numbers.
        codes: Codes to count, K of them. All other values, 0 among them, are no data.

    Returns:
        Fractions of shape (..., K), float32. They sum to 1, or to 0 if no pixel is
        valid.

    Raises:
        TypeError: If *mask* is not a real-valued tensor.
        ValueError: If *codes* has duplicates or values outside of 1 to 255, or if
            *mask* has no pixels, is interpolated or has NaN. On a CUDA device, which
            would have to be waited for, such pixels are no data instead.
    """
    counts, _ = _count(mask, _check_codes(codes))
    return _normalize(counts)


def _normalize(counts: Tensor) -> Tensor:
    """Divide counts (..., K) by their sum, zeros stay zeros."""
    return counts.float() / counts.sum(-1, keepdim=True).clamp_min(1)


def _count(mask: Tensor, codes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Count the pixels (..., H, W) of K classes, and find the values that occur.

    Returns int64 of shape (..., K), and whether each value from 0 to 255 occurs, of shape
    (256,), None on a CUDA device. 255 stands for everything out of range, too.
    """
    _check_mask(mask)
    if mask.dtype in (torch.uint16, torch.uint32, torch.uint64):
        mask = mask.long()  # these types can be stored, but hardly computed with

    # bincount looks at the values before it allocates, so on a device it waits. One
    # comparison per class does not, and reads the mask faster than atomics add.
    if mask.device.type != 'cpu':
        return torch.stack([(mask == code).sum((-2, -1)) for code in codes], -1), None

    flat = mask.flatten(0, -3) if mask.ndim > 2 else mask[None]  # (N, H, W)
    if mask.dtype != torch.uint8 and len(flat):
        low, high = torch.aminmax(flat)
        if low < 0 or high >= _BINS:
            flat = torch.where((flat < 0) | (flat >= _BINS), _BINS - 1, flat)

    # One bincount for many masks: mask n has the bins from 256 n on. As many masks as
    # 16 bits can number, because the width of the numbers decides the speed.
    bins = torch.cat([_histograms(chunk) for chunk in flat.split(127)])  # (N, 256)
    counts = bins[:, list(codes)].view(*mask.shape[:-2], len(codes))
    return counts, bins.any(0)


def _histograms(mask: Tensor) -> Tensor:
    """Count the values of at most 127 masks of bytes (N, H, W), gives (N, 256)."""
    first = torch.arange(len(mask), dtype=torch.int16)[:, None, None] * _BINS
    bins = (mask.to(torch.int16) + first).flatten()
    return torch.bincount(bins, minlength=len(mask) * _BINS).view(-1, _BINS)


def _check_mask(mask: Tensor) -> None:
    """Refuse all but masks, on the CPU also NaN and values between the codes."""
    if not isinstance(mask, Tensor):
        raise TypeError(
            f'mask must be a tensor, got {type(mask).__name__}: convert it with '
            'torch.as_tensor'
        )
    if mask.dtype == torch.bool or mask.is_complex():
        raise TypeError(f'mask must hold class codes, got dtype {mask.dtype}')
    require(
        mask.ndim > 1 and 0 not in mask.shape[-2:],
        f'mask must be of shape (..., H, W) with at least one pixel, got {tuple(mask.shape)}',
    )
    if mask.device.type != 'cpu' or not mask.is_floating_point():
        return
    require(
        mask.isfinite().all(),
        'mask must hold class codes, got NaN or infinite values: give no data as 0',
    )
    between = [f'{value:.4g}' for value in mask[mask != mask.round()][:5].tolist()]
    require(
        not between,
        f'mask must hold class codes, got {", ".join(between)}: it was interpolated, '
        'resample it with nearest neighbour',
    )


def _check_codes(codes: Sequence[int]) -> tuple[int, ...]:
    """Return class codes, or refuse a choice of them."""
    codes = tuple(codes)
    require(
        codes and all(0 < code < _BINS and code == int(code) for code in codes),
        f'codes must be whole numbers from 1 to 255 (0 is no data), got {codes}',
    )
    require(len(set(codes)) == len(codes), f'codes must be unique, got {codes}')
    return tuple(int(code) for code in codes)


class WorldCoverMultiLabel(nn.Module):
    """Replace a mask of ESA WorldCover codes by a multi-hot label.

    Can be passed as *transforms* to any TorchGeo dataset, or called on a batch, on
    any device.

    A class is in the label if it covers at least *min_fraction* of the valid pixels.
    The default of 5 % keeps stray pixels out: in 288 patches of 128 x 128 pixels
    around Delhi, it leaves 2.5 of 6.1 classes per patch, and the others cover less than
    4 % of the ground. The map itself is wrong at `23 % of its pixels
    <https://worldcover2021.esa.int/data/docs/WorldCover_PVR_V2.0.pdf>`__.

    An all-zero label means *unknown*, never *nothing there*.
    """

    #: Whether a batch gives the labels of its samples, see :class:`.ImageMaskFolder`.
    batched = True

    def __init__(
        self,
        codes: Sequence[int] | None = None,
        min_fraction: float = 0.05,
        min_valid: float = 0.5,
        fractions: bool = False,
        keep_mask: bool = False,
        foreign: Literal['error', 'ignore'] = 'error',
        product: ProductLike = 'worldcover',
    ) -> None:
        """Initialize a new WorldCoverMultiLabel instance.

        Args:
            codes: Class codes to keep, in the order of the label, K of them, by default
                all of *product*. All other codes are no data.
            min_fraction: Smallest share of the valid pixels that a class must cover
                to count as present, in (0, 1]. Not used if *fractions* is true.
            min_valid: Smallest share of all pixels that must be valid, in [0, 1]. The
                label of a mask with less is unknown: the default of one half keeps
                labels away that speak of the smaller part of an image.
            fractions: Give the share of every class instead of 0 and 1.
            keep_mask: Whether the mask stays in the sample.
            foreign: *error* finds masks that are ordinal or interpolated by codes that
                are not in the legend, *ignore* counts these as no data. The legend is the
                product's, or *codes* if one of these is not the product's.
            product: Another land-cover product, its name, or its YAML file, see
                :func:`torchgeo_softcon.landcover.find_product`.

        Raises:
            ValueError: If *codes* has duplicates or other values than the product's and
                those from 1 to 255, or if another argument is out of range.
        """
        check_types(WorldCoverMultiLabel.__init__, locals())
        product = find_product(product)
        codes = product.codes if codes is None else tuple(codes)
        official = {*codes} <= {*product.codes} and 0 < len(codes) == len({*codes})
        if not official:
            codes = _check_codes(codes)
        require(
            0 < min_fraction <= 1, f'min_fraction must be in (0, 1], got {min_fraction}'
        )
        check_fractions(min_valid=min_valid)

        super().__init__()
        self.codes, self.foreign = codes, foreign
        self.min_fraction, self.min_valid = min_fraction, min_valid
        self.fractions, self.keep_mask = fractions, keep_mask
        self._legend = product.legend if official else (0, *codes)

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Convert the mask of a sample or of a batch to a label.

        A dimension of size 1 in front of (H, W) is a channel and has no place in the
        label: (1, H, W) gives (K,) and (B, 1, H, W) gives (B, K). An *image* of
        (1, C, H, W) or (B, 1, C, H, W) tells that it is a batch or a time series of one:
        (1, H, W) then gives (1, K), and (B, 1, H, W) gives (B, 1, K).

        Args:
            sample: A sample or a batch with a *mask* of class codes, which are whole
                numbers also if it is of floats. It is not modified.

        Returns:
            The same sample with a float32 *label* of shape (K,), (B, K) or (B, T, K),
            and without *mask* unless *keep_mask*.

        Raises:
            TypeError: If the mask is not a real-valued tensor.
            ValueError: If there is no mask, or if its values are no class codes, see
                :func:`class_fractions`.
        """
        require(
            'mask' in sample,
            "sample must have a 'mask' of land-cover codes, got the keys "
            f'{sorted(map(str, sample))}: join the images with ESAWorldCover, or leave '
            'this transform out if the labels are there already',
        )
        mask = sample['mask']
        counts, present = _count(mask, self.codes)
        if self.foreign == 'error':
            _check_present(present, self._legend)
        if _has_channel(mask, sample.get('image')):
            counts = counts.squeeze(-2)

        label = _normalize(counts)
        if not self.fractions:
            label = (label >= self.min_fraction).float()
        pixels = mask.shape[-2] * mask.shape[-1]
        # Of 100 pixels, .07 are 7, but .07 * 100 is a little more than that
        least = math.ceil(self.min_valid * pixels - 1e-6)
        valid = counts.sum(-1, keepdim=True) >= least

        sample = dict(sample)
        if not self.keep_mask:
            del sample['mask']
        sample['label'] = label * valid
        return sample


def check_values(mask: Tensor, product: ProductLike = 'worldcover') -> None:
    """Refuse a mask (..., H, W) on the CPU that does not hold class codes of a product."""
    product = find_product(product)
    _, present = _count(mask, product.codes)
    _check_present(present, product.legend)


def _check_present(present: Tensor | None, legend: Sequence[int]) -> None:
    """Refuse values that are not in the legend, if they are known."""
    if present is None:
        return
    values = present.nonzero().flatten().tolist()
    foreign = [value for value in values if value not in legend]
    if not foreign:
        return

    names = ', '.join(map(str, foreign[:5])) + (', ...' if foreign[5:] else '')
    if _BINS - 1 in foreign:
        names += ' (255 stands for everything out of range, too)'
    if max(values) < len(legend) < max(legend):
        remedy = (
            'It looks like ordinals: read it with ESAWorldCover(ordinal=False), or '
            'pass codes=range(1, K + 1) if 0 is no data, or map it back with '
            'torch.tensor(WORLDCOVER_CODES)[mask] if 0 is tree cover'
        )
    else:
        remedy = (
            'If it was interpolated or reprojected, resample it with nearest '
            "neighbour. With foreign='ignore' these pixels are no data"
        )
    raise ValueError(
        f'mask must hold the class codes {", ".join(map(str, legend))}, got also '
        f'{names}. {remedy}'
    )


def _has_channel(mask: Tensor, image: Any) -> bool:
    """Return whether the third last dimension of a mask is a channel."""
    is_batch = isinstance(image, Tensor) and image.ndim > 3
    if is_batch and mask.shape[:-2] == image.shape[:-3]:
        return False
    return mask.ndim > 2 and mask.shape[-3] == 1
