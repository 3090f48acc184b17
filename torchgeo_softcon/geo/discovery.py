# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Finding images: which files and bands make a scene."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rasterio.windows import Window

from ..bands import (
    KNOWN_BANDS,
    RGB_BANDS,
    SENTINEL1_BANDS,
    SENTINEL2_BANDS,
    SENTINEL2_SUBSETS,
    normalize_band_names,
    spell_band_name,
)
from .find_files import RASTERS, AnyPath, find_files, path_list
from .grid import Grid
from .rasters import (
    RGB_COLORS,
    Layer,
    Scene,
    check_place,
    describe_layer,
    open_raster,
    read_raster,
)
from .sentinel2 import Offset, product_offset, tell_offsets

#: A band at the end of a file name, as Sentinel products, SSL4EO-S12 and BigEarthNet
#: write it: B2, B02, B8A, B08A, VV, with or without a resolution.
_BAND_TOKEN = re.compile(
    r'(?:^|[_.\-])(?P<band>B(?:0?8A|0?[1-9]|1[0-2])|VV|VH|HH|HV)(?:_(?:10|20|60)m)?$',
    re.IGNORECASE,
)

#: Files beside bands that are not bands themselves: of Sentinel-2 products, of items of
#: STAC catalogues, of Major-TOM, Planet and BigEarthNet, and WorldCover itself.
_NOT_A_BAND = re.compile(
    r'(?:^|_)(?:TCI|AOT|WVP|SCL|PVI|QA60)(?:_(?:10|20|60)m)?$'
    r'|^(?:visual|preview|thumbnail|overview|cloud_mask)$|_udm2?(?:_clip)?$'
    r'|_reference_map$|^MSK_|^ESA_WorldCover_',
    re.IGNORECASE,
)

#: Files of Landsat, whose B1 to B12 are not those of Sentinel-2.
_LANDSAT = re.compile(r'(?<![A-Za-z0-9])L[CET]0\d_|HLS\.L30')

#: A band within a description, such as 0_B2, B2_median or Sigma0_VH_db.
_BAND_WORD = re.compile(
    r'(?<![A-Za-z0-9])(B(?:0?8A|0?[1-9]|1[0-2])|VV|VH|HH|HV)(?![A-Za-z0-9])',
    re.IGNORECASE,
)

#: Digital numbers of Sentinel-2 per unit of reflectance.
_PER_REFLECTANCE = 10_000

#: Folders of a Level-2A product that hold bands of one scene.
_RESOLUTION_FOLDER = re.compile(r'R(?:10|20|60)m')


def find_rasters(paths: AnyPath | Iterable[AnyPath]) -> list[str]:
    """List the rasters that may be images, see :func:`.find_files`."""
    named = path_list(paths)
    files = [
        file
        for path in named
        for file in find_files(path, RASTERS, 'images')
        if file == path or not _NOT_A_BAND.search(PurePath(file).stem)
    ]
    if not files:
        raise FileNotFoundError(
            f'images must have at least one raster ({", ".join(RASTERS)}), found none in '
            f'{", ".join(named) or "an empty list"}'
        )
    return list(dict.fromkeys(files))


