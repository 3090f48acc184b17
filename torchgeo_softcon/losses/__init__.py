# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Losses: a pure function and a thin module each."""

from .dino import DINOLoss, multi_crop_cross_entropy
from .soft_contrastive import (
    SoftContrastiveLoss,
    SoftContrastiveTerms,
    cosine_similarity,
    jaccard_similarity,
    soft_contrastive_loss,
    soft_contrastive_terms,
)

__all__ = (
    'DINOLoss',
    'SoftContrastiveLoss',
    'SoftContrastiveTerms',
    'cosine_similarity',
    'jaccard_similarity',
    'multi_crop_cross_entropy',
    'soft_contrastive_loss',
    'soft_contrastive_terms',
)
