# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Made-up Sentinel scenes over made-up land cover, as files on disk."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .._checks import check_types, require
from ..bands import SENTINEL1_BANDS, SENTINEL2_BANDS, normalize_band_names
from ..storage.user_cache import cache_folder
from ..synthetic.scenes import MAX_SITES, MAX_SIZE, write_scenes

#: Goes up whenever other files come out of the same arguments.
_VERSION = 2

_MARKER = 'complete.json'


class SyntheticScenes:
    """Georeferenced scenes of a few seasons, and an ESA WorldCover tile under them.

    The files look like real ones to every reader, so the whole way from a raster to a
    trained model runs without a download. Land cover is patches of 100 to 600 m, a
    river and fields; every class has the spectrum of Sentinel-2 Level-1C data
    (reflectance times 10,000), with phenology, texture, relief that is lit by the sun
    of the date, haze, mixed pixels, sensor noise and, in one scene, the edge of the
    orbit. Bands of 20 m and 60 m are made at their resolution and repeated. All of this is
    invented: accuracies on it say nothing about real ones.

    Files:

    * ``images/T32TQR_20210118_0.tif``: one multi-band raster per place and date, 10 m,
      in EPSG:32632 and EPSG:32633. All dates of a place have the same pixels
    * ``worldcover/ESA_WorldCover_10m_2021_v200_N45E012_Map.tif``: official name and
      georeference, land cover under the scenes only

    The same arguments always give the same files, which are written only once, also by
    several processes that start at the same time.
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
            root: Folder for the files, with a subfolder for each choice of the other
                arguments. Defaults to *synthetic* in the folder of the environment
                variable ``TORCHGEO_SOFTCON_CACHE`` or in ``~/.cache/torchgeo_softcon``.
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
        check_types(SyntheticScenes.__init__, locals())
        names = normalize_band_names(bands)
        sensors = (SENTINEL2_BANDS, SENTINEL1_BANDS)
        require(
            names and any({*names} <= {*sensor} for sensor in sensors),
            f'bands must be some of {", or some of ".join(map(", ".join, sensors))}, got '
            f'{tuple(bands)}',
        )
        limits = {'places': (1, MAX_SITES), 'size': (32, MAX_SIZE)}
        limits |= {'seasons': (1, 52), 'seed': (0, 2**32 - 1)}
        given = {'places': places, 'size': size, 'seasons': seasons, 'seed': seed}
        for name, (low, high) in limits.items():
            require(
                low <= given[name] <= high,
                f'{name} must be from {low} to {high}, got {given[name]}',
            )
        self.places, self.size, self.seasons = places, size, seasons
        self.bands, self.seed = names, seed
        # The folder is named after these, in this order
        self._arguments = dict(vars(self))

        folder = cache_folder() / 'synthetic' if root is None else Path(root)
        #: Folder of exactly these files, with those of the scenes and the land cover.
        self.root = folder.expanduser() / self._key()
        self.images, self.worldcover = self.root / 'images', self.root / 'worldcover'
        if not self._complete():
            self._write()

    def _key(self) -> str:
        """Return the name of the folder: what can be read, and a hash of everything."""
        key = json.dumps({'version': _VERSION, **self._arguments})
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        sensor = 's1' if self.bands[0] in SENTINEL1_BANDS else 's2'
        count = f'{2 * self.places}x{self.seasons}x{self.size}'
        return f'{sensor}-{count}-seed{self.seed}-{digest}'

    def _complete(self) -> bool:
        """Tell whether all files are there, or raise an OSError if only some are."""
        if not self.root.exists():
            return False
        try:
            sizes = json.loads((self.root / _MARKER).read_text())
            found = _sizes(self.root)
            damaged = [name for name in sizes if found.get(name) != sizes[name]]
        except (OSError, ValueError) as error:
            damaged = [str(error)]
        if damaged:
            raise OSError(
                f'{self.root} was complete once, but is not any more '
                f'({", ".join(damaged[:3])}): delete this folder to have it written again'
            )
        return True

    def _write(self) -> None:
        """Write everything to a temporary folder, then give it its name."""
        parent = self.root.parent
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f'.{self.root.name}-', dir=parent))
        try:
            write_scenes(temporary, **self._arguments)
            (temporary / _MARKER).write_text(json.dumps(_sizes(temporary), indent=1))
            temporary.chmod(0o755)  # mkdtemp is for one user only
            temporary.rename(self.root)
        except OSError:
            # Another process may have been faster, and have written the same files
            if not self._complete():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _sizes(root: Path) -> dict[str, int]:
    """Return the bytes of all rasters, by path below a folder."""
    paths = sorted(root.rglob('*.tif'))
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
