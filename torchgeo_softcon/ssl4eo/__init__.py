# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The archive SSL4EO-S12 in all its forms."""
