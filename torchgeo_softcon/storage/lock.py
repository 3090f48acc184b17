# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""One writer at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(
    path: Path, what: str | os.PathLike[str], wait: bool = False
) -> Iterator[None]:
    """Hold the lock of something that one process writes at a time.

    If another one holds it, *wait* for that, or raise a BlockingIOError.

    The system drops the lock when its process ends, however it ends, so a file that is
    left behind locks nothing.
    """
    with path.open('a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # A run that has just finished may have deleted the file after it was opened
            # here: a lock on it keeps nobody out
            alone = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            alone = False
        if not alone:
            raise BlockingIOError(
                f'another run is writing {os.fspath(what)}: wait for it, or stop it first'
            )
        yield
