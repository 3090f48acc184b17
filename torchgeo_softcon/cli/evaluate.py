# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""k-NN and linear evaluation of frozen features: ``torchgeo-softcon evaluate``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.evaluate import evaluate_encoder
from ..models.encoders import open_encoder
from .data import data_parser, parse_data

#: What is no score.
_COUNTS = ('train_images', 'test_images', 'val_images', 'image_size')


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon evaluate``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status.

    Raises:
        OSError: If a file is missing, or is there already.
        ValueError: If arguments, data and encoder do not fit each other.
    """
    parser = data_parser(
        'torchgeo-softcon evaluate',
        'Evaluate the frozen features of an encoder on labelled data, by nearest '
        'neighbours and by a linear classifier.',
    )
    parser.add_argument('--split', type=str, default='test', help='test or val')
    parser.add_argument(
        '--k', type=list[int], default=[5, 10, 15, 20], help='numbers of neighbours'
    )
    parser.add_argument(
        '--temperature', type=float, default=0.07, help='of their votes'
    )
    parser.add_argument(
        '--size', type=int | None, help='pixels, by default as in training, or 224'
    )
    parser.add_argument(
        '--fraction', type=float, default=1.0, help='share of the training split to use'
    )
    parser.add_argument(
        '--seed', type=int, default=42, help='of the choice of the share'
    )
    parser.add_argument('--device', type=str | None, help='cpu, cuda, ...')
    parser.add_argument('--out', type=str | None, help='JSON file for the result')
    parser.add_argument('--overwrite', action='store_true', help='replace the file')
    options, datamodule = parse_data(parser, args)
    out = None if options.out is None else Path(options.out)
    if out is not None and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f'the folder of out = {out} does not exist')
    if out is not None and out.exists() and not options.overwrite:
        raise FileExistsError(f'out = {out} exists already. Set overwrite')
    if datamodule is None:
        raise ValueError(
            'data must be given: --data CLASS --data.OPTION VALUE, or --config FILE'
        )
    encoder = open_encoder(
        options.checkpoint,
        options.weights,
        options.model,
        options.bands,
        options.unit_range,
    )
    device = options.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    values = evaluate_encoder(
        encoder,
        datamodule,
        options.split,
        options.k,
        options.temperature,
        options.size,
        options.fraction,
        options.seed,
        device,
    )
    print(_table(values))
    if out is not None:
        origin: dict[str, Any] = {
            'checkpoint': options.checkpoint,
            'weights': options.weights,
            'data': options.data.as_dict(),
            'split': options.split,
            'fraction': options.fraction,
            'seed': options.seed,
            'temperature': options.temperature,
            'bands': encoder.bands,
            'unit_range': encoder.unit_range,
        }
        text = json.dumps({**origin, **values}, indent=2, default=str)
        out.write_text(f'{text}\n')
    return 0


def _table(values: dict[str, float]) -> str:
    """The values in lines."""
    width = max(map(len, values))
    return '\n'.join(
        f'{name:{width}}  {value:{".0f" if name in _COUNTS else ".4f"}}'
        for name, value in values.items()
    )
