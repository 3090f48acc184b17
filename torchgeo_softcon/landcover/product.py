# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""A land-cover product: its classes, years and files."""

import colorsys
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._checks import require
from .tiles import TileGrid

#: Red, green, blue and opacity in [0, 255].
Color = tuple[int, int, int, int]

#: What may stand in braces in *path*, as it is found in names of files.
_PLACEHOLDERS = {'year': r'\d{4}', 'version': '[A-Za-z0-9.]+', 'tile': '[A-Za-z0-9]+'}

#: Types of the values of a product, and what errors call them.
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(('name', 'title', 'resolution', 'path', 'url'), (str, 'a text')),
    **dict.fromkeys(('classes', 'no_data'), (list | tuple, 'a list')),
    'years': (Mapping | list | tuple, 'a list, or a mapping from years to versions'),
    'tiles': (TileGrid | None, 'a mapping with degrees and pixels'),
    'mappings': (Mapping, 'a mapping with a mapping of codes for each product'),
}


@dataclass(frozen=True)
class LandCoverClass:
    """A class of a land-cover product.

    Attributes:
        code: Its code in the rasters, from 0 to 255.
        name: Its name.
        color: Its colour as ``'#RRGGBB'``, None for one by its position.
    """

    code: int
    name: str
    color: str | None = None


