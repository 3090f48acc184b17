# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The rows of a file of embeddings."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from torch import Tensor

from ..storage.resumable import ROWS, ResumableParquet
from .footprints import Footprint, footprints

#: A part is written after so many seconds at the latest.
_SECONDS = 30


class EmbeddingRows:
    """The rows of one process, on their way to a file of embeddings."""

    def __init__(
        self,
        file: ResumableParquet,
        dataset: Any,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Start after *position* samples, of a *rank* whose turn is every *world_size*."""
        self.position = position
        self._file = file
        self.dataset = dataset
        self._rank, self._world_size = rank, world_size
        self._kind = f'part-{rank:05d}'
        self._written = file.count_rows(self._kind)
        self._held: list[pa.Table] = []
        self._since = time.monotonic()

    def add(self, embedding: Tensor, batch: Any, queries: Sequence[Any] | None) -> None:
        """Take the embeddings (B, F) of a batch, and write a part if it is time.

        Rows that an interrupted run has written are left out. *queries* are what the
        dataset was asked for, if that is known.
        """
        start = self.position
        self.position += len(embedding)
        if self.position <= self._written:
            return
        index = np.arange(start, self.position) * self._world_size + self._rank
        label = batch.get('label') if isinstance(batch, dict) else None
        if not isinstance(label, Tensor) or (
            label.ndim not in (1, 2) or len(label) != len(embedding)
        ):
            label = None
        found = footprints(batch, queries, self.dataset)
        table = make_table(index, embedding, found, label)
        self._held.append(table.slice(max(self._written - start, 0)))
        rows = sum(table.num_rows for table in self._held)
        if rows >= ROWS or time.monotonic() - self._since > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that are in memory as a part."""
        if self._held:
            self._file.append(self._kind, pa.concat_tables(self._held))
        self._held, self._since = [], time.monotonic()


def make_table(
    index: Any,
    embedding: Tensor,
    footprints: Sequence[Footprint] | None = None,
    label: Tensor | None = None,
) -> pa.Table:
    """Make rows of numbers (B,), embeddings (B, F), footprints, and labels (B,) or (B, K)."""
    columns = {
        'index': pa.array(index, pa.int64()),
        'embedding': _column(embedding.float()),
    }
    if label is not None:
        columns['label'] = _column(label)
    if footprints is not None:
        outlines = shapely.to_wkb([footprint.outline for footprint in footprints])
        moment = pa.timestamp('us', 'UTC')
        columns |= {
            'crs': pa.array([footprint.crs for footprint in footprints], pa.string()),
            'start': pa.array([footprint.start for footprint in footprints], moment),
            'stop': pa.array([footprint.stop for footprint in footprints], moment),
            'geometry': pa.array(outlines, pa.binary()),
        }
    return pa.table(columns)


def _column(values: Tensor) -> pa.Array:
    """Make a column of numbers (B,) or of vectors (B, F)."""
    array = values.detach().cpu().numpy()
    return pa.array(array) if array.ndim == 1 else vectors(array)


def vectors(values: npt.NDArray[Any]) -> pa.Array:
    """Make a column of vectors (B, F)."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
