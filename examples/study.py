# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Does it learn? Pretraining methods side by side, on ground that they never saw.

    python examples/study.py                      # made-up scenes
    python examples/study.py --folder DIR --places REGEX   # your patches and masks
    python examples/study.py --table              # what the results file has so far

Every row trains the same encoder for the same number of optimizer steps on the same
windows, with several seeds. Then the encoder is frozen. Windows of the training ground
are the bank of a k-NN and of a linear classifier, windows of other places the queries;
the score is the mean average precision (mAP) over the land-cover classes. Folders of
``--score`` are other images with labels, scored by cross-validation.

A row is a method and options of its task, such as ``'SoftCon soft_weight=10'``. The
option ``labels=shuffled`` gives it the labels of other windows, ``labels=constant``
makes all of them alike. Each finished run is a line of the results file, and is not
run again.
"""

import argparse
import csv
import json
import logging
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchgeo.trainers import MoCoTask
from tqdm import tqdm

from torchgeo_softcon import DINOMCTask, SoftConTask
from torchgeo_softcon.datasets import ImageMaskFolder, SyntheticScenes, WorldCoverScenes
from torchgeo_softcon.evaluation.features import resize
from torchgeo_softcon.evaluation.probes import evaluate, knn_scores, linear_scores
from torchgeo_softcon.transforms import MultiCropView, WorldCoverMultiLabel

SIZE = 64  # of windows and views, in pixels
ENCODED = 128  # at a time
HEADS = {'hidden_dim': 512, 'output_dim': 128}
# Per 256 images: short runs of small networks take more than the defaults
LR = {'scratch': 4e-3, 'continual': 1e-3}
ROWS = (
    'statistics',
    'start',
    'contrast',
    'SoftCon',
    'SoftCon labels=shuffled',
    'SoftCon labels=constant',
    'classifier',
    'MoCo',
    'DINO-MC',
    'DINO-MC soft_weight=30',
)
CONTINUAL_ROWS = (
    'start',
    'contrast',
    *(f'SoftCon soft_weight={weight}' for weight in (10, 3, 30)),
    'SoftCon soft_weight=10 labels=shuffled',
)


class Ground(NamedTuple):
    """Places in memory: images (P, T, C, H, W) in [0, 1] and WorldCover codes (P, H, W)."""

    images: Tensor
    masks: Tensor


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
        images, masks = self.ground
        place, date = random.integers(images.shape[:2])
        y, x = (random.integers(n - SIZE + 1) for n in masks.shape[1:])
        rows, columns = slice(y, y + SIZE), slice(x, x + SIZE)
        return images[place, date, :, rows, columns], masks[place, rows, columns]


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
    return stack([(sample['image'], sample['mask']) for sample in samples.values()])


def stack(samples: Sequence[tuple[Tensor, Tensor]]) -> Ground:
    """Put images (T, C, H, W) and masks (H, W) into memory, images to half a level of 8 bit."""
    images = torch.stack([image.half() for image, _ in samples])
    return Ground(images, torch.stack([mask.to(torch.uint8) for _, mask in samples]))


def folders(
    root: str, tests: Sequence[str], places: str | None, held_out: str | None
) -> tuple[Ground, Ground]:
    """Patches to train on, and patches of other places and of other folders to test on.

    A fourth of the places is held out, or those that *held_out* matches.
    """
    train: list[tuple[Tensor, Tensor]] = []
    test: list[tuple[Tensor, Tensor]] = []
    for path in (root, *tests):
        data = ImageMaskFolder(path, places=places, transforms=lambda sample: sample)
        names = sorted(set(data.places))
        count = round(len(names) / 4)
        held = set(np.random.default_rng(0).permutation(names)[:count].tolist())
        if held_out is not None:
            held = {name for name in names if re.search(held_out, name)}
        for name, sample in zip(data.places, tqdm(data, path), strict=True):
            away = path != root or name in held
            (test if away else train).append((sample['image'][None], sample['mask']))
    if not train or not test:
        raise ValueError(
            f'--places and --held-out must keep some places apart, not all or none, got '
            f'{places!r} and {held_out!r}, which leave {len(train)} images to train on '
            f'and {len(test)} to test on'
        )
    return stack(train), stack(test)


class Scored(NamedTuple):
    """Other images (N, C, H, W) with class numbers (N,) or multi-hot labels (N, K)."""

    name: str
    images: Tensor
    labels: Tensor


def scored(path: str) -> Scored:
    """Read a folder with *labels.csv*: a *file*, and its *label* or columns of 0 and 1."""
    root = Path(path)
    with (root / 'labels.csv').open() as file:
        rows = list(csv.DictReader(file))
    known = ('file', 'label', 'class_name', 'split')
    classes = [name for name in rows[0] if name not in known]
    images = []
    for row in tqdm(rows, path):
        with Image.open(root / 'images' / row['file']) as image:
            pixels = torch.from_numpy(np.array(image.convert('RGB')))
        images.append(resize(pixels.permute(2, 0, 1)[None] / 255, SIZE))
    labels = torch.tensor([[int(row[n]) for n in classes or ['label']] for row in rows])
    if not classes:
        labels = labels[:, 0]
    return Scored(root.name, torch.cat(images), labels)


class Statistics(nn.Module):
    """What needs no learning: mean and standard deviation of every band."""

    def forward(self, image: Tensor) -> Tensor:
        """Features (B, 2 C) of images (B, C, H, W)."""
        return torch.cat([image.mean((2, 3)), image.std((2, 3))], dim=1)


class ClassifierTask(SoftConTask):
    """The contrastive term, and a plain classifier in place of the soft term."""

    def configure_models(self) -> None:
        """Add a linear classifier of the eleven classes."""
        super().configure_models()
        self.classifier = nn.Linear(self.feature_size, 11)

    def compare_views(self, views: Any, labels: Any) -> Any:
        """Replace the soft term."""
        terms, features, compared = super().compare_views(views, labels)
        logits = self.classifier(features)
        found = F.binary_cross_entropy_with_logits(logits, labels[0])
        return torch.stack([terms[0], found]), features, compared


def alike(label: Tensor, key_label: Tensor) -> Tensor:
    """Return the same similarity for all pairs, the mean of what labels tell."""
    cosine = F.normalize(label) @ F.normalize(key_label).T
    return cosine.mean().expand_as(cosine)


def dino_views() -> dict[str, Any]:
    """Return options of DINO-MC, those of examples/dino_mc_small.yaml."""
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
    return {
        'size': size,
        'local_sizes': local_sizes,
        'output_dim': 256,
        'hidden_dim': 512,
        'bottleneck_dim': 128,
        'momentum': 0.9,
        'momentum_final': 0.99,
        'teacher_temperature': 0.07,
        'warmup_teacher_temperature': 0.07,
        'augmentations': views,
    }


class Run(NamedTuple):
    """All that decides a result."""

    row: str
    seed: int
    model: str = 'test_resnet'
    weights: str | None = None
    steps: int = 200
    batch: int = 128
    windows: int = 2000
    data: str = 'synthetic'

    def parse(self) -> tuple[str, dict[str, Any]]:
        """Return method and options."""
        method, *words = self.row.split()
        pairs = (word.partition('=')[::2] for word in words)
        return method, {name: yaml.safe_load(value) for name, value in pairs}

    @property
    def epochs(self) -> int:
        """Number of epochs, as TorchGeo's schedules count: at most 12 of whole steps."""
        return max(n for n in range(1, 13) if self.steps % n == 0)

    def task(self, channels: int) -> tuple[LightningModule | None, str]:
        """Build the task, and tell where it has the encoder and what labels it gets."""
        method, options = self.parse()
        labels = options.pop('labels', 'true')
        options = {
            'in_channels': channels,
            'size': SIZE,
            'lr': LR['continual' if self.weights else 'scratch'],
            'weight_decay': 1e-4,
            'warmup_epochs': self.epochs / 10,
            **options,
        }
        if self.weights:
            # With in_channels = 3, the input layer fits as it is
            options = {'weights': self.weights, **options}
        if labels == 'constant':
            options['label_similarity'] = alike
        if method in ('contrast', 'SoftCon', 'classifier', 'start'):
            defaults: dict[str, Any] = {**HEADS, 'momentum': 0.99, 'mask_ratio': 0.0}
            if method == 'contrast':
                defaults['soft_weight'] = 0.0
            elif method == 'classifier':
                defaults['soft_weight'] = 3.0
            make = ClassifierTask if method == 'classifier' else SoftConTask
            return make(self.model, **{**defaults, **options}), labels
        if method == 'DINO-MC':
            return DINOMCTask(self.model, **{**options, **dino_views()}), labels
        if method == 'MoCo' and not self.weights:
            options = {'lr': 1e-3, **HEADS, 'in_channels': channels, 'size': SIZE}
            return MoCoTask(self.model, **options), labels
        if method == 'statistics':
            return None, labels
        raise ValueError(f'--rows: unknown method {method}, or not for --weights')


