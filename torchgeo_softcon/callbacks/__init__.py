# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Callbacks that tell whether an encoder learns, for any task of the host."""

from .collapse import CollapseMonitor, effective_rank, uniformity
from .embeddings import EmbeddingWriter
from .knn import KNNProbe, knn_scores

__all__ = (
    'CollapseMonitor',
    'EmbeddingWriter',
    'KNNProbe',
    'effective_rank',
    'knn_scores',
    'uniformity',
)
