# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Embeddings of a dataset in a (Geo)Parquet file: ``torchgeo-softcon embed``."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .data import data_parser, open_encoder_and_data, parse_options
from .parsers import CommandParser

#: Options of datamodules that do not change what a sample is. (The choice of samples is
#: compared on its own.)
_READING = ('batch_size', 'num_workers', 'length')

_RUN = {
    '--split NAME': 'predict, test, val or train, by default the first that the data have',
    '--size N': 'pixels to resize images to, by default as in the training',
    '--pooling NAME': 'cls or mean',
    '--accelerator NAME': 'cpu, gpu, ...',
    '--out FILE': 'default: embeddings.parquet',
    '--overwrite': 'replace the file',
}
_FILE = {
    '--layout {footprint,point}': "point: centres as geometry, for all of TorchGeo's readers "
    'of embeddings',
    '--dtype {float32,int8}': 'int8: a quarter of the size',
    '--stac': 'write a STAC item, too',
    '--dense': 'features of all patches of whole scenes instead, as GeoTIFFs in the folder '
    '--out, or in a store --out X.zarr, from overlapping windows of --size pixels',
}


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = data_parser(
        'embed',
        'Write the embeddings of a dataset to a Parquet file, with place and time where\n'
        'the data tell. An interrupted run goes on when started again.',
        '--checkpoint logs/version_0/checkpoints/last.ckpt',
    )
    parser.add_options(_RUN, 'run')
    parser.add_options(_FILE, 'file')
    parser.set_defaults(accelerator='auto', out='embeddings.parquet')
    parser.set_defaults(layout='footprint', dtype='float32')
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = parse_options(parser(), args)
    # Not before: help must not wait for it
    from ..evaluation.dense import embed_dense
    from ..evaluation.embed import embed
    from ..evaluation.embedding_file import write_stac_item

    encoder, datamodule, data = open_encoder_and_data(options)
    if options.dense:
        written = embed_dense(
            encoder,
            datamodule,
            options.out.removesuffix('.parquet'),
            options.size,
            options.overwrite,
            str(data['class_path']),
            accelerator=options.accelerator,
        )
        print(*written, sep='\n')
        return 0
    names = ('split', 'pooling', 'overwrite', 'layout', 'dtype', 'accelerator')
    rows = embed(
        encoder,
        datamodule,
        options.out,
        size=options.size or encoder.size,
        origin={
            'checkpoint': _fingerprint(options.checkpoint),
            'weights': options.weights,
            **_data_origin(data),
        },
        **{name: getattr(options, name) for name in names},
    )
    print(f'{rows} embeddings are in {options.out}')
    if options.stac:
        print(write_stac_item(Path(options.out)))
    return 0


def _data_origin(data: dict[str, Any]) -> dict[str, Any]:
    """Tell the samples of one datamodule from those of others."""
    options = {**data.get('init_args', {}), **data.get('dict_kwargs', {})}
    origin = {f'data.{k}': v for k, v in options.items() if k not in _READING}
    return {'data': data['class_path'], **origin}


def _fingerprint(path: str | None) -> str | None:
    """Tell whether a file is the same."""
    if path is None:
        return None
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
