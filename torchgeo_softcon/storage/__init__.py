# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files that survive a kill: written whole, or in parts that a run goes on with."""
