# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Land-cover labels of the images of SSL4EO-S12, from a file."""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .._checks import require
from ..landcover.products import DYNAMICWORLD, WORLDCOVER
from .tiffs import days, pair

#: Columns of a class in a Parquet file, by its code.
_CLASS_COLUMN = re.compile(r'(count|fraction)_(\d+)')

#: Smallest share of the pixels that must have a class, else the label is unknown.
MIN_VALID = 0.5

#: Images that a message names.
_NAMED = 3


@dataclass(frozen=True)
class SeasonLabels:
    """Labels of N images.

    Attributes:
        source: The file that they are from, for messages.
        split: Split of each image, empty where it is not said.
        location: Name of the location of each image.
        season: Name of each image.
        values: Shares of the K classes (if *shares*) or 0 and 1, shape (N, K). All zeros
            is unknown.
        codes: Codes of the classes.
    """

    source: str
    split: npt.NDArray[np.bytes_]
    location: npt.NDArray[np.bytes_]
    season: npt.NDArray[np.bytes_]
    values: npt.NDArray[np.float32]
    codes: Sequence[int]
    shares: bool


def read_labels(path: str | os.PathLike[str]) -> SeasonLabels:
    """Read the JSON file of SSL4EO-S12-ML, or a Parquet file of ``torchgeo-softcon labels``.

    The former is ``{location: {season: [class, ...]}}`` with classes of Dynamic World or
    codes of WorldCover, where an empty list is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'labels must be a file, found none at {path}')
    if path.suffix.lower() == '.json':
        return _read_json(path)
    if path.suffix.lower() in ('.parquet', '.pq'):
        return _read_parquet(path)
    raise ValueError(f'labels must be a .json or a .parquet file, got {path}')


def _read_json(path: Path) -> SeasonLabels:
    try:
        text = path.read_text(encoding='utf-8')
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'labels {path} is not a valid JSON file: {error}') from error
    form = f'labels {path} must be {{location: {{season: [class, ...]}}}},'
    require(isinstance(content, dict), f'{form} the file has something else')
    for location, seasons in content.items():
        require(isinstance(seasons, dict), f'{form} {location} has something else')
    names = [(location, season) for location in content for season in content[location]]
    require(names, f'labels {path} has no entries')
    classes = [content[location][season] for location, season in names]
    # A bool is an int to Python, but no class
    sound = (isinstance(one, list) and {*map(type, one)} <= {int} for one in classes)
    require(all(sound), f'{form} an image has something else')
    codes = [code for one in classes for code in one]

    known = {*codes}
    # SSL4EO-S12-ML has the former, https://github.com/zhu-xlab/softcon#readme
    legends = (DYNAMICWORLD.codes, WORLDCOVER.codes)
    legend = next((codes for codes in legends if known <= {*codes}), None)
    if legend is None:
        raise ValueError(
            f'labels {path} must have classes of Dynamic World (0 to 8) or codes of '
            f'WorldCover ({", ".join(map(str, WORLDCOVER.codes))}), got '
            f'{", ".join(map(str, sorted(known)[:20]))}'
        )
    values = np.zeros((len(names), len(legend)), np.float32)
    rows = np.repeat(np.arange(len(names)), [len(one) for one in classes])
    values[rows, np.searchsorted(legend, codes)] = 1
    unsaid = np.zeros(len(names), np.bytes_)
    location, season = map(_bytes, zip(*names, strict=True))
    return SeasonLabels(
        str(path), unsaid, location, season, values, legend, shares=False
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object. Of names that come twice, Python would keep the last."""
    names = [name for name, _ in pairs]
    if len({*names}) < len(names):
        raise ValueError(f'{max(names, key=names.count)!r} comes twice')
    return dict(pairs)


def _bytes(names: Sequence[str]) -> npt.NDArray[np.bytes_]:
    return np.array([name.encode() for name in names], dtype=np.bytes_)


