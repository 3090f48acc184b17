# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""When an image was taken, as far as the names of its file and folders tell."""

import datetime
import re
from pathlib import PurePath

#: Year, month and day in a name, not in the middle of a number.
_DATE = re.compile(r'(?<!\d)((?:19|20)\d{2})([-_]?)(\d{2})\2(\d{2})(?!\d)')

#: A year that stands alone.
_YEAR = re.compile(r'(?<![A-Za-z0-9.])(?:19[7-9]\d|20[0-3]\d)(?![A-Za-z0-9])')

#: Parts of a path, from its end, that may have a date, and those that may have a year.
_DATED, _OF_A_YEAR = 6, 2


def find_date(name: str) -> datetime.date | None:
    """Return the first date in a name, such as 20210630 or 2021-06-30."""
    for match in _DATE.finditer(name):
        try:
            return datetime.date(*map(int, match.group(1, 3, 4)))
        except ValueError:  # a number that is no date
            continue
    return None


def name_year(path: str) -> int | None:
    """Return the year that the names in a path tell.

    It is that of a date in the name of the file or of a folder above it, such as that of
    a product, or the only year in the names of the file and its folder.
    """
    parts = PurePath(path).parts[: -_DATED - 1 : -1]
    for part in parts:
        if (date := find_date(part)) is not None:
            return date.year
    for part in parts[:_OF_A_YEAR]:
        years = {*_YEAR.findall(part)}
        if len(years) == 1:
            return int(years.pop())
    return None
