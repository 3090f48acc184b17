# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Names of a package that are loaded at their first use (PEP 562).

The standard library only: this is imported in the middle of ``import torch``.
"""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

_NAME = re.compile(r'^    from \.(\w+) import (\w+) as \2$', re.MULTILINE)


def lazy_names(
    namespace: dict[str, Any],
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Load the public names of a package at their first use.

    They are those that the package imports for type checkers, below ``if TYPE_CHECKING``
    as ``from .module import name as name``: its source is the one list of them.

    Args:
        namespace: The ``globals()`` of the package, where loaded names stay.

    Returns:
        ``__getattr__``, ``__dir__`` and ``__all__`` of the package.
    """
    package = namespace['__name__']
    source = namespace['__loader__'].get_source(package)
    homes = {name: module for module, name in _NAME.findall(source)}

    def load(name: str) -> Any:
        """Load a name at its first use."""
        if name not in homes:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        value = getattr(import_module(f'.{homes[name]}', package), name)
        namespace[name] = value
        return value

    def names() -> list[str]:
        """List the names of the package, including those that are not loaded yet."""
        return sorted({*namespace, *homes})

    return load, names, [name for name in homes if not name.startswith('_')]
