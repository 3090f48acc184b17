# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Writes embeddings to a (Geo)Parquet file during prediction."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from pyproj import CRS
from torch import Tensor

from ..storage.parted_parquet import ROWS, PartedFile
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
        #: What the embeddings are made from, if the trainer does not know.
        self.origin: dict[str, Any] = {}
        #: Samples at the start that the trainer leaves out, because they are written.
        self.skipped = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, or go on with what is there.

        Args:
            trainer: The trainer.
            pl_module: The task.

        Raises:
            FileExistsError: If the file exists already.
            ValueError: If there are parts of something else.
        """
        if trainer.predict_loop.num_dataloaders > 1:
            raise ValueError(
                'EmbeddingWriter writes one dataset, got '
                f'{trainer.predict_loop.num_dataloaders} data loaders for prediction'
            )
        dataset = _dataset(trainer)
        origin = self.origin or {
            'checkpoint': trainer.ckpt_path,
            'dataset': type(dataset).__name__,
            'samples': len(dataset) if hasattr(dataset, '__len__') else None,
        }
        self._world = trainer.world_size
        self._file = PartedFile(
            self.path, {**origin, 'processes': self._world}, trainer.global_rank
        )
        if trainer.is_global_zero:
            self._file.open(self.overwrite)
        trainer.strategy.barrier('EmbeddingWriter')
        self._held: list[pa.Table] = []
        self._since = time.monotonic()
        self._written = self._file.rows()
        self._position = self.skipped

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
        index = np.arange(start, self._position) * self._world + trainer.global_rank
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
        self._flush()
        trainer.strategy.barrier('EmbeddingWriter')
        if trainer.is_global_zero:
            self.rows = self._file.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save what there is, for the next run to go on from.

        Args:
            trainer: The trainer.
            pl_module: The task.
            exception: What has happened.
        """
        if getattr(self, '_held', None):
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._file.append(join_tables(self._held))
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
        The rows, without the metadata of GeoParquet.
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


def join_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """Join rows, and say what GeoParquet wants to know about them.

    https://geoparquet.org/releases/v1.0.0/

    Args:
        tables: From :func:`make_table`.

    Returns:
        The rows.
    """
    table = pa.concat_tables(tables)
    if 'geometry' not in table.column_names:
        return table
    outlines = shapely.from_wkb(table['geometry'].to_numpy())
    geometry = {
        'encoding': 'WKB',
        'geometry_types': ['Polygon'],
        'crs': CRS.from_user_input('OGC:CRS84').to_json_dict(),
        'bbox': shapely.total_bounds(outlines).tolist(),
    }
    geo = {
        'version': '1.0.0',
        'primary_column': 'geometry',
        'columns': {'geometry': geometry},
    }
    return table.replace_schema_metadata({'geo': json.dumps(geo)})


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
