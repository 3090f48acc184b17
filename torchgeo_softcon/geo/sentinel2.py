# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The offset of Sentinel-2's digital numbers, as products tell it."""

import functools
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info

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

#: Files without the name of their product, such as those of Planetary Computer, but with
#: the tile and the time of acquisition: T32UNE_20230601T101031_B02_10m.tif.
_GRANULE = re.compile(r'T\d{2}[A-Z]{3}_(?P<date>\d{8})T\d{6}')

#: Metadata of a product, and the folders above an image that may have it.
_METADATA = ('MTD_MSIL2A.xml', 'MTD_MSIL1C.xml')
_LEVELS_UP = 5


class Offset(NamedTuple):
    """The offset of digital numbers, and the file or name that tells it."""

    value: float
    source: str | None


def product_offset(path: str) -> Offset:
    """Find the offset of the product that a file belongs to.

    The product's metadata count before the baseline in its name, both of the real path,
    so that a link or a relative path gives the same pixels.
    """
    real = os.path.realpath(path)
    for folder in [*Path(real).parents][:_LEVELS_UP]:
        for name in _METADATA:
            if (folder / name).is_file():
                return Offset(_read_offset(str(folder / name)), str(folder / name))
    match = _PRODUCT.search(real)
    if match is not None:
        shifted = _FIRST <= int(match['baseline']) <= _LAST
        return Offset(_OFFSET if shifted else 0.0, match[0])
    return Offset(0.0, None)


@functools.lru_cache(maxsize=1024)
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


def tell_offsets(offsets: dict[str, Offset]) -> None:
    """Say which offsets were chosen, in a line for each kind, and where one may lack.

    Args:
        offsets: Of files with digital numbers of Sentinel-2, by path.
    """
    applied = [(path, o) for path, o in offsets.items() if o.value]
    if applied:
        path, offset = applied[0]
        rank_zero_info(
            f'{offset.value:g} is added to the digital numbers of {len(applied)} files '
            f'such as {path}, as {offset.source} says. If that is not so, give offset'
        )
    for path, offset in offsets.items():
        granule = _GRANULE.search(os.path.basename(path))
        recent = granule is not None and granule['date'] >= '20220125'
        if recent and offset.source is None:
            rank_zero_info(
                f'{path} does not tell its processing baseline, so its digital numbers '
                'are taken as they are. Since January 2022 ESA adds 1000: if that is so '
                'here, give offset=-1000'
            )
            break
