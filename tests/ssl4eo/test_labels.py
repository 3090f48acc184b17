# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.ssl4eo.archives import season
from torchgeo_softcon.ssl4eo.labels import match_labels, read_labels
from torchgeo_softcon.transforms.worldcover import WORLDCOVER_CODES

JUNE, SEPTEMBER, DECEMBER = '20200604', '20200902', '20201204'


def write_json(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def write_parquet(path: Path, ids: list[Any], **columns: Any) -> Path:
    pd.DataFrame({'id': ids, **columns}).to_parquet(path)
    return path


def images(*names: str) -> tuple[Any, Any]:
    """Locations and names of images, from location/name."""
    location, image = zip(*(name.split('/') for name in names), strict=True)
    return np.array(location, np.bytes_), np.array(image, np.bytes_)


def match(labels: Any, *names: str, split: str = 's2c') -> list[list[float]]:
    values = match_labels(labels, split, *images(*names))
    return [[round(x, 3) for x in row] for row in values.tolist()]


class TestJSON:
    def test_classes_of_dynamic_world(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / 'l.json', {'0': {'a': [0, 8], 'b': []}})
        labels = read_labels(path)
        assert labels.codes == tuple(range(9))
        assert not labels.shares
        assert match(labels, '0/b', '0/a') == [[0] * 9, [1, 0, 0, 0, 0, 0, 0, 0, 1]]

    def test_codes_of_worldcover(self, tmp_path: Path) -> None:
        labels = read_labels(write_json(tmp_path / 'l.json', {'0': {'a': [10, 95]}}))
        assert labels.codes == WORLDCOVER_CODES
        assert match(labels, '0/a') == [[1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]]

    @pytest.mark.parametrize(
        ('content', 'message'),
        [
            ({'0': {'a': [9]}}, 'Dynamic World .* got 9'),
            ({'0': {'a': [1, 10]}}, 'got 1, 10'),
            ({'0': {'a': 3}}, 'location: {season: .* an image has'),
            ({'0': {'a': '35'}}, 'an image has'),
            ({'0': {'a': ['3']}}, 'an image has'),
            ({'0': {'a': [3.0]}}, 'an image has'),
            ({'0': {'a': [True]}}, 'an image has'),
            ({'0': {'a': {'3': 1}}}, 'an image has'),
            ({'0': {'a': [10**30]}}, f'got {10**30}'),
            ({'0': [1]}, '0 has something else'),
            ([1], 'the file has something else'),
            ({'0': {}}, 'no entries'),
            ('{"0": {', 'not a valid JSON'),
            ('{"0":' * 10**5, 'not a valid JSON'),
            ({'0': {'a': [[1]]}}, 'an image has'),
            ({'0': {'a': {'b': [1]}}}, 'an image has'),
            ('{"0": {"a": [1]}, "0": {"b": [1]}}', "'0' comes twice"),
            ('{"0": {"a": [1], "a": [2]}}', "'a' comes twice"),
        ],
    )
    def test_other_content(self, tmp_path: Path, content: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_labels(write_json(tmp_path / 'l.json', content))


class TestParquet:
    def test_counts_become_shares(self, tmp_path: Path) -> None:
        path = write_parquet(
            tmp_path / 'l.parquet',
            ['s2c/0/a', 's2c/0/b', 's2c/0/c'],
            count_10=[3, 0, 1],
            count_80=[1, 0, 0],
            fraction_10=[0.0, 0.0, 0.0],
            # Less than half of c has a class
            valid=[1.0, 0.0, 0.4],
        )
        labels = read_labels(path)
        assert (labels.codes, labels.shares) == ([10, 80], True)
        assert match(labels, '0/b', '0/a', '0/c') == [[0, 0], [0.75, 0.25], [0, 0]]

    def test_fractions_alone(self, tmp_path: Path) -> None:
        path = write_parquet(
            tmp_path / 'l.parquet',
            ['0/a', '0/b'],
            fraction_0=[0.2, np.nan],
            fraction_8=[0.6, 0.1],
        )
        assert match(read_labels(path), '0/a', '0/b') == [[0.25, 0.75], [0, 0]]

    def test_each_split_has_its_own(self, tmp_path: Path) -> None:
        path = write_parquet(
            tmp_path / 'l.parquet',
            ['data/s2a/0/a', 'data/s2c/0/a'],
            count_10=[1, 0],
            count_80=[0, 1],
        )
        labels = read_labels(path)
        assert match(labels, '0/a', split='s2c') == [[0, 1]]
        assert match(labels, '0/a', split='s2a') == [[1, 0]]

    def test_levels_of_sentinel_2_share_names(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / 'l.parquet', ['s2a/0/a'], count_10=[1])
        assert match(read_labels(path), '0/a', split='s2c') == [[1]]

    @pytest.mark.parametrize(
        ('ids', 'columns', 'message'),
        [
            (['0/a', '0/a'], {'count_10': [1, 1]}, r'unique, 1 come again: 0/a'),
            (['s2c/0/a', '0/a'], {'count_10': [1, 1]}, None),
            (['a', '0/a'], {'count_10': [1, 1]}, r'1 of 2 are not: a'),
            (
                ['s2c/0/a/B2.tif', '0/a'],
                {'count_10': [1, 1]},
                r'1 of 2 are not: s2c/0/a',
            ),
            ([None, '0/a'], {'count_10': [1, 1]}, r'1 of 2 are not: None'),
            (['0/a', '0/b'], {'label': [1, 1]}, 'count_10 or fraction_10'),
            (['0/a', '0/b'], {'count_10': [1, -1]}, 'negative, got -1'),
            (
                ['0/a', '0/b'],
                {'count_10': ['1', 'b']},
                'numbers .* count_10, got .*string',
            ),
            (['0/a', '0/b'], {'fraction_10': [[1], [0]]}, 'fraction_10, got list'),
            (
                ['0/a', '0/b'],
                {'count_10': [1, 1], 'valid': ['yes', 'no']},
                'column valid, got .*string',
            ),
        ],
    )
    def test_other_content(
        self, tmp_path: Path, ids: Any, columns: Any, message: str | None
    ) -> None:
        path = write_parquet(tmp_path / 'l.parquet', ids, **columns)
        if message is None:
            assert len(read_labels(path).values) == len(ids)
            return
        with pytest.raises(ValueError, match=message):
            read_labels(path)

    def test_no_parquet(self, tmp_path: Path) -> None:
        (tmp_path / 'l.parquet').write_text('0/a')
        with pytest.raises(ValueError, match='not a valid Parquet file'):
            read_labels(tmp_path / 'l.parquet')


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='labels must be a file'):
        read_labels(tmp_path / 'l.json')
    (tmp_path / 'l.csv').touch()
    with pytest.raises(ValueError, match=r'a \.json or a \.parquet file'):
        read_labels(tmp_path / 'l.csv')


class TestMatch:
    @pytest.fixture
    def labels(self, tmp_path: Path) -> Any:
        content = {
            '0': {season('s2c', JUNE): [1], season('s2c', DECEMBER): [2]},
            '1': {season('s2c', JUNE): [3]},
        }
        return read_labels(write_json(tmp_path / 'l.json', content))

    def test_names_of_another_archive(self, labels: Any) -> None:
        names = [f'{place:07}/{season("s2c", JUNE)}' for place in range(4)]
        with pytest.raises(ValueError, match=r'4 of 4 images are not in') as error:
            match(labels, *names)
        message = str(error.value)
        assert all(name in message for name in names[:3])
        assert names[3] not in message
        assert f'such as 0/{season("s2c", JUNE)}' in message

    def test_other_dates_of_most_locations(self, tmp_path: Path) -> None:
        names = [f'{place}/{season("s2c", SEPTEMBER)}' for place in (0, 1, 2)]
        # Another one, so that it is not all
        june = f'2/{season("s2c", JUNE)}'
        content = {str(place): {season('s2c', JUNE): [1]} for place in range(3)}
        labels = read_labels(write_json(tmp_path / 'm.json', content))
        with pytest.raises(ValueError, match=r'2 of 4 images .* 0/20200902'):
            match(labels, *names, june)
        # Only looking, that is no error
        values = match_labels(labels, 's2c', *images(*names, june), strict=False)
        assert values.sum(1).tolist() == [0, 0, 0, 1]

    def test_one_location_of_other_dates(self, labels: Any) -> None:
        with pytest.warns(UserWarning, match=r'1 of 2 images .*such as 0/20200902'):
            values = match(
                labels, f'1/{season("s2c", JUNE)}', f'0/{season("s2c", SEPTEMBER)}'
            )
        assert [sum(row) for row in values] == [1, 0]

    def test_more_images_than_labels_are_unknown(self, labels: Any) -> None:
        with pytest.warns(UserWarning, match=r'2 of 3 images .*such as 0/20200902'):
            values = match(
                labels,
                f'0/{season("s2c", JUNE)}',
                f'0/{season("s2c", SEPTEMBER)}',
                f'2/{season("s2c", JUNE)}',
            )
        assert [sum(row) for row in values] == [1, 0, 0]

    def test_sentinel_1_takes_the_nearest_in_time(self, labels: Any) -> None:
        names = [f'0/{season("s1", day)}' for day in ('20201130', '20200610', JUNE)]
        with pytest.warns(UserWarning, match=r'1 of 3 images .*20200610'):
            values = match(labels, *names, split='s1')
        # The second is nearer to June than to December, but the third is nearer still
        assert [row.index(1) if any(row) else None for row in values] == [2, None, 1]

    def test_all_is_well(self, labels: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            match(labels, f'1/{season("s2c", JUNE)}')
