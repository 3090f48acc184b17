# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The folders of SSL4EO-S12: which images are there, and how one is read."""

import abc
import copy
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import rasterio

from .._checks import require
from ..bands import RGB_BANDS, SENTINEL1_BANDS, SENTINEL2_BANDS, SENTINEL2_SUBSETS
from ..geo.rasters import has_mask, open_raster, read_raster
from .image_records import record_dtype

#: Sentinel-1 GRD, Sentinel-2 Level-1C and Level-2A, by the folders of 2022 or of v1.1.
#: S2RGB and S1RTC are in v1.1 and TerraMesh only.
Split = Literal['s1', 's2c', 's2a', 'S1GRD', 'S2L1C', 'S2L2A', 'S2RGB', 'S1RTC']

#: Bands of each, in the order of TorchGeo.
BANDS: dict[str, tuple[str, ...]] = {
    's1': SENTINEL1_BANDS,
    's2c': SENTINEL2_BANDS,
    's2a': SENTINEL2_SUBSETS[12],
    's2rgb': RGB_BANDS,
    's1rtc': SENTINEL1_BANDS,
}

#: Those of Sentinel-1.
RADAR = ('s1', 's1rtc')

#: Their folders in v1.1 and TerraMesh.
MODALITIES = {
    's1': 'S1GRD',
    's2c': 'S2L1C',
    's2a': 'S2L2A',
    's2rgb': 'S2RGB',
    's1rtc': 'S1RTC',
}

#: Images that are looked at to find out what all are like.
_TRIED = 10

#: Names of locations, such as 0000200, and in TerraMesh majortom_train_0000200.
_LOCATION = re.compile(r'\d+', re.ASCII)
_SAFE_LOCATION = re.compile(r'[A-Za-z0-9]\w*', re.ASCII)

#: Names of images are those of Earth Engine and contain the time of acquisition:
#: 20200604T054639_20200604T054831_T43RCP, S1A_IW_GRDH_1SDV_20200607T010800_... Images of
#: v1.1 without such a name have that time alone.
_SENTINEL1_IMAGE = re.compile(r'(?:S1[A-Z]_\w{12}_)?(\d{8})T\d{6}\w*', re.ASCII)
_SENTINEL2_IMAGE = re.compile(r'(\d{8})T\d{6}\w*', re.ASCII)
_IMAGE = {s: _SENTINEL1_IMAGE if s in RADAR else _SENTINEL2_IMAGE for s in BANDS}

#: The seasons of a location are a quarter of a year apart, and the images of the sensors
#: were taken within 30 days of one another. Halfway to the next season is too far.
#: https://github.com/zhu-xlab/SSL4EO-S12/blob/main/src/download_data/ssl4eo_s12_downloader.py
MAX_DAYS = 45


class Georeference(NamedTuple):
    """The pixel grids of an image, of each of its bands.

    Attributes:
        crs: Coordinate reference system as an authority code or WKT, if there is one.
        transforms: Affine transform of each band, six numbers.
        nodata: Value without data of each band, None if there is none.
        bounds: Left, bottom, right and top of the first band of the finest resolution.
    """

    crs: str | None
    transforms: tuple[tuple[float, ...], ...]
    nodata: tuple[float | None, ...]
    bounds: tuple[float, float, float, float]


#: CRS of each of N images, transforms of shape (N, 6), and height and width in pixels, of
#: their finest band.
Grids = tuple[list[str | None], npt.NDArray[np.float64], tuple[int, int]]


