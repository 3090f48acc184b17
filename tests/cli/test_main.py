# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from inspect import signature
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from torchgeo_softcon import __version__, plugin
from torchgeo_softcon.__main__ import main
from torchgeo_softcon._compat import MisconfigurationException as OfHost
from torchgeo_softcon.cli.commands import COMMANDS
from torchgeo_softcon.cli.data import parse_options
from torchgeo_softcon.cli.labels import parser as labels_parser
from torchgeo_softcon.cli.pack import parser as pack_parser
from torchgeo_softcon.cli.parsers import CommandError
from torchgeo_softcon.cli.report import parser as report_parser


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
        out, err = capsys.readouterr()
        assert err == 'Loading everything that is declared ...\n'
        lines = out.splitlines()
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


@pytest.mark.parametrize('command', COMMANDS)
class TestRule:
    """One rule for the errors and exit statuses of all commands."""

    @pytest.fixture
    def fail(self, command: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        """Run the command, which raises an error."""

        def fail(error: BaseException) -> int:
            def run(args: Any) -> int:
                raise error

            module = f'torchgeo_softcon.cli.{command.replace("-", "_")}'
            monkeypatch.setattr(import_module(module), 'main', run)
            return main([command])

        return fail

    @pytest.mark.parametrize(
        'error',
        [
            argparse.ArgumentError(None, 'so it is'),
            CommandError('so it is'),
            MisconfigurationException('so it is'),
            OSError('so it is'),
            OfHost('so it is'),
            ValueError('so it is'),
        ],
        ids=type,
    )
    def test_fault_of_the_user(
        self,
        command: str,
        error: Exception,
        fail: Callable[..., int],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert fail(error) == 2
        assert capsys.readouterr().err == f'torchgeo-softcon {command}: so it is\n'

    def test_killed_process(
        self, command: str, fail: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert fail(BrokenProcessPool()) == 2
        assert f'{command}: a process was killed' in capsys.readouterr().err

    def test_fault_of_the_package(self, command: str, fail: Callable[..., int]) -> None:
        with pytest.raises(TypeError, match='so it is'):
            fail(TypeError('so it is'))

    def test_interrupted(
        self, command: str, fail: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        resumable = command in ('embed', 'labels', 'pack', 'pretrain', 'unpack')
        of_lightning = SystemExit(1)
        of_lightning.__context__ = KeyboardInterrupt()
        for error in (KeyboardInterrupt(), of_lightning):
            assert fail(error) == 130
            line = capsys.readouterr().err
            assert line == f'interrupted{", start again to go on" * resumable}\n'

    def test_wrong_use(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match='2'):
            main([command, '--no-such-option'])
        err = capsys.readouterr().err
        assert 'no-such-option' in err or 'required' in err
        if command != 'bench-data':  # whose other options are those of the host
            assert err.startswith(f'torchgeo-softcon {command}: error: ')
            assert err.count('\n') == 1

    def test_help_is_light_and_short(self, command: str) -> None:
        help_text, heavy = run_and_list_modules(command, '--help')
        assert heavy == set()
        lines = help_text.splitlines()
        assert lines[0].startswith(f'usage: torchgeo-softcon {command} ')
        assert len(lines) <= 60
        assert lines[lines.index('example:') + 1].startswith(
            f'  torchgeo-softcon {command}'
        )
        # The example is the end
        after = lines[lines.index('example:') + 1 :]
        assert all(line.startswith('  ') for line in after)


def run_and_list_modules(*args: str) -> tuple[str, set[str]]:
    """Run a command in a process, and list the heavy modules that it imports."""
    code = (
        'import atexit, runpy, sys\n'
        'atexit.register(lambda: print("imported:", *{"torch", "torchgeo", "lightning", "kornia", '
        '"geopandas", "pandas", "rasterio"} & {*sys.modules}))\n'
        f'sys.argv[1:] = {list(args)}\n'
        'runpy.run_module("torchgeo_softcon", run_name="__main__")'
    )
    process = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, 'COLUMNS': '80'},
    )
    text, _, modules = process.stdout.partition('imported:')
    return text, {*modules.split()}


@pytest.mark.parametrize('option', ['--help', '--version'])
def test_options_import_nothing_heavy(option: str) -> None:
    text, heavy = run_and_list_modules(option)
    assert heavy == set()
    assert ('list' in text) == (option == '--help')
    version = f'torchgeo-softcon {__version__}'
    assert (text.splitlines()[0] == version) == (option == '--version')


def test_defaults_that_help_names() -> None:
    """Parsers do not import what they are for, so that help is light."""
    pack = signature(import_module('torchgeo_softcon.ssl4eo.pack').pack).parameters
    text = pack_parser().format_help()
    for name in ('workers', 'shard_size'):
        assert f'(default: {pack[name].default})' in text
    labels = signature(import_module('torchgeo_softcon.labels').label_archive)
    text = ' '.join(labels_parser().format_help().split())
    for option in ('--images', '--footprints', '--layout', '--download', '--scheduler'):
        assert option in text
    for name in ('out', 'min_fraction', 'min_valid'):
        assert f'default: {labels.parameters[name].default}' in text


class TestData:
    """Options of the datamodule are read by jsonargparse, all others are not."""

    def test_split(self) -> None:
        args = ['run', '--data', 'X', '--split', 'val', '--data.a=1', '--data.b', '-1']
        options = parse_options(report_parser(), [*args, '--samples', '3'])
        assert (options.run_dir, options.split, options.samples) == (['run'], 'val', 3)
        assert options.data_args == ['--data', 'X', '--data.a=1', '--data.b', '-1']

    def test_values_as_in_yaml(self) -> None:
        args = ['--bands', '[B2, "B3"]', '--unit-range', 'false', '--weights', 'null']
        options = parse_options(report_parser(), args)
        assert options.bands == ['B2', 'B3']
        assert options.unit_range is False
        assert options.weights is None

    @pytest.mark.parametrize(
        ('args', 'message'),
        [
            (['--bands', 'B2'], 'argument --bands: must be a list: [A,B], got B2'),
            (
                ['--unit-range', '7'],
                "argument --unit-range: invalid boolean value: '7'",
            ),
            (['--samples', 'all'], "argument --samples: invalid int value: 'all'"),
        ],
    )
    def test_invalid_values(
        self, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match='2'):
            main(['report', *args])
        assert message in capsys.readouterr().err

    def test_unknown_option_of_the_data(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ['--data', 'SyntheticScenesDataModule', '--data.workers', '8']
        assert main(['embed', *args]) == 2
        err = capsys.readouterr().err
        assert err.startswith('torchgeo-softcon embed: ')
        assert 'workers' in err
