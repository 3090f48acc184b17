# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""README.md and examples/README.md: what they name is there, and runs as written."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from torchgeo_softcon import __version__
from torchgeo_softcon.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / 'README.md', ROOT / 'examples' / 'README.md')


def anchors(page: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r'(?m)^#+ (.*)$', page.read_text())
    return {re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.parent.name)
def test_links(page: Path) -> None:
    for target in re.findall(r'\]\(([^)]+)\)', page.read_text()):
        if target.startswith('http'):
            continue
        name, _, anchor = target.partition('#')
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.parent.name)
def test_commands(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r'torchgeo-softcon ([a-z][a-z-]*)(?= )', text):
        assert name in COMMANDS
    for name in re.findall(r'examples/([a-z0-9_]+\.(?:yaml|py))', text):
        assert (ROOT / 'examples' / name).exists(), name


def test_readme_is_short_and_says_how_to_test() -> None:
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 150
    for mark in ('main', 'tests'):
        assert text.count(f'<!-- command: {mark} -->\n```bash\n') == 1


def test_every_recipe_is_listed() -> None:
    text = PAGES[1].read_text()
    for path in (ROOT / 'examples').glob('*.yaml'):
        assert f'({path.name})' in text, path.name


@pytest.mark.usefixtures('own_folder')
def test_weights_load_as_the_readme_says() -> None:
    (code,) = re.findall(
        r'```python\n(import timm.*?)```', PAGES[0].read_text(), re.DOTALL
    )
    names: dict[str, Any] = {'images': torch.rand(2, 12, 224, 224)}
    exec(code, names)  # noqa: S102
    assert names['features'].shape == (2, 384)


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == __version__
    first = re.search(r'(?m)^## (\S+) - (\S+)$', (ROOT / 'CHANGELOG.md').read_text())
    assert first is not None
    assert first.groups() == (__version__, citation['date-released'])
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    pythons = [c for c in project['classifiers'] if 'Python :: 3.' in c]
    assert len(pythons) == 4
