# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Land-cover labels for archives of patches: ``torchgeo-softcon labels``.

The names are loaded at their first use: workers need a part of the package only.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .archive import Labelled, label_archive
    from .export import write_json

__all__ = ('Labelled', 'label_archive', 'write_json')

_MODULES = {'Labelled': 'archive', 'label_archive': 'archive', 'write_json': 'export'}

__getattr__, __dir__ = lazy_names(globals(), _MODULES)
