# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from contextlib import nullcontext
from typing import Any

import kornia.filters
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from torchgeo_softcon.transforms import RandomView
from torchgeo_softcon.transforms.colours import colour_map

from .helpers import random_crop_grid

PLAIN: dict[str, Any] = {
    'scale': (1.0, 1.0),
    'ratio': (1.0, 1.0),
    'horizontal_flip': 0.0,
    'jitter_probability': 0.0,
    'grey_probability': 0.0,
    'blur_probability': 0.0,
}


def ramp(batch: int, height: int, width: int) -> Tensor:
    """Images whose two channels are the pixel coordinates x and y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    return torch.stack([x, y]).float().expand(batch, -1, -1, -1)


class TestRandomView:
    @pytest.mark.parametrize('channels', [1, 2, 3, 13])
    @pytest.mark.parametrize('size', [32, (24, 40)])
    def test_shape(self, channels: int, size: int | tuple[int, int]) -> None:
        image = torch.randn(4, channels, 50, 60)
        before = image.clone()
        view = RandomView(size)(image)
        expected = (size, size) if isinstance(size, int) else size
        assert view.shape == (4, channels, *expected)
        assert view.isfinite().all()
        assert torch.equal(image, before)

    def test_nothing_drawn_changes_nothing(self) -> None:
        image = torch.randn(3, 5, 32, 32)
        torch.testing.assert_close(RandomView(32, **PLAIN)(image), image)

    def test_flips(self) -> None:
        image = torch.randn(3, 5, 32, 32)
        view = RandomView(32, **{**PLAIN, 'horizontal_flip': 1})(image)
        torch.testing.assert_close(view, image.flip(-1))
        view = RandomView(32, **{**PLAIN, 'vertical_flip': 1})(image)
        torch.testing.assert_close(view, image.flip(-2))
        torch.manual_seed(0)
        view = RandomView(32, **{**PLAIN, 'horizontal_flip': 0.5})(
            image[:1].expand(64, -1, -1, -1)
        )
        flipped = (view - image[:1].flip(-1)).abs().amax((1, 2, 3)) < 1e-4
        assert 16 < flipped.sum() < 48

    def test_crop_is_an_axis_aligned_box_inside_the_image(self) -> None:
        torch.manual_seed(0)
        grid = random_crop_grid(ramp(500, 40, 60), (8, 8), (0.2, 0.9), (0.7, 1.4))
        assert grid.abs().max() <= 1
        x = F.grid_sample(ramp(500, 40, 60), grid, align_corners=False)[:, 0]
        assert torch.allclose(x[:, 0], x[:, -1], atol=1e-3)

    def test_area_and_aspect_are_those_of_torchvision(self) -> None:
        torch.manual_seed(0)
        n, size = 4000, 100
        grid = random_crop_grid(
            torch.zeros(n, 1, size, size), (2, 2), (0.2, 0.6), (3 / 4, 4 / 3)
        )
        # The centres of the two output pixels are half the extent apart
        width = (grid[:, 0, 1, 0] - grid[:, 0, 0, 0]) * size
        height = (grid[:, 1, 0, 1] - grid[:, 0, 0, 1]) * size
        image = torch.zeros(1, size, size)
        params = [
            RandomResizedCrop.get_params(image, [0.2, 0.6], [3 / 4, 4 / 3])
            for _ in range(n)
        ]
        _, _, h, w = torch.tensor(params).float().T
        for quantile in (0.1, 0.5, 0.9):
            for ours, theirs in ((width * height, h * w), (width / height, w / h)):
                assert ours.quantile(quantile).item() == pytest.approx(
                    theirs.quantile(quantile).item(), rel=0.05
                )

    def test_parameters_are_drawn_per_sample(self) -> None:
        torch.manual_seed(0)
        image = torch.rand(1, 3, 32, 32).expand(8, -1, -1, -1)
        for option in (
            {'scale': (0.2, 0.5)},
            {'jitter_probability': 1.0},
            {'blur_probability': 1.0},
        ):
            view = RandomView(32, **{**PLAIN, **option})(image)
            assert len({tuple(v.flatten()[:50].tolist()) for v in view}) == 8

    def test_same_seed_same_view(self) -> None:
        image = torch.rand(4, 3, 32, 32)
        views = []
        for _ in range(2):
            torch.manual_seed(3)
            views.append(RandomView(24)(image))
        assert torch.equal(*views)

    def test_values_are_not_clipped_unless_declared(self) -> None:
        torch.manual_seed(0)
        image = torch.randn(16, 13, 32, 32) * 100 - 50
        view = RandomView(32)(image)
        assert view.min() < -100
        assert view.max() > 50
        view = RandomView(32, value_range=(0, 1))(image)
        assert view.min() == 0
        assert view.max() == 1

    def test_declared_range_holds(self) -> None:
        torch.manual_seed(0)
        view = RandomView(32, value_range=(0, 1))(torch.rand(32, 13, 32, 32))
        assert view.min() >= 0
        assert view.max() <= 1

    def test_grey_is_the_mean_of_all_bands(self) -> None:
        image = torch.randn(3, 5, 32, 32)
        view = RandomView(32, **{**PLAIN, 'grey_probability': 1})(image)
        expected = image.mean(1, keepdim=True).expand_as(image)
        torch.testing.assert_close(view, expected)

    def test_blur_is_gaussian(self) -> None:
        image = torch.randn(2, 3, 40, 40)
        view = RandomView(
            40, **{**PLAIN, 'blur_probability': 1, 'blur_sigma': (1.5, 1.5)}
        )(image)
        expected = kornia.filters.gaussian_blur2d(image, 31, (1.5, 1.5))
        torch.testing.assert_close(view, expected, rtol=0, atol=0.01)

    def test_blur_of_a_tiny_view(self) -> None:
        view = RandomView(8, blur_probability=1)(torch.rand(2, 3, 16, 16))
        assert view.isfinite().all()

    def test_float32_under_autocast(self) -> None:
        image = torch.rand(4, 3, 32, 32)
        torch.manual_seed(0)
        expected = RandomView(24)(image)
        torch.manual_seed(0)
        with torch.autocast('cpu', torch.bfloat16):
            actual = RandomView(24)(image)
        assert torch.equal(actual, expected)

    def test_digital_numbers(self) -> None:
        image = torch.randint(0, 10_000, (2, 13, 32, 32), dtype=torch.uint16)
        view = RandomView(32, **PLAIN)(image)
        torch.testing.assert_close(view, image.float())

    def test_waits_for_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tensors without values: whoever looks at one raises."""
        monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
        image = torch.empty(2, 13, 40, 40, device='meta')
        view = RandomView(32, value_range=(0, 1))(image)
        assert view.device.type == 'meta'
        assert view.shape == (2, 13, 32, 32)

    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'scale': (0, 1)}, r'scale must be a range .* got \(0, 1\)'),
            ({'scale': (0.2, 1.5)}, r'scale must be a range'),
            ({'ratio': (2, 1)}, 'ratio must be a range'),
            ({'blur_sigma': (-1, 1)}, 'blur_sigma must be a range'),
            ({'horizontal_flip': 2}, r'horizontal_flip must be in \[0, 1\], got 2'),
            ({'brightness': -0.1}, r'brightness must be in \[0, 1\], got -0.1'),
            ({'value_range': (1, 0)}, r'value_range must be \(low, high\)'),
        ],
    )
    def test_bad_option(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            RandomView(**kwargs)

    def test_bad_image(self) -> None:
        with pytest.raises(ValueError, match=r'\(B, C, H, W\), got \(3, 8, 8\)'):
            RandomView()(torch.rand(3, 8, 8))


def test_jitter_is_brightness_then_contrast_about_each_bands_mean() -> None:
    image = torch.randn(2, 3, 8, 8).double()
    brightness, contrast = torch.tensor([1.3, 0.7]), torch.tensor([0.6, 1.4])
    means = image.mean((2, 3))
    matrix, offset = colour_map(means, brightness, contrast, torch.ones(2))
    actual = (matrix @ image.flatten(2) + offset).view_as(image)
    for b in range(2):
        for c in range(3):
            band = image[b, c] * brightness[b]
            expected = (band - band.mean()) * contrast[b] + band.mean()
            torch.testing.assert_close(actual[b, c], expected)


def test_boxes_are_what_the_views_show() -> None:
    """The image says where its pixels are: their centres."""
    x = torch.arange(40.0).expand(8, 1, 30, 40) + 0.5
    y = torch.arange(30.0).expand(8, 1, 40, 30).mT + 0.5
    view = RandomView(
        (16, 8),
        vertical_flip=0.5,
        jitter_probability=0,
        grey_probability=0,
        blur_probability=0,
    )
    assert view.boxes is None
    shown = view(torch.cat([x, y], 1))
    assert view.boxes is not None
    assert view.boxes.shape == (8, 4)
    for (left, top, right, bottom), pixels in zip(view.boxes, shown, strict=True):
        inside = pixels[:, 4:-4, 2:-2]  # off the border, where pixels repeat
        centre = torch.stack([left + right, top + bottom]) / 2
        torch.testing.assert_close(inside.mean((1, 2)), centre, rtol=0, atol=1e-3)
        width = (pixels[0, 8, -3] - pixels[0, 8, 2]).abs() / 3 * 8
        torch.testing.assert_close(width, right - left, rtol=0, atol=1e-3)
