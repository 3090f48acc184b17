# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import copy
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, cast

import pytest

import torchgeo_softcon
from torchgeo_softcon import plugin

REPOSITORY = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())
DECLARED: dict[str, dict[str, str]] = PYPROJECT['project']['entry-points']

# A weight that exists for these tests only. Its enum is called like one of TorchGeo's.
THROWAWAY = """
from torchvision.models._api import Weights, WeightsEnum

class ViTSmall16_Weights(WeightsEnum):
    THROWAWAY = Weights(
        url='', transforms=None, meta={'model': 'vit_small_patch16_224'}
    )
"""

# What a user may see, after any order of imports. Each name is asked for in a way that
# imports nothing more than it has to.
FACTS = """
import importlib, inspect, json, sys
from importlib.machinery import SourceFileLoader
from importlib.resources import files
from types import ModuleType

def weight(name='ViTSmall16_Weights.THROWAWAY'):
    import torchgeo.models
    try:
        return type(torchgeo.models.get_weight(name)).__module__
    except ValueError:
        return None

def short_name(base, name):
    from jsonargparse._typehints import resolve_class_path_by_name
    return resolve_class_path_by_name(base, name)

def host_tasks():
    try:
        return importlib.import_module('torchgeo.tasks')
    except ImportError:
        return importlib.import_module('torchgeo.trainers')

def facts():
    found = weight()
    from torchgeo.datamodules import BaseDataModule
    import timm.models
    names = ('torchgeo.models', 'torchgeo.models.api', 'torchgeo.datamodules')
    names += ('timm', 'timm.models')
    modules = [sys.modules[name] for name in names] + [host_tasks()]
    return {
        'weight': found,
        'host weight': weight('ViTSmall16_Weights.SENTINEL2_ALL_DINO'),
        'task': short_name(host_tasks().BaseTask, 'SoftConTask'),
        'datamodule': short_name(BaseDataModule, 'SyntheticScenesDataModule'),
        'model': timm.models.is_model('dinomc_resnet50'),
        'listed': 'softcon_resnet50' in sys.modules['torchgeo.models'].list_models(),
        'class': sorted({type(m).__name__ for m in modules}),
        'loader': sorted(
            {type(x).__name__ for m in modules for x in (m.__loader__, m.__spec__.loader)}
        ),
        'source': 'def get_weight' in inspect.getsource(sys.modules[names[1]]),
        'resource': files('torchgeo.models').joinpath('api.py').is_file(),
    }

def tell(**more):
    print(json.dumps({**facts(), **more}))
"""

EXPECTED = {
    'weight': 'throwaway',
    'host weight': 'torchgeo.models.vit',
    'task': 'torchgeo_softcon.SoftConTask',
    'datamodule': 'torchgeo_softcon.SyntheticScenesDataModule',
    'model': True,
    'listed': True,
    'class': ['module'],
    'loader': ['SourceFileLoader'],
    'source': True,
    'resource': True,
}


class Order(NamedTuple):
    code: str
    expected: Mapping[str, Any] = MappingProxyType({})
    env: Mapping[str, str] = MappingProxyType({})
    torch_first: bool = True  # and what TorchGeo needs, all but timm and Lightning
    warnings: int = 0


