# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders in files for other tools: ``torchgeo-softcon export``."""

from collections.abc import Sequence

from .parsers import CommandParser


def parser() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser(
        'export',
        'Write the encoder of a checkpoint, with a model card. TorchGeo opens the\n'
        'checkpoints themselves as well; an export is smaller, can have another patch\n'
        'size, and is for other tools, too.',
        'torchgeo-softcon export last.ckpt --format timm --img-size 120',
    )
    parser.add_argument('checkpoint', help='of SoftConTask or DINOMCTask')
    parser.add_argument(
        '--format', required=True, choices=('torchgeo', 'timm', 'safetensors', 'smp')
    )
    parser.add_argument(
        '--branch',
        choices=('student', 'teacher'),
        help='default: the student of SoftCon, the teacher of DINO-MC',
    )
    parser.add_argument('--patch-size', type=int, metavar='P')
    parser.add_argument(
        '--img-size',
        type=int,
        metavar='N',
        help='that a Vision Transformer is built for',
    )
    parser.add_argument(
        '--output', metavar='FILE', help='default: beside the checkpoint'
    )
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = vars(parser().parse_args(args))
    # Not before: help must not wait for it
    from ..export.files import export

    for path in export(options.pop('checkpoint'), **options):
        print(path)
    return 0
