# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from inspect import getclosurevars
from pathlib import Path

import pytest

import torchgeo_softcon

PACKAGE = Path(torchgeo_softcon.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))

# A unit may import the units of earlier rows, and those of its own row
ROWS: tuple[tuple[str, ...], ...] = (
    ('_checks', '_cores', '_lazy', '_version', '_workers', 'bands', 'plugin'),
    ('_compat',),
    ('storage',),
    ('geo',),
    ('landcover',),
    ('losses', 'modules', 'transforms'),
    ('synthetic',),
    ('ssl4eo',),
    ('models',),
    ('datasets',),
    ('labels',),
    # Before tasks, which ask the datamodule of their trainer for what it may offer
    ('datamodules',),
    ('tasks',),
    ('export',),
    ('evaluation',),
    ('callbacks',),
    ('report',),
    ('cli',),
    ('__main__',),
)
ROW = {unit: row for row, units in enumerate(ROWS) for unit in units}

# These are imported by torch in the middle of `import torch`
STANDARD_LIBRARY_ONLY = ('__init__', '_lazy', 'plugin')


def module_name(path: Path) -> str:
    parts = [PACKAGE.name, *path.with_suffix('').parts]
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


NAMES = {module_name(path): path for path in MODULES}


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, full name and whether at run time, for each import of a module."""
    tree = ast.parse((PACKAGE / path).read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == 'TYPE_CHECKING'
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = [PACKAGE.name, *path.parent.parts]
    for node in ast.walk(tree):
        runtime = id(node) not in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, runtime
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from package import unit` names a module, not an object in one
                named = f'{module}.{alias.name}'
                is_module = module == PACKAGE.name or named in NAMES
                yield node.lineno, named if is_module else module, runtime


def unit(path: Path) -> str:
    return path.parts[0].removesuffix('.py')


@pytest.mark.parametrize('path', MODULES, ids=str)
def test_module_has_a_row(path: Path) -> None:
    assert path.name != 'utils.py', 'a function without a home is a missing module'
    assert unit(path) == '__init__' or unit(path) in ROW


@pytest.mark.parametrize('path', MODULES, ids=str)
def test_imports_go_to_the_left(path: Path) -> None:
    # The package itself names all units
    row = ROW.get(unit(path), len(ROWS))
    for line, name, _ in imports(path):
        root, _, rest = name.partition('.')
        if root == PACKAGE.name:
            imported = rest.partition('.')[0]
            assert imported in ROW or imported == '__version__', (
                f'line {line}: import {name} from the module that defines it'
            )
            assert ROW.get(imported, 0) <= row, f'line {line}: {path} uses {name}'


@pytest.mark.parametrize('path', MODULES, ids=str)
def test_torchgeo_is_imported_by_compat_only(path: Path) -> None:
    for line, name, _ in imports(path):
        host = name.partition('.')[0] == 'torchgeo'
        assert not host or unit(path) == '_compat', f'line {line}: {name}'


@pytest.mark.parametrize('name', STANDARD_LIBRARY_ONLY)
def test_light_modules_import_the_standard_library_only(name: str) -> None:
    light = {f'{PACKAGE.name}.{module}' for module in STANDARD_LIBRARY_ONLY}
    for line, imported, runtime in imports(Path(f'{name}.py')):
        if runtime and imported.partition('.')[0] not in sys.stdlib_module_names:
            assert imported in light, f'line {line}: {imported}'


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a module imports at run time, also in functions."""
    found = set()
    for _, name, runtime in imports(path):
        # An object is defined in the module before the last dot
        module = name if name in NAMES else name.rpartition('.')[0]
        if runtime and module in NAMES and module != PACKAGE.name:
            found.add(module)
    if path.name == '__init__.py' and path.parent.parts:
        # What its names are loaded from, see lazy_names
        found |= {n for n in NAMES if n.startswith(f'{module_name(path)}.')}
    return found


def test_no_circles() -> None:
    graph = {name: imported_modules(path) for name, path in NAMES.items()}
    assert f'{PACKAGE.name}.cli.data' in graph[f'{PACKAGE.name}.cli.report']
    TopologicalSorter(graph).prepare()  # names the modules of a circle in its error


@pytest.mark.parametrize('path', MODULES, ids=str)
def test_modules_are_short(path: Path) -> None:
    assert len((PACKAGE / path).read_text().splitlines()) <= 450


def test_a_weight_by_name_is_light() -> None:
    """It adds nothing to what the host has imported for its own models."""
    code = (
        'import sys, torchgeo.models\n'
        'before = {*sys.modules}\n'
        'import torchgeo_softcon\n'
        'torchgeo.models.get_weight("ViTSmall16_Weights.SENTINEL2_SOFTCON")\n'
        'print(*{*sys.modules} - before)'
    )
    process = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    added = process.stdout.split()
    heavy = ('kornia', 'lightly', 'lightning', 'pandas', 'rasterio')
    assert not [name for name in added if name.startswith(heavy)]
    ours = {name.split('.')[1] for name in added if name.startswith(f'{PACKAGE.name}.')}
    assert ours <= {'_checks', '_compat', 'bands', 'models', 'transforms'}
    assert f'{PACKAGE.name}.transforms.crops' not in added


FACES = [
    path
    for path in MODULES
    if path.name == '__init__.py' and 'lazy_names(' in (PACKAGE / path).read_text()
]


@pytest.mark.parametrize('path', FACES, ids=str)
def test_type_checkers_see_the_public_names(path: Path) -> None:
    face = import_module('.'.join([PACKAGE.name, *path.parent.parts]))
    (block,) = (
        node
        for node in ast.parse((PACKAGE / path).read_text()).body
        if isinstance(node, ast.If)
    )
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name  # else type checkers take it for private
    }
    homes = getclosurevars(face.__getattr__).nonlocals['homes']
    assert typed == homes
    assert set(face.__all__) == {*typed} - {'__version__'}
    for name in typed:
        assert getattr(face, name) is not None