ORDERS = {
    'models': Order(
        """
        from torchgeo.models import get_weight
        early = type(get_weight('ViTSmall16_Weights.THROWAWAY')).__module__
        light = not {'lightning', 'torchgeo.datamodules'} & {*sys.modules}
        tell(early=early, light=light)
        """,
        expected={'early': 'throwaway', 'light': True},
    ),
    'models.api': Order(
        """
        from torchgeo.models.api import get_weight
        tell(early=type(get_weight('ViTSmall16_Weights.THROWAWAY')).__module__)
        """,
        expected={'early': 'throwaway'},
    ),
    'models.vit': Order(
        """
        import torchgeo.models.vit
        tell(early=weight())
        """,
        expected={'early': 'throwaway'},
    ),
    'torch, then reload': Order(
        """
        import torch
        early = [m for m in sys.modules if m.startswith(('torchgeo.', 'lightning'))]
        import torchgeo.models.api
        importlib.reload(torchgeo.models.api)
        importlib.reload(host_tasks())
        importlib.reload(torchgeo.models)
        tell(early=early)
        """,
        expected={'early': []},
        torch_first=False,
    ),
    'tasks': Order(
        """
        host_tasks()
        from torchgeo.models import get_weight
        early = type(get_weight('ViTSmall16_Weights.THROWAWAY')).__module__
        tell(early=early)
        """,
        expected={'early': 'throwaway'},
    ),
    'datamodules': Order(
        """
        import torchgeo.datamodules
        base = torchgeo.datamodules.BaseDataModule
        tell(early=short_name(base, 'SyntheticScenesDataModule'))
        """,
        expected={'early': 'torchgeo_softcon.SyntheticScenesDataModule'},
    ),
    'timm': Order(
        """
        from timm.models import create_model
        early = create_model('softcon_resnet50').conv1.in_channels
        light = not {'torchgeo.models', 'lightning', 'lightly'} & {*sys.modules}
        tell(early=early, light=light)
        """,
        expected={'early': 13, 'light': True},
    ),
    'lightning': Order('import lightning\ntell()'),
    'plugin': Order(
        """
        import torchgeo_softcon
        early = [m for m in sys.modules if m in ('torch', 'torchgeo', 'numpy')]
        tell(early=early)
        """,
        # The explicit import must do without the hook of torch
        env={'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'},
        expected={'early': []},
        torch_first=False,
    ),
    'from plugin': Order(
        """
        from torchgeo_softcon import SoftConTask
        tell(early=weight())
        """,
        expected={'early': 'throwaway'},
    ),
    'threads': Order(
        """
        # The host's own stack cannot be imported by several threads at once: without
        # this, Python detects deadlocks among its modules also in absence of a plugin
        import threading
        import torch, torchvision, timm, lightning.pytorch, lightly.loss
        import kornia.augmentation, segmentation_models_pytorch, torchgeo.datasets
        start = threading.Barrier(6)

        def run(number):
            start.wait()
            if number % 3 == 0:
                found.append(weight())
            elif number % 3 == 1:
                base = host_tasks().BaseTask
                found.append(short_name(base, 'SoftConTask'))
            else:
                from torchgeo_softcon import SoftConTask
                found.append(SoftConTask.__name__)

        found = []
        threads = [threading.Thread(target=run, args=[i]) for i in range(6)]
        [thread.start() for thread in threads]
        [thread.join(120) for thread in threads]
        alive = sum(thread.is_alive() for thread in threads)
        tell(alive=alive, found=sorted({str(name) for name in found}))
        """,
        expected={
            'alive': 0,
            'found': ['SoftConTask', 'throwaway', 'torchgeo_softcon.SoftConTask'],
        },
    ),
    'opt-out, import after': Order(
        """
        import torch
        loaded = [m for m in sys.modules if m.startswith('torchgeo_softcon')]
        early = weight()
        import torchgeo_softcon
        tell(early=early, loaded=loaded)
        """,
        env={'TORCHGEO_SOFTCON_AUTOLOAD': '0'},
        expected={'early': None, 'loaded': []},
        torch_first=False,
    ),
    'opt-out, import before': Order(
        'import torchgeo_softcon\ntell()',
        env={'TORCHGEO_SOFTCON_AUTOLOAD': '0'},
        torch_first=False,
    ),
    'broken': Order(
        'import torch\nimport torchgeo.datamodules\nhost_tasks()\ntell()',
        torch_first=False,
        warnings=1,
    ),
}


# Before TorchGeo 0.10, these are the tasks
if importlib.util.find_spec('torchgeo.tasks'):
    ORDERS['trainers'] = Order(
        """
        import torchgeo.trainers
        tell(early=weight())
        """,
        expected={'early': 'throwaway'},
    )


