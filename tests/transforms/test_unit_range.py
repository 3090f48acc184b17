# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from typing import Any

import pytest
import torch

from torchgeo_softcon.bands import SENTINEL2_BANDS
from torchgeo_softcon.transforms import ToUnitRange


def test_of_bands() -> None:
    whole = ToUnitRange.of(SENTINEL2_BANDS)
    some = ToUnitRange.of(['b08', 'B2'])
    image = 4000 * torch.rand(2, 13, 4, 4)
    expected = whole(image)[:, [7, 1]]
    assert torch.equal(some(image[:, [7, 1]]), expected)
    assert torch.equal(some({'image': image[:, [7, 1]]})['image'], expected)


def test_level_2a_has_its_own_statistics() -> None:
    # The first band by hand: 752.4 - 2 * 1108.03 becomes 0
    image = torch.tensor([752.4 - 2 * 1108.03, 752.4, 752.4 + 1108.03]).view(1, 1, 3)
    actual = ToUnitRange.of(['B1'], 'L2A')(image).ravel()
    torch.testing.assert_close(actual, torch.tensor([0, 0.5, 0.75]))
    radar = torch.full((2, 1, 1), -15.0)
    levels = [ToUnitRange.of(['VV', 'VH'], level)(radar) for level in ('L1C', 'L2A')]
    assert torch.equal(*levels)
    with pytest.raises(ValueError, match='no statistics of B10 of Sentinel-2 L2A'):
        ToUnitRange.of(['B10'], 'L2A')
    with pytest.raises(ValueError, match="level must be one of L1C, L2A, got 'L2'"):
        ToUnitRange.of(['B1'], 'L2')  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ('bands', 'match'),
    [
        (['B2', 'NIR'], 'no statistics of NIR of Sentinel-2 L1C'),
        ([], 'at least one name, got none'),
        ('B2', "a list of names, .* got 'B2'"),
    ],
)
def test_bands_without_statistics(bands: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ToUnitRange.of(bands)


@pytest.mark.parametrize(
    ('mean', 'std', 'match'),
    [
        ([1.0, 2.0], [1.0], 'one number for each band, got 2 and 1'),
        ([], [], 'one number for each band, got 0 and 0'),
        ([1.0, 2.0], [1.0, 0.0], r'std must be positive, got \(1.0, 0.0\)'),
        ([1.0], [float('nan')], r'std must be positive, got \(nan'),
    ],
)
def test_bad_statistics(mean: list[float], std: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ToUnitRange(mean, std)


@pytest.mark.parametrize('shape', [(13, 4, 4), (2, 1, 4, 4), (4, 4)])
def test_other_channels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'image must have 2 channels, .* got \('):
        ToUnitRange.of(['VV', 'VH'])({'image': torch.zeros(shape)})
