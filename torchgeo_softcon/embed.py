# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Embeddings of a dataset in a (Geo)Parquet file: ``torchgeo-softcon embed``."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from . import datamodules  # noqa: F401, for the short names of its classes
from ._compat import BaseDataModule, Sample
from .callbacks.embeddings import EmbeddingWriter
from .callbacks.features import encode, poolings, prepare
from .callbacks.labelled import split_samples
from .callbacks.parts import PartedFile
from .datamodules.normalization import match_images
from .models.trained import Encoder, open_encoder

#: Options of datamodules that do not change what a sample is. (The choice of samples is
#: compared on its own.)
_READING = ('batch_size', 'num_workers', 'length')

#: Stage of a datamodule that has a split.
_STAGES = {'predict': 'predict', 'test': 'test', 'val': 'validate', 'train': 'fit'}


class _Embedder(LightningModule):
    """Makes an encoder usable by a trainer."""

    def __init__(
        self, encoder: Encoder, size: int | None, pooling: str | None = None
    ) -> None:
        super().__init__()
        self.model = encoder.model
        self.in_channels = encoder.in_channels
        self.size = size
        self.pooling = pooling

    def predict_step(self, batch: Sample, batch_idx: int) -> Tensor:
        image, seasons = prepare(batch['image'].float(), self.in_channels, self.size)
        features = encode(self.model, image)
        pooled = features[self.pooling or next(iter(features))]
        return pooled.unflatten(0, (-1, seasons)).mean(1)


def embed(
    encoder: Encoder,
    datamodule: LightningDataModule,
    out: str | os.PathLike[str],
    split: str | None = None,
    size: int | None = None,
    pooling: str | None = None,
    overwrite: bool = False,
    origin: dict[str, Any] | None = None,
    **trainer: Any,
) -> int:
    """Write the embeddings of a split of a datamodule to a file.

    If a file is there that is not complete, the run goes on where that one ended.

    Args:
        encoder: From :func:`.open_encoder`.
        datamodule: A TorchGeo datamodule.
        out: The file, see :class:`.EmbeddingWriter`.
        split: Either 'predict', 'test', 'val' or 'train'. By default, the first of them
            that the datamodule has.
        size: Side to resize images to in pixels, None for as they are.
        pooling: ``'cls'`` or ``'mean'``, see :func:`.encode`. By default the encoder's
            own.
        overwrite: Whether to replace a file that exists.
        origin: What the embeddings are made from, to tell whether a file that is not
            complete belongs to them.
        **trainer: Arguments of Lightning's trainer.

    Returns:
        Number of rows in the file.

    Raises:
        FileExistsError: If the file exists.
        ValueError: If the encoder has no such pooling, the datamodule no such split, or
            if there is an incomplete file of something else.
    """
    known = poolings(encoder.model)
    if pooling is not None and pooling not in known:
        raise ValueError(
            f'pooling must be one that the encoder has ({", ".join(known)}), got '
            f'{pooling!r}'
        )
    writer = EmbeddingWriter(out)
    arguments = {'logger': False, 'enable_checkpointing': False, 'devices': 1}
    runner = Trainer(**{**arguments, **trainer}, callbacks=[writer])
    split = set_up(datamodule, split)
    match_images(datamodule, encoder.bands, encoder.unit_range)
    torch.manual_seed(0)  # for samplers that draw
    dataset, indices = split_samples(datamodule, split)
    origin = dict(origin or {})
    origin |= {'encoder': encoder.name, 'size': size, 'pooling': pooling}
    origin |= {
        'bands': encoder.bands,
        'unit_range': encoder.unit_range,
        'split': split,
        'samples': len(indices),
        'indices': _digest(indices),
    }
    file = PartedFile(Path(out), {**origin, 'processes': 1})
    file.open(overwrite)
    done = file.rows()
    if done:
        print(f'{done} of {len(indices)} samples are in {file.folder} already')
    if done == len(indices):
        return file.close()

    # The number of processes that read may depend on its device
    datamodule.trainer = runner
    loader = DataLoader(
        dataset,
        batch_size=getattr(datamodule, 'batch_size', None) or 64,
        sampler=indices[done:],
        num_workers=getattr(datamodule, 'num_workers', 0),
        collate_fn=getattr(datamodule, 'collate_fn', default_collate),
    )
    cast(Any, datamodule).predict_dataloader = lambda: loader
    writer.origin, writer.skipped = origin, done
    runner.predict(
        _Embedder(encoder, size, pooling), datamodule, return_predictions=False
    )
    return writer.rows


