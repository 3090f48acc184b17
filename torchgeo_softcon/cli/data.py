# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Options that name an encoder and data, shared by the commands."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule

from .. import datamodules  # noqa: F401, for the short names of its classes
from .._compat import BaseDataModule


def data_parser(prog: str, description: str) -> ArgumentParser:
    """A parser with the options that name an encoder and data.

    Args:
        prog: What the user calls.
        description: What it does.

    Returns:
        The parser.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument('--checkpoint', type=str | None, help='checkpoint of a task')
    parser.add_argument(
        '--weights', type=str | None, help='name of a weight enum member, instead'
    )
    parser.add_argument(
        '--model', type=str | None, help='timm name, if the checkpoint has none'
    )
    parser.add_argument(
        '--config',
        type=str | None,
        help='configuration of `torchgeo fit`, of which the section `data` is used. By '
        'default the one of the run that the checkpoint is from',
    )
    parser.add_argument(
        '--bands',
        type=list[str] | None,
        help='names of the bands of the images, if they are not those of --weights: '
        '[B2,B3,B4,B8]',
    )
    parser.add_argument(
        '--unit-range',
        type=bool | None,
        help='whether to scale the images of a datamodule of TorchGeo to [0, 1], as '
        'SoftCon did. By default true for weights of SoftCon',
    )
    parser.add_subclass_arguments(
        BaseDataModule, 'data', required=False, help='datamodule, as in `torchgeo fit`'
    )
    return parser


def parse_options(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse all options but those of data, whose class a configuration may name.

    Args:
        parser: From :func:`data_parser`.
        args: Command-line arguments.

    Returns:
        The options.
    """
    kept: list[str] = []
    value = False
    for arg in args:
        if value and not arg.startswith('--'):
            value = False
            continue
        name, equals, _ = arg.partition('=')
        data = name.partition('.')[0] == '--data'
        value = data and not equals
        if not data:
            kept.append(arg)
    return parser.parse_args(kept)


def parse_data(
    parser: ArgumentParser, args: Sequence[str], run: Path | None = None
) -> tuple[Namespace, LightningDataModule | None]:
    """Parse options, with the data of a configuration as default.

    Args:
        parser: From :func:`data_parser`.
        args: Command-line arguments.
        run: Folder of a run, by default that of the checkpoint.

    Returns:
        The options and the datamodule, None if none is named.

    Raises:
        FileNotFoundError: If there is no such configuration.
        ValueError: If it is no YAML, or has data of another class than the options.
    """
    options = parse_options(parser, args)
    named = _option(args, '--data') or _option(args, '--data.class_path')
    config = options.config
    if config is None and named is None:
        if run is None and options.checkpoint is not None:
            run = Path(options.checkpoint).absolute().parent.parent
        if run is not None and (run / 'config.yaml').exists():
            config = str(run / 'config.yaml')
    data = None if config is None else _read_yaml(Path(config)).get('data')
    if data:
        if named is not None and _named_class(named) != _class_name(data):
            raise ValueError(
                f'data must be those of config {config}, {_class_name(data)}, got '
                f'{named}. Leave out --config or --data'
            )
        args = ['--data', json.dumps(data), *args]
    namespace = parser.parse_args(list(args))
    return namespace, parser.instantiate_classes(namespace).get('data')


def _read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a configuration."""
    if not path.is_file():
        raise FileNotFoundError(f'config {path} does not exist, or is no file')
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'config {path} is not YAML: {error}') from error
    return content if isinstance(content, dict) else {}


def _class_name(data: Any) -> str:
    """Name of the class of some data, without its module."""
    path = data.get('class_path') if isinstance(data, dict) else data
    return str(path).rpartition('.')[2]


def _named_class(data: str) -> str:
    """Name of the class of an option, which is a name, YAML, or a file of that."""
    if Path(data).is_file():
        return _class_name(_read_yaml(Path(data)))
    try:
        return _class_name(yaml.safe_load(data))
    except yaml.YAMLError as error:
        raise ValueError(f'data {data} is not YAML: {error}') from error


def _option(args: Sequence[str], name: str) -> str | None:
    """Value of an option in the two ways to write it."""
    for position, arg in enumerate(args):
        if arg == name and position + 1 < len(args):
            return args[position + 1]
        if arg.startswith(f'{name}='):
            return arg.removeprefix(f'{name}=')
    return None
