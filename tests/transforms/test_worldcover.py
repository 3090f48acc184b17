# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from torchgeo_softcon.transforms.worldcover import (
    WORLDCOVER_CODES,
    WorldCoverMultiLabel,
    check_values,
    class_fractions,
)

DELHI = Path(__file__).parents[2].parent / 'shared' / 'data' / 'delhi_s2rgb_worldcover'

DTYPES = [
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.float32,
    torch.bfloat16,
]


def random_mask(*shape: int, extra: tuple[int, ...] = ()) -> Tensor:
    values = torch.tensor([0, *WORLDCOVER_CODES, *extra])
    generator = torch.Generator().manual_seed(sum(shape))
    return values[torch.randint(len(values), shape, generator=generator)]


def slow_fractions(mask: Tensor, codes: tuple[int, ...]) -> Tensor:
    rows = []
    for one in mask.reshape(-1, *mask.shape[-2:]):
        valid = [value for value in one.flatten().tolist() if value in codes]
        rows.append([valid.count(code) / max(len(valid), 1) for code in codes])
    return torch.tensor(rows).reshape(*mask.shape[:-2], len(codes))


def half_and_half(first: int, second: int) -> Tensor:
    mask = torch.full((4, 4), first)
    mask[:2] = second
    return mask


class TestClassFractions:
    @pytest.mark.parametrize(
        'shape', [(5, 7), (1, 5, 7), (3, 5, 7), (2, 3, 5, 7), (300, 2, 3), (0, 2, 2)]
    )
    def test_match_a_slow_count(self, shape: tuple[int, ...]) -> None:
        mask = random_mask(*shape, extra=(1, 255, 300, -7))
        actual = class_fractions(mask, WORLDCOVER_CODES)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, slow_fractions(mask, WORLDCOVER_CODES))

    @pytest.mark.parametrize('dtype', DTYPES)
    def test_do_not_depend_on_the_dtype(self, dtype: torch.dtype) -> None:
        mask = random_mask(2, 5, 7)
        actual = class_fractions(mask.to(dtype), WORLDCOVER_CODES)
        torch.testing.assert_close(actual, class_fractions(mask, WORLDCOVER_CODES))

    def test_follow_the_order_of_the_codes(self) -> None:
        mask = random_mask(3, 8, 8)
        codes = (95, 10, 40)
        torch.testing.assert_close(
            class_fractions(mask, codes), slow_fractions(mask, codes)
        )

    def test_without_data_are_zero(self) -> None:
        mask = torch.stack([torch.zeros(4, 4), torch.full((4, 4), 255)]).long()
        assert class_fractions(mask, WORLDCOVER_CODES).eq(0).all()

    def test_do_not_change_the_mask(self) -> None:
        mask = random_mask(2, 4, 4, extra=(300,))
        before = mask.clone()
        class_fractions(mask)
        assert torch.equal(mask, before)

    def test_shape_on_a_device_without_values(self) -> None:
        # Fails if anything on the way waits for a value of the mask
        actual = class_fractions(torch.empty(2, 3, 4, 4, device='meta').long())
        assert actual.shape == (2, 3, 11)
        assert actual.dtype == torch.float32

    @pytest.mark.gpu
    @pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.float32])
    def test_cuda_equals_cpu_without_waiting(self, dtype: torch.dtype) -> None:
        mask = random_mask(5, 33, 31, extra=(7, 255)).to(dtype)
        on_device = mask.cuda()
        torch.cuda.set_sync_debug_mode('error')
        try:
            actual = class_fractions(on_device)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        torch.testing.assert_close(actual.cpu(), class_fractions(mask))


