# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files that stay open between reads."""

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


def _close_all(files: OrderedDict[str, Any]) -> None:
    """Close files and forget them."""
    while files:
        files.popitem()[1].close()


class OpenFiles:
    """The last few files that were read, open. Safe to copy, to pickle and to fork.

    Every process opens files on first use. They are closed before the interpreter goes
    away, because GDAL can no longer report to Python after that.
    """

    def __init__(self, opener: Callable[[str], Any], max_open: int = 64) -> None:
        """Initialize a new OpenFiles instance.

        Args:
            opener: Opens a file. Module-level, so that it can be pickled.
            max_open: Number of files to keep open.
        """
        self.opener = opener
        self.max_open = max_open
        self._pid = os.getpid()
        self._files: OrderedDict[str, Any] = OrderedDict()
        weakref.finalize(self, _close_all, self._files)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave open files behind."""
        return type(self), (self.opener, self.max_open)

    def __getitem__(self, path: str | os.PathLike[str]) -> Any:
        """Open a file, or take it from the open ones.

        Args:
            path: The file.

        Returns:
            What the opener made of it.
        """
        path = os.fspath(path)
        if self._pid != os.getpid():
            # Forked: the file position behind these is shared with the parent
            self._pid = os.getpid()
            self._files.clear()
        if path not in self._files:
            self.close(self.max_open - 1)
            self._files[path] = self.opener(path)
        self._files.move_to_end(path)
        return self._files[path]

    def close(self, keep: int = 0) -> None:
        """Close the files that were not used for longest.

        Args:
            keep: Number of files that stay open.
        """
        while len(self._files) > keep:
            self._files.popitem(last=False)[1].close()
