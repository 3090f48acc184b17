# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Finding images: which files and bands make a scene."""

import os
import re
from collections.abc import Iterable, Sequence
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
    normalize_band_names,
    spell_band_name,
)
from .file_index import open_each
from .find_files import RASTERS, AnyPath, find_files, path_list
from .grid import Grid
from .numbers import Numbers, OpenedFile, guess_bands, read_sample, snap_bands
from .rasters import (
    RGB_COLORS,
    DamagedFileError,
    Kind,
    Layer,
    Scene,
    check_place,
    describe_layer,
    open_raster,
    read_raster,
)
from .sentinel2 import hint_at_offset

#: A band at the end of a file name, as Sentinel products, SSL4EO-S12 and BigEarthNet
#: write it: B2, B02, B8A, B08A, VV, with or without a resolution.
_BAND_TOKEN = re.compile(
    r'(?:^|[_.\-])(?P<band>B(?:0?8A|0?[1-9]|1[0-2])|VV|VH|HH|HV)(?:_(?:10|20|60)m)?$',
    re.IGNORECASE,
)

#: Files beside bands that are not bands themselves: of Sentinel-2 products, of items of
#: STAC catalogues, of Sentinel Hub, THEIA, Major-TOM, Planet, BigEarthNet, HLS and Landsat,
#: of radar from SNAP and ASF, and WorldCover itself.
_NOT_A_BAND = re.compile(
    r'(?:^|[_.])(?:TCI|AOT|WVP|SCL|PVI|QA60|Fmask|[SV][AZ]A)(?:_(?:10|20|60)m)?$'
    r'|^(?:visual|preview|thumbnail|overview|cloud_mask|CLM|CLP|dataMask|s2cloudless)$'
    r'|(?:^|_)udm2?(?:_clip)?$|_(?:QA_PIXEL|QA_RADSAT|SR_QA_AEROSOL)$'
    r'|_(?:ATB_R|CLM_R|DFP_R|EDG_R|IAB_R|MG2_R|SAT_R)[12]$|_(?:inc|ls)_map$'
    r'|(?:^|_)(?:(?:projected)?_?local)?_?(?:incidence)?_?angle(?:FromEllipsoid)?$'
    r'|_reference_map$|^MSK_|^ESA_WorldCover_',
    re.IGNORECASE,
)

#: The two corrections of a band that THEIA writes, for slopes as well or not.
_THEIA = re.compile(r'_[FS]RE$')

#: Files of Landsat, whose B1 to B12 are not those of Sentinel-2.
_LANDSAT = re.compile(r'(?<![A-Za-z0-9])L[CET]0\d_|HLS\.L30')

#: A band within a description or a name, such as 0_B2, B2_median or Sigma0_VH_db, and its
#: resolution.
_BAND_WORD = re.compile(
    r'(?<![A-Za-z0-9])(B(?:0?8A|0?[1-9]|1[0-2])|VV|VH|HH|HV)(?![A-Za-z0-9])'
    r'(?:_(?:10|20|60)m(?![A-Za-z0-9]))?',
    re.IGNORECASE,
)

#: Statistics of a band that do not have its unit, as Earth Engine's reducers name them.
_NO_VALUES = re.compile(
    r'(?:std(?:dev)?|var(?:iance)?|count|cv|kurtosis|skew|slope|trend|phase|ratio)'
    r'(?![a-z])',
    re.IGNORECASE,
)

#: Sentinel-2 in a path, and the names of its bands as assets of STAC catalogues.
_SENTINEL2 = re.compile(r'(?<![A-Za-z0-9])(?:S2[A-D]?_|sentinel-?2)', re.IGNORECASE)
_ASSET_NAMES = (
    *('coastal', 'blue', 'green', 'red', 'rededge1', 'rededge2', 'rededge3', 'nir'),
    *('nir08', 'nir09', 'cirrus', 'swir16', 'swir22'),
)
_ASSETS = dict(zip(_ASSET_NAMES, SENTINEL2_BANDS, strict=True))

#: Folders of a Level-2A product that hold bands of one scene.
_RESOLUTION_FOLDER = re.compile(r'R(?:10|20|60)m')