class TestWorldCoverMultiLabel:
    def test_label_is_a_threshold_of_the_fractions(self) -> None:
        mask = torch.full((10, 10), 10)
        mask[0, :5] = 20  # 5 %, just enough
        mask[1, :4] = 30  # 4 %
        label = WorldCoverMultiLabel()({'mask': mask})['label']
        assert label.dtype == torch.float32
        assert label.tolist() == [1, 1, *[0] * 9]

    def test_share_is_of_the_valid_pixels(self) -> None:
        mask = torch.zeros(10, 10, dtype=torch.long)
        mask[:6] = 40
        mask[0, :3] = 50  # 3 % of all pixels, 5 % of the valid ones
        label = WorldCoverMultiLabel()({'mask': mask})['label']
        assert label.nonzero().flatten().tolist() == [3, 4]

    def test_fractions(self) -> None:
        mask = random_mask(3, 8, 8)
        sample = WorldCoverMultiLabel(fractions=True)({'mask': mask})
        torch.testing.assert_close(sample['label'], class_fractions(mask))

    def test_too_little_data_is_unknown(self) -> None:
        mask = torch.zeros(3, 4, 4, dtype=torch.long)
        mask[1, :2] = 80  # exactly one half
        mask[2, :2] = 80
        mask[2, 0, 0] = 0
        for fractions in (False, True):
            transform = WorldCoverMultiLabel(fractions=fractions)
            label = transform({'mask': mask})['label']
            assert label.sum(1).tolist() == [0, 1, 0]
        label = WorldCoverMultiLabel(min_valid=0)({'mask': mask})['label']
        assert label.sum(1).tolist() == [0, 1, 1]

    def test_smallest_share_is_enough(self) -> None:
        """Of 100 pixels, 7 are .07, although .07 * 100 is more than 7 in floats."""
        pixels = torch.arange(100).view(10, 10)
        for number in range(1, 101):
            transform = WorldCoverMultiLabel(min_valid=number / 100)
            masks = torch.stack([(pixels < n) * 10 for n in (number - 1, number)])
            assert transform({'mask': masks})['label'].sum(1).tolist() == [0, 1]

    @pytest.mark.parametrize(
        ('mask', 'image', 'label'),
        [
            ((4, 4), None, (11,)),
            ((1, 4, 4), None, (11,)),
            ((1, 4, 4), (3, 4, 4), (11,)),
            ((1, 4, 4), (1, 3, 4, 4), (1, 11)),
            ((2, 4, 4), (2, 3, 4, 4), (2, 11)),
            ((2, 1, 4, 4), None, (2, 11)),
            ((2, 1, 4, 4), (2, 3, 4, 4), (2, 11)),
            ((1, 1, 4, 4), (1, 3, 4, 4), (1, 11)),
            ((2, 3, 4, 4), (2, 9, 4, 4), (2, 3, 11)),
            ((2, 3, 4, 4), (2, 3, 5, 4, 4), (2, 3, 11)),
            ((2, 1, 4, 4), (2, 1, 5, 4, 4), (2, 1, 11)),
            ((2, 1, 4, 4), (2, 3, 5, 4, 4), (2, 11)),
            ((2, 3, 1, 4, 4), (2, 3, 5, 4, 4), (2, 3, 11)),
        ],
    )
    def test_shapes(
        self,
        mask: tuple[int, ...],
        image: tuple[int, ...] | None,
        label: tuple[int, ...],
    ) -> None:
        sample = {'mask': random_mask(*mask)}
        if image is not None:
            sample['image'] = torch.zeros(image)
        assert WorldCoverMultiLabel()(sample)['label'].shape == label

    def test_input_is_not_modified(self) -> None:
        mask = random_mask(4, 4)
        before = mask.clone()
        sample = {'mask': mask, 'other': 'text'}
        out = WorldCoverMultiLabel()(sample)
        assert set(sample) == {'mask', 'other'}
        assert torch.equal(mask, before)
        assert set(out) == {'label', 'other'}

    def test_mask_can_stay(self) -> None:
        sample = {'mask': random_mask(4, 4)}
        out = WorldCoverMultiLabel(keep_mask=True)(sample)
        assert out['mask'] is sample['mask']

    def test_other_legends(self) -> None:
        mask = torch.arange(12).view(3, 4)
        transform = WorldCoverMultiLabel(range(1, 12), fractions=True)
        assert torch.allclose(transform({'mask': mask})['label'], torch.tensor(1 / 11))

    def test_foreign_codes_can_be_no_data(self) -> None:
        mask = half_and_half(80, 37)
        label = WorldCoverMultiLabel(foreign='ignore')({'mask': mask})['label']
        assert label.nonzero().flatten().tolist() == [7]

    def test_survives_pickling(self) -> None:
        sample = {'mask': half_and_half(80, 37)}
        transform = WorldCoverMultiLabel((80, 10), min_valid=0.25, foreign='ignore')
        copy = pickle.loads(pickle.dumps(transform))
        assert copy(sample)['label'].tolist() == [1, 0]

    def test_delhi_has_two_and_a_half_labels_per_patch(self) -> None:
        if not DELHI.exists():
            pytest.skip('real data are not there')
        with open(DELHI / 'labels.csv') as file:
            rows = {row['name']: row for row in csv.DictReader(file)}
        names = sorted(rows)
        masks = torch.stack(
            [
                torch.from_numpy(np.array(Image.open(DELHI / 'masks' / f'{name}.png')))
                for name in names
            ]
        )

        fractions = WorldCoverMultiLabel(fractions=True)({'mask': masks})['label']
        for code in (10, 20, 30, 40, 50, 60, 80, 90):
            expected = [float(rows[name][f'wc_{code}']) for name in names]
            torch.testing.assert_close(
                fractions[:, WORLDCOVER_CODES.index(code)],
                torch.tensor(expected),
                atol=1e-4,
                rtol=0,
            )
        # The numbers of the docstring
        label = WorldCoverMultiLabel()({'mask': masks})['label']
        present = fractions > 0
        small = present & (fractions < 0.05)
        assert round(present.sum(1).float().mean().item(), 1) == 6.1
        assert round((small.sum() / present.sum()).item(), 2) == 0.59
        assert fractions[small].sum().item() / len(masks) < 0.04
        assert round(label.sum(1).mean().item(), 1) == 2.5


