# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The rows of a file of embeddings."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
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
        """Initialize a new EmbeddingRows instance.

        Args:
            file: The file, open.
            dataset: The dataset, which may know where its samples are from.
            position: Number of samples that this process has left out at the start.
            rank: Number of the process.
            world_size: Number of processes, which take turns in the samples.
        """
        self.position = position
        self._file = file
        self._dataset = dataset
        self._rank, self._world_size = rank, world_size
        self._kind = f'part-{rank:05d}'
        self._written = file.count_rows(self._kind)
        self._held: list[pa.Table] = []
        self._since = time.monotonic()

    def add(self, embedding: Tensor, batch: Any, queries: Sequence[Any] | None) -> None:
        """Take the rows of a batch, and write a part if it is time.

        Rows that an interrupted run has written are left out.

        Args:
            embedding: Embeddings of shape (B, F).
            batch: The batch.
            queries: What the dataset was asked for, if it is known.
        """
        start = self.position
        self.position += len(embedding)
        if self.position <= self._written:
            return
        index = np.arange(start, self.position) * self._world_size + self._rank
        found = footprints(batch, queries, self._dataset)
        table = make_table(index, embedding, found, _label(batch, len(embedding)))
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
    """Make rows of a file of embeddings.

    Args:
        index: Numbers of the samples, shape (B,).
        embedding: Embeddings of shape (B, F).
        footprints: Footprints of the samples, if they are known.
        label: Labels of shape (B,) or (B, K).

    Returns:
        The rows.
    """
    values = embedding.detach().float().cpu().numpy()
    columns: dict[str, pa.Array] = {
        'index': pa.array(index, pa.int64()),
        'embedding': _vectors(values),
    }
    if label is not None:
        array = label.detach().cpu().numpy()
        columns['label'] = pa.array(array) if array.ndim == 1 else _vectors(array)
    if footprints is not None:
        moment = pa.timestamp('us', 'UTC')
        columns |= {
            'crs': pa.array([footprint.crs for footprint in footprints], pa.string()),
            'start': pa.array([footprint.start for footprint in footprints], moment),
            'stop': pa.array([footprint.stop for footprint in footprints], moment),
            'geometry': pa.array(
                [shapely.to_wkb(footprint.outline) for footprint in footprints],
                pa.binary(),
            ),
        }
    return pa.table(columns)


def _vectors(values: Any) -> pa.Array:
    """Make a column of vectors from an array of shape (B, F)."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _label(batch: Any, count: int) -> Tensor | None:
    """Return the labels of a batch if there is one for each of its *count* samples."""
    label = batch.get('label') if isinstance(batch, dict) else None
    fits = isinstance(label, Tensor) and label.ndim in (1, 2) and len(label) == count
    return label if fits else None
