# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import math
import warnings
from contextlib import nullcontext
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as T

from torchgeo_softcon.transforms import MultiCropView, crops
from torchgeo_softcon.transforms.colours import jitter_rgb, shift_hue
from torchgeo_softcon.transforms.interpolation import Interpolation, crop_matrices
from torchgeo_softcon.transforms.resample import (
    resample,
    resample_batch,
    resample_blocks,
)
from torchgeo_softcon.transforms.sampling import random_boxes

# No augmentation but the crops
PLAIN: dict[str, Any] = {
    'horizontal_flip': 0.0,
    'jitter_probability': 0.0,
    'grey_probability': 0.0,
    'global_blur': (0.0, 0.0),
    'local_blur': 0.0,
}
# Whole images instead of crops, too
WHOLE: dict[str, Any] = {
    **PLAIN,
    'global_size': 32,
    'local_sizes': (32,),
    'global_scale': (1.0, 1.0),
    'local_scale': (1.0, 1.0),
    'ratio': (1.0, 1.0),
}
SMALL: dict[str, Any] = {'global_size': 32, 'local_sizes': (28, 20, 16)}


def seasons(batch: int, number: int, channels: int = 3, size: int = 48) -> Tensor:
    """Images of one colour for each sample and season: 10 * sample + season."""
    colour = 10.0 * torch.arange(batch)[:, None] + torch.arange(number)
    return colour[:, :, None, None, None].expand(-1, -1, channels, size, size).clone()


def colours(view: Tensor) -> Tensor:
    """The one colour of each image of a view."""
    low, high = torch.aminmax(view.flatten(1), dim=1)
    torch.testing.assert_close(low, high)
    return low


class TestBoxes:
    def test_are_inside_and_whole(self) -> None:
        torch.manual_seed(0)
        boxes = random_boxes(torch.zeros(5000, 1, 40, 60), (0.05, 1), (0.5, 2))
        left, top, right, bottom = boxes.T
        assert boxes.dtype == torch.int64
        assert left.min() == top.min() == 0
        assert right.max() == 60
        assert bottom.max() == 40
        assert (right > left).all()
        assert (bottom > top).all()

    def test_distribution_is_that_of_torchvision(self) -> None:
        # The large boxes often do not fit and are drawn again
        torch.manual_seed(0)
        n, image = 5000, torch.zeros(1, 90, 120)
        boxes = random_boxes(image.expand(n, 1, 90, 120), (0.32, 1), (3 / 4, 4 / 3))
        params = [
            RandomResizedCrop.get_params(image, [0.32, 1], [3 / 4, 4 / 3])
            for _ in range(n)
        ]
        top, left, height, width = torch.tensor(params).double().T
        x, y, right, bottom = boxes.double().T
        w, h = right - x, bottom - y
        for ours, theirs in (
            (w * h, width * height),
            (w / h, width / height),
            (x, left),
            (y, top),
        ):
            for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
                scale = theirs.quantile(0.9) - theirs.quantile(0.1)
                difference = ours.quantile(quantile) - theirs.quantile(quantile)
                assert difference.abs() < 0.05 * scale + 1

    @pytest.mark.parametrize(
        ('size', 'ratio', 'expected'),
        [
            ((40, 60), (1 / 1.35, 1.35), [3, 0, 57, 40]),
            ((60, 40), (1 / 1.35, 1.35), [0, 3, 40, 57]),
            ((9, 9), (1.3, 1.3), [0, 1, 9, 8]),
        ],
    )
    def test_central_box_where_none_fits(
        self, size: tuple[int, int], ratio: tuple[float, float], expected: list[int]
    ) -> None:
        boxes = random_boxes(torch.zeros(3, 1, *size), (1, 1), ratio)
        assert boxes.tolist() == [expected] * 3

    def test_sides_are_rounded_and_all_places_equally_likely(self) -> None:
        torch.manual_seed(0)
        # 33 * 0.95 = 31.35 and 33 * 0.96 = 31.68
        for side, expected in ((0.95, 31), (0.96, 32)):
            area = (side**2, side**2)
            boxes = random_boxes(torch.zeros(900, 1, 33, 33), area, (1, 1))
            assert ((boxes[:, 2:] - boxes[:, :2]) == expected).all()
            places = 33 - expected + 1
            for starts in boxes[:, :2].T:
                counts = torch.bincount(starts)
                assert len(counts) == places
                assert counts.min() > 0.8 * 900 / places

    def test_whole_image(self) -> None:
        boxes = random_boxes(torch.zeros(3, 1, 33, 33), (1, 1), (1, 1))
        assert boxes.tolist() == [[0, 0, 33, 33]] * 3


