# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Images whose bands have several resolutions, as one block of memory each.

A record holds the bands of an image one after the other, each with its own pixels and in
its own type. It is a value of a structured NumPy type, whose fields are the bands. So a
``.npy`` file of records describes itself, reading one is a single copy, and a batch of
them moves to the device as bytes. Only there the bands come to one resolution.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

#: Bytes that the size of a record is a multiple of: those of the largest number.
_ALIGNMENT = 8


def record_dtype(bands: Mapping[str, tuple[npt.DTypeLike, tuple[int, int]]]) -> Any:
    """Return the structured type of the records of an archive, whose fields are the bands.

    Each band is given by its type and its height and width in pixels. Bands of one type
    and size lie together, large numbers first, so that every number is where a device
    can read it.
    """
    names = sorted(
        bands,
        key=lambda b: (-np.dtype(bands[b][0]).itemsize, *map(int.__neg__, bands[b][1])),
    )
    formats = [
        np.dtype((np.dtype(bands[b][0]).newbyteorder('<'), bands[b][1])) for b in names
    ]
    ends = np.cumsum([0, *(f.itemsize for f in formats)]).tolist()
    size = -(-ends[-1] // _ALIGNMENT) * _ALIGNMENT
    return np.dtype(
        {'names': names, 'formats': formats, 'offsets': ends[:-1], 'itemsize': size}
    )


def decode(
    records: Tensor, dtype: np.dtype[Any], bands: Sequence[str], size: int
) -> Tensor:
    """Bring the bands of records to one resolution, on whatever device they are.

    Pixels are repeated, or chosen by nearest neighbour where sizes are no multiples,
    exactly as GDAL and with it TorchGeo do when a band is read at another size.

    Args:
        records: Bytes of shape (..., R).
        dtype: Type of the records, R bytes each.
        bands: The C bands to take, in this order.
        size: Height and width of the result in pixels.

    Returns:
        Values of shape (..., C, size, size), float32.
    """
    flat = records.reshape(-1, records.shape[-1])
    image = flat.new_empty((len(flat), len(bands), size, size), dtype=torch.float32)
    for channel, band in enumerate(bands):
        field, offset = dtype.fields[band][:2]  # type: ignore[index]
        height, width = field.shape
        raw = flat[:, offset : offset + field.itemsize]
        pixels = raw.view(getattr(torch, field.base.name)).view(-1, height, width)
        out = image[:, channel]
        if size % height == 0 and size % width == 0:
            # Converts and repeats in one pass, without intermediate results
            blocks = out.view(-1, height, size // height, width, size // width)
            blocks.copy_(pixels[:, :, None, :, None])
        else:
            resized = F.interpolate(
                pixels.float()[:, None], (size, size), mode='nearest-exact'
            )
            out.copy_(resized[:, 0])
    return image.view(*records.shape[:-1], len(bands), size, size)
