# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders in files for other tools: ``torchgeo-softcon export``."""

from collections.abc import Sequence

from .parsers import CommandParser

_OPTIONS = {
    '--format {torchgeo,timm,safetensors,smp,hf,onnx}': 'tool that opens the file',
    '--branch {student,teacher}': 'default: the student of SoftCon, the teacher of DINO-MC',
    '--patch-size N': 'of a Vision Transformer',
    '--img-size N': 'that a Vision Transformer is built for',
    '--output FILE': 'default: beside the checkpoint; of hf a folder',
    '--license NAME': 'for the card, such as apache-2.0',
    '--push OWNER/NAME': 'upload hf to this repository, too',
    '--private': 'if that is new',
}


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
    parser.add_options(_OPTIONS, required=['--format'])
    parser.set_defaults(license='unknown')
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    options = vars(parser().parse_args(args))
    push, private = options.pop('push'), options.pop('private')
    if push and options['format'] != 'hf':
        raise ValueError(f'--push is for --format hf, got {options["format"]}')
    # Not before: help must not wait for it
    from ..export.files import export, push_to_hub

    paths = export(options.pop('checkpoint'), **options)
    print(*paths, sep='\n')
    if push:
        print(push_to_hub(paths[0].parent, push, private))
    return 0
