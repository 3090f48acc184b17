# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Ratios against slow forms, side by side in one run. Not collected by pytest."""
