# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Names of a package that are loaded at their first use (PEP 562).

The standard library only: this is imported in the middle of ``import torch``.
"""

from collections.abc import Callable
from typing import Any


def lazy_names(
    namespace: dict[str, Any], **modules: tuple[str, ...]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Load the public names of a package at their first use.

    Type checkers need the same names as imports below ``if TYPE_CHECKING``;
    ``tests/test_layout.py`` compares the two.

    Args:
        namespace: The ``globals()`` of the package, where loaded names stay.
        **modules: The public names of each module of the package.

    Returns:
        ``__getattr__``, ``__dir__`` and ``__all__`` of the package.
    """
    package = namespace['__name__']
    homes = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        """Load a name at its first use."""
        if name not in homes:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')

        from importlib import import_module

        value = getattr(import_module(f'.{homes[name]}', package), name)
        namespace[name] = value
        return value

    def names() -> list[str]:
        """List the names of the package, including those that are not loaded yet."""
        return sorted({*namespace, *homes})

    return load, names, [name for name in homes if not name.startswith('_')]
