# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""k-NN and linear evaluation of frozen features: ``torchgeo-softcon evaluate``."""

import json
from collections.abc import Sequence
from pathlib import Path

from .data import data_parser, open_encoder_and_data, parse_options
from .parsers import CommandParser, print_table

_RUN = {
    '--protocol {softcon,dino,torchgeo-bench,copernicus-bench}': 'as a paper or a benchmark '
    'does, on train, val and test, with intervals of 95 %%; --split, --k, --temperature and '
    '--fraction are then not used',
    '--split NAME': 'test (default) or val',
    '--k NUMBERS': 'numbers of neighbours, default: [5,10,15,20]',
    '--temperature X': 'of their votes, default: 0.07',
    '--size N': 'pixels, by default as in training, or 224',
    '--fraction X': 'share of the training split to use, default: 1',
    '--seed N': 'of the choice of the share and the bootstrap, default: 42',
    '--device NAME': 'cpu, cuda, ...',
    '--out FILE': 'JSON file for the result',
    '--overwrite': 'replace the file',
}

#: Options of the evaluation without a protocol.
_OWN = ('split', 'k', 'temperature', 'fraction')

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
    parser.add_options(_RUN, 'run')
    parser.set_defaults(split='test', k=[5, 10, 15, 20], temperature=0.07)
    parser.set_defaults(fraction=1.0, seed=42)
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
        own = {name: getattr(options, name) for name in _OWN}
        values = evaluate_encoder(encoder, datamodule, **own, **common)
    print_table(
        [(k, f'{v:{".0f" if k in _COUNTS else ".4f"}}') for k, v in values.items()]
    )
    if options.out is not None:
        names = ('checkpoint', 'weights', 'protocol', 'seed', *_OWN)
        origin = {
            **{name: getattr(options, name) for name in names},
            'data': data,
            'bands': encoder.bands,
            'unit_range': encoder.unit_range,
        }
        text = json.dumps({**origin, **values}, indent=2, default=str)
        out.write_text(f'{text}\n')
    return 0
