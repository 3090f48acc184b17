# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""k-NN and linear evaluation of frozen features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..datamodules.normalization import match_images
from ..models.encoders import Encoder
from ..models.loading import has_class_token
from ..transforms.views import center_view
from .features import encode, pool
from .loop import LabelledFeatures, collect_labelled, encode_batches, score_probes
from .samples import LabelledSamples, choose_subset, find_places, set_up

#: Blocks of a Vision Transformer whose class tokens are used side by side, as in DINO.
_BLOCKS = 4


@torch.inference_mode()
def extract_features(
    encoder: Encoder,
    samples: LabelledSamples,
    size: int,
    device: torch.device,
    view: Callable[[Tensor, int], Tensor] = center_view,
) -> LabelledFeatures:
    """Encode a view of labelled images, *size* pixels wide, on *device*.

    Returns:
        Features by the names of :func:`.encode`, and *blocks*, the class tokens of the
        last four blocks, of Vision Transformers, with their labels, on the CPU.
    """
    encoded = encode_batches(
        encoder.model,
        tqdm(samples.batches(), samples.name, leave=False),
        samples.transform,
        encoder.in_channels,
        size,
        device,
        view=view,
        encode=_encode,
    )
    return collect_labelled(encoded, samples.name, 'cpu', places=samples.places)


def _encode(encoder: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return all features of images, from one pass."""
    model: Any = encoder
    if not has_class_token(encoder):
        return encode(encoder, image)
    depth = min(_BLOCKS, len(model.blocks))
    tokens, layers = model.forward_intermediates(
        image, depth, return_prefix_tokens=True, norm=True, output_fmt='NLC'
    )  # per block: patch tokens (B, N, F), class token and registers (B, P, F)
    blocks = torch.cat([prefix[:, 0] for _, prefix in layers], 1)
    return {**pool(encoder, tokens), 'blocks': blocks}


def evaluate_encoder(
    encoder: Encoder,
    datamodule: LightningDataModule,
    split: str = 'test',
    k: Sequence[int] = (20,),
    temperature: float = 0.07,
    size: int | None = None,
    fraction: float = 1.0,
    seed: int = 42,
    device: str | torch.device = 'cpu',
) -> dict[str, float]:
    """Evaluate frozen features by nearest neighbours and by a linear classifier.

    Args:
        encoder: The encoder.
        datamodule: Labelled data, whose training split has the neighbours and fits the
            classifier.
        split: Either 'test' or 'val', to classify.
        k: Numbers of neighbours (5, 10, 15 and 20 in the code of DINO-MC).
        temperature: Temperature of their votes (0.07 in DINO and DINO-MC).
        size: Side of the images in pixels. Defaults to that of the training, or 224.
        fraction: Share of the training split to use, see :func:`.choose_subset`.
        seed: Seed of the choice of that share.
        device: Where to compute.

    Returns:
        Accuracy, or for multi-labels *map* (macro) and *micro_map*, by names such as
        ``knn20_accuracy_cls`` and ``linear_accuracy_blocks``. The linear classifier is
        a ridge regression, see :func:`.linear_scores`; that of the papers is
        :class:`.LinearProbeTask`.
    """
    if split not in ('test', 'val'):
        raise ValueError(f"split must be 'test' or 'val', got {split!r}")
    samples = open_splits(encoder, datamodule, 'train', split)
    bank = samples['train']
    chosen = choose_subset(len(bank.indices), fraction, seed)
    bank.indices = [bank.indices[i] for i in chosen]
    if min(k) < 1 or max(k) > len(chosen):
        raise ValueError(
            'k must be from 1 to the number of training images that are used, '
            f'{len(chosen)}, got {tuple(k)}'
        )
    find_places(bank, samples[split])
    features, values = encode_splits(encoder, samples, size, device)
    for score in score_probes(features['train'], features[split], k, temperature):
        name = f'{score.method}{score.k or ""}_{score.metric}'
        values['_'.join(filter(None, (name, score.feature)))] = score.value
    return values


def open_splits(
    encoder: Encoder, datamodule: LightningDataModule, *splits: str
) -> dict[str, LabelledSamples]:
    """Prepare labelled splits for an encoder: one to learn from, ..., one to test on.

    Raises:
        ValueError: If the last one has images or ground of the first.
    """
    for split in splits:
        set_up(datamodule, split)
    match_images(datamodule, encoder.bands, encoder.unit_range)
    torch.manual_seed(0)  # for samplers that draw
    names = {'train': 'training split'}
    samples = {
        split: LabelledSamples.of_split(
            datamodule, split, names.get(split, f'{split} split')
        )
        for split in splits
    }
    bank, *_, queries = samples.values()
    if bank.is_same(queries) or bank.shares_ground:
        raise ValueError(
            f'split = {splits[-1]} of {type(datamodule).__name__} has the images of its '
            'training split, or others of the same ground, so that scores would mean '
            'nothing. Keep them apart, such as by val_fraction = 0.1, or more for a large '
            'patch_size'
        )
    return samples


def encode_splits(
    encoder: Encoder,
    samples: Mapping[str, LabelledSamples],
    size: int | None,
    device: str | torch.device,
    view: Callable[[Tensor, int], Tensor] = center_view,
) -> tuple[dict[str, LabelledFeatures], dict[str, float]]:
    """Encode splits as :func:`extract_features` does, and count their images."""
    try:
        device = torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition('\n')[0]
        raise ValueError(
            f'device must be one that PyTorch finds here, got {device}: {reason}'
        ) from error
    size = size or encoder.size or 224
    encoder.model.to(device)
    features = {
        split: extract_features(encoder, part, size, device, view)
        for split, part in samples.items()
    }
    counts = {f'{k}_images': float(len(v.labels)) for k, v in features.items()}
    return features, {**counts, 'image_size': float(size)}