class Archive(abc.ABC):
    """Images of one split, by number.

    Attributes:
        root: Folder of the split.
        split: Name of the split.
        bands: Names of its bands.
        location: Location of each image, shape (N,).
        season: Name of each image in its location, shape (N,).
        dtype: Type of the image records, see :func:`.record_dtype`.
        order: Rank of each image in the order that is fastest to read, shape (N,).
    """

    location: npt.NDArray[np.bytes_]
    season: npt.NDArray[np.bytes_]
    dtype: np.dtype[Any]
    order: npt.NDArray[np.int64]

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        """Initialize a new Archive instance, of a folder in *root*."""
        self.root = Path(root) / split
        self.split = split
        self.bands = BANDS[split]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.location)

    def name(self, row: int) -> tuple[str, str]:
        """Return the location of an image and its own name."""
        return self.location[row].decode(), self.season[row].decode()

    @abc.abstractmethod
    def read(self, rows: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return the records of N images as bytes, shape (N, R)."""

    @abc.abstractmethod
    def georeference(self, row: int) -> Georeference:
        """Return the pixel grids of an image."""

    def load(self, row: int) -> tuple[npt.NDArray[Any], Georeference]:
        """Return the record of an image, of shape (), and its georeference."""
        return self.read([row]).view(self.dtype)[0, 0], self.georeference(row)

    def clouds(self) -> npt.NDArray[np.float32] | None:
        """Return the share of clouds of each image, shape (N,), None if it is unknown."""
        return None

    def cloud_mask(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the classes of clouds and shadows of an image, shape (H, W).

        Land (0), water, snow, thin cloud (3), thick cloud, cloud shadow, no data (6).

        Raises:
            ValueError: If there are none.
        """
        raise ValueError(f'{self.root} has no cloud masks')


class TiffArchive(Archive):
    """Images of one split in folders, as published.

    ``s2c/0000200/20200604T054639_20200604T054831_T43RCP/B1.tif``: split, location, image,
    band. Only what is on disk is listed, and other folders and files are passed over.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        """Initialize a new TiffArchive instance."""
        super().__init__(root, split)
        found = list_images(root, split)
        if not found:
            raise FileNotFoundError(
                f'root must be a folder of SSL4EO-S12 with images such as '
                f'{split}/0000200/DATE_.../B1.tif, or one that is packed to the end, found none '
                f'in {self.root}'
            )
        # Bytes, not text: a million names in 50 MB that processes share
        location, season = zip(*found, strict=True)
        self.location = np.array(location, dtype=np.bytes_)
        self.season = np.array(season, dtype=np.bytes_)
        self.order = np.arange(len(found))
        self.dtype = self._first_dtype()

    def only(self, rows: npt.NDArray[np.int64]) -> Self:
        """Return an archive of some of the images."""
        other = copy.copy(self)
        other.location, other.season = self.location[rows], self.season[rows]
        other.order = self.order[rows]
        return other

    def georeference(self, row: int) -> Georeference:
        """Return the pixel grids of an image."""
        return self.load(row)[1]

    def load(self, row: int) -> tuple[npt.NDArray[Any], Georeference]:
        """Return the record of an image, of shape (), and its georeference."""
        record = np.zeros((), self.dtype)
        grids = {}
        for band, source, values in self._open(row):
            record[band] = values
            crs = source.crs.to_string() if source.crs else None
            grids[band] = crs, tuple(source.transform[:6]), source.nodata, source.bounds
        systems = {crs for crs, *_ in grids.values()}
        require(
            len(systems) == 1,
            f'the bands of an image must have one CRS, those in {self._folder(row)} have '
            f'{", ".join(sorted(map(str, systems)))}',
        )
        finest = max(self.bands, key=lambda band: self.dtype[band].shape)
        crs, _, _, bounds = grids[finest]
        _, transforms, nodata, _ = zip(*(grids[b] for b in self.bands), strict=True)
        return record, Georeference(crs, transforms, nodata, tuple(bounds))

    def read(self, rows: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return records as bytes, see :meth:`Archive.read`."""
        records = np.zeros(len(rows), self.dtype)
        for record, row in zip(records, rows, strict=True):
            for band, _, values in self._open(row):
                record[band] = values
        return records.view(np.uint8).reshape(len(rows), self.dtype.itemsize)

    def _folder(self, row: int) -> Path:
        return self.root.joinpath(*self.name(row))

    def _open(self, row: int) -> Iterator[tuple[str, Any, npt.NDArray[Any]]]:
        """Yield each band of an image with its open file and its values."""
        # GDAL shall not list the folder to look for other files that belong to this one
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN='EMPTY_DIR'):
            for band in self.dtype.names or ():
                path, field = self._folder(row) / f'{band}.tif', self.dtype[band]
                with open_raster(path, alone=True) as source:
                    found, model = source.dtypes[0], field.base.name
                    require(
                        (found, source.shape) == (model, field.shape),
                        f'the images of an archive must be alike: {path} is {found} of '
                        f'{source.height} x {source.width} pixels, '
                        f'{self._model / path.name} is {model} of {field.shape[0]} x '
                        f'{field.shape[1]}',
                    )
                    require(
                        source.scales[0] == 1
                        and not source.offsets[0]
                        and not has_mask(source),
                        f'the images of an archive must be as published: {path} has a '
                        'mask, or a scale and an offset, which a record cannot hold. '
                        'Apply them (`gdal_translate -unscale -mask none`), or read the '
                        'files as images of WorldCoverScenes',
                    )
                    yield band, source, read_raster(source, [1])[0]

    def _first_dtype(self) -> np.dtype[Any]:
        """Return the type of the records of the first image that can be opened."""
        errors = []
        for row in range(min(len(self), _TRIED)):
            self._model = self._folder(row)
            bands = {}
            try:
                for band in self.bands:
                    with open_raster(self._model / f'{band}.tif') as source:
                        bands[band] = source.dtypes[0], source.shape
            except OSError as error:
                errors.append(error)
            else:
                return record_dtype(bands)
        raise errors[0]


