# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor, nn

from torchgeo_softcon.transforms import MultiCropView, RandomView, interpolation
from torchgeo_softcon.transforms.colours import colour_map
from torchgeo_softcon.transforms.interpolation import (
    bilinear_matrices,
    blur_matrices,
    crop_matrices,
    gaussian_kernels,
    identity,
)
from torchgeo_softcon.transforms.resample import means, resample_batch, resample_blocks
from torchgeo_softcon.transforms.sampling import random_crop_axes

from .helpers import random_crop_grid


def blur(image: Tensor, sigma: float) -> Tensor:
    """kornia's Gaussian blur of images (B, C, H, W) within three standard deviations."""
    kernel = get_gaussian_kernel1d(2 * math.ceil(3 * sigma) + 1, sigma)
    return filter2d_separable(image, kernel, kernel)


@pytest.mark.parametrize('form', [resample_blocks, resample_batch])
def test_bilinear_equals_grid_sample(form: Callable[..., Tensor]) -> None:
    image, size = torch.rand(6, 3, 70, 90), (60, 110)
    draws = []
    for function in (random_crop_grid, random_crop_axes):
        torch.manual_seed(0)
        draws.append(function(image, size, (0.05, 1), (0.5, 2), 0.5, 0.5))
    grid, axes = draws
    assert isinstance(grid, Tensor)
    expected = F.grid_sample(image, grid, padding_mode='border', align_corners=False)
    rows, columns = (
        bilinear_matrices(axis, side) for axis, side in zip(axes, (70, 90), strict=True)
    )
    view = form(image, rows, columns)
    # grid_sample rounds its coordinates, too
    torch.testing.assert_close(view, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('form', ['_blur_each', '_blur_all'])
@pytest.mark.parametrize('resample', [resample_blocks, resample_batch])
def test_blur_equals_kornia(form: str, resample: Callable[..., Tensor]) -> None:
    image = torch.randn(5, 3, 60, 50)
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.4, 2.0])
    drawn = torch.tensor([True, True, False, True, True])
    kernels = gaussian_kernels(sigma, drawn, 6)
    torch.testing.assert_close(kernels.sum(1), torch.ones(5))
    rows, columns = (getattr(interpolation, form)(w, kernels) for w in identity(image))
    view = resample(image, rows, columns)
    for i in range(5):
        one = image[i : i + 1]
        expected = blur(one, sigma[i].item()) if drawn[i] else one
        torch.testing.assert_close(view[i : i + 1], expected, rtol=0, atol=2e-6)


def test_crop_jitter_and_blur_are_one_product() -> None:
    """As one operation after the other, on both kinds of devices."""
    torch.manual_seed(0)
    image = torch.rand(6, 13, 80, 90)
    boxes = torch.tensor([[5, 9, 70, 80]] * 3 + [[40, 30, 60, 70]] * 3)
    flips, sigma = torch.rand(2, 6) < 0.5, torch.rand(6) * 1.9 + 0.1
    gain, contrast, saturation = torch.rand(6, 13) + 0.5, torch.rand(6), torch.rand(6)
    saturation[0] = 0
    crop = crop_matrices(image, boxes, (70, 50), flips, 'bicubic')
    kernels = gaussian_kernels(sigma, torch.ones(6).bool(), 6)
    rows, columns = (blur_matrices(w, kernels) for w in crop)

    view = resample_batch(image, *crop) * gain[..., None, None]
    mean = view.mean((2, 3), keepdim=True)
    view = mean + contrast.view(-1, 1, 1, 1) * (view - mean)
    grey = view.mean(1, keepdim=True)
    view = grey + saturation.view(-1, 1, 1, 1) * (view - grey)
    pairs = zip(view.split(1), sigma.tolist(), strict=True)
    expected = torch.cat([blur(one, s) for one, s in pairs])

    colours = colour_map(means(image, *crop), gain, contrast, saturation)
    for form in (resample_blocks, resample_batch):
        torch.testing.assert_close(
            form(image, rows, columns, colours), expected, rtol=0, atol=3e-6
        )
    unblurred = resample_batch(image, *crop, colours)
    torch.testing.assert_close(unblurred, view, rtol=0, atol=3e-6)


@pytest.mark.parametrize('block', [1, 7, 48, 1000])
def test_blocks_leave_nothing_out(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('torchgeo_softcon.transforms.resample._BLOCK', block)
    image = torch.rand(3, 2, 60, 70)
    boxes = torch.tensor([[0, 0, 70, 60], [10, 20, 13, 60], [69, 59, 70, 60]])
    for flip in (False, True):
        crop = crop_matrices(
            image, boxes, (50, 64), torch.full((2, 3), flip), 'bicubic'
        )
        torch.testing.assert_close(
            resample_blocks(image, *crop), resample_batch(image, *crop)
        )
        torch.testing.assert_close(
            means(image, *crop), resample_batch(image, *crop).mean((2, 3))
        )


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('module', [RandomView(32), MultiCropView(32, (24,))])
def test_float32_whatever_the_default(module: nn.Module, dtype: torch.dtype) -> None:
    """As in training with double or half precision: not a position is rounded."""
    image = torch.rand(4, 5, 40, 40)
    torch.manual_seed(0)
    expected = module(image)
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        views = module(image)
    finally:
        torch.set_default_dtype(torch.float32)
    for view, same in zip(
        *([v] if isinstance(v, Tensor) else v for v in (views, expected)), strict=True
    ):
        assert view.dtype == torch.float32
        assert torch.equal(view, same)


def test_grid_is_float32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        image = torch.rand(2, 1, 8, 8, dtype=torch.float32)
        grid = random_crop_grid(image, (4, 4), (0.2, 1), (0.75, 1.33))
    finally:
        torch.set_default_dtype(torch.float32)
    assert grid.dtype == torch.float32


def test_blocks_read_what_contributes_only() -> None:
    """A pixel beside a crop may be anything."""
    image = torch.rand(2, 3, 60, 60)
    boxes = torch.tensor([[10, 12, 40, 50]] * 2)
    crop = crop_matrices(image, boxes, (20, 20), torch.zeros(2, 2).bool())
    expected = resample_blocks(image, *crop)
    image[:, :, :12] = image[..., 40:] = torch.nan
    assert torch.equal(resample_blocks(image, *crop), expected)
