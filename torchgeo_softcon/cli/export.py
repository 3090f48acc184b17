# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""``torchgeo-softcon export``."""

import argparse


def run(namespace: argparse.Namespace) -> int:
    """Write the encoder of a checkpoint.

    Args:
        namespace: Parsed arguments.

    Returns:
        0.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If something does not fit.
    """
    from ..export.files import export

    options = {
        k: v for k, v in vars(namespace).items() if k not in ('run', 'checkpoint')
    }
    for path in export(namespace.checkpoint, **options):
        print(path)
    return 0