def _digest(indices: Sequence[Any]) -> str:
    """Tells whether samples are the same, in the same order."""
    digest = hashlib.sha256()
    for index in indices:
        digest.update(f'{index!r}\n'.encode())
    return digest.hexdigest()


def set_up(datamodule: LightningDataModule, split: str | None = None) -> str:
    """Prepare a split of a datamodule.

    Args:
        datamodule: The datamodule.
        split: Either 'predict', 'test', 'val' or 'train'. By default, the first of them
            that the datamodule has.

    Returns:
        The split.

    Raises:
        ValueError: If there is none.
    """
    datamodule.prepare_data()
    for name in _STAGES if split is None else (split,):
        datamodule.setup(_STAGES[name])
        if getattr(datamodule, f'{name}_dataset', None) is not None:
            return name
    # Datamodules of one dataset for all splits
    split_samples(datamodule, split or 'predict')
    return split or 'predict'


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


def _data_origin(data: Namespace) -> dict[str, Any]:
    """What the class and the options of a datamodule say of its samples."""
    values = data.as_dict()
    options = {**values.get('init_args', {}), **values.get('dict_kwargs', {})}
    origin = {f'data.{k}': v for k, v in options.items() if k not in _READING}
    return {'data': values['class_path'], **origin}


def _fingerprint(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def main(args: Sequence[str]) -> int:
    """Run ``torchgeo-softcon embed``.

    Args:
        args: Command-line arguments.

    Returns:
        Exit status.

    Raises:
        OSError: If a file is missing, or is there already.
        ValueError: If arguments, data and encoder do not fit each other.
    """
    parser = data_parser(
        'torchgeo-softcon embed',
        'Write the embeddings of a dataset to a Parquet file, with place and time where '
        'the data tell. An interrupted run goes on when started again.',
    )
    parser.add_argument('--out', type=str, default='embeddings.parquet', help='file')
    parser.add_argument(
        '--split',
        type=str | None,
        help='predict, test, val or train, the first there is',
    )
    parser.add_argument(
        '--size',
        type=int | None,
        help='resize images to so many pixels. By default the size in the training',
    )
    parser.add_argument('--pooling', type=str | None, help='cls or mean')
    parser.add_argument('--overwrite', action='store_true', help='replace the file')
    parser.add_argument('--accelerator', type=str, default='auto', help='cpu, gpu, ...')
    options, datamodule = parse_data(parser, args)
    if datamodule is None:
        raise ValueError(
            'data must be given: --data CLASS --data.OPTION VALUE, or --config FILE'
        )
    if options.split not in (None, *_STAGES):
        raise ValueError(
            f'split must be one of {", ".join(_STAGES)}, got {options.split}'
        )
    encoder = open_encoder(
        options.checkpoint,
        options.weights,
        options.model,
        options.bands,
        options.unit_range,
    )
    rows = embed(
        encoder,
        datamodule,
        options.out,
        options.split,
        options.size or encoder.size,
        options.pooling,
        options.overwrite,
        {
            'checkpoint': _fingerprint(options.checkpoint),
            'weights': options.weights,
            **_data_origin(options.data),
        },
        accelerator=options.accelerator,
    )
    print(f'{rows} embeddings are in {options.out}')
    return 0
