# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Writes embeddings to a (Geo)Parquet file during prediction."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from ..storage.resumable import ROWS, ResumableParquet
from .places import Footprint, footprints

#: A part is written after so many seconds at the latest.
_SECONDS = 30


class EmbeddingWriter(BasePredictionWriter):
    """Writes what ``predict_step`` gives to a Parquet file, sample by sample.

    The columns are *index* (position in the order of prediction), *embedding* and, where
    the batch has it, *label*. Where data tell the place of a sample, the file is a
    `GeoParquet <https://geoparquet.org>`__ file with *geometry*, the outline in
    longitude and latitude, *crs*, the coordinate reference system that the sample is in,
    and *start* and *stop*, its time in UTC. QGIS and geopandas open it.

    A run that is interrupted and started again adds what is missing: nothing is written
    twice. (It is computed twice, unlike with ``torchgeo-softcon embed``.)

    .. code-block:: yaml

        # torchgeo predict --ckpt_path run.ckpt --return_predictions false --config ...
        trainer:
          callbacks:
            - class_path: torchgeo_softcon.callbacks.EmbeddingWriter
              init_args:
                path: embeddings.parquet

    .. versionadded:: 0.1
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = 'embeddings.parquet',
        overwrite: bool = False,
    ) -> None:
        """Initialize a new EmbeddingWriter instance.

        Args:
            path: File to write.
            overwrite: Whether to replace an existing file, and not to go on with one
                that is not complete.
        """
        super().__init__('batch')
        self.path = Path(path)
        self.overwrite = overwrite
        self._file: ResumableParquet | None = None
        self._skipped = 0
        self._lock = contextlib.ExitStack()

    def resume(self, file: ResumableParquet, skipped: int) -> None:
        """Write to a file that is open already.

        Args:
            file: The file. Whoever has opened it closes it.
            skipped: Samples at the start that the trainer leaves out, because they are
                written.
        """
        self._file, self._skipped = file, skipped

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, or go on with what is there.

        Args:
            trainer: The trainer.
            pl_module: The task.

        Raises:
            BlockingIOError: If another run writes the file.
            FileExistsError: If the file exists already.
            ValueError: If there are parts of something else.
        """
        if trainer.predict_loop.num_dataloaders > 1:
            raise ValueError(
                'EmbeddingWriter writes one dataset, got '
                f'{trainer.predict_loop.num_dataloaders} data loaders for prediction'
            )
        self._kind = f'part-{trainer.global_rank:05d}'
        if self._file is None:
            dataset = _dataset(trainer)
            origin = {
                'checkpoint': trainer.ckpt_path,
                'dataset': type(dataset).__name__,
                'samples': len(dataset) if hasattr(dataset, '__len__') else None,
                'processes': trainer.world_size,
            }
            self._file = ResumableParquet(self.path, origin)
            if trainer.is_global_zero:
                self._lock.enter_context(self._file.open(self.overwrite))
        trainer.strategy.barrier('EmbeddingWriter')
        self._held: list[pa.Table] = []
        self._since = time.monotonic()
        self._written = self._file.count_rows(self._kind)
        self._position = self._skipped

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take the rows of a batch, and write a part if it is time.

        Args:
            trainer: The trainer.
            pl_module: The task.
            prediction: Embeddings of shape (B, F).
            batch_indices: What the dataset was asked for.
            batch: The batch.
            batch_idx: Index of the batch.
            dataloader_idx: Index of the dataloader.

        Raises:
            ValueError: If *prediction* is no embedding.
        """
        if not isinstance(prediction, Tensor) or prediction.ndim != 2:
            shape = getattr(prediction, 'shape', None)
            seen = tuple(shape) if shape is not None else type(prediction).__name__
            raise ValueError(
                f'predict_step of {type(pl_module).__name__} must give features of shape '
                f'(B, F), got {seen}. For other tasks, use `torchgeo-softcon embed '
                '--checkpoint`, which takes the encoder alone'
            )
        start = self._position
        self._position += len(prediction)
        known = min(max(self._written - start, 0), len(prediction))
        if known == len(prediction):
            return
        # Ranks take turns
        index = np.arange(start, self._position) * trainer.world_size
        index += trainer.global_rank
        places = footprints(batch, batch_indices, _dataset(trainer))
        table = make_table(index, prediction, places, _label(batch, len(prediction)))
        self._held.append(table.slice(known))
        if (
            sum(table.num_rows for table in self._held) >= ROWS
            or time.monotonic() - self._since > _SECONDS
        ):
            self._flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make one file of the parts.

        Args:
            trainer: The trainer.
            pl_module: The task.
        """
        assert self._file is not None  # since the start
        with self._close():
            self._flush()
            # Of all processes, which have then written theirs
            samples = trainer.strategy.reduce(
                torch.tensor(self._position, device=pl_module.device), reduce_op='sum'
            )
            if trainer.is_global_zero:
                self.rows = self._file.join(int(samples))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the rows that are in memory, for the next run to go on from.

        Args:
            trainer: The trainer.
            pl_module: The task.
            exception: The error.
        """
        with self._close():
            if getattr(self, '_held', None):
                self._flush()

    @contextlib.contextmanager
    def _close(self) -> Iterator[None]:
        """Let go of the file at the end, also for the next run of this writer."""
        try:
            yield
        finally:
            self._lock.close()
            self._file, self._skipped = None, 0

    def _flush(self) -> None:
        if self._held and self._file is not None:
            self._file.append(self._kind, pa.concat_tables(self._held))
        self._held, self._since = [], time.monotonic()


def make_table(
    index: Any,
    embedding: Tensor,
    places: Sequence[Footprint] | None = None,
    label: Tensor | None = None,
) -> pa.Table:
    """Rows of a file of embeddings.

    Args:
        index: Numbers of the samples, shape (B,).
        embedding: Embeddings of shape (B, F).
        places: Where the samples are from.
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
    if places is not None:
        moment = pa.timestamp('us', 'UTC')
        columns |= {
            'crs': pa.array([place.crs for place in places], pa.string()),
            'start': pa.array([place.start for place in places], moment),
            'stop': pa.array([place.stop for place in places], moment),
            'geometry': pa.array(
                [shapely.to_wkb(place.outline) for place in places], pa.binary()
            ),
        }
    return pa.table(columns)


def _vectors(values: Any) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _label(batch: Any, count: int) -> Tensor | None:
    label = batch.get('label') if isinstance(batch, dict) else None
    fits = isinstance(label, Tensor) and label.ndim in (1, 2) and len(label) == count
    return label if fits else None


def _dataset(trainer: Trainer) -> Any:
    loaders: Any = trainer.predict_dataloaders
    loader = loaders[0] if isinstance(loaders, list) else loaders
    return getattr(loader, 'dataset', None)
