# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Docstrings and messages read as plain English (ruff checks the imperative mood)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchgeo_softcon

PACKAGE = Path(torchgeo_softcon.__file__).parent
MODULES = sorted(PACKAGE.rglob('*.py'))

#: Phrases that read as translated.
PHRASES = ('cannot be had', 'can not', 'for want of', 'a pass less', 'what there is')


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The name and the docstring of a module and of what it defines."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, 'name', path.stem), text


@pytest.mark.parametrize(
    'path', MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_docstrings(path: Path) -> None:
    for name, text in docstrings(path):
        assert not text.startswith('What '), f'{name}: name the thing or the action'


@pytest.mark.parametrize(
    'path', MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_phrases(path: Path) -> None:
    text = re.sub(r'\s+(#:? )?', ' ', path.read_text()).lower()
    for phrase in PHRASES:
        assert phrase not in text, f'{path.name}: {phrase!r} reads as translated'
