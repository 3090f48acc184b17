# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Files of pretrained weights: from a folder, from the cache, or from the network."""

import codecs
import hashlib
import os
import re
import uuid
from http.client import HTTPException
from urllib.parse import urlparse

import torch

from .checkpoints import read_checkpoint

#: Environment variable with the folder to look into before the network is used.
WEIGHTS_VARIABLE = 'TORCHGEO_SOFTCON_WEIGHTS'

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
    """Find a file of weights, or download it.

    The first of these that exists: the file in *root*, the file in the cache, a download
    to the cache. A download replaces nothing before it is complete and readable, so that
    an interrupted one leaves no trace.

    Args:
        url: Where to download from, http(s):// or file://.
        file: Name of the file. Defaults to the last part of *url*.
        root: Folder with files that were downloaded by hand. Defaults to the one that
            the environment variable ``TORCHGEO_SOFTCON_WEIGHTS`` names, if any.
        model_dir: The cache, a folder. Defaults to that of torch.hub.
        check_hash: Whether to compare the file with the digits of SHA-256 in its name, if
            there are any.
        progress: Whether to show the progress of a download.

    Raises:
        ValueError: If *root* or *model_dir* is not a folder, or the file has another hash.
        RuntimeError: If the download fails.
    """
    name = file or os.path.basename(urlparse(url).path)
    folder, source = root, 'root'
    if folder is None:
        folder, source = os.environ.get(WEIGHTS_VARIABLE) or None, WEIGHTS_VARIABLE
    if folder is not None:
        folder = os.path.expanduser(folder)
        if not os.path.isdir(folder):
            raise ValueError(f'{source} must be a folder, got {str(folder)!r}')
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return _checked(path, check_hash)

    cache = os.path.expanduser(
        model_dir or os.path.join(torch.hub.get_dir(), 'checkpoints')
    )
    path = os.path.join(cache, name)
    if not os.path.isfile(path):
        try:
            os.makedirs(cache, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f'model_dir must be a folder, got {str(cache)!r}. Choose another'
            ) from error
        _download(url, path, check_hash, progress)
        return path
    return _checked(path, check_hash)


def _checked(path: str, check_hash: bool) -> str:
    """Return the path of a file, if the file is what its name promises."""
    match = _HASH.search(os.path.basename(path)) if check_hash else None
    if match is not None:
        with open(path, 'rb') as stream:
            digest = hashlib.file_digest(stream, 'sha256').hexdigest()
        if not digest.startswith(match[1]):
            raise ValueError(
                f'{path} must have a SHA-256 of {match[1]}..., as its name says, got '
                f'{digest[:16]}.... Remove the file and download it again'
            )
    return path


def _download(url: str, path: str, check_hash: bool, progress: bool) -> None:
    """Download to a path, all or nothing."""
    folder, name = os.path.split(path)
    # Under its own name, for the sake of the hash
    partial = os.path.join(folder, f'.{uuid.uuid4().hex}.{name}')
    try:
        torch.hub.download_url_to_file(url, partial, progress=progress)
        _reject_page(partial)
        _checked(partial, check_hash)
        # Servers that break off do not always say so
        read_checkpoint(partial)
        os.replace(partial, path)
    except (OSError, HTTPException, ValueError) as error:
        reason = str(error).replace(partial, 'the file')
        raise RuntimeError(
            f'{name} could not be downloaded from {url}: {reason or repr(error)}. '
            f'Download it by other means and put it, as {name}, into a folder; then set '
            f'root or the environment variable {WEIGHTS_VARIABLE} to this folder'
        ) from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _reject_page(path: str) -> None:
    """Raise if a server has sent a page or a message instead of the file.

    Google Drive does so to ask for confirmation, to ask for a login, and after too many
    downloads by others.
    """
    with open(path, 'rb') as stream:
        start = stream.read(65536).removeprefix(codecs.BOM_UTF8).lstrip()
    if b'\0' in start:  # not text, whatever the first byte is
        return
    if start[:1] in (b'{', b'['):
        text = start[:200].decode(errors='replace')
        raise ValueError(f'the server sent a message {text!r} instead of the file')
    if start[:1] == b'<':
        title = re.search(rb'<title>(.*?)</title>', start, re.DOTALL | re.IGNORECASE)
        name = title[1].decode(errors='replace').strip() if title else ''
        raise ValueError(f'the server sent a web page {name!r} instead of the file')