@dataclass(frozen=True)
class LandCoverProduct:
    """A land-cover map in rasters of class codes.

    Attributes:
        name: Short name, as options and label files have it.
        classes: The classes, in the order of a label.
        title: Full name for messages, by default *name*.
        resolution: Size of a pixel, as ``10 m``, for label files.
        years: Years of the map, each with its version, or only the years.
        no_data: Codes of pixels without data. The first one stands for them in masks.
        path: Path of a file below *url*, with ``{year}``, ``{version}`` and ``{tile}``
            where they belong. Its last part is the name of the file. Without it, every
            TIFF is taken for a clip of the map.
        url: Address below which the files can be downloaded.
        tiles: Grid of the tiles, None if the map is in other files.
        mappings: Other products whose classes pixels can be counted in, by name: their
            code for every code of this product.
    """

    name: str
    classes: Sequence[LandCoverClass]
    title: str = ''
    resolution: str = ''
    years: Mapping[int, str] | Sequence[int] = ()
    no_data: Sequence[int] = (0,)
    path: str = ''
    url: str = ''
    tiles: TileGrid | None = None
    mappings: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Complete and check the values.

        Raises:
            ValueError: If a value is missing or invalid.
        """
        for key, (kinds, meaning) in _KINDS.items():
            value = getattr(self, key)
            require(isinstance(value, kinds), f'{key} must be {meaning}, got {value!r}')
        years = self.years if isinstance(self.years, Mapping) else {}
        for key, value in {
            'title': self.title or self.name,
            'classes': tuple(self.classes),
            'no_data': tuple(self.no_data),
            'years': {year: str(years.get(year) or '') for year in self.years},
        }.items():
            object.__setattr__(self, key, value)  # it is frozen
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        """Tell what is wrong with the values, and what to do about it."""
        if not re.fullmatch(r'[\w-]+', self.name):
            yield f'name must be made of letters, digits, _ and -, got {self.name!r}'
        if not self.classes:
            yield 'classes must not be empty: list code and name of each'
        if not self.no_data:
            yield 'no_data must not be empty: name a code that no class has'
        names: dict[int, str] = {}
        for position, one in enumerate(self.classes):
            key, code, name = f'classes[{position}]', one.code, one.name
            if not _is_code(code):
                yield f'{key}.code must be a whole number from 0 to 255, got {code!r}'
            if not (isinstance(name, str) and name.strip()):
                yield (
                    f'{key}.name must be a text, got {name!r} for code {code}: name the '
                    'class (in quotes, if YAML takes it for something else)'
                )
            if code in names:
                yield (
                    f'{key}.code must be unique, got {code} for {names[code]!r} and for '
                    f'{name!r}: give each class its own code'
                )
            if not re.fullmatch('#[0-9a-fA-F]{6}', str(one.color or '#000000')):
                yield (
                    f"{key}.color must be such as '#00ff00' (in quotes), got {one.color!r}"
                )
            names[code] = name
        for code in self.no_data:
            if not _is_code(code):
                yield f'no_data must be whole numbers from 0 to 255, got {code!r}'
            if code in names:
                yield (
                    f'no_data must not be the code of a class, got {code}, which is '
                    f'{names[code]!r}: name a code that no class has'
                )
        for name, mapping in self.mappings.items():
            if not isinstance(mapping, Mapping):
                yield f'mappings.{name} must map codes to codes, got {mapping!r}'
            elif wrong := sorted({*mapping} ^ {*names}, key=str):
                yield (
                    f'mappings.{name} must have the codes of all classes and no others, '
                    f'got {list(mapping)}: add or take out {", ".join(map(str, wrong))}'
                )
        for year in self.years:
            if type(year) is not int or not 1000 <= year <= 9999:
                yield f'years must have four digits, got {year!r}'
        path, url = self.path, self.url
        if re.search('[{}]', re.sub(r'\{(year|version|tile)\}', '', path)):
            yield (
                'path must have nothing but {year}, {version} and {tile} in braces, got '
                f'{path!r}'
            )
        if path and not path.lower().endswith(('.tif', '.tiff')):
            yield f'path must end in .tif or .tiff, got {path!r}'
        if '{year}' in path and not self.years:
            yield f'path must not have {{year}} without years, got {path!r}: add years'
        if '{tile}' not in path and self.tiles is not None:
            yield f'path must have {{tile}} if there are tiles, got {path!r}'
        if url and not url.startswith(('https://', 'http://')):
            yield f'url must start with https:// or http://, got {url!r}'

    @property
    def codes(self) -> tuple[int, ...]:
        """Codes of the classes, in the order of a label."""
        return tuple(one.code for one in self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the same order."""
        return tuple(one.name for one in self.classes)

    @property
    def fill(self) -> int:
        """Code that stands for no data in masks."""
        return self.no_data[0]

    @property
    def legend(self) -> tuple[int, ...]:
        """All codes that pixels may have, those without data first."""
        return *self.no_data, *self.codes

    @property
    def grid(self) -> TileGrid:
        """Grid of the tiles.

        Raises:
            ValueError: If there are no tiles.
        """
        if self.tiles is None:
            raise ValueError(
                f'product must have tiles to be found on a server, {self.name!r} has none: '
                'name its files, or add tiles to the product'
            )
        return self.tiles

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Names by code, *No data* first."""
        return {self.fill: 'No data', **{one.code: one.name for one in self.classes}}

    @functools.cached_property
    def colors(self) -> dict[int, Color]:
        """Colours by code, transparent for no data."""
        colors: dict[int, Color] = {self.fill: (0, 0, 0, 0)}
        for position, one in enumerate(self.classes):
            if one.color:
                red, green, blue = bytes.fromhex(one.color[1:])
            else:  # steps of the golden ratio around the circle of hues stay apart
                hue = colorsys.hsv_to_rgb(0.618034 * position % 1, 0.65, 0.9)
                red, green, blue = (round(255 * value) for value in hue)
            colors[one.code] = (red, green, blue, 255)
        return colors

    def check_year(self, year: int | None) -> int | None:
        """Return a year of the map, the last one (or None if it has none) for None.

        Raises:
            ValueError: If the map does not have this year.
        """
        known = ' or '.join(map(str, sorted(self.years))) or 'left out'
        require(
            year is None or year in self.years,
            f'year must be {known}, got {year!r}: {self.title} has no other',
        )
        return max(self.years, default=None) if year is None else year

    def version(self, year: int | None) -> str:
        """Return the version of a year."""
        return '' if year is None else str(self.years[year])

    def edition(self, year: int | None) -> str:
        """Return the title with resolution, year and version, for label files."""
        words = (self.title, self.resolution, str(year or ''), self.version(year))
        return ' '.join(filter(None, words))

    def file_path(self, tile: str, year: int | None) -> str:
        """Return the path of a tile (if there are any) and year below *url*."""
        return self.path.format(tile=tile, year=year, version=self.version(year))

    def file_name(self, tile: str, year: int | None) -> str:
        """Return the name of a file, without folders."""
        return self.file_path(tile, year).rpartition('/')[2]

    @functools.cached_property
    def official(self) -> re.Pattern[str]:
        """Official names of files, and of files that were made of them.

        The group *map* is None for other layers of the product, whose names differ after
        the last placeholder.
        """
        if not self.path:
            return re.compile('(?!)')
        stem = self.path.rpartition('/')[2].rpartition('.')[0]
        first, brace, layer = stem.rpartition('}')
        pattern = re.escape(first + brace)
        for name, characters in _PLACEHOLDERS.items():
            text = re.escape(f'{{{name}}}')
            pattern = pattern.replace(text, f'(?P<{name}>{characters})', 1)
            pattern = pattern.replace(text, f'(?P={name})')
        end = '(?![A-Za-z0-9])'
        return re.compile(f'{pattern}(?:(?P<map>{re.escape(layer)}){end}|_[A-Za-z0-9])')


def _is_code(code: object) -> bool:
    return type(code) is int and 0 <= code <= 255
