# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Datamodule for BigEarthNet v2, which TorchGeo has the dataset of."""

from typing import Any

import torch

from .._checks import check_choice, check_types
from .._compat import BigEarthNetV2, NonGeoDataModule, RGBBandsMissingError, Sample
from ..transforms.unit_range import ToUnitRange
from .normalization import BAND_SETS


class BigEarthNetV2DataModule(NonGeoDataModule):
    """BigEarthNet v2: 549,488 patches of Sentinel-2 (Level-2A) and Sentinel-1, 19 classes.

    The splits are those of the dataset, which share no ground. Images are scaled to [0, 1]
    as by SoftCon's authors, see :class:`.ToUnitRange`; the maps of the dataset are left
    out. Sentinel-1, VH before VV, comes before Sentinel-2.

    If you use this dataset in your research, please cite the following paper:

    * https://arxiv.org/abs/2407.03653
    """

    mean = torch.tensor(0)
    std = torch.tensor(1)
    #: Images are scaled as :class:`.ToUnitRange` does.
    unit_range = True

    def __init__(
        self, batch_size: int = 64, num_workers: int = 0, **kwargs: Any
    ) -> None:
        """Initialize a new BigEarthNetV2DataModule instance.

        Args:
            batch_size: Number of samples in a batch.
            num_workers: Number of processes that read.
            **kwargs: Other options of :class:`~torchgeo.datasets.BigEarthNetV2`: *root*,
                *bands* (``'all'``, ``'s1'`` or ``'s2'``), *download*, ...

        Raises:
            TypeError: If an argument is of another type.
            ValueError: If *bands* are others.
        """
        check_types(BigEarthNetV2DataModule.__init__, locals())
        bands = kwargs.setdefault('bands', 'all')
        check_choice('bands', bands, [*BAND_SETS])
        super().__init__(BigEarthNetV2, batch_size, num_workers, **kwargs)
        self._unit_range = ToUnitRange.of(BAND_SETS[bands], 'L2A')
        # After the options were saved, which others read
        self.kwargs['transforms'] = self._scale

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Make no picture: TorchGeo's shows the map of the dataset, which is left out."""
        raise RGBBandsMissingError

    def _scale(self, sample: Sample) -> Sample:
        """Scale the image of a sample, and leave out its map."""
        if 'image' in sample:
            image = sample['image']
        else:
            image = torch.cat([sample['image_s1'], sample['image_s2']])
        return {'image': self._unit_range(image), 'label': sample['label']}