# Imports what no order is about, which takes most of the time, and then forks for each
# folder that it is told of
FORKS = """
import os, sys, traceback
import torch, torchvision, pandas, matplotlib.pyplot, rasterio, geopandas, kornia

for line in sys.stdin:
    folder = line.rstrip()
    if not (child := os.fork()):
        for stream in (sys.stdout, sys.stderr):
            sink = open(f'{folder}/{stream.name[1:-1]}', 'w')
            os.dup2(sink.fileno(), stream.fileno())
        status = 0
        try:
            exec(open(f'{folder}/code.py').read(), {'__name__': '__main__'})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment(metadata: Path, env: Mapping[str, str]) -> dict[str, str]:
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in (plugin.AUTOLOAD_VARIABLE, 'TORCH_DEVICE_BACKEND_AUTOLOAD')
    }
    # The first distribution of a name hides any other, such as the really installed one
    source = Path(torchgeo_softcon.__file__).parents[1]
    variables['PYTHONPATH'] = os.pathsep.join([str(metadata), str(source)])
    return {**variables, **env}


def interpret(
    metadata: Path, *args: str, env: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter in which the entry points of *metadata* are installed."""
    return subprocess.run(
        [sys.executable, *args],
        env=environment(metadata, env),
        cwd=metadata,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


class Forks:
    """Interpreters with the entry points of *metadata* that have imported torch."""

    def __init__(self, metadata: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, '-c', FORKS],
            env=environment(metadata, {}),
            cwd=metadata,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
        (folder / 'code.py').write_text(code)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(folder, file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        printed = [(folder / name).read_text() for name in ('stdout', 'stderr')]
        return subprocess.CompletedProcess([], status, *printed)


@pytest.fixture(scope='module')
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation of the package whose entry points are those of pyproject.toml."""
    root = tmp_path_factory.mktemp('site')
    return write_metadata(root)


def write_metadata(root: Path, **more: dict[str, str]) -> Path:
    (root / 'throwaway.py').write_text(THROWAWAY)
    (root / 'facts.py').write_text(FACTS)
    (root / 'broken.py').write_text("raise OSError('libthrowaway.so is missing')")
    groups: dict[str, dict[str, str]] = {**DECLARED, **more}
    groups['torchgeo.weights'] = {
        **groups.get('torchgeo.weights', {}),
        'ThrowAway': 'throwaway:ViTSmall16_Weights',
    }
    lines = []
    for group, entry_points in groups.items():
        lines += [f'[{group}]', *(f'{k} = {v}' for k, v in entry_points.items())]
    info = root / 'torchgeo_softcon-99.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Name: torchgeo-softcon\nVersion: 99\n')
    (info / 'entry_points.txt').write_text('\n'.join(lines))
    return root


@pytest.fixture(scope='module')
def broken_metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    broken = {'Broken': 'broken:Broken'}
    return write_metadata(
        tmp_path_factory.mktemp('broken'),
        **{
            'torchgeo.datamodules': broken | DECLARED['torchgeo.datamodules'],
            'torchgeo.tasks': broken | DECLARED['torchgeo.tasks'],
        },
    )


@pytest.fixture(scope='module')
def forks(metadata: Path) -> Iterator[Forks]:
    forks = Forks(metadata)
    yield forks
    forks.process.communicate()


@pytest.mark.parametrize('order', ORDERS)
def test_every_order_of_imports(
    order: str, metadata: Path, broken_metadata: Path, forks: Forks, tmp_path: Path
) -> None:
    code = 'from facts import *\n' + textwrap.dedent(ORDERS[order].code)
    if ORDERS[order].torch_first:
        process = forks.run(tmp_path, code)
    else:
        site = broken_metadata if order == 'broken' else metadata
        process = interpret(site, '-c', code, env=ORDERS[order].env)
    assert process.returncode == 0, process.stderr
    actual = json.loads(process.stdout.splitlines()[-1])
    assert actual == {**EXPECTED, **ORDERS[order].expected}
    assert process.stderr.count('RuntimeWarning: torchgeo-softcon') == (
        ORDERS[order].warnings
    ), process.stderr


# With the stock command line, whose classes have other names in TorchGeo 0.8
CLI = """
import io, contextlib, sys, pathlib
from torchgeo.main import main

def config(*args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(['fit', *args, '--print_config'])
        except SystemExit as e:
            assert not e.code, e
    return out.getvalue()

def class_paths(text):
    return [s.partition(': ')[2] for s in text.splitlines() if ' class_path: torchgeo_s' in s]

data = 'SyntheticScenesDataModule'
texts = [
    config('--model', 'SoftConTask', '--data', data),
    config('--model.class_path', 'SoftConTask', '--data.class_path', data),
    config('--model', 'torchgeo_softcon.SoftConTask', f'--data=torchgeo_softcon.{data}'),
]
pathlib.Path(sys.argv[1]).write_text(texts[0])
texts.append(config('--config', sys.argv[1]))
pathlib.Path(sys.argv[1]).write_text(
    f'model:\\n  class_path: SoftConTask\\ndata:\\n  class_path: {data}\\n'
)
texts.append(config('--config', sys.argv[1]))
for text in texts:
    print(*class_paths(text))
"""


def test_command_line_takes_short_and_full_names(
    metadata: Path, tmp_path: Path
) -> None:
    process = interpret(metadata, '-c', CLI, str(tmp_path / 'config.yaml'))
    assert process.returncode == 0, process.stderr
    names = f'{EXPECTED["task"]} {EXPECTED["datamodule"]}'
    assert process.stdout.splitlines() == [names] * 5


def test_console_script_without_the_hook_takes_full_names(metadata: Path) -> None:
    script = Path(sys.executable).with_name('torchgeo')
    if not script.exists():
        pytest.skip('TorchGeo has no console script beside this interpreter')
    args = ('fit', '--model', 'torchgeo_softcon.SoftConTask', '--print_config')
    process = interpret(
        metadata, str(script), *args, env={'TORCHGEO_SOFTCON_AUTOLOAD': '0'}
    )
    assert process.returncode == 0, process.stderr
    assert 'class_path: torchgeo_softcon.SoftConTask' in process.stdout


SPAWN = """
from torch.utils.data import DataLoader, Dataset

class Names(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        from torchgeo.models import get_weight
        return str(get_weight('ViTSmall16_Weights.THROWAWAY'))

if __name__ == '__main__':
    print(*DataLoader(Names(), num_workers=1, multiprocessing_context='spawn'))
"""


def test_spawned_worker_knows_the_weight(metadata: Path, tmp_path: Path) -> None:
    script = tmp_path / 'spawn.py'
    script.write_text(SPAWN)
    process = interpret(metadata, str(script))
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "['ViTSmall16_Weights.THROWAWAY']"


def test_installed_entry_points_are_those_of_pyproject() -> None:
    try:
        installed = distribution('torchgeo-softcon').entry_points
    except PackageNotFoundError:
        pytest.skip('the package is on the path, but not installed')
    actual: dict[str, dict[str, str]] = {}
    for entry_point in installed:
        actual.setdefault(entry_point.group, {})[entry_point.name] = entry_point.value
    scripts = PYPROJECT['project']['scripts']
    declared = {group: names for group, names in DECLARED.items() if names}
    assert actual == {**declared, 'console_scripts': scripts}


class FakeEntryPoint(NamedTuple):
    name: str
    load: Callable[[], None]


class Stage:
    """A copy of the plugin that serves a small host instead of TorchGeo."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = importlib.util.spec_from_file_location('stage_plugin', plugin.__file__)
        assert spec is not None
        assert spec.loader is not None
        self.plugin = cast(Any, importlib.util.module_from_spec(spec))
        spec.loader.exec_module(self.plugin)
        self.calls: list[str] = []
        self.actions: dict[str, Callable[[], object]] = {}
        self.root = root
        triggers = {'stage_host.early': 'early', 'stage_host.late': 'late'}
        self.plugin._TRIGGERS = triggers
        self.plugin._HOSTS = (*triggers, 'stage_host.other')
        self.plugin._PACKAGE = 'stage_ours'
        self.plugin._entry_points = self.entry_points
        monkeypatch.syspath_prepend(str(root))
        self.write('stage_host/__init__.py')
        self.write('stage_host/early.py', 'name = 1')
        self.write('stage_host/late.py', 'import stage_host.early\nname = 2')

    def write(self, path: str, code: str = '') -> None:
        file = self.root / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)

    def entry_points(self, group: str | None = None) -> list[FakeEntryPoint]:
        def load() -> None:
            self.calls.append(str(group))
            self.actions.get(str(group), lambda: None)()

        return [FakeEntryPoint('name', load)]

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f'stage_host.{name}')


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    stage = Stage(tmp_path, monkeypatch)
    yield stage
    if stage.plugin._finder in sys.meta_path:
        sys.meta_path.remove(stage.plugin._finder)
    for name in [n for n in sys.modules if n.startswith('stage_')]:
        del sys.modules[name]


class TestStage:
    def test_absent_modules_are_awaited(self, stage: Stage) -> None:
        stage.plugin.install()
        stage.plugin.install()
        assert stage.calls == []
        early = stage.module('early')
        assert stage.calls == ['early']
        assert type(early) is ModuleType
        assert type(early.__loader__).__name__ == 'SourceFileLoader'
        assert early.__spec__ is not None
        assert early.__spec__.loader is early.__loader__
        assert inspect.getsource(early).strip() == 'name = 1'
        assert files('stage_host').joinpath('early.py').is_file()

    def test_complete_modules_are_acted_upon_at_once(self, stage: Stage) -> None:
        stage.module('early')
        stage.plugin.install()
        assert stage.calls == ['early']

    def test_module_in_mid_import_is_acted_upon_at_its_first_use(
        self, stage: Stage
    ) -> None:
        stage.write('stage_host/early.py', 'import stage_hook\nname = 1')
        stage.write('stage_hook.py', 'import stage_plugin\nstage_plugin.install()')
        sys.modules['stage_plugin'] = stage.plugin
        early = stage.module('early')
        assert stage.calls == []
        assert type(early) is not ModuleType
        assert early.name == 1
        assert stage.calls == ['early']
        assert type(early) is ModuleType

    def test_half_imported_host_delays_the_action(self, stage: Stage) -> None:
        stage.plugin.install()
        stage.write(
            'stage_host/other.py',
            'import stage_host.late\n'
            'from stage_host.early import name\n'
            'from stage_calls import calls\n'
            'middle = [*calls]',
        )
        sys.modules['stage_calls'] = ModuleType('stage_calls')
        sys.modules['stage_calls'].__dict__['calls'] = stage.calls
        assert stage.module('other').middle == []
        assert stage.module('late').name == 2
        assert stage.calls == ['early', 'late']
        assert type(stage.module('early')) is ModuleType

    def test_own_module_in_mid_import_delays_the_action(self, stage: Stage) -> None:
        stage.write('stage_ours/__init__.py')
        stage.write('stage_ours/unit.py', 'from stage_host.late import name')
        stage.plugin.install()
        stage.actions['late'] = lambda: complete.append(
            hasattr(sys.modules['stage_ours.unit'], 'name')
        )
        complete: list[bool] = []
        importlib.import_module('stage_ours.unit')
        assert stage.calls == ['early', 'late']
        assert complete == [True]

    def test_action_that_imports_another_host_module(self, stage: Stage) -> None:
        stage.actions['early'] = lambda: stage.module('late')
        stage.plugin.install()
        stage.module('early')
        assert stage.calls == ['early', 'late']

    def test_reload_acts_again(self, stage: Stage) -> None:
        stage.plugin.install()
        importlib.reload(stage.module('early'))
        assert stage.calls == ['early', 'early']

    def test_failed_import_of_the_host_is_no_fault_of_ours(self, stage: Stage) -> None:
        stage.write('stage_host/late.py', 'import stage_hook\nimport stage_missing')
        stage.write('stage_hook.py', 'import stage_plugin\nstage_plugin.install()')
        sys.modules['stage_plugin'] = stage.plugin
        with pytest.raises(ModuleNotFoundError, match='stage_missing'):
            stage.module('late')
        assert stage.module('early').name == 1
        assert stage.calls == ['early']

    def test_fault_of_ours_warns_once(self, stage: Stage) -> None:
        stage.actions['early'] = stage.actions['late'] = lambda: 1 / 0
        stage.plugin.install()
        with pytest.warns(RuntimeWarning, match='ZeroDivisionError') as record:
            stage.module('late')
        assert len(record) == 1
        assert stage.calls == ['early', 'late']

    @pytest.mark.filterwarnings('error')
    def test_fault_of_ours_never_raises(
        self, stage: Stage, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stage.actions['early'] = lambda: 1 / 0
        stage.plugin.install()
        assert stage.module('early').name == 1
        assert 'torchgeo-softcon list' in capsys.readouterr().err

    def test_damaged_metadata_never_raises(self, stage: Stage) -> None:
        stage.plugin._entry_points = lambda group: 1 / 0
        stage.plugin.install()
        with pytest.warns(RuntimeWarning, match='ZeroDivisionError'):
            assert stage.module('early').name == 1

    def test_specification_can_be_asked_and_copied(self, stage: Stage) -> None:
        stage.plugin.install()
        spec = importlib.util.find_spec('stage_host.early')
        assert spec is not None
        loader: Any = copy.deepcopy(spec).loader
        assert loader.get_source('stage_host.early') == 'name = 1'
        assert stage.calls == []

    def test_failure_of_the_installation_is_reported(self, stage: Stage) -> None:
        stage.plugin._TRIGGERS = None
        with pytest.warns(RuntimeWarning, match='TypeError'):
            stage.plugin.autoload()

    def test_warning_that_cannot_be_shown_breaks_nothing(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError('no display')

        monkeypatch.setattr(warnings, 'showwarning', fail)
        monkeypatch.setattr(warnings, 'warn', fail)
        stage.plugin._TRIGGERS = None
        stage.plugin.autoload()

    def test_thread_waits_for_the_one_that_acts(self, stage: Stage) -> None:
        acting, go_on = threading.Event(), threading.Event()

        def act() -> None:
            acting.set()
            assert go_on.wait(30)
            done.append('early')

        stage.write('stage_host/early.py', 'import stage_hook\nname = 1')
        stage.write('stage_hook.py', 'import stage_plugin\nstage_plugin.install()')
        sys.modules['stage_plugin'] = stage.plugin
        stage.actions['early'] = act
        early = stage.module('early')
        done: list[str] = []
        seen: list[list[str]] = []
        first = threading.Thread(target=lambda: early.name)
        second = threading.Thread(
            target=lambda: seen.append([str(early.name), *done]), daemon=True
        )
        first.start()
        assert acting.wait(30)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        go_on.set()
        first.join(30)
        second.join(30)
        assert seen == [['1', 'early']]
        assert stage.calls == ['early']

    def test_threads_with_opposite_orders_do_not_block(self, stage: Stage) -> None:
        # One thread holds the import lock of a host module, ours want it in an action
        stage.write('stage_host/late.py', 'import time\ntime.sleep(0.2)\nname = 2')
        stage.actions['early'] = lambda: stage.module('late')
        stage.actions['late'] = lambda: stage.module('early')
        stage.plugin.install()
        threads = [
            threading.Thread(target=stage.module, args=[name], daemon=True)
            for name in ('early', 'late', 'early', 'late')
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert stage.module('early').name + stage.module('late').name == 3
        assert sorted(set(stage.calls)) == ['early', 'late']

    def test_opting_out_forgets_the_package_but_not_an_explicit_import(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.write('stage_ours/__init__.py')
        monkeypatch.setenv('TORCHGEO_SOFTCON_AUTOLOAD', '0')
        importlib.import_module('stage_ours')
        stage.plugin.autoload()
        assert 'stage_ours' not in sys.modules
        assert stage.plugin._finder not in sys.meta_path

        importlib.import_module('stage_ours')
        stage.plugin.install_unless_silenced()
        stage.plugin.autoload()
        assert 'stage_ours' in sys.modules
        assert stage.plugin._finder in sys.meta_path


class TestRegister:
    @pytest.fixture(autouse=True)
    def nothing_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugin, '_yielded', set())

    @pytest.fixture
    def api(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        api: Any = importlib.import_module('torchgeo.models.api')
        monkeypatch.setattr(api, '_model_weights', dict(api._model_weights))
        monkeypatch.setattr(api, '_model', dict(api._model))
        return api

    def weights(self, *members: str) -> Any:
        from torchvision.models._api import Weights, WeightsEnum

        # Members of equal values would be one member
        meta = {'model': 'vit_small_patch16_224'}
        values = {name: Weights(name, None, meta) for name in members}
        return WeightsEnum('ViTSmall16_Weights', values)  # type: ignore[call-overload]

    def test_new_member_is_found_and_old_ones_stay(self, api: Any) -> None:
        ours = self.weights('THROWAWAY')
        plugin._register(ours)
        plugin._register(ours)
        assert api.get_weight('ViTSmall16_Weights.THROWAWAY') is ours.THROWAWAY
        theirs = api.get_weight('ViTSmall16_Weights.SENTINEL2_ALL_DINO')
        assert type(theirs) is not type(ours)

    def test_enum_of_a_model_has_the_members_of_host_and_plugin(self, api: Any) -> None:
        theirs: Any = importlib.import_module('torchgeo.models').ViTSmall16_Weights
        ours = self.weights('THROWAWAY')
        plugin._register(ours)
        for key in ('vit_small_patch16_224', api.vit_small_patch16_224):
            joint: Any = api.get_model_weights(key)
            assert issubclass(joint, theirs.__bases__[0])
            assert [*joint][: len(theirs)] == [*theirs]
            assert joint.THROWAWAY is joint['THROWAWAY'] is ours.THROWAWAY
            assert ours.THROWAWAY in joint
            assert api.get_model_weights('resnet18').SENTINEL2_ALL_MOCO not in joint
            assert joint.verify('ViTSmall16_Weights.THROWAWAY') is ours.THROWAWAY
            assert joint.__name__ == 'ViTSmall16_Weights'

    def test_every_weight_of_every_model_is_found_by_its_name(self, api: Any) -> None:
        assert {'softcon_resnet50', 'resnet50'} < {*api.list_models()}
        for name in api.list_models():
            for member in api._model_weights.get(name, ()):
                assert api.get_weight(str(member)) is member
                assert len(member.meta.get('bands', ())) in (
                    0,  # as some of the host's
                    member.meta.get('in_chans'),
                )

    def test_bands_are_spelled_as_by_the_host(self, api: Any) -> None:
        for enum in ('resnet50', 'vit_base_patch14_dinov2'):
            weights: Any = api.get_model_weights(enum)
            for host, ours in (
                ('SENTINEL2_ALL_SOFTCON', 'SENTINEL2_SOFTCON'),
                ('SENTINEL1_GRD_SOFTCON', 'SENTINEL1_SOFTCON'),
            ):
                assert weights[ours].meta['bands'] == weights[host].meta['bands']

    def test_model_that_the_host_has_yields(self, api: Any) -> None:
        def resnet18() -> None:
            pass

        before = api._model['resnet18'], api._model_weights['resnet18']
        with pytest.warns(UserWarning, match='TorchGeo has its own resnet18, which is'):
            plugin._register_builder(resnet18)
        assert (api._model['resnet18'], api._model_weights['resnet18']) == before

    def test_member_that_the_host_has_yields(self, api: Any) -> None:
        name = 'ViTSmall16_Weights.SENTINEL2_ALL_DINO'
        theirs = api.get_weight(name)
        ours = self.weights('SENTINEL2_ALL_DINO', 'THROWAWAY')
        with pytest.warns(UserWarning, match=f'TorchGeo has its own {name}, which is'):
            plugin._register(ours)
        assert api.get_weight(name) is theirs
        assert api.get_weight('ViTSmall16_Weights.THROWAWAY') is ours.THROWAWAY
        with warnings.catch_warnings():  # once is enough
            warnings.simplefilter('error')
            plugin._register(ours)

    def test_model_that_timm_has_yields(self) -> None:
        import timm

        def resnet18() -> None:
            pass

        theirs = timm.models.model_entrypoint('resnet18')
        with pytest.warns(
            UserWarning, match='timm has its own resnet18, which is used'
        ):
            plugin._register_model(resnet18)
        assert timm.models.model_entrypoint('resnet18') is theirs

    def test_model_is_registered_once(self) -> None:
        import timm

        from torchgeo_softcon.models import timm_models

        with warnings.catch_warnings():
            warnings.simplefilter('error')
            plugin._register_model(vars(timm_models)['softcon_resnet50'])
        entry = timm.models.model_entrypoint('softcon_resnet50')
        assert entry is vars(timm_models)['softcon_resnet50']

    def test_enum_without_a_new_member_is_not_registered(self, api: Any) -> None:
        before = dict(api._model_weights)
        with pytest.warns(UserWarning, match='TorchGeo has its own'):
            plugin._register(self.weights('SENTINEL2_ALL_DINO'))
        assert api._model_weights == before


class TestPackage:
    def test_every_public_name_loads(self) -> None:
        namespace: dict[str, Any] = {}
        exec('from torchgeo_softcon import *', namespace)  # noqa: S102
        assert {*torchgeo_softcon.__all__} < {*namespace}
        for name in torchgeo_softcon.__all__:
            value = getattr(torchgeo_softcon, name)
            assert value.__name__ == name
            assert value.__module__.startswith('torchgeo_softcon.')
            assert pickle.loads(pickle.dumps(value)) is value

    def test_names_are_listed_before_they_are_loaded(self) -> None:
        code = (
            'import torchgeo_softcon as p, sys; print("torch" in sys.modules, *dir(p))'
        )
        process = subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        )
        loaded, *names = process.stdout.split()
        assert loaded == 'False'
        assert {*torchgeo_softcon.__all__, '__version__'} <= {*names}

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'HardConTask'"):
            torchgeo_softcon.HardConTask  # noqa: B018
        assert not hasattr(torchgeo_softcon, '__wrapped__')