class TestResample:
    @pytest.mark.parametrize('interpolation', get_args(Interpolation))
    @pytest.mark.parametrize('size', [(84, 84), (17, 40), (40, 17), (11, 12)])
    def test_equals_torchvision(
        self, interpolation: Interpolation, size: tuple[int, int]
    ) -> None:
        """Down-scaling up to 10 times, up-scaling, both at once, and flips."""
        image = torch.randn(5, 4, 120, 110)
        same = [10, 20, 10 + size[1], 20 + size[0]]
        boxes = torch.tensor(
            [[0, 0, 110, 120], [3, 5, 23, 30], [7, 0, 99, 22], [50, 2, 61, 120], same]
        )
        flips = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]]).bool()
        weights = crop_matrices(image, boxes, size, flips, interpolation)
        views = [form(image, *weights) for form in (resample_blocks, resample_batch)]

        for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
            # In float32, its weights are off by 1e-5
            expected = T.resized_crop(
                image[i].double(),
                top,
                left,
                bottom - top,
                right - left,
                list(size),
                InterpolationMode(interpolation),
                antialias=True,
            ).float()
            if flips[0, i]:
                expected = T.horizontal_flip(expected)
            if flips[1, i]:
                expected = T.vertical_flip(expected)
            for view in views:
                torch.testing.assert_close(view[i], expected, rtol=0, atol=5e-6)

    def test_does_not_alias(self) -> None:
        """The finest stripes of a large crop become grey."""
        image = torch.zeros(1, 1, 200, 200)
        image[..., ::2] = 1
        whole, upright = torch.tensor([[0, 0, 200, 200]]), torch.zeros(2, 1).bool()
        crop = resample(image, *crop_matrices(image, whole, (84, 84), upright))
        assert (crop[..., 2:-2] - 0.5).abs().max() < 0.1


class TestColours:
    @pytest.mark.parametrize('number', range(4))
    def test_each_operation_is_that_of_torchvision(self, number: int) -> None:
        torch.manual_seed(0)
        image = torch.rand(6, 3, 16, 16)
        factors = [torch.ones(6), torch.ones(6), torch.ones(6), torch.zeros(6)]
        factors[number] = torch.tensor([0.2, 0.5, 0.9, 1.1, 1.5, 1.8])
        if number == 3:
            factors[3] = factors[3] - 1
        factors[3] = factors[3].clamp(-0.5, 0.5)
        operation = (
            T.adjust_brightness,
            T.adjust_contrast,
            T.adjust_saturation,
            T.adjust_hue,
        )[number]
        actual = jitter_rgb(image, *[*factors, torch.zeros(6).bool()])
        for i in range(6):
            expected = operation(image[i], factors[number][i].item())
            torch.testing.assert_close(actual[i], expected, rtol=0, atol=1e-4)

    def test_overshoot_of_bicubic_crops(self) -> None:
        image = torch.tensor([-0.1, -1e-8, 0, 0.5, 1.1]).expand(1, 3, 1, 5)
        factors = [torch.ones(1), torch.ones(1), torch.ones(1), torch.zeros(1)]
        for seed in range(24):
            torch.manual_seed(seed)
            view = jitter_rgb(image, *[*factors, torch.zeros(1).bool()])
            torch.testing.assert_close(view, image.clamp(0, 1))

    def test_order_is_random(self) -> None:
        image, half = torch.rand(1, 3, 8, 8), torch.full((1,), 1.7)
        hue, grey = torch.full((1,), 0.2), torch.zeros(1).bool()
        results = set()
        for seed in range(40):
            torch.manual_seed(seed)
            view = jitter_rgb(image, half, half, half, hue, grey)
            results.add(round(view.sum().item(), 3))
        assert len(results) > 6

    @pytest.mark.parametrize('shift', [0.0, 1 / 3, -0.5, 0.1])
    def test_hue_of_corners_and_greys(self, shift: float) -> None:
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 3)
        image = corners.T.view(1, 3, 3, 9)
        actual = shift_hue(image, torch.tensor([shift]))
        expected = T.adjust_hue(image, shift)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


