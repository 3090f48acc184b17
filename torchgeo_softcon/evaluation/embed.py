# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Embeddings of a dataset in a (Geo)Parquet file."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from .. import datamodules  # noqa: F401, for the short names of its classes
from .._compat import Sample
from ..callbacks.embeddings import EmbeddingWriter
from ..datamodules.normalization import match_images
from ..models.encoders import Encoder
from ..storage.resumable import ResumableParquet
from .features import encode, poolings, prepare
from .samples import set_up, split_samples


class _Embedder(LightningModule):
    """Makes an encoder usable by a trainer."""

    def __init__(
        self, encoder: Encoder, size: int | None, pooling: str | None = None
    ) -> None:
        super().__init__()
        self.model = encoder.model
        self.in_channels = encoder.in_channels
        self.size = size
        self.pooling = pooling

    def predict_step(self, batch: Sample, batch_idx: int) -> Tensor:
        image, seasons = prepare(batch['image'].float(), self.in_channels, self.size)
        features = encode(self.model, image)
        pooled = features[self.pooling or next(iter(features))]
        return pooled.unflatten(0, (-1, seasons)).mean(1)


def embed(
    encoder: Encoder,
    datamodule: LightningDataModule,
    out: str | os.PathLike[str],
    split: str | None = None,
    size: int | None = None,
    pooling: str | None = None,
    overwrite: bool = False,
    origin: dict[str, Any] | None = None,
    **trainer: Any,
) -> int:
    """Write the embeddings of a split of a datamodule to a file.

    If a file is there that is not complete, the run goes on where that one ended.

    Args:
        encoder: From :func:`.open_encoder`.
        datamodule: A TorchGeo datamodule.
        out: The file, see :class:`.EmbeddingWriter`.
        split: Either 'predict', 'test', 'val' or 'train'. By default, the first of them
            that the datamodule has.
        size: Side to resize images to in pixels, None for as they are.
        pooling: ``'cls'`` or ``'mean'``, see :func:`.encode`. By default the encoder's
            own.
        overwrite: Whether to replace a file that exists.
        origin: What the embeddings are made from, to tell whether a file that is not
            complete belongs to them.
        **trainer: Arguments of Lightning's trainer.

    Returns:
        Number of rows in the file.

    Raises:
        BlockingIOError: If another run writes the file.
        FileExistsError: If the file exists.
        ValueError: If the encoder has no such pooling, the datamodule no such split, or
            if there is an incomplete file of something else.
    """
    known = poolings(encoder.model)
    if pooling is not None and pooling not in known:
        raise ValueError(
            f'pooling must be one that the encoder has ({", ".join(known)}), got '
            f'{pooling!r}'
        )
    writer = EmbeddingWriter(out)
    arguments = {'logger': False, 'enable_checkpointing': False, 'devices': 1}
    runner = Trainer(**{**arguments, **trainer}, callbacks=[writer])
    split = set_up(datamodule, split)
    match_images(datamodule, encoder.bands, encoder.unit_range)
    torch.manual_seed(0)  # for samplers that draw
    dataset, indices = split_samples(datamodule, split)
    origin = dict(origin or {})
    origin |= {'encoder': encoder.name, 'size': size, 'pooling': pooling}
    origin |= {
        'bands': encoder.bands,
        'unit_range': encoder.unit_range,
        'split': split,
        'samples': len(indices),
        'indices': _digest(indices),
    }
    file = ResumableParquet(Path(out), {**origin, 'processes': 1})
    with file.open(overwrite):
        done = file.count_rows()
        if done:
            print(f'{done} of {len(indices)} samples are in {file.folder} already')
        if done >= len(indices):
            return file.join(len(indices))

        # The number of processes that read may depend on its device
        datamodule.trainer = runner
        loader = DataLoader(
            dataset,
            batch_size=getattr(datamodule, 'batch_size', None) or 64,
            sampler=indices[done:],
            num_workers=getattr(datamodule, 'num_workers', 0),
            collate_fn=getattr(datamodule, 'collate_fn', default_collate),
        )
        cast(Any, datamodule).predict_dataloader = lambda: loader
        writer.resume(file, done)
        embedder = _Embedder(encoder, size, pooling)
        runner.predict(embedder, datamodule, return_predictions=False)
    return writer.rows


def _digest(indices: Sequence[Any]) -> str:
    """Tells whether samples are the same, in the same order."""
    digest = hashlib.sha256()
    for index in indices:
        digest.update(f'{index!r}\n'.encode())
    return digest.hexdigest()
