# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Version of the package, apart so that reading it imports nothing."""

__version__ = '0.1.0'
