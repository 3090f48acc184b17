# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Every option of every public class refuses what it cannot be, and says which it is."""

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import torchgeo_softcon
from torchgeo_softcon import callbacks
from torchgeo_softcon._checks import check_types
from torchgeo_softcon.losses import SoftContrastiveLoss, SoftLabelLoss

HEADS = {'hidden_dim': 8, 'output_dim': 8}
#: Arguments that are needed, or make it fast.
GIVEN: dict[str, dict[str, Any]] = {
    'DINOLoss': {'output_dim': 8},
    'DINOMCTask': {
        'model': 'test_resnet',
        'size': 32,
        'local_sizes': (16,),
        'bottleneck_dim': 8,
        **HEADS,
    },
    'ESAWorldCover': {'paths': 'missing'},
    'EmbeddingWriter': {'path': 'embeddings.parquet'},
    'ImageMaskFolder': {'root': 'missing'},
    'LinearProbeTask': {'model': 'test_resnet', 'num_classes': 3},
    'LoadBackbone': {'weights': 'run.ckpt'},
    'SSL4EOS12ML': {'root': 'missing'},
    'SoftConTask': {'model': 'test_resnet', 'size': 32, **HEADS},
    'ToUnitRange': {'mean': [1.0], 'std': [1.0]},
    'TrainSubset': {'fraction': 0.5},
    'WorldCoverScenesDataModule': {'images': 'missing', 'worldcover': 'missing'},
    'WorldCoverScenes': {'images': 'missing', 'worldcover': 'missing'},
}
CLASSES = [
    value
    for face in (torchgeo_softcon, callbacks)
    for name in face.__all__
    if inspect.isclass(value := getattr(face, name)) and 'Weights' not in name
]


class Nonsense:
    """Fits no type."""


def hints_of(cls: Any) -> dict[str, Any]:
    """Return the types of all arguments, those that a class passes on among them."""
    hints = get_type_hints(cls.__init__)
    if 'options' in hints:
        # To the next class, or to a part
        target = SoftLabelLoss if cls is SoftContrastiveLoss else cls.__mro__[1]
        hints = hints_of(target) | hints
    return hints


def options() -> Iterator[Any]:
    """Yield each option of each class with what it cannot be."""
    for cls in dict.fromkeys(CLASSES):
        for name, hint in hints_of(cls).items():
            kinds = {*re.findall(r'\w+', str(hint))} | {getattr(hint, '__name__', '')}
            wrong: list[Any] = [Nonsense()]
            if kinds & {'int', 'float'} and 'Sequence' not in kinds:
                wrong += [math.nan, math.inf]
                if 'str' not in kinds:
                    wrong += ['text']
            if 'int' in kinds and 'float' not in kinds:
                wrong += [1.5]
            if 'Sequence' in kinds and 'str' not in kinds:
                wrong += [16, [Nonsense()]]
            for value in wrong:
                if name not in ('return', 'kwargs'):
                    title = f'{cls.__name__}-{name}-{type(value).__name__}-{value}'
                    yield pytest.param(cls, name, value, id=title.split(' object')[0])


@pytest.mark.parametrize(('cls', 'name', 'value'), [*options()])
def test_names_the_option(cls: type, name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf'\b{name}\b'):
        cls(**{**GIVEN.get(cls.__name__, {}), name: value})


def accept(
    count: int = 1,
    share: float | None = None,
    sides: tuple[float, float] = (0, 1),
    path: str | Path = '',
) -> None:
    """Stand for a function with options."""


@pytest.mark.parametrize(
    'values',
    [
        {'count': np.int64(3), 'share': np.float32(0.5)},
        {'count': torch.tensor(3), 'share': torch.tensor(0.5)},
        {'share': 1},
        {'share': None},
        {'sides': [0.5, 1]},
        {'path': Path()},
    ],
)
def test_accepts(values: dict[str, Any]) -> None:
    check_types(accept, values)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'count': True}, r'count must be a whole number, got bool: True'),
        ({'count': '3'}, r"count must be a whole number, got str: '3'"),
        ({'share': math.nan}, r'share must be finite, got nan'),
        ({'sides': (1, 2, 3)}, r'sides must be \(a number, a number\), got tuple'),
        ({'path': 3}, r'path must be text or Path, got int: 3'),
    ],
)
def test_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_types(accept, values)
