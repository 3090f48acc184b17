# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Pixel grids on the ground: which files make a scene, and windows of them."""
