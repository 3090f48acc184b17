# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Whether a run waits for its data: ``torchgeo-softcon bench-data``."""

import json
from collections.abc import Sequence
from pathlib import Path

from .parsers import CommandParser


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        'bench-data',
        'Tell whether a run waits for its data, at how many images per second, and what to\n'
        'change. Trains on one device for a moment and writes nothing. All other options\n'
        'are those of `torchgeo fit`.',
        'torchgeo-softcon bench-data --config run.yaml --data.num_workers 8',
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        '-c',
        '--config',
        metavar='FILE',
        action='append',
        default=[],
        help='configuration of `torchgeo fit`. May be repeated: later files win',
    )
    add('--steps', type=int, default=20, help='batches to measure (default: 20)')
    add('--json', action='store_true', help='print JSON')
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options, fit_args = parser().parse_known_args(args)
    if options.steps < 1:
        raise ValueError(f'steps must be at least 1, got {options.steps}')
    for config in options.config:
        if not Path(config).is_file():
            raise ValueError(f'config {config} is not a file')
    # Not before: help must not wait for it
    from .data_speed import measure

    configs = [x for config in options.config for x in ('--config', config)]
    speed = measure([*configs, *fit_args], options.steps)
    print(json.dumps(speed.as_dict(), indent=2) if options.json else speed)
    return 0