def _read_parquet(path: Path) -> SeasonLabels:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f'labels {path} is not a valid Parquet file: {error}'
        ) from error
    # Counts become shares, and take precedence in a file that has both
    found = [m for name in schema.names if (m := _CLASS_COLUMN.fullmatch(name))]
    columns = {int(m[2]): m[0] for m in sorted(found, key=lambda m: m[1], reverse=True)}
    codes = sorted(columns)
    if 'id' not in schema.names or not columns:
        raise ValueError(
            f'labels {path} must have the column id and one column per class (count_10 or '
            f'fraction_10 and so on), got {", ".join(schema.names)}'
        )
    of_classes = [columns[code] for code in codes]
    valid = ['valid'] if 'valid' in schema.names else []
    for name in (*valid, *of_classes):
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise ValueError(
                f'labels {path} must have numbers in the column {name}, got {kind}: '
                'convert it, or make the file by `torchgeo-softcon labels`'
            )
    table = pq.read_table(path, columns=['id', *valid, *of_classes])
    ids = pd.Series(table['id'].to_pylist(), dtype=object)
    names = ids.astype(str).str.extract(r'^(?:(?:.*/)?(s1|s2c|s2a)/)?([^/]+)/([^/]+)$')
    wrong = ids[names[1].isna()]
    if len(wrong):
        raise ValueError(
            f'id in labels {path} must be split/location/image, as `torchgeo-softcon '
            f'labels --layout ssl4eo-s12` writes it, {len(wrong)} of {len(ids)} are not: '
            f'{", ".join(map(str, wrong[:_NAMED]))}'
        )
    twice = ids[ids.duplicated()]
    if len(twice):
        raise ValueError(
            f'id in labels {path} must be unique, {len(twice)} come again: '
            f'{", ".join(twice[:_NAMED])}'
        )
    counts = np.stack([table[name].to_numpy() for name in of_classes], 1).astype(float)
    known = np.isfinite(counts).all(1)
    if valid:
        known &= table['valid'].to_numpy() >= MIN_VALID
    counts[~known] = 0
    if (counts < 0).any():
        raise ValueError(f'labels {path} must not be negative, got {counts.min():g}')
    totals = counts.sum(1, keepdims=True)
    values = (counts / np.where(totals > 0, totals, 1)).astype(np.float32)
    split, location, season = (_bytes(names[column].fillna('')) for column in names)
    return SeasonLabels(str(path), split, location, season, values, codes, shares=True)


def match_labels(
    labels: SeasonLabels,
    split: str,
    location: npt.NDArray[np.bytes_],
    season: npt.NDArray[np.bytes_],
    strict: bool = True,
) -> npt.NDArray[np.float32]:
    """Find the label of each of N images by location and name.

    Labels that were made for another split are as good: images of both levels of
    Sentinel-2 have the same names, and one of Sentinel-1 takes the label of the image of
    the same location that is nearest in time, see :func:`.pair`.

    Returns:
        One label per image, shape (N, K), all zeros where there is none. If *strict*,
        labels that are not of these images, or not of all, are an error or a warning.
    """
    labels = _of_split(labels, split)
    index = pd.MultiIndex.from_arrays([labels.location, labels.season])
    if not index.is_unique:
        raise ValueError(f'{labels.source} has images that come twice')
    found = index.get_indexer(pd.MultiIndex.from_arrays([location, season]))
    by_name = split != 's1' or bool((found >= 0).any())
    if not by_name:
        with contextlib.suppress(ValueError):  # names of something else
            dates = days('s2c', labels.season)
            found = pair(location, days('s1', season), labels.location, dates)
    if strict:
        _check_found(labels, location, season, found, by_name)
    values = labels.values[found]
    values[found < 0] = 0
    return values


def _check_found(
    labels: SeasonLabels,
    location: npt.NDArray[np.bytes_],
    season: npt.NDArray[np.bytes_],
    found: npt.NDArray[np.int64],
    by_name: bool,
) -> None:
    """Raise or warn if labels do not belong to images, or only to some of them."""
    missing = found < 0
    # Locations that are there, but with other images: an archive of other dates
    known = np.isin(location, labels.location)
    foreign = known & ~np.isin(location, location[~missing]) & by_name
    other_dates = 2 * len({*location[foreign]}) > len({*location[known]})

    def name(rows: npt.NDArray[np.bool_]) -> str:
        some = zip(location[rows][:_NAMED], season[rows][:_NAMED], strict=True)
        return b', '.join(map(b'/'.join, some)).decode()

    if missing.all() or other_dates:
        wrong = missing if missing.all() else foreign
        example = b'/'.join([*labels.location[:1], *labels.season[:1]]).decode()
        raise ValueError(
            f'labels must have the names of the images: {wrong.sum()} of {len(location)} '
            f'images are not in {labels.source} ({len(labels.location)} names such as '
            f'{example}). The first are {name(wrong)}'
        )
    if missing.any():
        warnings.warn(
            f'{missing.sum()} of {len(location)} images are not in {labels.source} and '
            f'count as unknown, such as {name(missing)}',
            UserWarning,
            stacklevel=3,
        )


def _of_split(labels: SeasonLabels, split: str) -> SeasonLabels:
    """Return the labels of a split, or else those that may stand for them."""
    for name in (split, '', 's2c', 's2a'):
        rows = labels.split == name.encode()
        if rows.any():
            arrays = ('split', 'location', 'season', 'values')
            return replace(labels, **{a: getattr(labels, a)[rows] for a in arrays})
    return labels
