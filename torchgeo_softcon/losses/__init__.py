# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Losses, each as a module and as a function."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .dino import DINOLoss as DINOLoss
    from .dino import multi_crop_cross_entropy as multi_crop_cross_entropy
    from .soft_contrastive import PRESETS as PRESETS
    from .soft_contrastive import SoftContrastiveLoss as SoftContrastiveLoss
    from .soft_contrastive import SoftContrastiveTerms as SoftContrastiveTerms
    from .soft_contrastive import soft_contrastive_loss as soft_contrastive_loss
    from .soft_contrastive import soft_contrastive_terms as soft_contrastive_terms
    from .soft_labels import LabelAgreement as LabelAgreement
    from .soft_labels import SoftLabelLoss as SoftLabelLoss
    from .soft_labels import cosine_similarity as cosine_similarity
    from .soft_labels import jaccard_similarity as jaccard_similarity
    from .soft_labels import soft_label_loss as soft_label_loss

__getattr__, __dir__, __all__ = lazy_names(globals())
