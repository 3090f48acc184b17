# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Level and offset of Sentinel-2's digital numbers, as products tell them."""

import functools
import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..bands import SENTINEL2_BANDS, Level
from .dates import name_year

#: Name of a product of ESA, anywhere in a path, with its processing baseline.
_PRODUCT = re.compile(
    r'(?<![A-Za-z0-9])S2[A-Z]_MSIL(?:1C|2A)_\d{8}T\d{6}_N(?P<baseline>\d{4})_R\d{3}'
)

#: Baselines from 04.00 on (January 2022) have 1000 added. Numbers of 10.00 and above are
#: no baselines of ESA's archive: sen2cor writes N9999 on a user's machine, whatever the
#: baseline of its input.
#: https://sentiwiki.copernicus.eu/web/s2-processing
_FIRST, _LAST = 400, 999
_OFFSET = -1000.0

#: Tile and time of acquisition without the baseline, in the names of files or folders:
#: T32UNE_20230601T101031_B02_10m.tif, Planetary Computer's S2B_MSIL2A_20230601T103629_R008,
#: and Earth Engine's 20230601T101031_20230601T101123_T32UNE.
_GRANULE = re.compile(
    r'(?<![A-Za-z0-9])(?:(?:T\d{2}[A-Z]{3}|S2[A-Z]_MSIL(?:1C|2A))_(?P<date>\d{8})T\d{6}'
    r'|(?P<taken>\d{8})T\d{6}_\d{8}T\d{6}_T\d{2}[A-Z]{3})'
)

#: Metadata of a product, and the folders above an image that may have it.
_METADATA = {'MTD_MSIL2A.xml': '2A', 'MTD_MSIL1C.xml': '1C'}
_LEVELS_UP = 5

#: The level in the names of products (S2B_MSIL2A_...), of their granules (L2A_T32UNE_...),
#: of items and collections of STAC catalogues (S2B_32UNE_20200101_0_L2A, sentinel-2-l2a),
#: and of Major-TOM (Core-S2L2A).
_LEVEL = re.compile(
    r'(?:MSI|S2|(?<![A-Za-z0-9]))L(1C|2A)(?![A-Za-z0-9])', re.IGNORECASE
)

#: Collections whose names tell the level in another way: Earth Engine's and NASA's.
_COLLECTIONS = (
    (re.compile(r'(?<![A-Za-z0-9])(?:S2_SR(?![A-Za-z0-9])|HLS\.S30)'), '2A'),
    (re.compile(r'(?<![A-Za-z0-9])S2_HARMONIZED(?![A-Za-z0-9])'), '1C'),
)

#: Tags of files, and properties of STAC items without their prefix, that tell the level:
#: of GDAL's driver for products (PROCESSING_LEVEL=Level-2A), processing:level=L2A,
#: s2:product_type=S2MSI2A.
_LEVEL_TAGS = ('PROCESSING_LEVEL', 'LEVEL', 'PRODUCT_TYPE', 'PRODUCT_URI', 'PRODUCT_ID')
_LEVEL_VALUE = re.compile(
    r'(?:^|L|LEVEL|MSI)[- _]?(1C|2A)p?(?![A-Za-z0-9])', re.IGNORECASE
)

#: Tags and properties that tell when an image was taken: of GDAL's drivers, and of STAC.
_DATE_TAGS = (
    'ACQUISITIONDATETIME',
    'PRODUCT_START_TIME',
    'SENSING_TIME',
    'DATETIME',
    'START_DATETIME',
)

#: Layers that only Level-2A has.
_OF_LEVEL2A = {'SCL', 'AOT', 'WVP', 'MSK_CLDPRB', 'MSK_SNWPRB'}


class Offset(NamedTuple):
    """The offset of digital numbers, and the file or name that tells it."""

    value: float
    source: str | None