def find_rasters(
    paths: AnyPath | Iterable[AnyPath], left_out: dict[str, str] | None = None
) -> list[str]:
    """List the rasters that may be images, see :func:`.find_files`.

    Those that are left out are noted in *left_out*, with the reason.
    """
    named = path_list(paths)
    files: dict[str, None] = {}
    for path in named:
        for file in find_files(path, RASTERS, 'images'):
            if file != path and _NOT_A_BAND.search(PurePath(file).stem):
                _note(left_out, file, 'by its name, not a band')
            else:
                files[file] = None
    if not files:
        raise FileNotFoundError(
            f'images must have at least one raster ({", ".join(RASTERS)}), found none in '
            f'{", ".join(named) or "an empty list"}'
        )
    return list(files)


def _note(left_out: dict[str, str] | None, path: str, reason: str) -> None:
    """Note why a file is left out, if someone wants to know."""
    if left_out is not None:
        left_out[path] = reason


def find_scenes(
    files: Iterable[str],
    bands: Sequence[str] | None = None,
    all_bands: Sequence[str] | None = None,
    nodata: float | None = None,
    offset: float | None = None,
    to_digital: bool = True,
    left_out: dict[str, str] | None = None,
    damaged: list[str] | None = None,
) -> list[Scene]:
    """Open files, and put those together that hold bands of one scene.

    The options are those of :class:`.WorldCoverScenes`. *to_digital* brings reflectance of
    Sentinel-2 to digital numbers, of which its statistics are. Files that are left out are
    noted in *left_out*, with the reason. Scenes with damaged files are left out if there is
    a list of *damaged* files, to which those are added.
    """
    named = None if all_bands is None else tuple(map(spell_band_name, all_bands))
    if named is not None and len(set(named)) != len(named):
        raise ValueError(f'all_bands must be unique, got {tuple(all_bands or ())}')
    wanted = None if bands is None else normalize_band_names(bands, named or ())
    files = [*files]
    read = _open_file if damaged is None else _open_unless_damaged
    each = open_each(read, files, named, nodata)
    opened = [file for file in each if file is not None]
    if damaged is not None:
        damaged += [path for path, file in zip(files, each, strict=True) if not file]
    numbers = Numbers.of(opened, offset, to_digital)
    whole, single = _group(opened, left_out)
    for path in damaged or ():
        single.pop(_find_band(path)[0], None)
    if not (whole or single):
        raise OSError(f'all images are damaged, such as {(damaged or [""])[0]}')
    if wanted is not None:
        # What has none of the bands lies beside a scene, such as a mask of clouds
        some = [
            file
            for file in whole
            if set(wanted) & set(file.names or ()) or _is_landsat(file.layer.path)
        ]
        if some or single:
            for file in whole:
                if file not in some:
                    reason = f'it has none of {", ".join(wanted)}'
                    _note(left_out, file.layer.path, reason)
            whole = some
    scenes = [scene_from_file(file, wanted, numbers) for file in whole]
    for name, group in single.items():
        scenes.append(_from_bands(name, group, wanted, numbers))
        for band, file in group.items():
            if wanted and band not in wanted:
                _note(left_out, file.layer.path, f'the band {band} is not wanted')
    _tell(scenes, whole)
    hint_at_offset(numbers.untold)
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


def _tell(scenes: Sequence[Scene], whole: Sequence[OpenedFile]) -> None:
    """Say once what was chosen without a word from the files, and how to choose."""
    layers = [layer for scene in scenes for layer in scene.layers]
    if with_alpha := next((layer for layer in layers if layer.alpha is not None), None):
        rank_zero_info(
            f'band {with_alpha.alpha} of {with_alpha.path} is alpha, it tells where the '
            'others have data. If that is not so, name it, too, with all_bands'
        )
    guessed: dict[tuple[str, ...], OpenedFile] = {}
    for file in whole:
        if file.guess and file.names:
            guessed.setdefault(file.names, file)
    for names, file in guessed.items():
        rank_zero_info(
            f'{file.layer.path} does not name its bands, they are taken for '
            f'{", ".join(names)}, {file.guess}. If that is not so, give all_bands'
        )


