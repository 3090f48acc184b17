# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Does it learn? Pretraining methods side by side, on ground that they never saw.

    python examples/study.py                      # made-up scenes, 2 processes
    python examples/study.py --folder DIR --held-out REGEX   # your patches and masks

Every method trains the same encoder for the same number of optimizer steps on the same
windows, with several seeds. Then the encoder is frozen. Windows of the training ground
are the bank of a k-NN and of a linear classifier, windows of other ground the queries;
the score is the mean average precision (mAP) over the land-cover classes. As a negative
control, SoftCon also gets the labels of other windows.

Prints a table, and with ``--out FILE`` writes all figures as CSV.
"""

import argparse
import csv
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchgeo.trainers import MoCoTask
from tqdm import tqdm

from torchgeo_softcon import DINOMCTask, SoftConTask
from torchgeo_softcon.datasets import ImageMaskFolder, SyntheticScenes, WorldCoverScenes
from torchgeo_softcon.evaluation.probes import evaluate, knn_scores, linear_scores
from torchgeo_softcon.transforms import MultiCropView, WorldCoverMultiLabel

SIZE = 64  # of windows and views, in pixels
BATCH = 64
EPOCHS = 10  # TorchGeo's schedules count epochs
HEADS = {'hidden_dim': 512, 'output_dim': 128}
# Per 256 images: short runs of small networks take more than the defaults
SPEED = {'lr': 4e-3, 'weight_decay': 1e-4, 'warmup_epochs': 1}


@dataclass(frozen=True)
class Ground:
    """Places in memory: images (T, C, H, W) in [0, 1] and WorldCover codes (H, W)."""

    images: list[Tensor]
    masks: list[Tensor]


class Windows(Dataset[dict[str, Tensor]]):
    """Random windows of some ground. Window i is the same for every method."""

    def __init__(
        self, ground: Ground, length: int, seed: int, shuffled: bool = False
    ) -> None:
        """Choose the ground, and whether windows get the masks of others."""
        self.ground = ground
        self.length = length
        self.seed = seed
        self.shuffled = shuffled

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Image (C, H, W) and mask (H, W)."""
        image, mask = self._window(index)
        if self.shuffled:
            _, mask = self._window(index + self.length)
        return {'image': image.float(), 'mask': mask}

    def _window(self, index: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng([self.seed, index])
        place = random.integers(len(self.ground.masks))
        image, mask = self.ground.images[place], self.ground.masks[place]
        date = random.integers(len(image))
        y, x = (random.integers(n - SIZE + 1) for n in mask.shape)
        rows, columns = slice(y, y + SIZE), slice(x, x + SIZE)
        return image[date, :, rows, columns], mask[rows, columns]


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch with *image* and *label*."""
    return WorldCoverMultiLabel()(default_collate(samples))


class Stream(Sampler[int]):
    """New windows in every epoch."""

    def __init__(self, length: int) -> None:
        """Set the number of windows per epoch."""
        self.length = length
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of windows per epoch."""
        return self.length

    def __iter__(self) -> Iterator[int]:
        """Windows of the next epoch."""
        start = self.epoch * self.length
        self.epoch += 1
        return iter(range(start, start + self.length))


def synthetic(seed: int, places: int) -> Ground:
    """Made-up Sentinel-2 scenes of 5 x 5 km, each at four dates."""
    files = SyntheticScenes(places=places, size=512, seasons=4, seed=seed)
    scenes = WorldCoverScenes(
        files.images,
        files.worldcover,
        patch_size=512,
        seasons=4,
        min_valid=0,
        value_range='softcon',
        transforms=lambda sample: sample,
    )
    # A window of that size is the whole place: draw until every place has come
    samples: dict[bytes, Any] = {}
    for index in range(1000):
        sample = scenes[index]
        samples.setdefault(sample['mask'].numpy().tobytes(), sample)
        if len(samples) == 2 * places:
            break
    return Ground(
        [sample['image'].half() for sample in samples.values()],
        [sample['mask'].to(torch.uint8) for sample in samples.values()],
    )


def folder(root: str, held_out: str) -> tuple[Ground, Ground]:
    """Patches with masks, those whose names match *held_out* for testing."""
    dataset = ImageMaskFolder(root, transforms=lambda sample: sample)
    train, test = Ground([], []), Ground([], [])
    for name, sample in zip(dataset.places, dataset, strict=True):
        ground = test if re.search(held_out, name) else train
        ground.images.append(sample['image'][None].half())
        ground.masks.append(sample['mask'].to(torch.uint8))
    return train, test


class Statistics(nn.Module):
    """What needs no learning: mean and standard deviation of every band."""

    def forward(self, image: Tensor) -> Tensor:
        """Features (B, 2 C) of images (B, C, H, W)."""
        return torch.cat([image.mean((2, 3)), image.std((2, 3))], dim=1)


def soft_con(channels: int, model: str, **options: Any) -> SoftConTask:
    """SoftCon, or one of its terms."""
    settings = {'momentum': 0.99, **HEADS, **SPEED, 'mask_ratio': 0.0, **options}
    return SoftConTask(model, in_channels=channels, size=SIZE, **settings)


def dino_mc(channels: int, model: str) -> DINOMCTask:
    """DINO-MC with the settings of examples/dino_mc_small.yaml."""
    size, local_sizes = 48, (32, 32, 16, 16)
    views = MultiCropView(
        size,
        local_sizes,
        global_scale=(0.4, 1.0),
        local_scale=(0.1, 0.4),
        value_range=(0, 1),
        global_jitter=(0.4, 0.4, 0.0, 0.0),
        local_jitter=(0.4, 0.4, 0.0, 0.0),
        grey_probability=0.0,
        global_blur=(0.5, 0.5),
        global_solarize=(0.0, 0.0),
    )
    return DINOMCTask(
        model,
        in_channels=channels,
        size=size,
        local_sizes=local_sizes,
        output_dim=256,
        hidden_dim=512,
        bottleneck_dim=128,
        lr=4e-3,
        warmup_epochs=1,
        momentum=0.9,
        momentum_final=0.99,
        teacher_temperature=0.07,
        warmup_teacher_temperature=0.07,
        augmentations=views,
    )


def moco(channels: int, model: str, **options: Any) -> MoCoTask:
    """MoCo v3 of TorchGeo."""
    return MoCoTask(model, in_channels=channels, size=SIZE, **options)


#: What is compared: encoder before, and task. None is not trained.
METHODS: dict[str, Callable[[int, str], LightningModule] | None] = {
    'band statistics': None,
    'random start': None,
    'contrast only': lambda c, m: soft_con(c, m, soft_weight=0.0),
    'SoftCon': soft_con,
    'SoftCon, masked': lambda c, m: soft_con(c, m, mask_ratio=0.5),
    'SoftCon, shuffled labels': soft_con,
    'DINO-MC': dino_mc,
    "TorchGeo's MoCo v3": moco,
    "TorchGeo's MoCo v3, lr 1e-3": lambda c, m: moco(c, m, lr=1e-3, **HEADS),
}


@dataclass(frozen=True)
class Result:
    """One run."""

    method: str
    seed: int
    knn_map: float
    linear_map: float
    seconds: float
    images_per_second: float


def train(task: LightningModule, windows: Windows, steps: int) -> float:
    """Train a task, and give the seconds that it took."""
    loader: Any = DataLoader(
        windows, BATCH, sampler=Stream(steps // EPOCHS * BATCH), collate_fn=collate
    )
    trainer = Trainer(
        accelerator='cpu',
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(task, loader)
    return time.perf_counter() - start


@torch.no_grad()
def encode(encoder: nn.Module, windows: Windows) -> tuple[Tensor, Tensor]:
    """Features (N, F) and labels (N, K) of the windows whose label is known."""
    encoder.eval()
    parts = []
    for batch in DataLoader(windows, BATCH, collate_fn=collate):
        parts.append((encoder(batch['image']), batch['label']))
    features, labels = zip(*parts, strict=True)
    label = torch.cat(labels)
    known = label.any(1)
    return torch.cat(features)[known], label[known]


def run(
    method: str,
    seed: int,
    model: str,
    steps: int,
    windows: int,
    train_on: Ground,
    test_on: Ground,
) -> Result:
    """Train with one method and seed, and probe the encoder."""
    for name in ('lightning.pytorch', 'lightning.fabric'):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)

    seed_everything(seed, verbose=False)
    channels = train_on.images[0].shape[1]
    build, seconds = METHODS[method], 0.0
    if build is None:
        # The start of the others, which draw it first
        encoder: nn.Module = soft_con(channels, model).model
        if method == 'band statistics':
            encoder = Statistics()
    else:
        task: Any = build(channels, model)
        shuffled = method.endswith('shuffled labels')
        stream = Windows(train_on, steps * BATCH, seed, shuffled)
        seconds = train(task, stream, steps)
        # TorchGeo's tasks call it so
        encoder = task.backbone if isinstance(task, MoCoTask) else task.model

    # Other windows than those of the training, the same for every method and seed
    bank, labels = encode(encoder, Windows(train_on, windows, 2**31))
    queries, answers = encode(encoder, Windows(test_on, windows // 2, 2**31 + 1))
    knn = linear = float('nan')
    if bank.isfinite().all():  # not so after a learning rate that is too high
        knn = evaluate(knn_scores(queries, bank, labels), answers)
        linear = evaluate(linear_scores(queries, bank, labels), answers)
    rate = steps * BATCH / seconds if seconds else float('nan')
    return Result(method, seed, knn, linear, seconds, rate)


def table(results: Iterable[Result]) -> str:
    """Markdown: mean and standard deviation over seeds, and gains over contrast only."""
    runs = {(r.method, r.seed): r for r in results}
    seeds = sorted({seed for _, seed in runs})

    def spread(values: Sequence[float], sign: str = '') -> str:
        if isnan(sum(values)):
            return 'diverged'
        deviation = f' ± {stdev(values):.3f}' if len(values) > 1 else ''
        return f'{mean(values):{sign}.3f}{deviation}'

    lines = [
        '| method | k-NN mAP | linear mAP | linear, against contrast only | images/s | s |',
        '|---|---|---|---|---|---|',
    ]
    for method in METHODS:
        rows = [runs[method, seed] for seed in seeds if (method, seed) in runs]
        if not rows:
            continue
        gains = [
            row.linear_map - runs['contrast only', row.seed].linear_map
            for row in rows
            if ('contrast only', row.seed) in runs
        ]
        seconds = mean(row.seconds for row in rows)
        speed = mean(row.images_per_second for row in rows)
        cells = [
            method,
            spread([row.knn_map for row in rows]),
            spread([row.linear_map for row in rows]),
            spread(gains, '+') if gains and method != 'contrast only' else '',
            f'{speed:.0f}' if seconds else '',
            f'{seconds:.0f}' if seconds else '',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        '--model', default='test_resnet', help='timm name of the encoder'
    )
    parser.add_argument(
        '--steps', type=int, default=200, help='optimizer steps per run'
    )
    parser.add_argument(
        '--windows', type=int, default=2000, help='of the bank; half as many queries'
    )
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--jobs', type=int, default=2, help='processes of one thread')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument(
        '--folder', help='images/ and masks/, instead of made-up scenes'
    )
    parser.add_argument('--held-out', default='$.', help='pattern of names for testing')
    parser.add_argument('--out', type=Path, help='CSV file for all figures')
    args = parser.parse_args()
    if args.steps < EPOCHS or args.steps % EPOCHS:
        parser.error(f'--steps must be a multiple of {EPOCHS}, got {args.steps}')

    if args.folder:
        train_on, test_on = folder(args.folder, args.held_out)
        if not train_on.images or not test_on.images:
            parser.error(
                f'--held-out {args.held_out!r} must match some names, not all or none: it '
                f'leaves {len(train_on.images)} for training, {len(test_on.images)} to test'
            )
    else:
        train_on, test_on = synthetic(seed=0, places=4), synthetic(seed=1, places=2)

    results = []
    start = time.perf_counter()
    # Tensors in shared memory: the processes do not copy them
    context = torch.multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(args.jobs, context) as pool:
        # By seed: a table of all methods is there when the first seed is done
        jobs = [
            pool.submit(
                run,
                method,
                seed,
                args.model,
                args.steps,
                args.windows,
                train_on,
                test_on,
            )
            for seed in range(args.seeds)
            for method in args.methods
        ]
        for job in tqdm(as_completed(jobs), total=len(jobs), unit='run'):
            results.append(job.result())
            if args.out is not None:
                write(args.out, results)
    print(table(results))
    minutes = (time.perf_counter() - start) / 60
    print(f'\n{args.model}, {args.steps} steps of {BATCH} windows, {minutes:.0f} min')


def write(path: Path, results: Sequence[Result]) -> None:
    """Write all figures."""
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


if __name__ == '__main__':
    main()
