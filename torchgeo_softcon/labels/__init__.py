# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Land-cover labels for archives of patches: ``torchgeo-softcon labels``.

The names are loaded at their first use: workers need a part of the package only.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .archive import Labelled as Labelled
    from .archive import label_archive as label_archive
    from .store import write_json as write_json

__getattr__, __dir__, __all__ = lazy_names(globals())
