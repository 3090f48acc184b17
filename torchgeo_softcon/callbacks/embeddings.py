# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Embeddings of a prediction in a (Geo)Parquet file."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from .._checks import check_types
from ..evaluation.embedding_file import EmbeddingRows, arrange, describe
from ..models.encoders import Encoder
from ..storage.resumable import ResumableParquet


class EmbeddingWriter(BasePredictionWriter):
    """Write what ``predict_step`` gives to a Parquet file, sample by sample.

    The columns are *index* (position in the order of prediction), *embedding* and, where
    the batch has it, *label*. Where data tell the place of a sample, the file is
    `GeoParquet <https://geoparquet.org>`__, ordered by place, with *geometry* (the outline
    in longitude and latitude), *crs* (that of the sample), *start* and *stop* (its time in
    UTC), and what readers of others look for, see :func:`.arrange`.

    A run that is interrupted and started again writes what is missing. (It computes all
    of it again, unlike ``torchgeo-softcon embed``.)

    .. code-block:: yaml

        # torchgeo predict --ckpt_path run.ckpt --return_predictions false --config ...
        trainer:
          callbacks:
            - class_path: torchgeo_softcon.callbacks.EmbeddingWriter
              init_args:
                path: embeddings.parquet
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
        check_types(EmbeddingWriter.__init__, locals())
        super().__init__('batch')
        self.path, self.overwrite = Path(path), overwrite
        self._rows: EmbeddingRows | None = None
        self._lock = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, or go on with what is there.

        Raises:
            BlockingIOError: If another run writes the file.
            FileExistsError: If the file exists already.
            ValueError: If there are parts of something else.
        """
        self._rows = None
        loaders: Any = trainer.predict_dataloaders
        if trainer.predict_loop.num_dataloaders > 1:
            raise ValueError(
                'EmbeddingWriter writes one dataset, got '
                f'{trainer.predict_loop.num_dataloaders} data loaders for prediction'
            )
        loader = loaders[0] if isinstance(loaders, list) else loaders
        dataset: Any = getattr(loader, 'dataset', None)
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
        self._rows = EmbeddingRows(
            self._file, dataset, 0, trainer.global_rank, trainer.world_size
        )

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

        Raises:
            ValueError: If *prediction* is no embedding.
        """
        if not isinstance(prediction, Tensor) or prediction.ndim != 2:
            got = getattr(prediction, 'shape', type(prediction).__name__)
            raise ValueError(
                f'predict_step of {type(pl_module).__name__} must give features of shape '
                f'(B, F), got {got}. For other tasks, use '
                '`torchgeo-softcon embed --checkpoint`, which takes the encoder alone'
            )
        assert self._rows is not None  # since the start
        self._rows.add(prediction, batch, batch_indices)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make one file of the parts."""
        assert self._rows is not None  # since the start
        with self._lock:
            self._rows.flush()
            # Of all processes, which have then written theirs
            samples = trainer.strategy.reduce(
                torch.tensor(self._rows.position, device=pl_module.device),
                reduce_op='sum',
            )
            if trainer.is_global_zero:
                about = _describe(trainer, pl_module, self._rows.dataset)
                finish = partial(arrange, about=about)
                self.rows = self._file.join(int(samples), finish)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the rows in memory, for the next run to go on from."""
        with self._lock:
            if self._rows is not None:
                self._rows.flush()


def _describe(trainer: Trainer, task: LightningModule, dataset: Any) -> dict[str, Any]:
    """Tell how the embeddings of a prediction were made."""
    encoder = Encoder(
        task.state_dict(),
        task.hparams.get('model'),
        bands=task.hparams.get('bands'),
        source=str(trainer.ckpt_path or type(task).__name__),
    )
    name = type(dataset).__name__
    return describe(encoder, 'predict_step', None, (), name, dataset)
