# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from torchgeo_softcon import __version__, plugin
from torchgeo_softcon.__main__ import main


class EntryPoint:
    """An entry point of the class that a test wants."""

    def __init__(self, group: str, name: str, error: Exception | None = None) -> None:
        self.group = group
        self.name = name
        self.value = f'torchgeo_softcon.{name}'
        self.error = error

    def load(self) -> None:
        if self.error is not None:
            raise self.error


def declare(monkeypatch: pytest.MonkeyPatch, *entry_points: EntryPoint) -> None:
    def fake(group: str | None = None) -> list[Any]:
        return [e for e in entry_points if group in (None, e.group)]

    monkeypatch.setattr(plugin, '_entry_points', fake)
    monkeypatch.delenv('TORCHGEO_SOFTCON_AUTOLOAD', raising=False)
    monkeypatch.delenv('TORCH_DEVICE_BACKEND_AUTOLOAD', raising=False)


HOOK = EntryPoint('torch.backends', 'hook')
TASK = EntryPoint('torchgeo.tasks', 'task')


class TestList:
    def test_everything_loads(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        declare(monkeypatch, TASK, HOOK)
        assert main(['list']) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ['torchgeo-softcon', __version__]
        assert lines[1].split()[0] == 'torchgeo'
        assert lines[2].split() == ['activation', 'on']
        assert [line.split() for line in lines[4:]] == [
            ['GROUP', 'NAME', 'OBJECT', 'STATUS'],
            ['torch.backends', 'hook', 'torchgeo_softcon.hook', 'ok'],
            ['torchgeo.tasks', 'task', 'torchgeo_softcon.task', 'ok'],
        ]

    def test_something_does_not_load(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        error = ImportError('no lightly\nmore')
        declare(monkeypatch, HOOK, TASK, EntryPoint('torchgeo.tasks', 'bad', error))
        assert main(['list']) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2].endswith('torchgeo_softcon.bad   ImportError: no lightly')
        assert lines[-1].endswith('ok')

    def test_nothing_is_declared(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        declare(monkeypatch)
        assert main(['list']) == 1
        out = capsys.readouterr().out
        assert 'activation        off, the package is not installed' in out

    @pytest.mark.parametrize(
        ('variable', 'value', 'on'),
        [
            ('TORCHGEO_SOFTCON_AUTOLOAD', '0', False),
            ('TORCHGEO_SOFTCON_AUTOLOAD', '1', True),
            ('TORCHGEO_SOFTCON_AUTOLOAD', '', True),
            ('TORCH_DEVICE_BACKEND_AUTOLOAD', '0', False),
            ('TORCH_DEVICE_BACKEND_AUTOLOAD', '1', True),
            ('TORCH_DEVICE_BACKEND_AUTOLOAD', 'true', False),
        ],
    )
    def test_opt_out_is_shown(
        self,
        variable: str,
        value: str,
        on: bool,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        declare(monkeypatch, HOOK)
        monkeypatch.setenv(variable, value)
        assert main(['list']) == 0
        state = 'on' if on else f'off, {variable}={value}'
        assert f'activation        {state}\n' in capsys.readouterr().out


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match='2'):
        main([])
    assert 'required: COMMAND' in capsys.readouterr().err


@pytest.mark.parametrize('command', ['embed', 'evaluate', 'report', 'export'])
@pytest.mark.parametrize(
    'error', [OSError, ValueError, MisconfigurationException, TypeError]
)
def test_errors_of_commands(
    command: str,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **kwargs: Any) -> int:
        raise error('so it is')

    function = 'export' if command == 'export' else 'main'
    monkeypatch.setattr(f'torchgeo_softcon.{command}.{function}', fail)
    args = ['run.ckpt', '--format', 'timm'] if command == 'export' else []
    if error is TypeError:  # not the user's
        with pytest.raises(TypeError, match='so it is'):
            main([command, *args])
    else:
        assert main([command, *args]) == 1
        assert capsys.readouterr().err == f'torchgeo-softcon {command}: so it is\n'


@pytest.mark.parametrize('option', ['--help', '--version'])
def test_options_import_nothing_heavy(option: str, tmp_path: Path) -> None:
    code = (
        'import atexit, runpy, sys\n'
        'atexit.register(lambda: print({"torch", "numpy", "torchgeo"} & {*sys.modules}))\n'
        f'sys.argv[1:] = [{option!r}]\n'
        'runpy.run_module("torchgeo_softcon", run_name="__main__")'
    )
    process = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    lines = process.stdout.splitlines()
    assert lines[-1] == 'set()'
    assert ('list' in process.stdout) == (option == '--help')
    assert (lines[0] == f'torchgeo-softcon {__version__}') == (option == '--version')