def find_scenes(
    files: Iterable[str],
    bands: Sequence[str] | None = None,
    all_bands: Sequence[str] | None = None,
    nodata: float | None = None,
    offset: float | None = None,
    to_digital: bool = True,
) -> list[Scene]:
    """Open files, and put those together that hold bands of one scene.

    The options are those of :class:`.WorldCoverScenes`. *to_digital* brings reflectance of
    Sentinel-2 that a file declares by its scale to digital numbers.
    """
    named = None if all_bands is None else tuple(map(spell_band_name, all_bands))
    if named is not None and len(set(named)) != len(named):
        raise ValueError(f'all_bands must be unique, got {tuple(all_bands or ())}')
    wanted = None if bands is None else normalize_band_names(bands, named or ())
    numbers = Numbers(offset, to_digital)
    whole: list[tuple[Layer, tuple[str, ...] | None]] = []
    guessed: dict[tuple[str, ...], str] = {}
    single: dict[tuple[str, str], dict[str, Layer]] = {}
    for path in files:
        layer, names, sure = _open_layer(path, named, nodata)
        if names is not None and not sure:
            guessed.setdefault(names, path)
        name = PurePath(path)
        match = _BAND_TOKEN.search(name.stem)
        if match is None or len(layer.indexes) > 1:
            whole.append((layer, names))
            continue
        (band,) = normalize_band_names([match['band']])
        folder = name.parent
        if _RESOLUTION_FOLDER.fullmatch(folder.name):
            folder = folder.parent
        group = single.setdefault((str(folder), name.stem[: match.start()]), {})
        # Level-2A has the same band at several resolutions, only the finest counts
        if band not in group or layer.grid.pixel_area < group[band].grid.pixel_area:
            group[band] = layer
    if wanted is not None:
        # What has none of the bands lies beside a scene, such as a mask of clouds
        some = [
            x for x in whole if set(wanted) & set(x[1] or ()) or _is_landsat(x[0].path)
        ]
        whole = some or ([] if single else whole)
    scenes = [_from_file(layer, names, wanted, numbers) for layer, names in whole]
    scenes += [
        _from_bands(os.path.join(folder, stem), group, wanted, numbers)
        for (folder, stem), group in single.items()
    ]
    layers = [layer for scene in scenes for layer in scene.layers]
    numbers.tell()
    if with_alpha := next((layer for layer in layers if layer.alpha is not None), None):
        rank_zero_info(
            f'band {with_alpha.alpha} of {with_alpha.path} is alpha, it tells where the '
            'others have data. If that is not so, name it, too, with all_bands'
        )
    for names, path in guessed.items():
        rank_zero_info(
            f'{path} does not name its bands, they are taken for {", ".join(names)}. '
            'If that is not so, give all_bands'
        )

    first = scenes[0]
    for scene in scenes[1:]:
        if (scene.bands, scene.count) != (first.bands, first.count):
            ours, theirs = (
                ', '.join(s.bands or (f'{s.count} unnamed bands',))
                for s in (first, scene)
            )
            raise ValueError(
                f'all images must have the same bands, {first.name} has {ours} and '
                f'{scene.name} has {theirs}. Choose common ones with bands'
            )
    return scenes


def _open_layer(
    path: str, all_bands: tuple[str, ...] | None, nodata: float | None
) -> tuple[Layer, tuple[str, ...] | None, bool]:
    """Read what is known of a file: its bands, their names, whether these are sure."""
    with open_raster(path) as source:
        check_place(source)
        grid = Grid.of(source)
        count = None if all_bands is None else len(all_bands)
        layer = describe_layer(source, grid, nodata, bands=count)
        names, sure = all_bands, True
        if all_bands is None:
            names, sure = name_bands(source, layer)
        # The last pixel of the last band is where a truncated file usually ends
        corner = Window(grid.width - 1, grid.height - 1, 1, 1)
        read_raster(source, [source.count], corner)

    if all_bands is not None and len(all_bands) != len(layer.indexes) > 1:
        raise ValueError(
            f'all_bands must name the {len(layer.indexes)} bands of {path}, got '
            f'{len(all_bands)}: {", ".join(all_bands)}'
        )
    return layer, names, sure


def _is_landsat(path: str) -> bool:
    name = PurePath(path)
    return _LANDSAT.search(f'{name.parent.name}/{name.name}') is not None


def name_bands(source: Any, layer: Layer) -> tuple[tuple[str, ...] | None, bool]:
    """Name the bands of a file, and tell whether it does so itself or they are guessed."""
    indexes = layer.indexes
    # Landsat has other bands of the same names
    landsat = _is_landsat(layer.path)
    texts = [_find_name(source.descriptions[i - 1] or '') for i in indexes]
    known = [text for text in texts if text in KNOWN_BANDS]
    if known and len(set(known)) == len(known) and not landsat:
        # Earth Engine adds masks such as QA60, only all_bands can make use of them
        names = (t or f'BAND {i}' for i, t in zip(indexes, texts, strict=True))
        return tuple(names), True
    colors = tuple(source.colorinterp[i - 1] for i in indexes)
    if layer.palette or colors == RGB_COLORS:
        return RGB_BANDS, True
    if landsat or any(texts):
        # Bands that have other names are other bands, whatever their number
        return None, True
    if len(indexes) in (12, 13):
        return SENTINEL2_SUBSETS[len(indexes)], False
    if len(indexes) == 2 and source.dtypes[0].startswith('float'):
        return SENTINEL1_BANDS, False
    return None, False


def _find_name(description: str) -> str:
    """Return the band that a description names, else the description."""
    name = spell_band_name(description)
    words = {spell_band_name(word) for word in _BAND_WORD.findall(description)}
    return words.pop() if name not in KNOWN_BANDS and len(words) == 1 else name


