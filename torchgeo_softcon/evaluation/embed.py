# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Embeddings of a dataset in a (Geo)Parquet file."""

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .._checks import check_choice
from ..datamodules.normalization import match_images
from ..datamodules.protocol import offer_of
from ..models.encoders import Encoder
from ..storage.resumable import ResumableParquet
from .embedding_file import Dtype, EmbeddingRows, Layout, arrange, describe
from .features import poolings
from .loop import batch_transform, encode_batches, make_runner
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
    layout: Layout = 'footprint',
    dtype: Dtype = 'float32',
    **trainer: Any,
) -> int:
    """Write the embeddings of a split to a file, and return the number of its rows.

    The columns are those of :class:`.EmbeddingWriter`. If an interrupted run has left an
    incomplete file of the same *origin*, this one goes on where that ended.

    Args:
        encoder: From :func:`.open_encoder`.
        datamodule: A TorchGeo datamodule.
        out: The file.
        split: By default, see :func:`.set_up`.
        size: Side to resize images to in pixels, None for as they are.
        pooling: One of :func:`.poolings`, by default the encoder's own.
        overwrite: Whether to replace a file that exists.
        origin: Notes on encoder and data, to compare with those of an incomplete file.
        layout: See :func:`.arrange`.
        dtype: ``'int8'`` for a quarter of the size, with the scale of each dimension in
            the notes of the file, ``emb:quantization``.
        **trainer: Arguments of Lightning's trainer.
    """
    check_choice('layout', layout, get_args(Layout))
    check_choice('dtype', dtype, get_args(Dtype))
    known = poolings(encoder.model)
    if pooling not in (None, *known):
        raise ValueError(
            f'pooling must be one that the encoder has ({", ".join(known)}), got '
            f'{pooling!r}'
        )
    pooling = pooling or known[0]
    runner = make_runner(**trainer)
    split = set_up(datamodule, split)
    match_images(datamodule, encoder.bands, encoder.unit_range)
    torch.manual_seed(0)  # for samplers that draw
    dataset, indices = split_samples(datamodule, split)
    asked = ''.join(f'{index!r}\n' for index in indices)
    origin = {
        **(origin or {}),
        'encoder': encoder.name,
        'size': size,
        'pooling': pooling,
        'bands': encoder.bands,
        'unit_range': encoder.unit_range,
        'split': split,
        'samples': len(indices),
        'indices': hashlib.sha256(asked.encode()).hexdigest(),
        'processes': 1,
    }
    chip = (dataset[indices[0]]['image'].shape if indices else ())[-2:]
    data = str(origin.get('data') or type(datamodule).__name__)
    about = describe(encoder, pooling, size, chip, data, dataset)
    finish = partial(arrange, about=about, layout=layout, dtype=dtype)
    file = ResumableParquet(Path(out), origin)
    with file.open(overwrite):
        done = file.count_rows()
        if done:
            print(f'{done} of {len(indices)} samples are in {file.folder} already')
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
        hidden = not runner.progress_bar_callback
        encoded = encode_batches(
            encoder.model.to(device),
            tqdm(loader, 'embed', leave=False, disable=hidden),
            batch_transform(datamodule, RunningStage.PREDICTING),
            encoder.in_channels,
            size,
            device,
        )
        rows = EmbeddingRows(file, dataset, done)
        try:
            with torch.inference_mode(), runner.precision_plugin.forward_context():
                for batch, _, features in encoded:
                    values = features[pooling]
                    start = rows.position
                    rows.add(values, batch, indices[start : start + len(values)])
        finally:
            rows.flush()  # for the next run to go on from
        return file.join(len(indices), finish)
