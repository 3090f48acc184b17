# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Contents of a hundred thousand files, kept for the next start."""

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyproj import CRS

from ..storage.user_cache import describe_files
from .grid import parse_crs

T = TypeVar('T')

#: From so many files on, opening them is slower than asking for their size and time.
_MANY = 256


class _Pickler(pickle.Pickler):
    """Writes each CRS as text, which is parsed once for all files."""

    def persistent_id(self, obj: Any) -> str | None:
        return obj.to_wkt() if isinstance(obj, CRS) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: str) -> CRS:
        return parse_crs(pid)


def open_each(
    function: Callable[..., T], files: Sequence[str], *options: Any
) -> list[T]:
    """Call a function for each file, of many only for those that are new or have changed.

    Args:
        function: Takes a path and options, and tells what is in the file.
        files: Paths.
        *options: What else its results depend on.
    """
    if len(files) < _MANY or not all(map(os.path.isfile, files)):
        return [function(path, *options) for path in files]

    def describe(path: str) -> pa.Table:
        buffer = io.BytesIO()
        _Pickler(buffer).dump(function(names[path], *options))
        return pa.table({'found': pa.array([buffer.getvalue()], pa.binary())})

    names = {os.path.abspath(path): path for path in files}
    # Results of other options or of another version of this code are other results
    code = b''.join(
        path.read_bytes() for path in sorted(Path(__file__).parent.glob('*.py'))
    )
    kind = hashlib.sha256(code + repr((function.__name__, options)).encode())
    # One at a time: filters of warnings are shared by all threads
    table = describe_files(f'files-{kind.hexdigest()[:20]}', [*names], describe, 1)
    found = table['found'].to_pylist()
    return [_Unpickler(io.BytesIO(content)).load() for content in found]
