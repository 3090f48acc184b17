# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Encoders."""

from .encoders import create_encoder, feature_size, is_vit, load_encoder, read_weights

__all__ = ('create_encoder', 'feature_size', 'is_vit', 'load_encoder', 'read_weights')