def split_names(split: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of splits, of which there may be one as text, or several."""
    given = (split,) if isinstance(split, str) else tuple(split)
    ours = {name: short for short, name in MODALITIES.items()}
    names = tuple(ours.get(name, name) for name in given)
    if not names or len({*names}) < len(names) or not {*names} <= {*BANDS}:
        raise ValueError(
            f'split must be one or several of s1, s2c, s2a, got {split!r}. In v1.1 and '
            f'TerraMesh, they are also called {", ".join(ours)}'
        )
    return names


def is_image_name(name: str) -> bool:
    """Return whether a name is that of an image of some split."""
    return _SENTINEL1_IMAGE.fullmatch(name) is not None


def check_names(source: Path, split: str, location: pa.Array, season: pa.Array) -> None:
    """Check names that were read from a file, before a path is made of them."""
    for kind, names, pattern in (
        ('location', location, _SAFE_LOCATION),
        ('image', season, _IMAGE[split]),
    ):
        # RE2 knows ASCII only for these classes, as our patterns do
        valid = pc.match_substring_regex(names, rf'\A(?:{pattern.pattern})\z')
        wrong = names.filter(pc.invert(pc.fill_null(valid, False)))
        if len(wrong):
            raise ValueError(
                f'{source} has {wrong[0].as_py()!r} as the name of {kind}, which is none of '
                f'{split} of SSL4EO-S12. Do not use this file, it may be harmful'
            )


def list_images(root: str | os.PathLike[str], split: str) -> list[tuple[str, str]]:
    """Return location and name of each image of a split, sorted.

    Images are known by the names of their folders. Others are passed over.
    """
    folder = Path(root) / split
    return [
        (location, season)
        for location in _folders(folder, _LOCATION)
        for season in _folders(folder / location, _IMAGE[split])
    ]


def _folders(root: Path, pattern: re.Pattern[str]) -> list[str]:
    """Return the names of the folders in a folder, sorted."""
    if not root.is_dir():
        return []
    with os.scandir(root) as found:
        return sorted(e.name for e in found if pattern.fullmatch(e.name) and e.is_dir())


def days(split: str, seasons: npt.NDArray[np.bytes_]) -> npt.NDArray[np.datetime64]:
    """Return the days of N images of a split from their names, shape (N,)."""
    texts = []
    for name in seasons.tolist():
        match = _IMAGE[split].fullmatch(name.decode())
        if match is None:
            raise ValueError(f'{name.decode()!r} is not a name of an image of {split}')
        texts.append(f'{match[1][:4]}-{match[1][4:6]}-{match[1][6:]}')
    return np.array(texts, dtype='datetime64[D]')


def pair(
    locations: npt.NDArray[np.bytes_],
    dates: npt.NDArray[np.datetime64],
    other_locations: npt.NDArray[np.bytes_],
    other_dates: npt.NDArray[np.datetime64],
) -> npt.NDArray[np.int64]:
    """Find images of the same location and season in another list.

    The two with the least days between them come first, and no image is taken twice.

    Returns:
        Position of the partner of each of N images in the list of M others, shape (N,),
        -1 where there is none within :data:`MAX_DAYS`.
    """
    images, partners = (
        pd.Series(range(len(names))).groupby(names.tolist()).indices
        for names in (locations, other_locations)
    )
    ours = dates.astype(np.int64).tolist()
    theirs = other_dates.astype(np.int64).tolist()
    found = np.full(len(locations), -1)
    for location, here in images.items():
        there = partners.get(location, ())
        gaps = sorted((abs(ours[i] - theirs[j]), i, j) for i in here for j in there)
        taken = set()
        for gap, i, j in gaps:
            if gap <= MAX_DAYS and found[i] < 0 and j not in taken:
                found[i] = j
                taken.add(j)
    return found
