# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Labels in the structure of SSL4EO-S12-ML."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from .store import _whole


def write_json(
    labels: str | os.PathLike[str],
    out: str | os.PathLike[str],
    min_fraction: float = 0.05,
    min_valid: float = 0.5,
) -> None:
    """Write which classes the patches have: ``{location: {season id: [class, ...]}}``.

    A location is the last folder of an id, a season id its last part. For SSL4EO-S12, these
    are the folders of the location and of the date. An id without folders is both. Classes
    are codes of the legend, from the lowest to the highest. Patches with too few valid
    pixels have none: unknown.

    Args:
        labels: A file of labels.
        out: The file to write.
        min_fraction: Smallest share of the valid pixels that a class must cover.
        min_valid: Smallest share of the pixels that must be valid.
    """
    locations: dict[str, dict[str, list[int]]] = {}
    with pq.ParquetFile(labels) as file:
        names = [n for n in file.schema_arrow.names if n.startswith('fraction_')]
        codes = np.array([int(name.removeprefix('fraction_')) for name in names])
        for batch in file.iter_batches(columns=['id', 'valid', *names]):
            shares = np.stack([batch[name].to_numpy() for name in names], 1)
            present = (shares >= np.float32(min_fraction)) & (
                batch['valid'].to_numpy() >= np.float32(min_valid)
            )[:, None]
            for name, row in zip(batch['id'].to_pylist(), present, strict=True):
                folders, _, season = name.rpartition('/')
                location = folders.rpartition('/')[2] or season
                classes = codes[row].tolist()
                locations.setdefault(location, {})[season] = classes
    with _whole(Path(out)) as unfinished:
        unfinished.write_text(json.dumps(locations))
