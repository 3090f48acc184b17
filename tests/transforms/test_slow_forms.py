# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Views equal one operation of torchvision, PyTorch or kornia after the other."""

import math

import pytest
import torch
import torch.nn.functional as F
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as T

from torchgeo_softcon.transforms import MultiCropView, RandomView
from torchgeo_softcon.transforms.sampling import choose, random_boxes

from .helpers import random_crop_grid


def jitter(view: Tensor, factors: list[Tensor]) -> Tensor:
    """Brightness, contrast and saturation, one after the other."""
    brightness, contrast, saturation = (f.view(len(view), -1, 1, 1) for f in factors)
    view = view * brightness
    mean = view.mean((2, 3), keepdim=True)
    view = mean + contrast * (view - mean)
    grey = view.mean(1, keepdim=True)
    return grey + saturation * (view - grey)


def blur(view: Tensor, drawn: Tensor, sigmas: Tensor) -> Tensor:
    """A blur by kornia of the samples that are drawn."""
    for i, sigma in enumerate(sigmas.tolist()):
        if drawn[i]:
            kernel = get_gaussian_kernel1d(2 * math.ceil(3 * sigma) + 1, sigma)
            view[i : i + 1] = filter2d_separable(view[i : i + 1], kernel, kernel)
    return view


def random_view(image: Tensor, size: int) -> Tensor:
    """RandomView with its defaults."""
    grid = random_crop_grid(image, (size, size), (0.2, 1), (3 / 4, 4 / 3), 0.5)
    view = F.grid_sample(image, grid, padding_mode='border', align_corners=False)
    factors = (torch.rand(2, len(image)) * 2 - 1) * choose(image, 0.8)
    colour = ~choose(image, 0.2)
    view = jitter(view, [*(1 + 0.4 * factors), colour.float()])
    drawn = choose(view, 0.5)
    return blur(view, drawn, torch.empty(len(view)).uniform_(0.1, 2))


def multi_crop(image: Tensor, sizes: list[int]) -> list[Tensor]:
    """MultiCropView with its defaults, with the draws of all views first."""
    boxes, flips = [], []
    for number, scale in ((2, (0.32, 1)), (len(sizes) - 2, (0.05, 0.32))):
        every = image.repeat(number, 1, 1, 1)
        boxes += random_boxes(every, scale, (3 / 4, 4 / 3)).split(len(image))
        flips += choose(every, 0.5).split(len(image))
        choose(every, 0)  # top and bottom
    shape = len(sizes), len(image)
    drawn, grey = torch.rand(shape) < 0.8, torch.rand(shape) < 0.2
    factors = torch.rand(4, *shape) * 2 - 1
    gains = torch.rand(*shape, image.shape[1]) * 2 - 1
    blurred, sigmas = torch.rand(shape), torch.empty(shape).uniform_(0.1, 2)

    views = []
    for i, size in enumerate(sizes):
        crops = []
        for x, (left, top, right, bottom), mirror in zip(
            image, boxes[i].tolist(), flips[i].tolist(), strict=True
        ):
            kind = InterpolationMode.BICUBIC if i < 2 else InterpolationMode.BILINEAR
            box = top, left, bottom - top, right - left
            crop = T.resized_crop(x, *box, [size, size], kind, antialias=True)
            crops.append(crop.flip(-1) if mirror else crop)
        view = torch.stack(crops)

        strengths = (0.4, 0.4, 0.2, 0.1) if i < 2 else (0.8, 0.8, 0.8, 0.2)
        factor = factors[:, i] * torch.tensor(strengths)[:, None] * drawn[i]
        gain = 1 + strengths[3] * gains[i] * drawn[i][:, None]
        gain = (1 + factor[0])[:, None] * gain / gain.mean(1, keepdim=True)
        view = jitter(view, [gain, 1 + factor[1], (1 + factor[2]) * ~grey[i]])
        chosen = blurred[i] < ((1, 0.1)[i] if i < 2 else 0.5)
        views.append(blur(view, chosen, sigmas[i]))
    return views


@pytest.mark.parametrize('seed', range(3))
def test_random_view(seed: int) -> None:
    image = torch.rand(8, 13, 96, 90)
    module = RandomView(80)
    torch.manual_seed(seed)
    view = module(image)
    torch.manual_seed(seed)
    expected = random_view(image, 80)
    torch.testing.assert_close(view, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('seed', range(3))
def test_multi_crop_view(seed: int) -> None:
    image = torch.rand(8, 13, 96, 90)
    module = MultiCropView(80, (64, 48, 24))
    torch.manual_seed(seed)
    views = module(image)
    torch.manual_seed(seed)
    expected = multi_crop(image, [80, 80, 64, 48, 24])
    for view, slow in zip(views, expected, strict=True):
        torch.testing.assert_close(view, slow, rtol=0, atol=2e-5)
