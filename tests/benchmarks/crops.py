# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Forward and backward of a student on DINO-MC's crops: packed, and size by size.

    python -m tests.benchmarks.crops --model vit_small_patch16_224 --batch 2

Both are timed in turns, in CPU time on a CPU and with events on a GPU. Printed are the
medians, their ratio, and how far the results are apart.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from torchgeo_softcon.models import create_encoder
from torchgeo_softcon.modules.packing import encode_crops

SIZES = (224, 224, 184, 164, 144, 124, 104, 84)


def size_by_size(encoder: VisionTransformer, crops: list[Tensor]) -> Tensor:
    """One forward pass for both global crops and one for each local crop."""
    patch = encoder.patch_embed.patch_size[0]
    cut = [
        c[..., : c.shape[2] // patch * patch, : c.shape[3] // patch * patch]
        for c in crops
    ]
    return torch.cat([encoder(torch.cat(cut[:2])), *(encoder(c) for c in cut[2:])])


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of a forward and backward pass, and the features."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        out = run()
        out.float().square().sum().backward()  # type: ignore[no-untyped-call]
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, out
    begin = time.process_time()
    out = run()
    out.float().square().sum().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - begin, out


def main() -> None:
    """Print one line per precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='vit_small_patch16_224')
    parser.add_argument('--channels', type=int, default=13)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--sizes', type=int, nargs='+', default=SIZES)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    encoder = create_encoder(args.model, args.channels).to(device)
    assert isinstance(encoder, VisionTransformer)
    crops = [
        torch.randn(args.batch, args.channels, s, s, device=device) for s in args.sizes
    ]

    def unpacked(fused_attention: bool) -> Tensor:
        for block in encoder.blocks:
            cast(Any, block).attn.fused_attn = fused_attention
        return size_by_size(encoder, crops)

    def packed() -> Tensor:
        return encode_crops(encoder, crops).flatten(0, 1)

    forms: dict[str, Callable[[], Tensor]] = {
        'explicit attention': lambda: unpacked(False),
        'SDPA': lambda: unpacked(True),
        'packed': packed,
    }
    name = (
        torch.cuda.get_device_name()
        if device == 'cuda'
        else f'{args.threads} thread(s)'
    )
    print(f'{args.model}, {args.channels} bands, batch {args.batch}, {name}')
    print('precision  form                 median s   min s   ratio  max difference')
    for precision in (torch.float32, torch.bfloat16):
        seconds: dict[str, list[float]] = {form: [] for form in forms}
        features = {}
        for turn in range(args.rounds + 1):
            for form, run in forms.items():
                encoder.zero_grad()
                with torch.autocast(
                    device, torch.bfloat16, enabled=precision == torch.bfloat16
                ):
                    second, out = timed(run)
                if turn:  # the first is a warm-up
                    seconds[form].append(second)
                features[form] = out.detach().float()
        reference = statistics.median(seconds['explicit attention'])
        for form, values in seconds.items():
            median = statistics.median(values)
            apart = (features[form] - features['explicit attention']).abs().max()
            print(
                f'{str(precision)[6:]:10} {form:20} {median:8.3f} {min(values):7.3f} '
                f'{reference / median:7.2f} {float(apart):10.1e}',
                flush=True,
            )


if __name__ == '__main__':
    main()