def train(task: LightningModule, windows: Windows, batch: int, epochs: int) -> float:
    """Train a task, and give the seconds of CPU time that it took."""
    loader: Any = DataLoader(
        windows, batch, sampler=Stream(len(windows) // epochs), collate_fn=collate
    )
    trainer = Trainer(
        accelerator='cpu',
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(task, loader)
    return time.process_time() - start


@torch.no_grad()
def encode(encoder: nn.Module, windows: Windows) -> tuple[Tensor, Tensor]:
    """Features (N, F) and labels (N, K) of the windows whose label is known."""
    encoder.eval()
    parts = []
    for batch in DataLoader(windows, ENCODED, collate_fn=collate):
        parts.append((encoder(batch['image']), batch['label']))
    features, labels = zip(*parts, strict=True)
    label = torch.cat(labels)
    known = label.any(1)
    return torch.cat(features)[known], label[known]


def cross_validate(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Score labels by the nearest neighbours and a linear classifier of nine tenths."""
    hot = labels if labels.ndim == 2 else F.one_hot(labels)
    knn, linear = torch.zeros(2, *hot.shape)
    fold = torch.randperm(len(hot), generator=torch.Generator().manual_seed(0)) % 10
    for number in range(10):
        out, rest = fold == number, fold != number
        args = features[out], features[rest], hot[rest]
        # A sample of a data set has few images per class
        knn[out] = knn_scores(*args, k=5)
        linear[out] = linear_scores(*args)
    return evaluate(knn, labels), evaluate(linear, labels)


def execute(
    run: Run, grounds: Sequence[Ground], others: Sequence[Scored]
) -> dict[str, Any]:
    """Train with one method and seed, and probe the encoder: a line of the results."""
    for name in ('lightning.pytorch', 'lightning.fabric'):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)

    seed_everything(run.seed, verbose=False)
    train_on, test_on = grounds
    task: Any
    task, labels = run.task(train_on.images.shape[2])
    seconds = 0.0
    if task is not None and run.parse()[0] != 'start':
        shuffled = labels == 'shuffled'
        stream = Windows(train_on, run.steps * run.batch, run.seed, shuffled)
        seconds = train(task, stream, run.batch, run.epochs)
    encoder: nn.Module = Statistics()
    if task is not None:  # TorchGeo's tasks call it so
        encoder = task.backbone if isinstance(task, MoCoTask) else task.model

    # Other windows than those of the training, the same for every method and seed
    bank, known = encode(encoder, Windows(train_on, run.windows, 2**31))
    queries, answers = encode(encoder, Windows(test_on, run.windows // 2, 2**31 + 1))
    scores: dict[str, float] = {}
    if bank.isfinite().all():  # not so after a learning rate that is too high
        scores['k-NN mAP'] = evaluate(knn_scores(queries, bank, known), answers)
        scores['linear mAP'] = evaluate(linear_scores(queries, bank, known), answers)
    for name, images, answer in others if scores else ():
        with torch.no_grad():
            features = torch.cat([encoder(part) for part in images.split(ENCODED)])
        knn, linear = cross_validate(features, answer)
        scores |= {f'{name} k-NN': knn, f'{name} linear': linear}
    return {**run._asdict(), 'scores': scores, 'seconds': round(seconds, 1)}


def table(results: Sequence[dict[str, Any]], against: str = 'contrast') -> str:
    """Markdown: mean and standard deviation over seeds, and paired differences."""
    groups: dict[str, dict[str, dict[int, Any]]] = {}
    for result in results:
        start = Path(result['weights'] or 'random').stem
        name = f'{result["model"]}, start: {start}, {result["steps"]} steps of '
        name += str(result['batch'])
        rows = groups.setdefault(name, {})
        rows.setdefault(result['row'], {})[result['seed']] = result

    def cell(runs: dict[int, Any], base: dict[int, Any], score: str) -> str:
        values = {s: run['scores'].get(score) for s, run in runs.items()}
        if None in values.values():
            return 'diverged'
        text = spread(list(values.values()))
        paired = [s for s in values if score in base.get(s, {}).get('scores', {})]
        if base is not runs and paired:
            gains = [values[s] - base[s]['scores'][score] for s in paired]
            text += f' ({spread(gains, "+")})'
        return text

    lines = []
    for name, rows in groups.items():
        any_run = [run for runs in rows.values() for run in runs.values()]
        scores = list(dict.fromkeys(s for run in any_run for s in run['scores']))
        lines += [f'{name} (in brackets: against {against}, seed by seed)', '']
        lines += [f'| row | seeds | {" | ".join(scores)} | CPU s |']
        lines += ['|---' * (len(scores) + 3) + '|']
        for row, runs in rows.items():
            cells = [cell(runs, rows.get(against, {}), score) for score in scores]
            seconds = f'{mean(run["seconds"] for run in runs.values()):.0f}'
            lines.append(f'| {" | ".join([row, str(len(runs)), *cells, seconds])} |')
        lines.append('')
    return '\n'.join(lines)


def spread(values: Sequence[float], sign: str = '') -> str:
    """Return mean and standard deviation as text."""
    deviation = f' ± {stdev(values):.3f}' if len(values) > 1 else ''
    return f'{mean(values):{sign}.3f}{deviation}'


def read(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs of a results file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


class Inline(Executor):
    """Runs jobs in this process."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a job at once."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


_SHARED: list[Any] = []


def share(*values: Any) -> None:
    """Keep in this process what all runs use."""
    _SHARED[:] = values


def execute_shared(run: Run) -> dict[str, Any]:
    """Execute a run on the shared data."""
    return execute(run, *_SHARED)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('--model', default='test_resnet', help='timm name of the encoder')
    add('--weights', help='file of weights to go on from, instead of random ones')
    add('--steps', type=int, default=200, help='optimizer steps per run')
    add('--batch', type=int, default=128, help='windows per step')
    add('--windows', type=int, default=2000, help='of the bank; half as many queries')
    add('--seeds', type=int, default=3)
    add('--jobs', type=int, default=2, help='processes of one thread')
    add('--rows', nargs='+', help='methods, each with options (see the source)')
    add('--folder', help='images/ and masks/, instead of made-up scenes')
    add('--places', help='pattern whose groups are the place in the name of an image')
    add('--held-out', help='pattern of places for testing, by default a fourth of them')
    add(
        '--test',
        nargs='+',
        default=[],
        help='more folders, of other places, to test on',
    )
    add('--score', nargs='+', default=[], help='folders with labels.csv to score on')
    add('--results', type=Path, default='study.jsonl', help='file of finished runs')
    add('--table', action='store_true', help='print the table and run nothing')
    args = parser.parse_args()
    if args.table:
        print(table(read(args.results)))
        return

    rows = args.rows or (CONTINUAL_ROWS if args.weights else ROWS)
    data = Path(args.folder).name if args.folder else 'synthetic'
    fixed = (args.model, args.weights, args.steps, args.batch, args.windows, data)
    # By seed: a table of all rows is there when the first seed is done
    runs = [Run(row, seed, *fixed) for seed in range(args.seeds) for row in rows]
    done = {Run(*(line[field] for field in Run._fields)) for line in read(args.results)}
    runs = [run for run in runs if run not in done]
    try:
        for run in {run.row: run for run in runs}.values():
            run.task(3)
        if args.folder:
            train_on, test_on = folders(
                args.folder, args.test, args.places, args.held_out
            )
        else:
            train_on, test_on = synthetic(seed=0, places=4), synthetic(seed=1, places=2)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    shared = (train_on, test_on), [scored(path) for path in args.score]
    execute_runs(runs, args.jobs, shared, args.results)
    print(table(read(args.results)))


def execute_runs(runs: Sequence[Run], jobs: int, shared: Any, path: Path) -> None:
    """Execute runs in processes that share tensors, and write each when it is done."""
    share(*shared)
    context = torch.multiprocessing.get_context('spawn')
    pool = Inline() if jobs == 1 else ProcessPoolExecutor(jobs, context, share, shared)
    with pool, path.open('a') as file, tqdm(total=len(runs), unit='run') as bar:
        pending = (pool.submit(execute_shared, run) for run in runs)
        for job in pending if jobs == 1 else as_completed(list(pending)):
            file.write(json.dumps(job.result()) + '\n')
            file.flush()
            bar.update()


if __name__ == '__main__':
    main()
