# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Names of a package that are loaded at their first use (PEP 562).

The standard library only: this is imported in the middle of ``import torch``.
"""

from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    namespace: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make what loads the names of a package.

    Args:
        namespace: The ``globals()`` of the package, where loaded names stay.
        modules: Names, and the modules of the package that have them.

    Returns:
        ``__getattr__`` and ``__dir__`` of the package.
    """
    package = namespace['__name__']

    def load(name: str) -> Any:
        """Load a name at its first use."""
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')

        from importlib import import_module

        value = getattr(import_module(f'.{modules[name]}', package), name)
        namespace[name] = value
        return value

    def names() -> list[str]:
        """Names of the package, those that are not loaded yet included."""
        return sorted({*namespace, *modules})

    return load, names
