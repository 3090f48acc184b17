# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Damaged files that a training leaves out."""

import json
import os
import tempfile
import warnings
import weakref
from collections.abc import Iterable
from typing import Literal

#: What to do about a damaged file: an error that names it, or to leave it out.
OnError = Literal['raise', 'skip']

#: Files that a message lists.
_MAX_NAMED = 20


class Damage:
    """Damaged files, noted by all processes that read: in a temporary file."""

    def __init__(self, left_out: Iterable[str] = ()) -> None:
        """Initialize a new Damage instance, with files that could not be opened."""
        self.left_out = list(left_out)
        self._told = 0
        handle, self._notes = tempfile.mkstemp(prefix='damaged-')
        os.close(handle)
        weakref.finalize(self, _remove, self._notes, os.getpid())

    def note(self, path: str) -> None:
        """Note the damaged file that a draw has met."""
        with open(self._notes, 'a') as file:
            # Whole lines, also from several processes at once
            file.write(json.dumps(path) + '\n')

    def _noted(self) -> list[str]:
        """Return the file of each damaged draw."""
        with open(self._notes) as file:
            return [json.loads(line) for line in file]

    def tell_epoch(self) -> None:
        """Tell how many draws met damaged files since the last time."""
        total = len(self._noted())
        if total > self._told:
            warnings.warn(
                f'{total - self._told} draws of this epoch met damaged files, and others '
                f'were taken instead ({total} since the start)',
                UserWarning,
                stacklevel=2,
            )
        self._told = total

    def tell_files(self) -> None:
        """Name all files that were found to be damaged."""
        names = [*dict.fromkeys([*self.left_out, *sorted(self._noted())])]
        if names:
            more = len(names) - _MAX_NAMED
            warnings.warn(
                f'{len(names)} files are damaged and were left out (on_error=skip): '
                f'{", ".join(names[:_MAX_NAMED])}{f" and {more} more" * (more > 0)}. Fetch '
                'them again, or take them out of the folders',
                UserWarning,
                stacklevel=2,
            )


def _remove(path: str, process: int) -> None:
    """Remove a file, but not in a fork of the process that has made it."""
    if os.getpid() == process:
        os.unlink(path)
