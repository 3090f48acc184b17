# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

from collections.abc import Callable

import pytest
from torchgeo.models import ResNet50_Weights

from torchgeo_softcon.bands import (
    BAND_STATISTICS,
    SENTINEL1_BANDS,
    SENTINEL2_BANDS,
    SENTINEL2_SUBSETS,
    band_statistics,
    bands_of_count,
    normalize_band_names,
    rgb_indices,
)


def test_spellings() -> None:
    assert normalize_band_names(['B02', 'b8a', 'B08A'[:3], 'B11', 'B10']) == (
        'B2',
        'B8A',
        'B8',
        'B11',
        'B10',
    )
    assert normalize_band_names(['red', 'Green', 'B']) == ('R', 'G', 'B')
    assert normalize_band_names(['B08A', 'vv']) == ('B8A', 'VV')


def test_order_is_that_of_the_hosts_weights() -> None:
    meta = ResNet50_Weights.SENTINEL2_ALL_SOFTCON.meta
    assert normalize_band_names(meta['bands']) == SENTINEL2_BANDS
    meta = ResNet50_Weights.SENTINEL1_GRD_SOFTCON.meta
    assert normalize_band_names(meta['bands']) == SENTINEL1_BANDS


def test_statistics_are_those_of_the_hosts_weights() -> None:
    for weights, bands in (
        (ResNet50_Weights.SENTINEL2_ALL_SOFTCON, SENTINEL2_BANDS),
        (ResNet50_Weights.SENTINEL1_GRD_SOFTCON, SENTINEL1_BANDS),
    ):
        normalize = weights.transforms[-1]
        assert [BAND_STATISTICS[b][0] for b in bands] == list(normalize.mean)
        assert [BAND_STATISTICS[b][1] for b in bands] == list(normalize.std)


def test_statistics_of_level_2a() -> None:
    # Figures of SoftCon's authors, in the order of the bands without B10
    mean = [752.40, 884.30, 1144.16, 1297.47, 1624.91, 2194.64, 2422.21, 2517.76]
    mean += [2581.65, 2645.52, 2368.51, 1805.07]
    std = [1108.03, 1155.15, 1183.63, 1368.11, 1370.27, 1355.55, 1416.51, 1474.79]
    std += [1439.31, 1582.28, 1455.52, 1343.48]
    bands = SENTINEL2_SUBSETS[12]
    assert band_statistics(bands, 'L2A') == tuple(zip(mean, std, strict=True))


def test_rgb() -> None:
    assert rgb_indices(SENTINEL2_BANDS) == (3, 2, 1)
    assert rgb_indices(['G', 'R', 'NIR', 'B']) == (1, 0, 3)
    with pytest.raises(ValueError, match='must have red, green and blue'):
        rgb_indices(['VV', 'VH'])


def test_bad_names() -> None:
    with pytest.raises(ValueError, match=r"unknown name 'B8B', did you mean B8"):
        normalize_band_names(['B8B'])
    with pytest.raises(ValueError, match='must be unique'):
        normalize_band_names(['B2', 'B02'])


@pytest.mark.parametrize('function', [normalize_band_names, rgb_indices])
@pytest.mark.parametrize('bands', ['B2', 'RGB'])
def test_text_is_no_list(function: Callable[[str], object], bands: str) -> None:
    with pytest.raises(ValueError, match=rf"list of names, such as .* got '{bands}'"):
        function(bands)


def test_subsets_of_sentinel_2() -> None:
    # Level-2A of SSL4EO-S12, 10 and 20 m, 10 m, colours
    assert {n: ' '.join(bands) for n, bands in SENTINEL2_SUBSETS.items()} == {
        13: 'B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B10 B11 B12',
        12: 'B1 B2 B3 B4 B5 B6 B7 B8 B8A B9 B11 B12',
        10: 'B2 B3 B4 B5 B6 B7 B8 B8A B11 B12',
        4: 'B2 B3 B4 B8',
        3: 'B4 B3 B2',
    }
    for count, bands in SENTINEL2_SUBSETS.items():
        assert bands_of_count(count, SENTINEL2_BANDS) == bands


def test_count_of_bands() -> None:
    assert bands_of_count(2, SENTINEL1_BANDS) == ('VV', 'VH')
    with pytest.raises(ValueError, match='13 bands are too many, there are 2: VV, VH'):
        bands_of_count(13, SENTINEL1_BANDS)
    with pytest.raises(ValueError, match='1 bands of VV, VH could be any, only 2'):
        bands_of_count(1, SENTINEL1_BANDS)
