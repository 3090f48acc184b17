# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files of pretrained weights: from a folder, from the cache, or from the network."""

import codecs
import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from tqdm.auto import tqdm

from .._checks import require
from .checkpoints import read_checkpoint

#: Environment variable with the folder to look into before the network is used.
WEIGHTS_VARIABLE = 'TORCHGEO_SOFTCON_WEIGHTS'

#: Seconds without an answer or a byte, after which a download ends.
_TIMEOUT = 30

#: The most bytes of a file: the training checkpoint of a ViT-L has 3.7 GB.
_MOST = 4 * 2**30

#: The rule of torch.hub: a name may end in the first digits of the file's SHA-256.
_HASH = re.compile(r'-([a-f0-9]{8,64})\.')


def find_file(
    url: str,
    file: str | None = None,
    root: str | os.PathLike[str] | None = None,
    model_dir: str | os.PathLike[str] | None = None,
    check_hash: bool = False,
    progress: bool = True,
) -> str:
    """Find a file of weights in *root* or *model_dir*, or download it to *model_dir*.

    A download replaces nothing before it is complete and readable, so that an interrupted
    one leaves no trace.

    Args:
        url: Where to download from, http(s):// or file://.
        file: Name of the file. Defaults to the last part of *url*.
        root: Folder with files that were downloaded by hand. Defaults to the one that the
            environment variable ``TORCHGEO_SOFTCON_WEIGHTS`` names, if any.
        model_dir: Folder to download to. Defaults to the cache of torch.hub.
        check_hash: Whether to compare the file with the digits of SHA-256 in its name.
        progress: Whether to show the progress of a download.

    Raises:
        ValueError: If an argument is invalid, or the file has another hash.
        RuntimeError: If the download fails.
    """
    name = file or os.path.basename(urlparse(url).path)
    if name in ('', '.', '..') or {'/', '\\', '\0'} & {*name}:
        raise ValueError(f'file must be a name without folders, got {name!r}')
    option = WEIGHTS_VARIABLE if root is None else 'root'
    folder = os.environ.get(WEIGHTS_VARIABLE) if root is None else root
    if folder:
        given = Path(folder).expanduser()
        require(given.is_dir(), f'{option} must be a folder, got {str(given)!r}')
        if (given / name).is_file():
            return _checked(given / name, check_hash)

    cache = Path(model_dir or Path(torch.hub.get_dir(), 'checkpoints')).expanduser()
    if (cache / name).is_file():
        return _checked(cache / name, check_hash)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f'model_dir must be a folder, got {str(cache)!r}. Choose another'
        ) from error
    _download(url, cache / name, check_hash, progress)
    return str(cache / name)


def _checked(path: Path, check_hash: bool) -> str:
    """Return the path of a file, if the file is what its name promises."""
    if check_hash and (match := _HASH.search(path.name)):
        with path.open('rb') as stream:
            digest = hashlib.file_digest(stream, 'sha256').hexdigest()
        require(
            digest.startswith(match[1]),
            f'{path} must have a SHA-256 of {match[1]}..., as its name says, got '
            f'{digest[:16]}.... Remove the file and download it again',
        )
    return str(path)


def _download(url: str, path: Path, check_hash: bool, progress: bool) -> None:
    """Download to a path, all or nothing."""
    # Ends in its own name, for the sake of the hash
    partial = path.with_name(f'.{uuid.uuid4().hex}.{path.name}')
    try:
        _fetch(url, partial, progress)
        _checked(partial, check_hash)
        # Servers that break off do not always say so
        read_checkpoint(str(partial))
        partial.replace(path)
    except (OSError, ValueError) as error:
        reason = str(error).replace(str(partial), 'the file')
        raise RuntimeError(
            f'{path.name} could not be downloaded from {url}: {reason or repr(error)}. '
            f'Put it, as {path.name}, into a folder by other means; then set root or the '
            f'environment variable {WEIGHTS_VARIABLE} to this folder'
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _fetch(url: str, path: Path, progress: bool) -> None:
    """Copy a file from the network, through the proxies that the environment names."""
    if url.startswith('file:'):
        shutil.copyfile(url2pathname(urlparse(url).path), path)
        return
    import requests  # not before: a weight by its name needs no network

    with (
        requests.get(url, stream=True, timeout=_TIMEOUT) as response,
        path.open('wb') as stream,
    ):
        response.raise_for_status()
        size = response.raw.length_remaining or 0  # 0 if it is not announced
        with tqdm(
            total=size or None, unit='B', unit_scale=True, disable=not progress
        ) as bar:
            for chunk in response.iter_content(2**16):
                if not stream.tell():
                    _reject_page(chunk)
                enough = max(size, stream.tell() + len(chunk)) <= _MOST
                require(enough, f'a file of weights has at most {_MOST} bytes')
                stream.write(chunk)
                bar.update(len(chunk))
        if stream.tell() < size:  # before version 2, urllib3 accepts that
            raise ValueError(f'{stream.tell()} of {size} bytes came: download it again')


def _reject_page(start: bytes) -> None:
    """Raise if a server sends a page or a message instead of the file.

    Google Drive does so to ask for confirmation or a login, and after too many downloads.
    """
    if b'\0' in start:  # not text, whatever the first byte is
        return
    text = start.removeprefix(codecs.BOM_UTF8).decode(errors='replace').lstrip()
    if text.startswith(('{', '[')):
        raise ValueError(
            f'the server sent a message {text[:200]!r} instead of the file'
        )
    if text.startswith('<'):
        title = re.search('<title>(.*?)</title>', text, re.DOTALL | re.IGNORECASE)
        name = title[1].strip() if title else ''
        raise ValueError(f'the server sent a web page {name!r} instead of the file')
