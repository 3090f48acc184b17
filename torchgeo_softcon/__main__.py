# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""``python -m torchgeo_softcon``, and the console script ``torchgeo-softcon``."""

import sys

from .cli.commands import main

if __name__ == '__main__':
    sys.exit(main())
