# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Callbacks for any task of TorchGeo: what an encoder sees, and whether it learns."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .backbone import LoadBackbone as LoadBackbone
    from .collapse import CollapseMonitor as CollapseMonitor
    from .collapse import effective_rank as effective_rank
    from .collapse import uniformity as uniformity
    from .datamodule import TrainSubset as TrainSubset
    from .datamodule import UnitRange as UnitRange
    from .embeddings import EmbeddingWriter as EmbeddingWriter
    from .knn import KNNProbe as KNNProbe
    from .knn import knn_scores as knn_scores
    from .label_control import LabelControl as LabelControl
    from .resize import ResizeForWeights as ResizeForWeights
    from .resize import ResizeInput as ResizeInput
    from .terminal import Terminal as Terminal

__getattr__, __dir__, __all__ = lazy_names(globals())
