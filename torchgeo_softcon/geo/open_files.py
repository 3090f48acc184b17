# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files that stay open between reads."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def _close(files: OrderedDict[str, Any], keep: int = 0) -> None:
    """Close the files that were not used for longest."""
    while len(files) > keep:
        files.popitem(last=False)[1].close()


class OpenFiles:
    """The last few files that were read, open. Safe to copy, pickle, fork and share.

    Every process opens files on first use, and one thread reads at a time. Files are
    closed before the interpreter goes away: after that, GDAL can no longer report to
    Python and prints empty errors.
    """

    def __init__(self, opener: Callable[..., Any], max_open: int = 64) -> None:
        """Initialize a new OpenFiles instance."""
        self.opener = opener
        self.max_open = max_open
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._files: OrderedDict[str, Any] = OrderedDict()
        weakref.finalize(self, _close, self._files)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave open files behind."""
        return type(self), (self.opener, self.max_open)

    def __len__(self) -> int:
        """Return the number of files that are open."""
        return len(self._files)

    @contextmanager
    def use(self, path: str | os.PathLike[str]) -> Iterator[Any]:
        """Open a file, or take it from the open ones."""
        path = os.fspath(path)
        if self._pid != os.getpid():
            # Forked: the parent may hold the lock, and shares the file positions
            self._pid = os.getpid()
            self._lock = threading.RLock()
            self._files.clear()
        with self._lock:
            if path not in self._files:
                _close(self._files, max(self.max_open - 1, 0))
                self._files[path] = self.opener(path)
            self._files.move_to_end(path)
            try:
                yield self._files[path]
            finally:
                _close(self._files, self.max_open)
