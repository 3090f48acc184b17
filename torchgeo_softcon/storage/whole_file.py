# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files that are there once they are complete."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, whose file gets its real name once it is on the disk.

    Yields:
        The path for the time being, the same with ``.tmp`` at its end.

    Raises:
        OSError: If it cannot be written. A partial file is deleted.
    """
    unfinished = path.with_name(f'{path.name}.tmp')
    try:
        yield unfinished
        with open(unfinished, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(
            error.errno or 0,
            f'cannot write {path}: {error.strerror or error}. Files that are complete are '
            'kept: make room and start again',
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
