# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The files that a user means by paths: files, folders and glob patterns."""

import fnmatch
import glob
import os
import re
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import PurePath

#: A file or a folder.
AnyPath = str | os.PathLike[str]

#: Types of georeferenced rasters that a folder is searched for.
RASTERS = ('.tif', '.tiff', '.jp2')

#: A folder, its real path, and the positions in a pattern that its content may match.
_Folder = tuple[str, str, frozenset[int]]

#: What only GDAL can open, such as /vsicurl/https://... and s3://...
_OF_GDAL = re.compile(r'/vsi|\w+://')


def path_list(paths: AnyPath | Iterable[AnyPath]) -> list[str]:
    """Return one or more paths as a list of texts."""
    if isinstance(paths, str | os.PathLike):
        return [os.fspath(paths)]
    return [os.fspath(path) for path in paths]


def find_files(
    paths: AnyPath | Iterable[AnyPath],
    suffixes: Sequence[str] = RASTERS,
    option: str = 'paths',
    odd_names: bool = False,
) -> list[str]:
    """List the files that paths stand for, each once.

    Folders are searched with all their subfolders. Symbolic links are followed, but a
    folder or file that is also found at its real path is not listed again. Hidden files
    and folders (``.git``, ``._a.tif``) and what is no regular file are passed over.

    Args:
        paths: Files, which are always listed, also those that only GDAL can open, folders,
            and patterns such as ``DIR/**/*.tif``, with ``**`` for any number of folders.
        suffixes: Ends of the names of files that folders are searched for.
        option: Name of the option, for messages.
        odd_names: Whether to list files whose names are not UTF-8, which rasterio cannot
            open. Without, there is a warning.
    """
    files: dict[str, None] = {}
    for text in path_list(paths):
        if os.path.isdir(text):
            found = _search(text, ('**', '*'), tuple(suffixes))
        elif os.path.exists(text) or _OF_GDAL.match(text):
            files[text] = None
            continue
        elif glob.has_magic(text):
            root = pattern_root(text)
            found = _search(root, PurePath(text).parts[len(PurePath(root).parts) :])
        else:
            raise FileNotFoundError(f'{option} has a path that does not exist: {text}')
        for file in found:
            name = readable_name(file)
            if odd_names or name == file:
                files[file] = None
                continue
            warnings.warn(
                f'{option} has {name}, which is left out: its name is not UTF-8, rename '
                'it',
                UserWarning,
                stacklevel=2,
            )
    return list(files)


def pattern_root(path: AnyPath) -> str:
    """Return a folder itself, and the one in which a pattern begins or a file lies."""
    if os.path.isdir(path):
        return os.fspath(path)
    parts = PurePath(path).parts
    magic = [number for number, part in enumerate(parts) if glob.has_magic(part)]
    return str(PurePath(*parts[: magic[0] if magic else -1]))


def readable_name(file: AnyPath) -> str:
    r"""Return a name as UTF-8, with escapes such as ``\xff`` for all other bytes."""
    return os.fsencode(file).decode('utf-8', 'backslashreplace')


def _search(
    root: str, pattern: tuple[str, ...], suffixes: tuple[str, ...] = ('',)
) -> list[str]:
    """Find the files below a folder whose path below it matches a pattern."""
    files: dict[str, str] = {}  # by real path
    links: list[tuple[str, str]] = []
    # Folders by what may follow in the pattern: linked ones after all real ones, so that
    # what is reachable in both ways is listed at its real path
    start = ('' if root == '.' else root, os.path.realpath(root), _follow(pattern, {0}))
    real_folders: deque[_Folder] = deque([start])
    linked_folders: deque[_Folder] = deque()
    seen = set()
    while real_folders or linked_folders:
        folder, real, states = (real_folders or linked_folders).popleft()
        if (real, states) in seen:
            continue
        seen.add((real, states))
        try:
            entries = sorted(os.scandir(folder or '.'), key=lambda entry: entry.name)
        except OSError:  # not ours to read, such as lost+found
            continue
        for entry in entries:
            after = _step(pattern, states, entry.name)
            if not after:
                continue
            path, target = (os.path.join(f, entry.name) for f in (folder, real))
            linked = entry.is_symlink()
            if linked:
                target = os.path.realpath(path)
            if os.path.isdir(target) if linked else entry.is_dir():
                queue = linked_folders if linked else real_folders
                queue.append((path, target, after))
            elif len(pattern) in after and entry.name.lower().endswith(suffixes):
                if linked and os.path.isfile(target):
                    links.append((path, target))
                elif not linked and entry.is_file():
                    files.setdefault(target, path)
    # Several links to one file elsewhere are several files: stores that keep content
    # once (git-annex, DVC) link all files of equal content to one
    linked_files = [path for path, target in links if target not in files]
    return sorted((*files.values(), *linked_files), key=lambda path: path.split(os.sep))


def _step(pattern: Sequence[str], states: Iterable[int], name: str) -> frozenset[int]:
    """Positions in a pattern that are left to match below or after a name."""
    after = set()
    for state in states:
        part = pattern[state] if state < len(pattern) else ''
        if name.startswith('.') and not part.startswith('.'):
            continue
        if part == '**':
            after.add(state)
        elif part and fnmatch.fnmatch(name, part):
            after.add(state + 1)
    return _follow(pattern, after)


def _follow(pattern: Sequence[str], states: set[int]) -> frozenset[int]:
    """Add the positions after each ``**``, which may also stand for no folder."""
    for state in tuple(states):
        while state < len(pattern) and pattern[state] == '**':
            state += 1
            states.add(state)
    return frozenset(states)
