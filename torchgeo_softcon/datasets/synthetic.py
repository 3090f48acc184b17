# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Made-up Sentinel scenes over made-up land cover, as files on disk."""

import dataclasses
import datetime
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from pyproj import CRS, Transformer

from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS, normalize_band_names
from ..geo.grid import Grid, outline
from ..geo.warp import Warp
from ..landcover.products import WORLDCOVER
from ..synthetic.landscape import Landscape, optical, radar, random_field

Codes = npt.NDArray[np.uint8]

#: Goes up whenever other files come out of the same arguments.
_VERSION = 2

#: The tile that all scenes lie in, named after its south-west corner.
_TILE = 'ESA_WorldCover_10m_2021_v200_N45E012_Map.tif'
_TILE_WEST, _TILE_NORTH, _TILE_SIZE, _TILE_RES = 12, 48, 36000, 1 / 12000

#: UTM zones meet at 12 degrees east, at the edge of the tile. Products of zone 32 go
#: on for some kilometres to the east of that line. Zone and first latitude.
_ZONES = ((32, 45.3), (33, 45.7))

#: First longitude, and distance between places in degrees for up to 3 km.
_FIRST_LON, _STEP = 12.03, 0.08

#: Places per zone and their largest size, so that no two meet.
_MAX_PLACES, _MAX_SIZE = 16, 512

#: Ground around a scene that has land cover, in pixels of the tile.
_MARGIN = 32

#: Stray pixels of the map, as real classifications have them.
_STRAY = 0.003

_MARKER = 'complete.json'


@dataclasses.dataclass(frozen=True)
class _Place:
    """Ground of some scenes."""

    name: str
    index: int
    zone: int
    transform: Affine

    @property
    def crs(self) -> CRS:
        """CRS of the scenes."""
        return CRS.from_epsg(32600 + self.zone)


