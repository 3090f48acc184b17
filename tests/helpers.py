# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Small data that tests of several folders share."""

from typing import Any

from torchgeo_softcon.datamodules import SyntheticScenesDataModule
from torchgeo_softcon.datasets import SyntheticScenes

#: Options of GeoTIFFs in the structure of WorldCover's tiles.
TILE_PROFILE: dict[str, Any] = {
    'driver': 'GTiff',
    'count': 1,
    'dtype': 'uint8',
    'crs': 'EPSG:4326',
    'tiled': True,
    'blockxsize': 1024,
    'blockysize': 1024,
    'compress': 'deflate',
    'sparse_ok': True,
}


def scenes_datamodule(
    scenes: SyntheticScenes, patch_size: int, batch_size: int, **kwargs: Any
) -> SyntheticScenesDataModule:
    """Windows of the session's scenes."""
    root = str(scenes.root.parent)
    options = {'size': 96, 'dates': 2, 'patch_size': patch_size} | kwargs
    return SyntheticScenesDataModule(root, batch_size=batch_size, **options)
