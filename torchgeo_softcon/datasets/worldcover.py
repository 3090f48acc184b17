# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""ESA WorldCover, global land cover of 2020 and 2021 at 10 m."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import shapely
import torch
from affine import Affine
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from pyproj import CRS
from torch import Tensor

from .._checks import check_types, require
from .._compat import (
    DatasetNotFoundError,
    RasterDataset,
    Sample,
    full_slices,
    georeference,
)
from ..geo.find_files import AnyPath as Path
from ..geo.find_files import path_list
from ..geo.grid import Bounds, Grid, outline
from ..geo.mosaic import Mosaic, open_tile
from ..landcover.files import assumed_year, find_map_files, map_year, warn_of_resampled
from ..landcover.product import Color, LandCoverProduct
from ..landcover.products import WORLDCOVER, ProductLike, find_product


def _color_table(colors: Mapping[int, Color]) -> npt.NDArray[np.uint8]:
    """Return colours of all bytes, transparent where there is none, of shape (256, 4)."""
    table = np.zeros((256, 4), np.uint8)
    table[list(colors)] = list(colors.values())
    return table


class WorldCoverNotFoundError(DatasetNotFoundError):
    """Raised when there is no WorldCover tile of the chosen year."""

    def __init__(self, message: str) -> None:
        """Initialize with a message, unlike TorchGeo's own error."""
        FileNotFoundError.__init__(self, message)


