# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from nbmake.nb_run import NotebookRun

from .models.helpers import WeightsFolder

EXAMPLES = Path(__file__).parents[1] / 'examples'
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob('*.ipynb'))

#: Those that take published weights if they can.
PUBLISHED = {
    'finetune.ipynb': 'ViTSmall16_Weights.SENTINEL2_SOFTCON',
    'search_by_example.ipynb': 'ViTSmall14_DINOv2_Weights.SENTINEL2_SOFTCON',
}


@pytest.fixture(autouse=True)
def offline(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network, no weights, and scenes in a folder that all notebooks share."""
    root = tmp_path_factory.getbasetemp()
    monkeypatch.setenv('TORCHGEO_SOFTCON_CACHE', str(root / 'notebooks'))
    monkeypatch.setenv('TORCH_HOME', str(root / 'no_weights'))
    monkeypatch.delenv('TORCHGEO_SOFTCON_WEIGHTS', raising=False)
    # Quick: is the package there, and not whether all that it needs is (see
    # test_imports_what_the_package_declares)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_NO_DEPS', '1')
    for name in ('http_proxy', 'https_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')


def cells(notebook: Any, kind: str = 'code') -> list[Any]:
    return [cell for cell in notebook['cells'] if cell['cell_type'] == kind]


def run(name: str) -> str:
    """Run a notebook with the small settings of its metadata.

    Args:
        name: Name of the file.

    Returns:
        What it has printed.
    """
    before = sorted(EXAMPLES.iterdir())
    result = NotebookRun(EXAMPLES / name, default_timeout=300).execute()
    assert result.error is None, result.error.trace
    assert sorted(EXAMPLES.iterdir()) == before

    first, *_ = cells(result.nb)
    assert not any('ERROR' in output.get('text', '') for output in first.outputs)
    return ''.join(_printed(result.nb))


def imports(notebook: Any) -> Iterator[str]:
    """Top-level packages that the cells of a notebook import, in any place."""
    for cell in cells(notebook):
        # Lines of IPython, which are not Python
        source = re.sub(r'^\s*[%!].*$', '', ''.join(cell['source']), flags=re.MULTILINE)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition('.')[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield (node.module or '').partition('.')[0]


def normalize(distribution: str) -> str:
    """The name of a requirement or a distribution, in one spelling."""
    (name,) = re.findall(r'^[\w.-]+', distribution)
    return re.sub('[-_.]+', '-', name).lower()


def undeclared(notebook: Any) -> set[str]:
    """What a notebook imports, but `pip install torchgeo-softcon` need not bring."""
    project = tomllib.loads((EXAMPLES.parent / 'pyproject.toml').read_text())['project']
    declared = {normalize(text) for text in [project['name'], *project['dependencies']]}
    distributions = packages_distributions()
    return {
        package
        for package in {*imports(notebook)} - sys.stdlib_module_names
        if declared.isdisjoint(map(normalize, distributions.get(package, [package])))
    }


def _printed(notebook: Any) -> Iterator[str]:
    for cell in cells(notebook):
        for output in cell.outputs:
            if output.output_type == 'stream' and output.name == 'stdout':
                yield output.text


@pytest.mark.parametrize('name', [n for n in NOTEBOOKS if n not in PUBLISHED])
def test_runs(name: str) -> None:
    run(name)


@pytest.mark.parametrize('name', PUBLISHED)
def test_without_the_published_weights_says_so(name: str) -> None:
    assert (
        'The published weights cannot be downloaded here. Instead: a ResNet-18'
        in run(name)
    )


@pytest.mark.parametrize(('name', 'weights'), PUBLISHED.items())
def test_with_the_published_weights(
    name: str,
    weights: str,
    weights_folder: WeightsFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('TORCHGEO_SOFTCON_WEIGHTS', str(weights_folder.root))
    assert f'Published weights: {weights}' in run(name)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_is_small_and_clean(name: str) -> None:
    content = (EXAMPLES / name).read_bytes()
    assert len(content) < 300_000
    notebook = json.loads(content)
    assert '%pip install' in ''.join(cells(notebook)[0]['source'])
    # Warnings tell the paths of the machine they come from
    outputs = [output for cell in cells(notebook) for output in cell['outputs']]
    assert not [output for output in outputs if output.get('name') == 'stderr']


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_imports_what_the_package_declares(name: str) -> None:
    notebook = json.loads((EXAMPLES / name).read_bytes())
    assert 'torchgeo_softcon' in imports(notebook)
    assert not undeclared(notebook)


def test_undeclared_imports_are_seen() -> None:
    source = ['%pip install x\n', 'import os, distributed as g\n', 'if g:\n']
    source += ['    from nbmake.nb_run import NotebookRun\n', '    !ls\n']
    source += ['    import yaml, torch.nn\n', '    from none_such import x']
    cell = {'cell_type': 'code', 'source': source}
    assert undeclared({'cells': [cell]}) == {'distributed', 'nbmake', 'none_such'}
