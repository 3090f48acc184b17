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

from .parsers import CommandParser

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from ..models.encoders import Encoder

_ENCODER = {
    '--checkpoint FILE': 'checkpoint of a task',
    '--weights NAME': 'name of a weight enum member, instead',
    '--model NAME': 'timm name, if the checkpoint has none',
    '--bands NAMES': 'names of the bands of the images, if they are not those of --weights: '
    '[B2,B3,B4,B8]',
    '--unit-range BOOL': 'whether to scale the images of a datamodule of TorchGeo to [0, 1], '
    'as SoftCon did. By default true for weights of SoftCon',
}
_DATA = {
    '--data CLASS': 'datamodule, as in `torchgeo fit`. --data.help CLASS shows its options',
    '--data.OPTION VALUE': 'option of the datamodule',
    '--config FILE': 'configuration of `torchgeo fit`, of which the section `data` is used. '
    'By default the one of the run that the checkpoint is from',
}

#: Splits of a datamodule.
_SPLITS = ('train', 'val', 'test', 'predict')


def data_parser(command: str, description: str, example: str) -> CommandParser:
    """Return a parser with the options that name an encoder and data."""
    parser = CommandParser(
        command,
        description,
        f'torchgeo-softcon {command} {example}',
        allow_abbrev=False,
        usage='%(prog)s [OPTIONS]',
    )
    parser.add_options(_ENCODER, 'encoder')
    parser.add_options(_DATA, 'data')
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
    options = parser.parse_args(others)
    if options.split not in (None, *_SPLITS):
        raise ValueError(
            f'split must be one of {", ".join(_SPLITS)}, got {options.split}'
        )
    return argparse.Namespace(**vars(options), data_args=data_args)


def open_data(
    options: argparse.Namespace, run: Path | None = None
) -> 'tuple[LightningDataModule | None, dict[str, Any]]':
    """Build the datamodule that options or a configuration name, and return its values.

    The configuration is that of *run*, by default the run that the checkpoint is from.
    """
    args: list[str] = options.data_args
    finder = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    finder.add_argument('--data', '--data.class_path')
    named = finder.parse_known_args(args)[0].data
    config = options.config
    if config is None and named is None:
        if run is None and options.checkpoint is not None:
            run = Path(options.checkpoint).absolute().parent.parent
        if run is not None and (run / 'config.yaml').exists():
            config = run / 'config.yaml'
    if config is not None:
        if not Path(config).is_file():
            raise FileNotFoundError(f'config {config} does not exist, or is not a file')
        sections = _load_yaml('config', config)
        data = sections.get('data') if isinstance(sections, dict) else None
        if (
            data
            and named
            and _class_name(_load_yaml('data', named)) != _class_name(data)
        ):
            raise ValueError(
                f'data must be those of config {config}, {_class_name(data)}, got '
                f'{named}. Leave out --config or --data'
            )
        args = ['--data', json.dumps(data), *args] if data else args
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


def open_encoder_and_data(
    options: argparse.Namespace,
) -> 'tuple[Encoder, LightningDataModule, dict[str, Any]]':
    """Open what the options name, with the values of the datamodule, which must be given."""
    datamodule, values = open_data(options)
    if datamodule is None:
        raise ValueError(
            'data must be given: --data CLASS --data.OPTION VALUE, or --config FILE'
        )
    return open_named_encoder(options), datamodule, values


def open_named_encoder(options: argparse.Namespace) -> 'Encoder':
    """Build the encoder that the options name."""
    from ..models.encoders import open_encoder

    names = ('checkpoint', 'weights', 'model', 'bands', 'unit_range')
    return open_encoder(*(getattr(options, name) for name in names))


def load_classes(*folders: str) -> None:
    """Load classes, which options can name without their modules from then on."""
    for folder in folders:
        face = import_module(f'torchgeo_softcon.{folder}')
        for name in face.__all__:
            getattr(face, name)


def _load_yaml(name: str, value: str | Path) -> Any:
    """Load the value of an option, which is YAML or a file of that."""
    path = Path(value)
    try:
        return yaml.safe_load(path.read_text() if path.is_file() else str(value))
    except yaml.YAMLError as error:
        raise ValueError(f'{name} {value} is not YAML: {error}') from error


def _class_name(data: Any) -> str:
    """Return the name of the class of some data, without its module."""
    path = data.get('class_path') if isinstance(data, dict) else data
    return str(path).rpartition('.')[2]
