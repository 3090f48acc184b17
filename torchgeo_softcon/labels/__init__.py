# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Land-cover labels for archives of patches: ``torchgeo-softcon labels``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .archive import Labelled, label_archive
    from .command import main
    from .export import write_json

__all__ = ('Labelled', 'label_archive', 'main', 'write_json')

_MODULES = {
    'Labelled': 'archive',
    'label_archive': 'archive',
    'main': 'command',
    'write_json': 'export',
}


def __getattr__(name: str) -> Any:
    """Load a name at its first use (PEP 562): workers need a part of the package only."""
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    from importlib import import_module

    value = getattr(import_module(f'.{_MODULES[name]}', __name__), name)
    globals()[name] = value
    return value