class SyntheticScenes:
    """Georeferenced scenes of a few seasons, and an ESA WorldCover tile under them.

    The files look like real ones to every reader, so the whole way from a raster to a
    trained model runs without a download. Land cover is patches of 100 to 600 m, a
    river and fields; every class has the spectrum of Sentinel-2 Level-1C data
    (reflectance times 10,000), with phenology, texture, relief that is lit by the sun
    of the date, haze, mixed pixels, sensor noise and, in one scene, the edge of the
    orbit. Bands of 20 m and 60 m are made at their resolution and repeated.

    All of this is invented: it is no substitute for real data, and accuracies on it
    say nothing about real ones.

    Files:

    * ``images/T32TQR_20210118_0.tif``: one multi-band raster per place and date, 10 m,
      in EPSG:32632 and EPSG:32633. All dates of a place have the same pixels
    * ``worldcover/ESA_WorldCover_10m_2021_v200_N45E012_Map.tif``: official name and
      georeference, land cover under the scenes only

    The same arguments always give the same files, which are written only once: several
    processes may start at the same time, and an interrupted one leaves nothing behind
    that is taken for complete.

    .. versionadded:: 0.1
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        places: int = 1,
        size: int = 256,
        seasons: int = 4,
        bands: Sequence[str] = SENTINEL2_BANDS,
        seed: int = 0,
    ) -> None:
        """Initialize a new SyntheticScenes instance, and write its files if needed.

        Args:
            root: Folder for the files, which go into a subfolder of their own for each
                choice of the other arguments. Defaults to *synthetic* in the folder of
                the environment variable ``TORCHGEO_SOFTCON_CACHE``, which defaults to
                ``~/.cache/torchgeo_softcon``.
            places: Number of places in each of the two UTM zones, 1 to 16.
            size: Height and width of a scene in pixels of 10 m, 32 to 512.
            seasons: Number of dates, evenly over the year 2021, 1 to 52.
            bands: Bands of Sentinel-2 (uint16, reflectance times 10,000, 0 is no data)
                or of Sentinel-1 (float32, dB, NaN is no data), by name.
            seed: Other seeds give other ground.

        Raises:
            OSError: If the files cannot be written, or if some of them were removed.
            ValueError: If an argument is out of range, or if *bands* are unknown or of
                both sensors.
        """
        names = normalize_band_names(bands)
        if not names or not (
            set(names) <= set(SENTINEL2_BANDS) or set(names) <= set(SENTINEL1_BANDS)
        ):
            raise ValueError(
                f'bands must be some of {", ".join(SENTINEL2_BANDS)}, or some of '
                f'{", ".join(SENTINEL1_BANDS)}, got {tuple(bands)}'
            )
        for name, value, low, high in (
            ('places', places, 1, _MAX_PLACES),
            ('size', size, 32, _MAX_SIZE),
            ('seasons', seasons, 1, 52),
            ('seed', seed, 0, 2**32 - 1),
        ):
            if not low <= value <= high:
                raise ValueError(f'{name} must be from {low} to {high}, got {value}')

        self.places = places
        self.size = size
        self.seasons = seasons
        self.bands = names
        self.seed = seed

        if root is None:
            cache = os.environ.get(
                'TORCHGEO_SOFTCON_CACHE', '~/.cache/torchgeo_softcon'
            )
            root = Path(cache) / 'synthetic'
        #: Folder of exactly these files.
        self.root = Path(root).expanduser() / self._key()
        #: Folder of the scenes.
        self.images = self.root / 'images'
        #: Folder of the land cover.
        self.worldcover = self.root / 'worldcover'

        if not self._complete():
            self._write()

    def _key(self) -> str:
        """Name of the folder: what can be read, and a hash of everything."""
        arguments = {
            'version': _VERSION,
            'places': self.places,
            'size': self.size,
            'seasons': self.seasons,
            'bands': self.bands,
            'seed': self.seed,
        }
        digest = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:8]
        sensor = 's1' if self.bands[0] in SENTINEL1_BANDS else 's2'
        return (
            f'{sensor}-{2 * self.places}x{self.seasons}x{self.size}-seed{self.seed}-'
            f'{digest}'
        )

    def _complete(self) -> bool:
        """Whether all files are there.

        Raises:
            OSError: If the folder is there, but something in it is not.
        """
        if not self.root.exists():
            return False
        try:
            files = json.loads((self.root / _MARKER).read_text())
            damaged = [
                name
                for name, size in files.items()
                if (self.root / name).stat().st_size != size
            ]
        except (OSError, ValueError) as error:
            damaged = [str(error)]
        if damaged:
            raise OSError(
                f'{self.root} was complete once, but is not any more '
                f'({", ".join(damaged[:3])}): delete this folder to have it written '
                'again'
            )
        return True

    def _write(self) -> None:
        """Write everything to a temporary folder, then give it its name."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        parent = self.root.parent
        temporary = Path(tempfile.mkdtemp(prefix=f'.{self.root.name}-', dir=parent))
        try:
            for folder in ('images', 'worldcover'):
                (temporary / folder).mkdir()
            self._write_files(temporary)
            files = {
                path.relative_to(temporary).as_posix(): path.stat().st_size
                for path in sorted(temporary.rglob('*.tif'))
            }
            (temporary / _MARKER).write_text(json.dumps(files, indent=1))
            temporary.chmod(0o755)  # mkdtemp is for one user only
            try:
                temporary.rename(self.root)
            except OSError:
                # Another process was faster, and wrote the same files
                if not self._complete():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_files(self, root: Path) -> None:
        """Write the tile and the scenes."""
        tile_path = root / 'worldcover' / _TILE
        profile = {
            'driver': 'GTiff',
            'dtype': 'uint8',
            'count': 1,
            'width': _TILE_SIZE,
            'height': _TILE_SIZE,
            'crs': 'EPSG:4326',
            'transform': _tile().transform,
            'nodata': 0,
            'tiled': True,
            'blockxsize': 1024,
            'blockysize': 1024,
            'compress': 'deflate',
            # Blocks without land cover take no space
            'sparse_ok': True,
        }
        with rasterio.open(tile_path, 'w', **profile) as dst:
            dst.write_colormap(1, WORLDCOVER.colors)
            dst.update_tags(description='Synthetic land cover, no ESA product')
            for place in _places(self.places, self.size):
                landscape, (top, left) = self._landscape(place)
                stray = self._stray(landscape.codes, place)
                height, width = stray.shape
                window = ((top, top + height), (left, left + width))
                dst.write(stray, 1, window=window)
                self._write_scenes(root / 'images', place, landscape, top, left)

    def _rng(self, place: _Place, *purpose: int) -> np.random.Generator:
        """Random numbers that do not depend on how many places or dates there are."""
        return np.random.default_rng([self.seed, place.zone, place.index, *purpose])

    def _landscape(self, place: _Place) -> tuple[Landscape, tuple[int, int]]:
        """Land cover on the pixels of the tile around a place, and where it starts."""
        extent = 10 * self.size
        left, top = place.transform.c, place.transform.f
        box = outline(
            place.crs, _tile().crs, (left, top - extent, left + extent, top)
        ).bounds
        cols = [round((x - _TILE_WEST) / _TILE_RES) for x in (box[0], box[2])]
        rows = [round((_TILE_NORTH - y) / _TILE_RES) for y in (box[3], box[1])]
        shape = (rows[1] - rows[0] + 2 * _MARGIN, cols[1] - cols[0] + 2 * _MARGIN)

        # A degree of longitude is shorter than one of latitude
        metres = 111_195 * _TILE_RES
        pixel = (metres, metres * np.cos(np.radians(box[1])))
        landscape = Landscape.random(self._rng(place, 0), shape, pixel)
        return landscape, (rows[0] - _MARGIN, cols[0] - _MARGIN)

    def _stray(self, codes: Codes, place: _Place) -> Codes:
        """Land cover with the mistakes of a classification."""
        rng = self._rng(place, 1)
        wrong = rng.random(codes.shape) < _STRAY
        return np.where(wrong, rng.choice(np.unique(codes), codes.shape), codes)

    def _write_scenes(
        self, folder: Path, place: _Place, landscape: Landscape, top: int, left: int
    ) -> None:
        """Write all dates of a place."""
        grid = Grid(place.crs, place.transform, self.size, self.size)
        row, col = Warp(grid, _tile().crs).pixels(_tile())
        ground = landscape.take(row - top, col - left)
        is_radar = self.bands[0] in SENTINEL1_BANDS
        available = SENTINEL1_BANDS if is_radar else SENTINEL2_BANDS
        relief = random_field(self._rng(place, 2), row.shape, (10, 10), 350)

        profile = {
            'driver': 'GTiff',
            'dtype': 'float32' if is_radar else 'uint16',
            'count': len(self.bands),
            'width': self.size,
            'height': self.size,
            'crs': place.crs.to_wkt(),
            'transform': place.transform,
            'nodata': np.nan if is_radar else 0,
            'tiled': True,
            'blockxsize': 128,
            'blockysize': 128,
            'compress': 'deflate',
            'predictor': 3 if is_radar else 2,
            'interleave': 'band',
        }
        first = datetime.date(2021, 1, 18)
        for i in range(self.seasons):
            date = first + datetime.timedelta(round(365 * i / self.seasons))
            day = date.timetuple().tm_yday
            rng = self._rng(place, 3, day)
            image: npt.NDArray[Any]
            image = (radar if is_radar else optical)(rng, ground, relief, day)
            # The last date of the first place is at the edge of an orbit
            last = i == self.seasons - 1
            if last and place.index == 0 and place.zone == _ZONES[0][0]:
                image[:, _rim(rng, self.size)] = np.nan if is_radar else 0

            name = f'{place.name}_{date:%Y%m%d}_{place.index}.tif'
            with rasterio.open(folder / name, 'w', **profile) as dst:
                dst.write(image[[available.index(band) for band in self.bands]])
                dst.descriptions = self.bands
                dst.update_tags(description='Synthetic scene, no Copernicus product')