class TestMultiCropView:
    def test_defaults_of_the_paper(self) -> None:
        module = MultiCropView(value_range=(0, 1))
        views = module(torch.rand(2, 3, 264, 264))
        sizes = [224, 224, 184, 164, 144, 124, 104, 84]
        assert [tuple(view.shape) for view in views] == [(2, 3, s, s) for s in sizes]
        assert list(module.sizes) == sizes
        assert module.num_global == 2
        assert len(module.boxes) == 8
        assert module.global_jitter == (0.4, 0.4, 0.2, 0.1)
        assert module.global_blur == (1, 0.1)
        assert module.global_solarize == (0, 0.2)
        module = MultiCropView(views='temporal', value_range=(0, 1))
        assert list(module.sizes) == [224, *sizes]
        assert module.num_global == 3
        assert module.global_jitter == (0.4, 0.4, 0.4, 0.1)
        assert module.global_blur == (0.5, 0.5)
        assert module.global_solarize == (0, 0)

    @pytest.mark.parametrize('channels', [1, 2, 3, 13])
    @pytest.mark.parametrize('views', ['multi_crop', 'temporal'])
    @pytest.mark.parametrize('value_range', [None, (0, 1)])
    def test_any_number_of_bands(
        self, channels: int, views: Any, value_range: tuple[float, float] | None
    ) -> None:
        image = torch.rand(4, 3, channels, 40, 50)
        before = image.clone()
        module = MultiCropView(**SMALL, views=views, value_range=value_range)
        result = module(image)
        assert [view.shape[-1] for view in result] == list(module.sizes)
        for view in result:
            assert view.shape[:2] == (4, channels)
            assert view.dtype == torch.float32
            assert view.isfinite().all()
            assert view.is_contiguous()
            if value_range is not None:
                assert view.min() >= 0
                assert view.max() <= 1
        assert torch.equal(image, before)

    def test_input_of_the_final_size_is_not_modified(self) -> None:
        image = torch.rand(8, 5, 32, 32)
        before = image.clone()
        options = {**WHOLE, 'global_blur': (1, 1), 'local_blur': 1}
        for _ in range(3):
            MultiCropView(**options)(image)
        assert torch.equal(image, before)
        stacked = torch.rand(8, 2, 5, 32, 32)
        before = stacked.clone()
        MultiCropView(**options, views='temporal')(stacked)
        assert torch.equal(stacked, before)

    def test_the_last_sizes_are_taken(self) -> None:
        sizes = (28, 20, 16)
        for number, expected in ((3, sizes), (2, (20, 16)), (0, ())):
            module = MultiCropView(32, sizes, number)
            views = module(torch.rand(2, 3, 40, 40))
            assert tuple(view.shape[-1] for view in views) == (32, 32, *expected)

    @pytest.mark.parametrize('views', ['multi_crop', 'temporal'])
    def test_without_local_crops(self, views: Any) -> None:
        module = MultiCropView(32, (16,), num_local_crops=0, views=views)
        crops = module(torch.rand(2, 2, 4, 32, 32))
        assert [crop.shape for crop in crops] == [(2, 4, 32, 32)] * module.num_global
        assert len(module.boxes) == module.num_global

    def test_views_are_crops_of_their_boxes(self) -> None:
        torch.manual_seed(0)
        image = torch.randn(6, 5, 80, 70)
        module = MultiCropView(
            48, (40, 24), **PLAIN, global_scale=(0.4, 1), local_scale=(0.05, 0.3)
        )
        views = module(image)
        for view, boxes, size in zip(views, module.boxes, module.sizes, strict=True):
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1) / (80 * 70)
            low, high = (0.4, 1) if size == 48 else (0.05, 0.3)
            assert area.min() >= 0.95 * low
            assert area.max() <= 1.05 * high
            kernel: Interpolation = 'bicubic' if size == 48 else 'bilinear'
            upright = torch.zeros(2, 6, dtype=torch.bool)
            weights = crop_matrices(image, boxes, (size, size), upright, kernel)
            expected = resample(image, *weights)
            torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
        assert len({tuple(b.flatten().tolist()) for b in module.boxes}) == 4

    def test_flips(self) -> None:
        image = torch.randn(64, 2, 32, 32)
        for option, dim in (('horizontal_flip', -1), ('vertical_flip', -2)):
            for view in MultiCropView(**{**WHOLE, option: 1})(image):
                torch.testing.assert_close(view, image.flip(dim))
            torch.manual_seed(0)
            for view in MultiCropView(**{**WHOLE, option: 0.5})(image):
                flipped = (view - image.flip(dim)).abs().amax((1, 2, 3)) < 1e-4
                assert 16 < flipped.sum() < 48

    @pytest.mark.parametrize(
        'option',
        [
            {'global_scale': (0.2, 0.9), 'local_scale': (0.2, 0.9)},
            {'jitter_probability': 1.0},
            {'global_blur': (1, 1), 'local_blur': 1, 'blur_sigma': (0.5, 2)},
        ],
    )
    @pytest.mark.parametrize('channels', [3, 4])
    def test_parameters_are_drawn_per_sample_and_view(
        self, option: dict[str, Any], channels: int
    ) -> None:
        torch.manual_seed(0)
        image = torch.rand(1, channels, 32, 32).expand(8, -1, -1, -1)
        module = MultiCropView(**{**WHOLE, 'value_range': (0, 1), **option})
        views = torch.cat([view[:, :, :6, :6] for view in module(image)])
        assert len({tuple(view.flatten().tolist()) for view in views}) == 3 * 8

    def test_probabilities_per_view(self) -> None:
        """Blur always in the first global view, solarisation in the second only."""
        torch.manual_seed(0)
        image = torch.rand(200, 3, 32, 32)
        options = {**WHOLE, 'value_range': (0, 1)}
        for option, expected in (
            ({'global_blur': (1.0, 0.1), 'local_blur': 0.5}, (1, 0.1, 0.5)),
            ({'global_solarize': (0.0, 0.2)}, (0, 0.2, 0)),
            ({'jitter_probability': 0.8}, (0.8, 0.8, 0.8)),
            ({'grey_probability': 0.2}, (0.2, 0.2, 0.2)),
        ):
            base = {'global_solarize': (0.0, 0.0), **option}
            for view, share in zip(
                MultiCropView(**{**options, **base})(image), expected, strict=True
            ):
                changed = (view - image).abs().amax((1, 2, 3)) > 1e-5
                actual = changed.float().mean().item()
                # Blur by 0.1 pixel changes nothing
                assert actual == pytest.approx(share, abs=0.12)
                assert (actual > 0) == (share > 0)

    def test_solarize_reflects_the_upper_half(self) -> None:
        image = torch.rand(4, 5, 32, 32) * 400 - 100
        module = MultiCropView(
            **{**WHOLE, 'global_solarize': (0, 1), 'value_range': (-100, 300)}
        )
        plain, solarized, local = module(image)
        expected = torch.where(image >= 100, 200 - image, image)
        torch.testing.assert_close(solarized, expected, rtol=0, atol=1e-3)
        for view in (plain, local):
            torch.testing.assert_close(view, image, rtol=0, atol=1e-3)

    @pytest.mark.parametrize('number', range(4))
    def test_strengths_of_bands(self, number: int) -> None:
        """Each operation by its closed form, with factors in its range."""
        torch.manual_seed(0)
        image = (
            torch.randn(200, 4, 32, 32) + torch.tensor([1.0, 2, 3, 4])[:, None, None]
        )
        strengths = [0.0] * 4
        strengths[number] = 0.4
        module = MultiCropView(
            **{**WHOLE, 'jitter_probability': 1, 'global_jitter': strengths}
        )
        view = module(image)[0]
        if number == 0:  # one factor for all bands
            factor = view / image
            assert factor.flatten(1).std(1).max() < 1e-2
        elif number == 1:  # about the mean of each band
            factor = view.std((-2, -1)) / image.std((-2, -1))
            torch.testing.assert_close(view.mean((-2, -1)), image.mean((-2, -1)))
            assert factor.std(1).max() < 1e-4
        elif number == 2:  # about the mean of each pixel
            factor = view.std(1) / image.std(1)
            torch.testing.assert_close(view.mean(1), image.mean(1))
            assert factor.flatten(1).std(1).max() < 1e-3
        else:  # a gain for each band
            factor = view.mean((-2, -1)) / image.mean((-2, -1))
            torch.testing.assert_close(factor.mean(1), torch.ones(200))
            assert factor.std(1).min() > 1e-3
        low, high = (0.6, 1.4) if number < 3 else (0.4, 2.0)
        assert factor.flatten(1).median(1).values.min() >= low
        assert factor.flatten(1).median(1).values.max() <= high
        assert factor.mean().item() == pytest.approx(1, abs=0.05)

    def test_local_strengths_are_their_own(self) -> None:
        torch.manual_seed(0)
        image = torch.ones(500, 4, 32, 32)
        options = {'global_jitter': (0.4, 0, 0, 0), 'local_jitter': (0.8, 0, 0, 0)}
        module = MultiCropView(**{**WHOLE, **options, 'jitter_probability': 1})
        for view, strength in zip(module(image), (0.4, 0.4, 0.8), strict=True):
            factor = colours(view)
            assert factor.min().item() == pytest.approx(1 - strength, abs=0.02)
            assert factor.max().item() == pytest.approx(1 + strength, abs=0.02)

    def test_grey(self) -> None:
        image = torch.rand(4, 3, 32, 32)
        options = {**WHOLE, 'grey_probability': 1}
        for view in MultiCropView(**options)(image):
            expected = image.mean(1, keepdim=True).expand(-1, 3, -1, -1)
            torch.testing.assert_close(view, expected)
        options['global_solarize'] = (0, 0)
        for view in MultiCropView(**options, value_range=(0, 1))(image):
            expected = T.rgb_to_grayscale(image, 3)
            torch.testing.assert_close(view, expected, rtol=0, atol=1e-3)

    def test_values_are_not_clipped_unless_declared(self) -> None:
        torch.manual_seed(0)
        image = torch.randn(16, 13, 40, 40) * 100 - 50
        for view in MultiCropView(**SMALL)(image):
            assert view.min() < -100
            assert view.max() > 50
        for view in MultiCropView(**SMALL, value_range=(-10, 20))(image):
            assert view.min() == -10
            assert view.max() == 20

    def test_the_range_does_not_matter(self) -> None:
        """The same views of reflectances and of digital numbers."""
        image = torch.randint(0, 10_001, (4, 3, 40, 40), dtype=torch.int32)
        results = []
        for values, top in ((image, 10_000), (image / 10_000, 1)):
            torch.manual_seed(0)
            results.append(MultiCropView(**SMALL, value_range=(0, top))(values))
        for numbers, reflectances in zip(*results, strict=True):
            torch.testing.assert_close(numbers / 10_000, reflectances)

    def test_digital_numbers(self) -> None:
        image = torch.randint(0, 10_000, (2, 13, 32, 32), dtype=torch.uint16)
        for view in MultiCropView(**WHOLE)(image):
            torch.testing.assert_close(view, image.float())

    def test_same_seed_same_views(self) -> None:
        image = torch.rand(4, 3, 40, 40)
        module = MultiCropView(**SMALL, value_range=(0, 1))
        results = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            results.append(module(image))
        for first, again, other in zip(*results, strict=True):
            assert torch.equal(first, again)
            assert not torch.equal(first, other)

    def test_independent_of_autocast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Matrix products are what autocast would do in half precision
        monkeypatch.setattr(crops, 'resample', resample_batch)
        image = torch.rand(4, 3, 40, 40)
        results = []
        for context in (nullcontext(), torch.autocast('cpu', torch.bfloat16)):
            torch.manual_seed(0)
            with context:
                results.append(MultiCropView(**SMALL, value_range=(0, 1))(image))
        for plain, mixed in zip(*results, strict=True):
            assert torch.equal(plain, mixed)

    @pytest.mark.parametrize('views', ['multi_crop', 'temporal'])
    @pytest.mark.parametrize('channels', [3, 13])
    def test_waits_for_no_device(
        self, views: Any, channels: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tensors without values: whoever looks at one raises."""
        monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())
        image = torch.empty(2, 3, channels, 40, 40, device='meta')
        module = MultiCropView(**SMALL, views=views, value_range=(0, 1))
        for view in module(image):
            assert view.device.type == 'meta'

    def test_representation_has_all_options(self) -> None:
        text = repr(MultiCropView())
        assert 'local_sizes=(184, 164, 144, 124, 104, 84)' in text
        assert 'global_blur=(1.0, 0.1)' in text


class TestSeasons:
    def test_multi_crop_draws_one_per_sample(self) -> None:
        torch.manual_seed(0)
        module = MultiCropView(**{**WHOLE, 'local_sizes': (24, 16)})
        image = seasons(64, 3)
        drawn = [colours(view) for view in module(image)]
        for view in drawn[1:]:
            torch.testing.assert_close(view, drawn[0])
        season = drawn[0].round() - 10 * torch.arange(64)
        assert torch.bincount(season.long(), minlength=3).min() > 10
        again = colours(module(image)[0])
        assert not torch.allclose(again, drawn[0])

    @pytest.mark.parametrize('number', [2, 3, 4])
    def test_temporal_mapping(self, number: int) -> None:
        """Global views of t1, t2 and t0, local views of t0."""
        torch.manual_seed(0)
        module = MultiCropView(**{**WHOLE, 'local_sizes': (24, 16)}, views='temporal')
        views = module(seasons(200, number))
        assert [view.shape[-1] for view in views] == [32, 32, 32, 24, 16]
        second, third, first, *local = (
            (colours(view) - 10 * torch.arange(200)).round().long() for view in views
        )
        for season in local:
            assert torch.equal(season, first)
        assert (second != first).all()
        if number > 2:  # without replacement
            assert (third != first).all()
            assert (third != second).all()
        else:
            assert 70 < (third == first).sum() < 130
        for season in (first, second, third):
            expected = 200 / number
            assert torch.bincount(season).tolist() == pytest.approx(
                [expected] * number, abs=4 * math.sqrt(expected)
            )

    def test_temporal_augments_two_global_views_only(self) -> None:
        torch.manual_seed(0)
        image = torch.rand(100, 1, 3, 32, 32).expand(-1, 3, -1, -1, -1)
        options = {**WHOLE, 'horizontal_flip': 1.0}
        module = MultiCropView(**options, views='temporal')
        second, third, first, local = module(image)
        image = image[:, 0]
        for view in (third, local):
            torch.testing.assert_close(view, image)
        for view in (first, second):
            torch.testing.assert_close(view, image.flip(-1))
        for option in (
            {'jitter_probability': 1},
            {'grey_probability': 1},
            {'global_blur': (1, 1), 'blur_sigma': (1, 1), 'local_blur': 1},
        ):
            module = MultiCropView(**{**WHOLE, **option}, views='temporal')
            second, third, first, local = module(
                image[:, None].expand(-1, 3, -1, -1, -1)
            )
            for view in (third, local):
                torch.testing.assert_close(view, image)
            for view in (first, second):
                assert ((view - image).abs().amax((1, 2, 3)) > 1e-3).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            ({'num_local_crops': 7}, r'num_local_crops = 7 .* Give a size for each'),
            (
                {'num_local_crops': 4, 'local_sizes': (96,), 'views': 'temporal'},
                r'num_local_crops = 4 .* local_sizes = \(96,\)',
            ),
            ({'num_local_crops': -1}, 'num_local_crops must be >= 0, got -1'),
            ({'global_scale': (1, 0.3)}, r'global_scale must be a range .* \(1, 0.3\)'),
            ({'local_scale': (0, 0.3)}, r'local_scale must be a range .* \(0, 0.3\)'),
            ({'local_scale': (0.1, 1.3)}, 'local_scale must be a range'),
            ({'local_scale': (0.1,)}, r'local_scale must be \(a number, a number\)'),
            ({'ratio': (2, 1)}, 'ratio must be a range'),
            ({'blur_sigma': (-1, 1)}, 'blur_sigma must be a range'),
            ({'horizontal_flip': 2}, r'horizontal_flip must be in \[0, 1\], got 2'),
            ({'local_blur': -0.1}, r'local_blur must be in \[0, 1\], got -0.1'),
            ({'global_blur': (0, 2)}, r'global_blur must be 2 numbers in \[0, 1\]'),
            ({'global_jitter': (1, 1, 1)}, 'global_jitter must be'),
            ({'local_jitter': (1, 1, 1, 0.6)}, r'hue of local_jitter .* got 0.6'),
            ({'value_range': (1, 0)}, r'value_range must be \(low, high\)'),
            ({'global_solarize': (0, 0.2)}, 'declare value_range'),
            ({'views': 'tp'}, "views must be 'multi_crop' or 'temporal', got 'tp'"),
            ({'global_interpolation': 'nearest'}, "global_interpolation .* 'nearest'"),
            ({'global_size': 0}, 'global_size must be at least 1, got 0'),
        ],
    )
    def test_bad_option(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises((TypeError, ValueError), match=match):
            MultiCropView(**kwargs)

    @pytest.mark.parametrize('shape', [(3, 40, 40), (1, 1, 1, 3, 40, 40)])
    def test_bad_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r'image must have the shape \(B, C, H, W'):
            MultiCropView(**SMALL)(torch.rand(shape))

    @pytest.mark.parametrize('shape', [(2, 3, 40, 40), (2, 1, 3, 40, 40)])
    def test_temporal_needs_two_seasons(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"two seasons.*or views = 'multi_crop'"):
            MultiCropView(**SMALL, views='temporal')(torch.rand(shape))

    def test_large_crops_are_warned_of_once(self) -> None:
        module = MultiCropView(**SMALL)
        match = r'Crops of 32, 28 pixels .* 40 x 24 pixels.* \(size of DINOMCTask\)'
        with pytest.warns(UserWarning, match=match):
            views = module(torch.rand(2, 3, 40, 24))
        assert views[0].shape[-1] == 32
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            module(torch.rand(2, 3, 40, 24))
            MultiCropView(**SMALL)(torch.rand(2, 3, 32, 32))
