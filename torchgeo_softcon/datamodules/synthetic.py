# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datamodule for made-up scenes."""

import inspect
import json
import shlex
from collections.abc import Sequence
from typing import Any

from ..bands import SENTINEL2_BANDS
from ..datasets.synthetic import SyntheticScenes
from ..landcover.products import WORLDCOVER_CODES
from .base import Target
from .scenes import WorldCoverScenesDataModule


class SyntheticScenesDataModule(WorldCoverScenesDataModule):
    """Made-up Sentinel-2 scenes with a WorldCover tile, written to disk once.

    The whole way from rasters to a trained model, without a download: see
    :class:`.SyntheticScenes` for the files and :class:`.WorldCoverScenesDataModule` for
    how they are read.

    .. versionadded:: 0.1
    """

    def __init__(
        self,
        root: str | None = None,
        places: int = 1,
        size: int = 256,
        dates: int = 4,
        bands: Sequence[str] = SENTINEL2_BANDS,
        patch_size: int = 128,
        batch_size: int = 64,
        length: int | None = None,
        seasons: int = 1,
        num_workers: int | None = None,
        target: Target = 'label',
        min_fraction: float = 0.05,
        fractions: bool = False,
        min_valid: float = 0.5,
        val_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Initialize a new SyntheticScenesDataModule instance.

        Args:
            root: Folder for the files, a cache folder by default.
            places: Number of places in each of two UTM zones.
            size: Height and width of a scene in pixels.
            dates: Number of scenes of each place.
            bands: Bands of Sentinel-2 or of Sentinel-1, by name.
            patch_size: Height and width of a window in pixels.
            batch_size: Number of samples in a batch on one device.
            length: Number of samples per epoch. By default as many as cover the area
                of all places once, and at least one batch.
            seasons: Number of different dates per sample.
            num_workers: Number of processes that read, per device. By default the cores
                there are for each CUDA device, from 1 to 8, and 0 without CUDA.
            target: ``'label'`` for a multi-hot label (11 classes), ``'mask'`` for a
                mask with the classes 1 to 11 in the order of their codes, 0 is no data.
            min_fraction: Smallest share of a window that a class must cover to be in
                its label.
            fractions: Give the share of every class instead of 0 and 1.
            min_valid: Share of pixels of a window that must have data.
            val_fraction: Part of each scene, at its lower end, whose windows are for
                testing only, and as much above it for validation only. With 0, all are
                drawn from everywhere.
            seed: Seed of the scenes and of the windows.

        Raises:
            ValueError: If an argument is out of range.
        """
        super().__init__(
            images='',
            worldcover='',
            bands=bands,
            patch_size=patch_size,
            batch_size=batch_size,
            length=length,
            seasons=seasons,
            num_workers=num_workers,
            target=target,
            min_fraction=min_fraction,
            fractions=fractions,
            min_valid=min_valid,
            value_range='softcon',
            val_fraction=val_fraction,
            seed=seed,
        )
        self.min_fraction = min_fraction
        self._files: dict[str, Any] = {
            'root': root,
            'places': places,
            'size': size,
            'seasons': dates,
            'bands': bands,
            'seed': seed,
        }

    def finetune_options(self, size: int | None) -> str:
        """Options of a host's classification task and this data, for the command line.

        Args:
            size: Image size in pixels that the model needs, None for any.

        Returns:
            Options for ``torchgeo fit --model Classification``.
        """
        options = {
            'model.task': 'multilabel',
            'model.num_labels': len(WORLDCOVER_CODES),
            'model.loss': 'bce',
            'data': type(self).__name__,
            'data.root': self._files['root'],
            'data.places': self._files['places'],
            'data.size': self._files['size'],
            'data.dates': self._files['seasons'],
            'data.bands': json.dumps(list(self._files['bands'])),
            'data.patch_size': size or self.kwargs['patch_size'],
            'data.length': self.length,
            'data.min_fraction': self.min_fraction,
            'data.min_valid': self.kwargs['min_valid'],
            'data.val_fraction': self.val_fraction,
            'data.seed': self.seed,
            'trainer.max_epochs': 3,
        }
        defaults = inspect.signature(type(self)).parameters
        words = []
        for name, value in options.items():
            default = defaults.get(name.removeprefix('data.'))
            same = default is not None and (
                value == default.default
                or (name == 'data.bands' and value == json.dumps(default.default))
            )
            if not same:
                words += [f'--{name}', shlex.quote(str(value))]
        return ' '.join(words)

    def prepare_data(self) -> None:
        """Write the files, in one process."""
        SyntheticScenes(**self._files)

    def _scenes_kwargs(self) -> dict[str, Any]:
        files = SyntheticScenes(**self._files)
        return self.kwargs | {'images': files.images, 'worldcover': files.worldcover}
