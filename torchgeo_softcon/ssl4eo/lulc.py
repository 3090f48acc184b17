# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Labels from the land-cover layer of SSL4EO-S12 v1.1 and TerraMesh."""

import os

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..landcover.products import find_product
from .labels import MIN_VALID, SeasonLabels
from .shards import ShardArchive, check_aligned, modality_folder
from .tiffs import Archive, days, pair

#: What stands for these labels in place of a file.
LULC = 'lulc'

#: The codes of Esri's map that 0 to 9 stand for where they were numbered anew, as in
#: TerraMesh: no data, water, trees, ..., clouds, rangeland.
#: https://huggingface.co/datasets/ibm-esa-geospatial/TerraMesh
_RENUMBERED = (0, 1, 2, 4, 5, 7, 8, 9, 10, 11)


def lulc_labels(root: str | os.PathLike[str], archive: Archive) -> SeasonLabels:
    """Read the shares of Esri's classes in each image, from the layer of its date.

    Clouds and pixels without data are not known, and images of which more than half is
    not are unknown. The layer of the nearest date counts, see :func:`.pair`.

    Raises:
        FileNotFoundError: If there is no such layer.
        ValueError: If its files do not fit to those of the images.
    """
    folder = modality_folder(root, 'LULC')
    if folder is None:
        raise FileNotFoundError(
            f'labels=lulc needs the folder LULC of SSL4EO-S12 v1.1 or TerraMesh, found '
            f'none in {os.fspath(root)}: download it, or give a file of labels'
        )
    layer = ShardArchive(folder, 'LULC')
    check_aligned([archive, layer])
    counts = layer.count_codes('bands')
    product = find_product('esri')
    there = np.any(counts, 0)
    # Of Esri's own codes, 3 and 6 are not in use any more
    renumbered = bool(there[[3, 6]].any())
    if renumbered:
        numbered = counts[:, : len(_RENUMBERED)]
        counts = np.zeros_like(counts)
        counts[:, _RENUMBERED] = numbered
    if not there[[3, 6, 10, 11]].any():
        kind = 'taken for those of Esri, which none of 3, 6, 10 and 11 confirms'
    else:
        kind = 'numbered from 0 to 9' if renumbered else 'those of Esri'
    rank_zero_info(f'The codes of {folder} are {kind}')
    known = counts[:, product.codes].astype(np.float32)
    total = known.sum(1, keepdims=True)
    shares = known / np.maximum(total, 1)
    shares[total[:, 0] < MIN_VALID * counts.sum(1)] = 0

    dates, layer_dates = (
        days(split, one.season)
        for split, one in ((archive.split, archive), ('s2c', layer))
    )
    found = pair(archive.location, dates, layer.location, layer_dates)
    values = shares[found].astype(np.float32)
    values[found < 0] = 0
    split = np.full(len(archive), archive.split.encode())
    return SeasonLabels(
        str(folder),
        split,
        archive.location,
        archive.season,
        values,
        product.codes,
        shares=True,
    )