class TestErrors:
    def test_values_alone(self) -> None:
        check_values(random_mask(2, 4, 4).float())
        with pytest.raises(ValueError, match=r'got also 37\. If it was interpolated'):
            check_values(half_and_half(10, 37))

    def test_missing_mask_names_the_keys(self) -> None:
        with pytest.raises(ValueError, match=r"got the keys \['crs', 'image'\]"):
            WorldCoverMultiLabel()({'image': torch.zeros(3, 4, 4), 'crs': None})

    @pytest.mark.parametrize('last', [10, 11])
    def test_ordinals(self, last: int) -> None:
        mask = torch.arange(last + 1)[None]
        with pytest.raises(ValueError, match='looks like ordinals'):
            WorldCoverMultiLabel()({'mask': mask})

    def test_interpolated_floats(self) -> None:
        mask = half_and_half(10, 20).float()
        mask[1] = 15.5
        with pytest.raises(ValueError, match=r'got 15\.5.*nearest neighbour'):
            WorldCoverMultiLabel()({'mask': mask})

    def test_interpolated_integers(self) -> None:
        mask = torch.tensor([[10, 15, 20, 37, 40, 41, 42, 43, 44]])
        message = r'got also 15, 37, 41, 42, 43, \.\.\.\. .*interpolated'
        with pytest.raises(ValueError, match=message):
            WorldCoverMultiLabel()({'mask': mask})

    @pytest.mark.parametrize('value', [-1, 255, 256, 70000])
    def test_out_of_range(self, value: int) -> None:
        with pytest.raises(ValueError, match='got also 255'):
            WorldCoverMultiLabel()({'mask': half_and_half(10, value)})

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_not_finite(self, value: float) -> None:
        with pytest.raises(ValueError, match='NaN'):
            class_fractions(torch.tensor([[10.0, value]]))

    @pytest.mark.parametrize('mask', [np.zeros((4, 4)), [[10]], None])
    def test_no_tensor(self, mask: object) -> None:
        with pytest.raises(TypeError, match='mask must be a tensor, got'):
            WorldCoverMultiLabel()({'mask': mask})

    @pytest.mark.parametrize('dtype', [torch.bool, torch.complex64])
    def test_no_codes(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match='mask must hold class codes, got dtype'):
            class_fractions(torch.zeros(4, 4, dtype=dtype))

    @pytest.mark.parametrize('shape', [(), (4,), (0, 4), (2, 4, 0)])
    def test_no_pixels(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r'must be of shape \(\.\.\., H, W\)'):
            class_fractions(torch.zeros(shape))

    @pytest.mark.parametrize('codes', [(), (0, 10), (10, 256), (-10,)])
    def test_codes_out_of_range(self, codes: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match='codes must be whole numbers from 1'):
            WorldCoverMultiLabel(codes)

    def test_codes_of_another_type(self) -> None:
        with pytest.raises(TypeError, match='codes must be a list of a whole number'):
            WorldCoverMultiLabel((10.5,))  # type: ignore[arg-type]

    def test_duplicate_codes(self) -> None:
        with pytest.raises(ValueError, match=r'codes must be unique, got \(10, 10\)'):
            class_fractions(torch.zeros(2, 2), (10, 10))

    @pytest.mark.parametrize('value', [0, -0.1, 1.1, float('nan')])
    def test_min_fraction(self, value: float) -> None:
        with pytest.raises(
            ValueError, match=r'min_fraction must be (in \(0, 1\]|finite), got'
        ):
            WorldCoverMultiLabel(min_fraction=value)

    @pytest.mark.parametrize('value', [-0.1, 1.1, float('nan')])
    def test_min_valid(self, value: float) -> None:
        with pytest.raises(
            ValueError, match=r'min_valid must be (in \[0, 1\]|finite), got'
        ):
            WorldCoverMultiLabel(min_valid=value)

    def test_unknown_policy(self) -> None:
        with pytest.raises(ValueError, match="foreign must be 'error' or 'ignore'"):
            WorldCoverMultiLabel(foreign='warn')  # type: ignore[arg-type]