class Products:
    """The products that files belong to. Each folder is looked at once.

    Metadata count before names, and both are those of the real path, so that a link or a
    relative path gives the same pixels. *tags* are those of the file.
    """

    def __init__(self) -> None:
        """Initialize a new Products instance."""
        self._metadata = functools.cache(_find_metadata)
        self._item = functools.cache(_read_item)
        self._offset = functools.cache(_read_offset)

    def offset(self, path: str, tags: Mapping[str, Any] | None = None) -> Offset:
        """Find the offset of the digital numbers in a file."""
        real = os.path.realpath(path)
        if metadata := self._metadata(os.path.dirname(real)):
            return Offset(self._offset(metadata), os.path.basename(metadata))
        for source, facts in self._facts(real, tags):
            if (value := _tagged_offset(facts)) is not None:
                return Offset(value, source)
        if (value := _named_offset(real)) is not None:
            return Offset(value, 'the name of the product')
        return Offset(0.0, None)

    def level(
        self,
        path: str,
        tags: Mapping[str, Any] | None = None,
        bands: Iterable[str] = (),
    ) -> tuple[Level | None, str]:
        """Find the processing level of a file, and what tells it.

        *bands* are the names of all its bands, or of those in files beside it.
        """
        told = self._levels(os.path.realpath(path), tags, set(bands))
        level, source = next(told, (None, ''))
        return cast(Level | None, level and f'L{level.upper()}'), source

    def _levels(
        self, real: str, tags: Mapping[str, Any] | None, bands: set[str]
    ) -> Iterator[tuple[str, str]]:
        """Yield levels and what tells them, the most certain first."""
        if metadata := self._metadata(os.path.dirname(real)):
            name = os.path.basename(metadata)
            yield _METADATA[name], name
        for source, facts in self._facts(real, tags):
            for key in _LEVEL_TAGS:
                if match := _LEVEL_VALUE.search(facts.get(key, '')):
                    yield match[1], source
        if 'B10' in bands:
            yield '1C', 'the band B10'
        if of_level2a := bands & _OF_LEVEL2A:
            yield '2A', f'the band {min(of_level2a)}'
        for level in _LEVEL.findall(real)[-1:]:
            yield level, 'names'
        for regex, level in _COLLECTIONS:
            if regex.search(real):
                yield level, 'names'
        if {*SENTINEL2_BANDS} - bands == {'B10'}:
            yield '2A', 'all bands but B10'

    def year(self, path: str, tags: Mapping[str, Any] | None = None) -> int | None:
        """Find the year of a file: by its tags, a STAC item, or :func:`.name_year`."""
        real = os.path.realpath(path)
        for _, facts in self._facts(real, tags):
            for key in _DATE_TAGS:
                if match := re.match(r'((?:19|20)\d{2})-\d{2}-', facts.get(key, '')):
                    return int(match[1])
        return name_year(real)

    def _facts(
        self, real: str, tags: Mapping[str, Any] | None
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """Yield what tags of a file and STAC items beside it say, after who says so."""
        yield 'tags', _plain_tags(tags or {})
        for item in _items(real):
            yield 'the STAC item', self._item(item)

    def files(self, path: str) -> list[str]:
        """Return the metadata of its product and the STAC items of a file."""
        real = os.path.realpath(path)
        metadata = self._metadata(os.path.dirname(real))
        items = [item for item in _items(real) if os.path.isfile(item)]
        return [*items, *([metadata] if metadata else [])]


def _items(real: str) -> list[str]:
    """Return where STAC items of a file may be."""
    folder, name = os.path.split(real)
    names = ('item', os.path.basename(folder), os.path.splitext(name)[0])
    return [os.path.join(folder, f'{item}.json') for item in names]


def _plain_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Return tags in upper case without a prefix such as `s2:`."""
    return {key.rpartition(':')[2].upper(): str(value) for key, value in tags.items()}


def _offset_since(baseline: int) -> float:
    """Return the offset of a processing baseline, times 100."""
    return _OFFSET if _FIRST <= baseline <= _LAST else 0.0


def _named_offset(name: str) -> float | None:
    """Return the offset that the name of a product tells, None if it is none."""
    match = _PRODUCT.search(name)
    return None if match is None else _offset_since(int(match['baseline']))


def _tagged_offset(tags: Mapping[str, str]) -> float | None:
    """Return the offset that tags or properties tell, None if they do not."""
    if tags.get('BOA_OFFSET_APPLIED', '').lower() == 'true':
        return 0.0  # by Earth Search, whose files have it no more
    for key in ('BOA_ADD_OFFSET', 'RADIO_ADD_OFFSET'):
        if re.fullmatch(r'-?\d+(\.\d*)?', tags.get(key, '')):
            return float(tags[key])
    baseline = tags.get('PROCESSING_BASELINE', '')
    if re.fullmatch(r'\d{1,2}\.\d{2}', baseline):
        return _offset_since(int(baseline.replace('.', '')))
    names = (tags.get(key, '') for key in ('PRODUCT_URI', 'PRODUCT_ID'))
    return next((o for o in map(_named_offset, names) if o is not None), None)


def _find_metadata(folder: str) -> str | None:
    """Find the metadata of the product that a folder belongs to."""
    for above in [Path(folder), *Path(folder).parents][:_LEVELS_UP]:
        for name in _METADATA:
            if (above / name).is_file():
                return str(above / name)
    return None


def _read_item(path: str) -> dict[str, str]:
    """Read the properties of a STAC item, none if a file is none."""
    try:
        item = json.loads(Path(path).read_bytes())
        return _plain_tags(item['properties']) if 'stac_version' in item else {}
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ):
        return {}


def _read_offset(path: str) -> float:
    """Read the offset from the metadata of a product, 0 if they have none."""
    try:
        root = ET.parse(path).getroot()
        found = {
            float(element.text or 0)
            for element in root.iter()
            if element.tag.rpartition('}')[2] in ('RADIO_ADD_OFFSET', 'BOA_ADD_OFFSET')
        }
    except (ET.ParseError, ValueError) as error:
        raise ValueError(
            f'{path} cannot be read, so the offset of its images is unknown: {error}. '
            'Repair it, or give offset'
        ) from error
    if len(found) > 1:
        raise ValueError(
            f'{path} has different offsets for its bands ({sorted(found)}): give offset'
        )
    return found.pop() if found else 0.0


def hint_at_offset(paths: Iterable[str]) -> None:
    """Say once that an offset may be missing.

    Args:
        paths: Files with digital numbers of Sentinel-2 whose baseline nothing tells.
    """
    for path in paths:
        granule = _GRANULE.search(os.path.realpath(path))
        if granule and (granule['date'] or granule['taken']) >= '20220125':
            rank_zero_info(
                f'{path} does not tell its processing baseline, so its digital numbers '
                'are taken as they are. Since January 2022 ESA adds 1000: if that is so '
                'here, give offset=-1000'
            )
            break