def _group(
    files: Iterable[OpenedFile], left_out: dict[str, str] | None
) -> tuple[list[OpenedFile], dict[str, dict[str, OpenedFile]]]:
    """Tell files of whole scenes from those of single bands, by band for each scene."""
    whole: list[OpenedFile] = []
    ends: dict[str, dict[str, OpenedFile]] = {}
    middles: dict[str, dict[str, OpenedFile]] = {}
    for file in files:
        scene, band, at_end = _find_band(file.layer.path)
        if len(file.layer.indexes) > 1 or band is None:
            whole.append(file)
            continue
        group = (ends if at_end else middles).setdefault(scene, {})
        known = group.setdefault(band, file)
        if known is not file:
            # Level-2A has the same band at several resolutions, only the finest counts
            finer = file.layer.grid.pixel_area < known.layer.grid.pixel_area
            if finer:
                group[band], file, known = file, known, file
            reason = f'{known.layer.path} has the same band at least as fine'
            _note(left_out, file.layer.path, reason)
    for key, group in middles.items():
        # A band in the middle of a name may be the number of a place, too
        layers = [file.layer for file in group.values()]
        finest = min((layer.grid for layer in layers), key=lambda grid: grid.pixel_area)
        if len(group) > 1 and not any(_lies_apart(layer, finest) for layer in layers):
            ends[key] = group
        else:
            whole += group.values()
    return whole, ends


def _find_band(path: str) -> tuple[str, str | None, bool]:
    """Return the scene that a file of one band is of, the band, and if its name ends so."""
    name = PurePath(path)
    folder = name.parent
    if _RESOLUTION_FOLDER.fullmatch(folder.name):
        folder = folder.parent
    words = [*_BAND_WORD.finditer(name.stem)]
    end = _BAND_TOKEN.search(name.stem)
    if end is not None:
        band, stem = spell_band_name(end['band']), name.stem[: end.start()]
        return os.path.join(folder, _THEIA.sub('', stem)), band, True
    if name.stem in _ASSETS and _SENTINEL2.search(path):
        return os.path.join(folder, ''), _ASSETS[name.stem], True
    if len(words) != 1:
        return path, None, False
    start, stop = words[0].span()
    stem = f'{name.stem[:start]}*{name.stem[stop:]}'
    return os.path.join(folder, stem), spell_band_name(words[0][1]), False


def _open_file(
    path: str, all_bands: tuple[str, ...] | None, nodata: float | None
) -> OpenedFile:
    """Read what is known of a file: its bands, their names, why these are guessed."""
    with open_raster(path) as source:
        check_place(source)
        grid = Grid.of(source)
        file = describe_file(source, grid, all_bands, nodata)
        # The last pixel of the last band is where a truncated file usually ends
        corner = Window(grid.width - 1, grid.height - 1, 1, 1)
        read_raster(source, [source.count], corner)
    if all_bands is not None and len(all_bands) != len(file.layer.indexes) > 1:
        raise ValueError(
            f'all_bands must name the {len(file.layer.indexes)} bands of {path}, got '
            f'{len(all_bands)}: {", ".join(all_bands)}'
        )
    return file


def _open_unless_damaged(
    path: str, all_bands: tuple[str, ...] | None, nodata: float | None
) -> OpenedFile | None:
    """Read what is known of a file, None if it is damaged."""
    try:
        return _open_file(path, all_bands, nodata)
    except DamagedFileError:
        return None


def describe_file(
    source: Any,
    grid: Grid,
    all_bands: tuple[str, ...] | None = None,
    nodata: float | None = None,
    indexes: Sequence[int] | None = None,
    skip: int | None = None,
) -> OpenedFile:
    """Return what an open file of some pixels tells, see :func:`describe_layer`."""
    count = None if all_bands is None else len(all_bands)
    layer = describe_layer(source, grid, nodata, indexes, skip, count)
    path = source.name
    if layer.dtype.startswith('complex'):
        raise ValueError(
            f'{path} has complex numbers: make backscatter of them (SNAP: Calibration, '
            'Multilook and Terrain Correction)'
        )
    names, sure = all_bands, True
    if all_bands is None:
        names, sure = _name_bands(source, layer)
    band = _BAND_WORD.search(PurePath(path).stem)
    radar = {*SENTINEL1_BANDS} & {*(names or ()), (band or ('',))[0].upper()}
    real = layer.dtype.startswith('float') or any(s != 1 for s in layer.scale)
    sample = None
    if real or radar or (not sure and len(layer.indexes) == len(SENTINEL2_BANDS)):
        sample = read_sample(source, layer.indexes, layer.nodata, layer.alpha)
    guess = ''
    if not sure:
        names, guess = guess_bands(len(layer.indexes), layer.dtype, sample)
    if all_bands is None and _is_landsat(path) and set(names or ()) - set(RGB_BANDS):
        names = None
    return OpenedFile(layer, names, guess, source.tags(), sample)


def _is_landsat(path: str) -> bool:
    name = PurePath(path)
    return _LANDSAT.search(f'{name.parent.name}/{name.name}') is not None