def _tile() -> Grid:
    """Georeference of the tile."""
    transform = Affine(_TILE_RES, 0, _TILE_WEST, 0, -_TILE_RES, _TILE_NORTH)
    return Grid(CRS.from_epsg(4326), transform, _TILE_SIZE, _TILE_SIZE)


def _places(count: int, size: int) -> list[_Place]:
    """Where the scenes are: a grid of four columns in each zone."""
    places = []
    for zone, first_lat in _ZONES:
        to_utm = Transformer.from_crs(4326, 32600 + zone, always_xy=True)
        for i in range(count):
            lon = _FIRST_LON + i % 4 * _STEP
            x, y = to_utm.transform(lon, first_lat + i // 4 * _STEP)
            # Real products begin at multiples of 20 m
            left, top = 20 * round(x / 20), 20 * round(y / 20) + 10 * size
            transform = Affine(10, 0, left, 0, -10, top)
            places.append(_Place(_product_tile(zone, left, top), i, zone, transform))
    return places


def _product_tile(zone: int, x: float, y: float) -> str:
    """Name of a Sentinel-2 tile: zone, latitude band T, and square of 100 km."""
    columns = ('STUVWXYZ', 'ABCDEFGH', 'JKLMNPQR')[zone % 3]
    rows = 'ABCDEFGHJKLMNPQRSTUV'
    row = int(y // 100_000) + (5 if zone % 2 == 0 else 0)
    return f'T{zone}T{columns[int(x // 100_000) - 1]}{rows[row % 20]}'


def _rim(rng: np.random.Generator, size: int) -> npt.NDArray[np.bool_]:
    """Pixels beyond the edge of an orbit: a slanted and ragged line."""
    row, col = np.indices((size, size)) / size
    ragged = np.repeat(rng.normal(0, 0.01, -(-size // 4)), 4)[:size, None]
    return np.asarray(col > 0.88 - 0.25 * row + ragged)
