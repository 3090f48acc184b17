# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datamodule for made-up scenes."""

import inspect
import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

from .._checks import check_types
from ..bands import SENTINEL2_BANDS
from ..datasets.scenes import WorldCoverScenes
from ..datasets.synthetic import SyntheticScenes
from ..landcover.products import WORLDCOVER_CODES
from .scenes import WorldCoverScenesDataModule

#: Options that change what windows there are, and what their labels.
_SAME_DATA = ('length', 'min_fraction', 'min_valid', 'val_fraction')


class SyntheticScenesDataModule(WorldCoverScenesDataModule):
    """Made-up Sentinel-2 scenes with a WorldCover tile, written to disk once.

    The whole way from rasters to a trained model, without a download: see
    :class:`.SyntheticScenes` for the files and :class:`.WorldCoverScenesDataModule` for
    how they are read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        places: int = 1,
        size: int = 256,
        dates: int = 4,
        bands: Sequence[str] = SENTINEL2_BANDS,
        patch_size: int = 128,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Initialize a new SyntheticScenesDataModule instance.

        Args:
            root: Folder for the files, a cache folder by default.
            places: Number of places in each of two UTM zones.
            size: Height and width of a scene in pixels.
            dates: Number of scenes of each place.
            bands: Bands of Sentinel-2 or of Sentinel-1, by name.
            patch_size: Height and width of a window in pixels.
            seed: Seed of the scenes and of the windows.
            **kwargs: Other options of :class:`.WorldCoverScenesDataModule`.

        Raises:
            TypeError: If there is no such option.
            ValueError: If an argument is out of range.
        """
        check_types(SyntheticScenesDataModule.__init__, locals())
        super().__init__(
            images='',
            worldcover='',
            year=None,
            product='worldcover',
            bands=bands,
            all_bands=None,
            patch_size=patch_size,
            value_range='softcon',
            nodata=None,
            offset=None,
            level='L1C',
            radar_quantiles=False,
            on_error='raise',
            allow_unlabelled=False,
            seed=seed,
            **kwargs,
        )
        files = {'root': root, 'places': places, 'size': size}
        self._files: dict[str, Any] = {**files, 'seasons': dates, 'bands': bands}
        self._files['seed'] = seed
        self._same_data: dict[str, Any] = {
            **files,
            'dates': dates,
            'bands': json.dumps(list(bands)),
            'patch_size': patch_size,
            **{name: kwargs.get(name) for name in _SAME_DATA},
            'seed': seed,
        }

    def finetune_options(self, size: int | None) -> str:
        """Return options that fine-tune on this data, see :class:`.DataModuleOffer`."""
        defaults = {
            name: option.default
            for owner in (WorldCoverScenes, WorldCoverScenesDataModule, type(self))
            for name, option in inspect.signature(owner).parameters.items()
        }
        defaults['bands'] = json.dumps(defaults['bands'])
        data = self._same_data | ({} if size is None else {'patch_size': size})
        options = {
            'model.task': 'multilabel',
            'model.num_labels': len(WORLDCOVER_CODES),
            'model.loss': 'bce',
            'data': type(self).__name__,
            **{
                f'data.{name}': value
                for name, value in data.items()
                if value not in (None, defaults[name])
            },
            'trainer.max_epochs': 3,
        }
        return ' '.join(f'--{k} {shlex.quote(str(v))}' for k, v in options.items())

    def prepare_data(self) -> None:
        """Write the files, in one process."""
        SyntheticScenes(**self._files)

    def open_dataset(self) -> WorldCoverScenes:
        """Open the rasters, see :meth:`.WorldCoverScenesDataModule.open_dataset`."""
        files = SyntheticScenes(**self._files)
        self._images, self._worldcover = str(files.images), str(files.worldcover)
        return super().open_dataset()
