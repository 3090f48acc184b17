# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""k-NN and linear evaluation of frozen features: ``torchgeo-softcon evaluate``."""

import json
from collections.abc import Sequence
from pathlib import Path

from .data import data_parser, open_encoder_and_data, parse_options
from .parsers import CommandParser, list_of, optional, print_table

#: Options that the file of a result notes.
_ORIGIN = (
    *('checkpoint', 'weights', 'protocol', 'split', 'fraction', 'seed', 'temperature'),
)

#: Values that are counts, not scores.
_COUNTS = ('train_images', 'test_images', 'val_images', 'image_size')


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = data_parser(
        'evaluate',
        'Evaluate the frozen features of an encoder on labelled data, by nearest\n'
        'neighbours and by a linear classifier.',
        '--weights ResNet50_Weights.SENTINEL2_SOFTCON \\\n'
        '    --data EuroSATDataModule --data.dict_kwargs.root DIR',
    )
    add = parser.add_argument_group('run').add_argument
    add(
        '--protocol',
        choices=('softcon', 'dino', 'torchgeo-bench', 'copernicus-bench'),
        help='as a paper or a benchmark does, on train, val and test, with intervals of '
        '95 %%; --split, --k, --temperature and --fraction are then not used',
    )
    add('--split', type=str, default='test', help='test (default) or val')
    add(
        '--k',
        type=list_of(int),
        default=[5, 10, 15, 20],
        help='numbers of neighbours, default: [5,10,15,20]',
    )
    add('--temperature', type=float, default=0.07, help='of their votes, default: 0.07')
    add('--size', type=optional(int), help='pixels, by default as in training, or 224')
    add(
        '--fraction',
        type=float,
        default=1.0,
        help='share of the training split to use, default: 1',
    )
    add(
        '--seed',
        type=int,
        default=42,
        help='of the choice of the share and the bootstrap, default: 42',
    )
    add('--device', help='cpu, cuda, ...')
    add('--out', help='JSON file for the result')
    add('--overwrite', action='store_true', help='replace the file')
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = parse_options(parser(), args)
    if options.out is not None:
        out = Path(options.out)
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(f'the folder of out = {out} does not exist')
        if out.exists() and not options.overwrite:
            raise FileExistsError(f'out = {out} exists already. Set overwrite')
    # Not before: help must not wait for them
    import torch

    from ..evaluation.evaluate import evaluate_encoder
    from ..evaluation.protocols import evaluate_protocol

    encoder, datamodule, data = open_encoder_and_data(options)
    device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    common = {'size': options.size, 'seed': options.seed, 'device': device}
    if options.protocol is not None:
        values = evaluate_protocol(encoder, datamodule, options.protocol, **common)
    else:
        names = ('split', 'k', 'temperature', 'fraction')
        own = {name: getattr(options, name) for name in names}
        values = evaluate_encoder(encoder, datamodule, **own, **common)
    print_table(
        [(k, f'{v:{".0f" if k in _COUNTS else ".4f"}}') for k, v in values.items()]
    )
    if options.out is not None:
        origin = {
            **{name: getattr(options, name) for name in _ORIGIN},
            'data': data,
            'bands': encoder.bands,
            'unit_range': encoder.unit_range,
        }
        text = json.dumps({**origin, **values}, indent=2, default=str)
        out.write_text(f'{text}\n')
    return 0
