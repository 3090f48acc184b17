# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Options that name an encoder and data, shared by the commands."""

import argparse
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .parsers import CommandParser, boolean, list_of, optional

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from ..models.encoders import Encoder


def data_parser(command: str, description: str, example: str) -> CommandParser:
    """Return a parser with the options that name an encoder and data."""
    parser = CommandParser(
        command,
        description,
        f'torchgeo-softcon {command} {example}',
        allow_abbrev=False,
        usage='%(prog)s [OPTIONS]',
    )
    group = parser.add_argument_group('encoder')
    group.add_argument('--checkpoint', type=optional(str), help='checkpoint of a task')
    group.add_argument(
        '--weights', type=optional(str), help='name of a weight enum member, instead'
    )
    group.add_argument(
        '--model', type=optional(str), help='timm name, if the checkpoint has none'
    )
    group.add_argument(
        '--bands',
        type=optional(list_of(str)),
        help='names of the bands of the images, if they are not those of --weights: '
        '[B2,B3,B4,B8]',
    )
    group.add_argument(
        '--unit-range',
        type=optional(boolean),
        metavar='BOOL',
        help='whether to scale the images of a datamodule of TorchGeo to [0, 1], as '
        'SoftCon did. By default true for weights of SoftCon',
    )
    group = parser.add_argument_group('data')
    group.add_argument(
        '--data',
        metavar='CLASS',
        default=argparse.SUPPRESS,
        help='datamodule, as in `torchgeo fit`. --data.help CLASS shows its options',
    )
    group.add_argument(
        '--data.OPTION',
        metavar='VALUE',
        default=argparse.SUPPRESS,
        help='option of the datamodule',
    )
    group.add_argument(
        '--config',
        type=optional(str),
        help='configuration of `torchgeo fit`, of which the section `data` is used. By '
        'default the one of the run that the checkpoint is from',
    )
    return parser


def parse_options(parser: CommandParser, args: Sequence[str]) -> argparse.Namespace:
    """Parse all options but those of data, which become *data_args* for :func:`open_data`."""
    others: list[str] = []
    data_args: list[str] = []
    value = False
    for arg in args:
        name, equals, _ = arg.partition('=')
        of_data = name.partition('.')[0] == '--data'
        value_of_data = value and not arg.startswith('--')
        (data_args if of_data or value_of_data else others).append(arg)
        value = of_data and not equals
    return argparse.Namespace(**vars(parser.parse_args(others)), data_args=data_args)


def open_data(
    options: argparse.Namespace, run: Path | None = None
) -> 'tuple[LightningDataModule | None, dict[str, Any]]':
    """Build the datamodule that options or a configuration name, and return its values.

    The configuration is that of *run*, by default the run that the checkpoint is from.
    """
    args: list[str] = options.data_args
    named = _value(args, '--data') or _value(args, '--data.class_path')
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
    if not args:
        return None, {}
    # Not before: help must not wait for them
    from jsonargparse import ArgumentParser

    from .._compat import BaseDataModule

    load_classes('datamodules')
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BaseDataModule, 'data', required=False)
    namespace = parser.parse_args(args)
    values = namespace.as_dict()['data']
    return parser.instantiate_classes(namespace).data, values or {}


def load_classes(*folders: str) -> None:
    """Load classes, which options can name without their modules from then on."""
    for folder in folders:
        face = import_module(f'torchgeo_softcon.{folder}')
        for name in face.__all__:
            getattr(face, name)


def open_required_data(
    options: argparse.Namespace,
) -> 'tuple[LightningDataModule, dict[str, Any]]':
    """Build the datamodule as :func:`open_data`, and raise if none is named."""
    datamodule, values = open_data(options)
    if datamodule is None:
        raise ValueError(
            'data must be given: --data CLASS --data.OPTION VALUE, or --config FILE'
        )
    return datamodule, values


def open_named_encoder(options: argparse.Namespace) -> 'Encoder':
    """Build the encoder that the options name."""
    from ..models.encoders import open_encoder

    return open_encoder(
        options.checkpoint,
        options.weights,
        options.model,
        options.bands,
        options.unit_range,
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read the sections of a configuration."""
    if not path.is_file():
        raise FileNotFoundError(f'config {path} does not exist, or is not a file')
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'config {path} is not YAML: {error}') from error
    return content if isinstance(content, dict) else {}


def _class_name(data: Any) -> str:
    """Return the name of the class of some data, without its module."""
    path = data.get('class_path') if isinstance(data, dict) else data
    return str(path).rpartition('.')[2]


def _named_class(data: str) -> str:
    """Return the class of an option, which is a name, YAML, or a file of that."""
    if Path(data).is_file():
        return _class_name(_read_yaml(Path(data)))
    try:
        return _class_name(yaml.safe_load(data))
    except yaml.YAMLError as error:
        raise ValueError(f'data {data} is not YAML: {error}') from error


def _value(args: Sequence[str], name: str) -> str | None:
    """Return the value of an option in the two ways to write it."""
    for position, arg in enumerate(args):
        if arg == name and position + 1 < len(args):
            return args[position + 1]
        if arg.startswith(f'{name}='):
            return arg.removeprefix(f'{name}=')
    return None
