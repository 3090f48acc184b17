# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Embeddings of a dataset in a (Geo)Parquet file."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..datamodules.normalization import match_images
from ..datamodules.protocol import offer_of
from ..models.encoders import Encoder
from ..storage.resumable import ResumableParquet
from .embedding_rows import EmbeddingRows
from .features import poolings
from .loop import encode_batches
from .samples import set_up, split_samples


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

    If an interrupted run has left an incomplete file, this one goes on where that ended.

    Args:
        encoder: From :func:`.open_encoder`.
        datamodule: A TorchGeo datamodule.
        out: The file, with the columns of :class:`.EmbeddingWriter`.
        split: Either 'predict', 'test', 'val' or 'train'. By default, the first of them
            that the datamodule has.
        size: Side to resize images to in pixels, None for as they are.
        pooling: ``'cls'`` or ``'mean'``, see :func:`.encode`. By default the encoder's
            own.
        overwrite: Whether to replace a file that exists.
        origin: What the embeddings are made from, to tell whether a file that is not
            complete belongs to them.
        **trainer: Arguments of Lightning's trainer that say where and how to compute,
            such as *accelerator*, and whether to show the progress.

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
    runner = Trainer(
        **{'logger': False, 'enable_checkpointing': False, 'devices': 1, **trainer}
    )
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
        offer = offer_of(datamodule)
        loader = DataLoader(
            dataset,
            offer.batch_size,
            sampler=indices[done:],
            num_workers=offer.num_workers,
            collate_fn=offer.collate_fn,
        )
        device = runner.strategy.root_device
        silent = runner.progress_bar_callback is None
        rows = EmbeddingRows(file, dataset, done)
        try:
            with torch.inference_mode(), runner.precision_plugin.forward_context():
                for batch, _, features in encode_batches(
                    encoder.model.to(device),
                    tqdm(loader, 'embed', leave=False, disable=silent),
                    offer.aug if offer.predict_aug is None else offer.predict_aug,
                    encoder.in_channels,
                    size,
                    device,
                ):
                    values = features[pooling or known[0]]
                    start = rows.position
                    rows.add(values, batch, indices[start : start + len(values)])
        finally:
            rows.flush()  # for the next run to go on from
        return file.join(len(indices))


def _digest(indices: Sequence[Any]) -> str:
    """Return a digest of what a dataset is asked for, and in which order."""
    digest = hashlib.sha256()
    for index in indices:
        digest.update(f'{index!r}\n'.encode())
    return digest.hexdigest()
