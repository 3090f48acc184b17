# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Finding images: which files and bands make a scene."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rasterio.windows import Window

from .._checks import require
from ..bands import (
    SENTINEL1_BANDS,
    SENTINEL2_BANDS,
    normalize_band_names,
    spell_band_name,
)
from .describe import BAND_WORD, OpenedFile, describe_file, is_landsat
from .file_index import open_each
from .find_files import RASTERS, AnyPath, find_files, path_list
from .grid import Grid
from .numbers import Numbers
from .rasters import (
    DamagedFileError,
    Kind,
    Layer,
    Scene,
    check_place,
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

#: Sentinel-2 in a path, and the names of its bands as assets of STAC catalogues.
_SENTINEL2 = re.compile(r'(?<![A-Za-z0-9])(?:S2[A-D]?_|sentinel-?2)', re.IGNORECASE)
_ASSET_NAMES = (
    *('coastal', 'blue', 'green', 'red', 'rededge1', 'rededge2', 'rededge3', 'nir'),
    *('nir08', 'nir09', 'cirrus', 'swir16', 'swir22'),
)
_ASSETS = dict(zip(_ASSET_NAMES, SENTINEL2_BANDS, strict=True))

#: Folders of a Level-2A product that hold bands of one scene.
_RESOLUTION_FOLDER = re.compile(r'R(?:10|20|60)m')

#: Names of Level-2A end so, those of Level-1C do not.
_RESOLUTION = re.compile(r'_(?:10|20|60)m$', re.IGNORECASE)


def find_rasters(
    paths: AnyPath | Iterable[AnyPath], left_out: dict[str, str] | None = None
) -> list[str]:
    """List the rasters that may be images, see :func:`.find_files`.

    Those that are left out are noted in *left_out*, with the reason.
    """
    left_out = {} if left_out is None else left_out
    named = path_list(paths)
    files: dict[str, None] = {}
    for path in named:
        for file in find_files(path, RASTERS, 'images'):
            if file != path and _NOT_A_BAND.search(PurePath(file).stem):
                left_out[file] = 'by its name, not a band'
            else:
                files[file] = None
    if not files:
        raise FileNotFoundError(
            f'images must have at least one raster ({", ".join(RASTERS)}), found none in '
            f'{", ".join(named) or "an empty list"}'
        )
    return list(files)


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
    left_out = {} if left_out is None else left_out
    files = [*files]
    each = open_each(_open_file, files, named, nodata, damaged is not None)
    opened = [file for file in each if file is not None]
    gone = [path for path, file in zip(files, each, strict=True) if file is None]
    if damaged is not None:
        damaged += gone
    numbers = Numbers(opened, offset, to_digital)
    whole, single = _group(opened, left_out)
    for path in gone:
        single.pop(_find_band(path)[0], None)
    if not (whole or single):
        raise OSError(f'all images are damaged, such as {(gone or [""])[0]}')
    if wanted is not None:
        # Files with none of the bands lie beside a scene, such as a mask of clouds
        beside = {
            file.layer.path: f'it has none of {", ".join(wanted)}'
            for file in whole
            if not {*wanted} & {*(file.names or ())} and not is_landsat(file.layer.path)
        }
        if single or len(beside) < len(whole):
            whole = [file for file in whole if file.layer.path not in beside]
            left_out |= beside
    scenes = [scene_from_file(file, wanted, numbers) for file in whole]
    for name, group in single.items():
        scenes.append(_from_bands(name, group, wanted, numbers))
        for band, file in group.items():
            if wanted and band not in wanted:
                left_out[file.layer.path] = f'the band {band} is not wanted'
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
    files: Iterable[OpenedFile], left_out: dict[str, str]
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
            paths = known.layer.path, file.layer.path
            ends_so = {_RESOLUTION.search(PurePath(p).stem) is None for p in paths}
            require(
                not at_end or len(ends_so) == 1,
                f'{paths[0]} and {paths[1]} have one band, with a resolution in the name '
                'as Level-2A and without as Level-1C: put each level into its own folder',
            )
            # Level-2A has the same band at several resolutions, only the finest counts
            group[band], coarse = sorted((known, file), key=_pixel_area)
            reason = f'{group[band].layer.path} has the same band at least as fine'
            left_out[coarse.layer.path] = reason
    for key, group in middles.items():
        # A band in the middle of a name may be the number of a place, too
        finest = min(group.values(), key=_pixel_area).layer.grid
        apart = any(_lies_apart(file.layer, finest) for file in group.values())
        if len(group) > 1 and not apart:
            ends[key] = group
        else:
            whole += group.values()
    return whole, ends


def _pixel_area(file: OpenedFile) -> float:
    return file.layer.grid.pixel_area


def _find_band(path: str) -> tuple[str, str | None, bool]:
    """Return the scene that a file of one band is of, the band, and if its name ends so."""
    name = PurePath(path)
    folder = name.parent
    if _RESOLUTION_FOLDER.fullmatch(folder.name):
        folder = folder.parent
    words = [*BAND_WORD.finditer(name.stem)]
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
    path: str, all_bands: tuple[str, ...] | None, nodata: float | None, skip: bool
) -> OpenedFile | None:
    """Read what is known of a file, None if it is damaged and such are to be skipped."""
    try:
        with open_raster(path) as source:
            check_place(source)
            grid = Grid.of(source)
            file = describe_file(source, grid, all_bands, nodata)
            # The last pixel of the last band is where a truncated file usually ends
            corner = Window(grid.width - 1, grid.height - 1, 1, 1)
            read_raster(source, [source.count], corner)
    except DamagedFileError:
        if skip:
            return None
        raise
    if all_bands is not None and len(all_bands) != len(file.layer.indexes) > 1:
        raise ValueError(
            f'all_bands must name the {len(file.layer.indexes)} bands of {path}, got '
            f'{len(all_bands)}: {", ".join(all_bands)}'
        )
    return file


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
    path, present = file.layer.path, file.names or ()
    if wanted is None:
        return _make_scene(path, [(file, file.names)], present, numbers)
    landsat = file.names is None and is_landsat(path)
    if file.names is None and not landsat:
        raise ValueError(
            f'{path} does not name its {len(file.layer.indexes)} bands: give '
            'all_bands in file order, or leave bands out to use all of them'
        )
    _check_bands(path, wanted, present, landsat)
    chosen = file.choose([present.index(band) for band in wanted])
    return _make_scene(path, [(chosen, wanted)], present, numbers)


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
    landsat = any(is_landsat(file.layer.path) for file in group.values())
    if wanted is not None:
        _check_bands(name, wanted, present, landsat)
    parts = [(group[band], None if landsat else (band,)) for band in wanted or present]
    return _make_scene(name, parts, present, numbers)


def _make_scene(
    name: str,
    parts: Sequence[tuple[OpenedFile, tuple[str, ...] | None]],
    present: Sequence[str],
    numbers: Numbers,
) -> Scene:
    """Make a scene of files and the names of their bands, of those that are *present*."""
    layers, units, sources = zip(*(numbers.apply(*part) for part in parts), strict=True)
    finest = min((layer.grid for layer in layers), key=lambda grid: grid.pixel_area)
    for layer in layers:
        if message := _lies_apart(layer, finest):
            raise ValueError(f'the bands of {name} must {message}')
    file, names = parts[0]
    if names is not None:
        names = tuple(band for _, of_file in parts for band in of_file or ())
    # All bands tell the level, not only those that are wanted
    level = numbers.products.level(file.layer.path, file.tags, present)
    # None if one of them is unknown
    unit = '' if '' in units else ', '.join(dict.fromkeys(units))
    source = ', '.join(dict.fromkeys(filter(None, sources)))
    year = numbers.products.year(file.layer.path, file.tags)
    return Scene(name, names, layers, finest, Kind(*level, unit, source), year)


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
