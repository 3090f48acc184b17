# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The page of pictures that ``torchgeo-softcon report`` writes."""
