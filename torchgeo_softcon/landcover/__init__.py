# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Land-cover maps: their classes, tiles and files.

A product is one :class:`LandCoverProduct` or one YAML file with the same keys, such as
``worldcover.yaml`` beside this file. :func:`register` makes it known by its name to every
option *product*, which also takes the object itself and the path of the file.
"""

from .product import LandCoverClass, LandCoverProduct
from .products import find_product, register
from .tiles import TileGrid

__all__ = ('LandCoverClass', 'LandCoverProduct', 'TileGrid', 'find_product', 'register')