class ESAWorldCover(RasterDataset):
    """ESA WorldCover dataset.

    `ESA WorldCover <https://esa-worldcover.org>`__ maps the land cover of the Earth at
    10 m from Sentinel-1 and Sentinel-2, for 2020 (v100) and 2021 (v200).

    Dataset features:

    * 2,651 GeoTIFFs of 3 x 3 degrees in EPSG:4326, 36,000 x 36,000 pixels each
    * 11 classes, 0 is no data (open sea, and where no tile is)

    Dataset format:

    * ``ESA_WorldCover_10m_2021_v200_N51E003_Map.tif``, named after the south-west
      corner. Clips of any name, in any CRS, are read as well.

    A map is valid for all time, so it can be joined with images of any date::

        dataset = sentinel2 & ESAWorldCover('worldcover', year=2021)

    Every window is resampled by exact nearest neighbour on its own grid: a pixel has the
    class that the map has at its centre. Only the blocks under a window are read.

    If you use this dataset in your research, please cite it:

    * https://doi.org/10.5281/zenodo.5571936 (2020)
    * https://doi.org/10.5281/zenodo.7254221 (2021)
    """

    filename_glob = '*'
    # No group for a date: the tiles are valid from the first to the last timestamp. A
    # year would leave nothing of the intersection with images of any other year.
    filename_regex = '.*'
    is_image = False

    #: Where the official tiles are, without an account.
    url = f'{WORLDCOVER.url}/{WORLDCOVER.path}'

    #: Name of every class code.
    names = WORLDCOVER.names

    #: Official colour of every class code, red, green, blue and opacity in [0, 255].
    colors = WORLDCOVER.colors

    def __init__(
        self,
        paths: Path | Iterable[Path] = 'data',
        crs: CRS | None = None,
        res: float | tuple[float, float] | None = None,
        year: int | None = None,
        classes: Sequence[int] | None = None,
        ordinal: bool = False,
        transforms: Callable[[Sample], Sample] | None = None,
        cache: bool = True,
        product: ProductLike = 'worldcover',
    ) -> None:
        """Initialize a new ESAWorldCover instance.

        Args:
            paths: One or more folders to search, with all their subfolders, or files,
                see :func:`.find_map_files`. Where files overlap, official tiles go first.
            crs: CRS to warp to (defaults to that of the first file).
            res: Resolution in units of *crs* (defaults to that of the first file).
            year: Year of the map (defaults to the last one).
            classes: Class codes to keep (defaults to all). All others become no data.
            ordinal: Number the classes from 1 to K in the order of *classes* (0 is no
                data), as segmentation needs it, instead of the codes.
            transforms: A function of a sample, which sees the mask after *classes* and
                *ordinal*.
            cache: Whether to keep files open to speed up repeated sampling.
            product: Another land-cover product, its name, or its YAML file, see
                :func:`torchgeo_softcon.landcover.find_product`.

        Raises:
            DatasetNotFoundError: If there is no file of *year*.
            OSError: If a tile cannot be opened.
            ValueError: If *year* or *classes* are unknown, or if a raster has no CRS,
                more than one band, or is not of integers.

        Warns:
            UserWarning: If a tile with an official name is not of the official size.
        """
        check_types(ESAWorldCover.__init__, locals())
        self.product = product = find_product(product)
        self.year = product.check_year(year)
        self.classes = classes = tuple(product.codes if classes is None else classes)
        require(
            classes
            and {*classes} <= {*product.codes}
            and len({*classes}) == len(classes),
            f'classes must be some of {product.codes} without duplicates, got {classes}',
        )
        if product is not WORLDCOVER:
            self.url = f'{product.url}/{product.path}'
            self.names, self.colors = product.names, product.colors
        self.paths = paths if isinstance(paths, str | os.PathLike) else list(paths)
        self.ordinal = ordinal
        codes = (product.fill, *classes)
        self._code_of = dict(enumerate(codes)) if ordinal else {c: c for c in codes}
        self._map = np.full(256, 0 if ordinal else product.fill)
        self._map[list(classes)] = [*self._code_of][1:]

        rasters = [open_tile(path) for path in self.files]
        if text := assumed_year((r.path for r in rasters), product, self.year):
            rank_zero_info(text)
        for raster in rasters:
            # Of the caller of this class
            warn_of_resampled(raster, product, stacklevel=2)
        self._mosaic = Mosaic(rasters, product.codes, cache, product.no_data)
        super().__init__(self.paths, crs, res, transforms=transforms, cache=cache)
        # TorchGeo leaves out what it cannot warp without a word
        lost = {raster.path for raster in rasters} - set(self.index.filepath)
        if lost:
            raise OSError(f'{", ".join(sorted(lost))} cannot be warped to {self.crs}')

    @property
    def files(self) -> list[str]:
        """All files of the dataset, official tiles first."""
        try:
            return find_map_files(self.paths, self.product, self.year)
        except FileNotFoundError as error:
            raise WorldCoverNotFoundError(str(error)) from None

    def tiles(self, crs: Any, bounds: Bounds) -> list[str]:
        """Return the names of the official tiles under a box, there or not.

        Args:
            crs: CRS of the box, anything that pyproj understands.
            bounds: Left, bottom, right and top of the box.
        """
        if self.product.tiles is None:
            return []
        box = outline(CRS.from_user_input(crs), CRS.from_epsg(4326), bounds)
        names = self.product.tiles.names_under(box.bounds)
        return [self.product.file_name(name, self.year) for name in names]

    def covers(self, crs: Any, bounds: Bounds, wholly: bool = False) -> bool:
        """Tell whether there is a tile under a box.

        Args:
            crs: CRS of the box, anything that pyproj understands.
            bounds: Left, bottom, right and top of the box.
            wholly: Whether there must be tiles under all of it. There are none where only
                sea is.
        """
        return self._mosaic.covers(CRS.from_user_input(crs), bounds, wholly)

    def read_window(
        self, crs: Any, transform: Affine, height: int, width: int
    ) -> Tensor:
        """Read the land cover on any grid.

        Args:
            crs: CRS of the grid, anything that pyproj understands.
            transform: Georeference of the grid, from columns and rows to the CRS.
            height: Rows of the grid.
            width: Columns of the grid.

        Returns:
            The class at the centre of every pixel, of shape (*height*, *width*), long:
            codes, or numbers from 1 to K if the dataset is *ordinal*. 0, or what the
            product has for it, where no data or no tile is.

        Raises:
            OSError: If a tile cannot be read.
            ValueError: If *height* or *width* are not positive, or a tile has codes that
                are not the product's.
        """
        require(
            height > 0 and width > 0,
            f'height and width must be positive, got {height} and {width}',
        )
        grid = Grid(CRS.from_user_input(crs), transform, height, width)
        return torch.from_numpy(self._map[self._mosaic.read(grid)])

    def __getitem__(self, query: Any) -> Sample:
        """Retrieve the mask at a spatiotemporal slice.

        Args:
            query: [xmin:xmax:xres, ymin:ymax:yres, tmin:tmax:tres] coordinates to
                index. What is left out is that of the dataset.

        Returns:
            A sample with a *mask* of shape (H, W), long, and *crs*, *bounds* or *transform*
            as TorchGeo's own raster datasets give them.

        Raises:
            IndexError: If *query* does not touch a tile.
            OSError: If a tile cannot be read.
        """
        x, y, _ = full_slices(self, query)
        box = shapely.box(x.start, y.start, x.stop, y.stop)
        if not len(self.index.sindex.query(box, predicate='intersects')):
            raise IndexError(
                f'query: {query} not found in index with bounds: {self.bounds}'
            )
        transform = Affine(x.step, 0, x.start, 0, -y.step, y.stop)
        # As many pixels as TorchGeo reads for the images of an intersection
        height, width = (max(round((s.stop - s.start) / s.step), 1) for s in (y, x))
        sample = georeference(self, query, transform)
        sample['mask'] = self.read_window(self.crs, transform, height, width)
        return sample if self.transforms is None else self.transforms(sample)

    def plot(
        self, sample: Sample, show_titles: bool = True, suptitle: str | None = None
    ) -> Figure:
        """Plot a sample of the dataset.

        Args:
            sample: A sample returned by :meth:`__getitem__`, with an optional
                *prediction* of the same shape as its *mask*.
            show_titles: Whether to show titles above each panel.
            suptitle: Title of the figure.

        Returns:
            A figure with the classes that are present in its legend.
        """
        panels = ['mask', 'prediction'] if 'prediction' in sample else ['mask']
        size = (4 * len(panels) + 3, 4)
        fig, axs = plt.subplots(
            1, len(panels), figsize=size, squeeze=False, layout='constrained'
        )
        colors = {value: self.colors[code] for value, code in self._code_of.items()}
        table = _color_table(colors)
        present: set[int] = set()
        for ax, panel in zip(axs[0], panels, strict=True):
            values = sample[panel].detach().cpu().squeeze().numpy().astype(np.uint8)
            present.update(np.unique(values).tolist())
            ax.imshow(table[values], interpolation='none')
            ax.axis('off')
            if show_titles:
                ax.set_title(panel.capitalize())
        handles = [
            Patch(fc=table[value] / 255, ec='0.5', label=f'{value} {self.names[code]}')
            for value, code in self._code_of.items()
            if value in present
        ]
        fig.legend(handles=handles, loc='outside right center', frameon=False)
        if suptitle is not None:
            fig.suptitle(suptitle)
        return fig


def open_years(
    paths: Path | Iterable[Path], product: LandCoverProduct
) -> dict[int | None, ESAWorldCover]:
    """Open the map of every year of which there are files, the last one first.

    Raises:
        DatasetNotFoundError: If there are none.
    """
    paths = path_list(paths)
    maps: dict[int | None, ESAWorldCover] = {}
    for year in sorted(product.years, reverse=True):
        with suppress(FileNotFoundError):
            # Also of files that are named, only those of the year
            found = find_map_files(paths, product, year)
            files = [f for f in found if map_year(f, product) in (None, year)]
            if files:
                maps[year] = ESAWorldCover(files, year=year, product=product)
    if not maps:
        worldcover = ESAWorldCover(paths, product=product)
        maps[worldcover.year] = worldcover
    return maps