class Numbers:
    """Scale and offset of the numbers in files, and the line that tells about them."""

    def __init__(self, offset: float | None, to_digital: bool) -> None:
        """Initialize a new Numbers instance, see :func:`find_scenes`."""
        self.offset, self.to_digital = offset, to_digital
        self.products: dict[str, Offset] = {}
        self.declared: list[Layer] = []

    def apply(self, layer: Layer, names: tuple[str, ...] | None) -> Layer:
        """Complete the nodata value, scale and offset of some bands."""
        count = len(layer.indexes)
        sentinel2 = names is not None and set(names) <= set(SENTINEL2_BANDS)
        # Bytes and floats were scaled by someone, who knows what became of 0 and 1000
        whole = layer.dtype in ('uint16', 'uint32', 'uint64')
        if sentinel2 and whole and all(value is None for value in layer.nodata):
            layer = replace(layer, nodata=(0.0,) * count)
        if self.offset is not None:
            return replace(layer, scale=(1.0,) * count, offset=(self.offset,) * count)
        if any(scale != 1 for scale in layer.scale) or any(layer.offset):
            self.declared.append(layer)
            reflectance = sentinel2 and max(map(abs, layer.scale)) < 0.01
            if reflectance and self.to_digital:
                # The statistics of bands are those of digital numbers
                scale, offset = (
                    tuple(round(value * _PER_REFLECTANCE, 6) for value in values)
                    for values in (layer.scale, layer.offset)
                )
                layer = replace(layer, scale=scale, offset=offset)
            return layer
        if sentinel2 and whole:
            found = self.products[layer.path] = product_offset(layer.path)
            layer = replace(layer, offset=(found.value,) * count)
        return layer

    def tell(self) -> None:
        """Say once for each kind of file what is applied, and how to choose otherwise."""
        if self.declared:
            first = self.declared[0]
            rank_zero_info(
                f'The scale and offset that {len(self.declared)} files such as '
                f'{first.path} declare are applied: {first.scale[0]:g} times the number, '
                f'{first.offset[0]:+g}. To read numbers as stored, give offset=0'
            )
        tell_offsets(self.products)


def _check_bands(
    name: str, wanted: Sequence[str], present: Sequence[str], landsat: bool
) -> None:
    """Check that a scene has the bands that are wanted."""
    if landsat:
        raise ValueError(
            f'bands must not be given for {name}, got {", ".join(wanted)}: these are '
            'bands of Sentinel-2, and the bands of Landsat have other numbers. Leave '
            'bands out and give value_range, or name the bands of a file with all_bands'
        )
    if missing := [band for band in wanted if band not in present]:
        raise ValueError(
            f'{name} lacks the band{"s" * (len(missing) > 1)} {", ".join(missing)}, it '
            f'has {", ".join(present)}'
        )


def _from_file(
    layer: Layer,
    names: tuple[str, ...] | None,
    wanted: tuple[str, ...] | None,
    numbers: Numbers,
) -> Scene:
    """Make a scene of one file."""
    if wanted is not None:
        landsat = names is None and _is_landsat(layer.path)
        if names is None and not landsat:
            raise ValueError(
                f'{layer.path} does not name its {len(layer.indexes)} bands: give '
                'all_bands in file order, or leave bands out to use all of them'
            )
        names = names or ()
        _check_bands(layer.path, wanted, names, landsat)
        positions = [names.index(band) for band in wanted]
        layer, names = layer.select(positions), wanted
    return Scene(layer.path, names, (numbers.apply(layer, names),), layer.grid)


def _from_bands(
    name: str, group: dict[str, Layer], wanted: tuple[str, ...] | None, numbers: Numbers
) -> Scene:
    """Make a scene of one file per band."""
    order = (*SENTINEL2_BANDS, *SENTINEL1_BANDS)
    present = sorted(
        group, key=lambda b: (order.index(b) if b in order else len(order), b)
    )
    landsat = any(_is_landsat(layer.path) for layer in group.values())
    if wanted is not None:
        _check_bands(name, wanted, present, landsat)
    names = wanted or tuple(present)
    layers = tuple(
        numbers.apply(group[band], None if landsat else (band,)) for band in names
    )
    finest = min((layer.grid for layer in layers), key=lambda grid: grid.pixel_area)
    for layer in layers:
        _check_same_ground(layer, finest, name)
    return Scene(name, None if landsat else names, layers, finest)


def _check_same_ground(layer: Layer, finest: Grid, name: str) -> None:
    """Check that a band ends within one of its pixels of the finest band."""
    if layer.grid.matches(finest):
        return
    ours, theirs = layer.grid.transform, finest.transform
    if layer.grid.crs != finest.crs or any((ours.b, ours.d, theirs.b, theirs.d)):
        raise ValueError(
            f'the bands of {name} must share one CRS and be parallel to its axes, '
            f'{layer.path} is not like the others'
        )
    apart = np.abs(np.subtract(layer.grid.bounds, finest.bounds))
    if (apart > np.abs([ours.a, ours.e, ours.a, ours.e])).any():
        raise ValueError(
            f'the bands of {name} must cover the same ground, {layer.path} covers '
            f'{layer.grid.bounds} and the finest band {finest.bounds}'
        )
