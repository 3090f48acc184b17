# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Callbacks for any task of TorchGeo: what an encoder sees, and whether it learns."""

from .collapse import CollapseMonitor, effective_rank, uniformity
from .embeddings import EmbeddingWriter
from .knn import KNNProbe, knn_scores
from .resize import ResizeForWeights, ResizeInput
from .subset import TrainSubset
from .unit_range import UnitRange

__all__ = (
    'CollapseMonitor',
    'EmbeddingWriter',
    'KNNProbe',
    'ResizeForWeights',
    'ResizeInput',
    'TrainSubset',
    'UnitRange',
    'effective_rank',
    'knn_scores',
    'uniformity',
)