def _name_bands(source: Any, layer: Layer) -> tuple[tuple[str, ...] | None, bool]:
    """Name the bands of a file, and tell whether it says all that is to be known of them."""
    indexes = layer.indexes
    descriptions = [source.descriptions[i - 1] or '' for i in indexes]
    if len(indexes) > 1 and source.driver == 'GTiff' and not any(descriptions):
        of_snap = snap_bands(source.name)
        if len(of_snap) == source.count:
            descriptions = [of_snap[i - 1] for i in indexes]
    texts = [_find_name(text) for text in descriptions]
    known = [text for text in texts if text in KNOWN_BANDS]
    if known and len(set(known)) == len(known):
        # Earth Engine adds masks such as QA60, only all_bands can make use of them
        names = (t or f'BAND {i}' for i, t in zip(indexes, texts, strict=True))
        return tuple(names), True
    colors = tuple(source.colorinterp[i - 1] for i in indexes)
    if layer.palette or colors == RGB_COLORS:
        return RGB_BANDS, True
    # Bands that have other names are other bands, whatever their number
    return None, any(texts)


def _find_name(description: str) -> str:
    """Return the band that a description names, else the description."""
    name = spell_band_name(description)
    words = {spell_band_name(word) for word in _BAND_WORD.findall(description)}
    if name in KNOWN_BANDS or len(words) != 1 or _NO_VALUES.search(description):
        return name
    return words.pop()


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


def scene_from_file(
    file: OpenedFile, wanted: tuple[str, ...] | None, numbers: Numbers
) -> Scene:
    """Make a scene of one file, of the bands that are wanted."""
    path, names = file.layer.path, file.names
    # All of them tell the level, not only those that are wanted
    level = numbers.products.level(path, file.tags, names or ())
    if wanted is not None:
        landsat = names is None and _is_landsat(path)
        if names is None and not landsat:
            raise ValueError(
                f'{path} does not name its {len(file.layer.indexes)} bands: give '
                'all_bands in file order, or leave bands out to use all of them'
            )
        names = names or ()
        _check_bands(path, wanted, names, landsat)
        file = file.choose([names.index(band) for band in wanted])
        names = wanted
    layer, unit, source = numbers.apply(file, names)
    year = numbers.products.year(path, file.tags)
    return Scene(path, names, (layer,), layer.grid, Kind(*level, unit, source), year)


def _from_bands(
    name: str,
    group: dict[str, OpenedFile],
    wanted: tuple[str, ...] | None,
    numbers: Numbers,
) -> Scene:
    """Make a scene of one file per band."""
    order = (*SENTINEL2_BANDS, *SENTINEL1_BANDS)
    present = sorted(
        group, key=lambda b: (order.index(b) if b in order else len(order), b)
    )
    landsat = any(_is_landsat(file.layer.path) for file in group.values())
    if wanted is not None:
        _check_bands(name, wanted, present, landsat)
    names = wanted or tuple(present)
    layers, units, sources = zip(
        *(numbers.apply(group[band], None if landsat else (band,)) for band in names),
        strict=True,
    )
    finest = min((layer.grid for layer in layers), key=lambda grid: grid.pixel_area)
    for layer in layers:
        if message := _lies_apart(layer, finest):
            raise ValueError(f'the bands of {name} must {message}')
    some = group[names[0]]
    level = numbers.products.level(some.layer.path, some.tags, present)
    # None if one of them is unknown
    unit = '' if '' in units else ', '.join(dict.fromkeys(units))
    source = ', '.join(dict.fromkeys(filter(None, sources)))
    kind = Kind(*level, unit, source)
    year = numbers.products.year(some.layer.path, some.tags)
    return Scene(name, None if landsat else names, layers, finest, kind, year)


def _lies_apart(layer: Layer, finest: Grid) -> str:
    """Say how a band differs if it does not end within one of its pixels of the finest."""
    if layer.grid.matches(finest):
        return ''
    ours, theirs = layer.grid.transform, finest.transform
    if layer.grid.crs != finest.crs or any((ours.b, ours.d, theirs.b, theirs.d)):
        return (
            f'share one CRS and be parallel to its axes, {layer.path} is not like the '
            'others'
        )
    apart = np.abs(np.subtract(layer.grid.bounds, finest.bounds))
    if (apart > np.abs([ours.a, ours.e, ours.a, ours.e])).any():
        return (
            f'cover the same ground, {layer.path} covers {layer.grid.bounds} and the '
            f'finest band {finest.bounds}'
        )
    return ''
