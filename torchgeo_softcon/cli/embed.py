# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Embeddings of a dataset in a (Geo)Parquet file: ``torchgeo-softcon embed``."""

import hashlib
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from .. import datamodules  # noqa: F401, for the short names of its classes
from ..evaluation.embed import embed
from ..evaluation.samples import STAGES
from ..models.encoders import open_encoder
from .data import data_parser, parse_data

#: Options of datamodules that do not change what a sample is. (The choice of samples is
#: compared on its own.)
_READING = ('batch_size', 'num_workers', 'length')


def _data_origin(data: Namespace) -> dict[str, Any]:
    """What the class and the options of a datamodule say of its samples."""
    values = data.as_dict()
    options = {**values.get('init_args', {}), **values.get('dict_kwargs', {})}
    origin = {f'data.{k}': v for k, v in options.items() if k not in _READING}
    return {'data': values['class_path'], **origin}


def _fingerprint(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon embed``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status.

    Raises:
        OSError: If a file is missing, or is there already.
        ValueError: If arguments, data and encoder do not fit each other.
    """
    parser = data_parser(
        'torchgeo-softcon embed',
        'Write the embeddings of a dataset to a Parquet file, with place and time where '
        'the data tell. An interrupted run goes on when started again.',
    )
    parser.add_argument('--out', type=str, default='embeddings.parquet', help='file')
    parser.add_argument(
        '--split',
        type=str | None,
        help='predict, test, val or train, the first there is',
    )
    parser.add_argument(
        '--size',
        type=int | None,
        help='resize images to so many pixels. By default the size in the training',
    )
    parser.add_argument('--pooling', type=str | None, help='cls or mean')
    parser.add_argument('--overwrite', action='store_true', help='replace the file')
    parser.add_argument('--accelerator', type=str, default='auto', help='cpu, gpu, ...')
    options, datamodule = parse_data(parser, args)
    if datamodule is None:
        raise ValueError(
            'data must be given: --data CLASS --data.OPTION VALUE, or --config FILE'
        )
    if options.split not in (None, *STAGES):
        raise ValueError(
            f'split must be one of {", ".join(STAGES)}, got {options.split}'
        )
    encoder = open_encoder(
        options.checkpoint,
        options.weights,
        options.model,
        options.bands,
        options.unit_range,
    )
    rows = embed(
        encoder,
        datamodule,
        options.out,
        options.split,
        options.size or encoder.size,
        options.pooling,
        options.overwrite,
        {
            'checkpoint': _fingerprint(options.checkpoint),
            'weights': options.weights,
            **_data_origin(options.data),
        },
        accelerator=options.accelerator,
    )
    print(f'{rows} embeddings are in {options.out}')
    return 0
