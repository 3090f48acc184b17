# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""All rows of the comparison, on the device that is there, as one table of ratios.

    python -m tests.benchmarks [--toy] [--rows loss ema ...] [--precision bf16]

Forms of a row are timed in turns, in CPU time on a CPU and with events on a GPU. The
ratio is that of the medians; larger than 1 is faster than the first form of the row.
Memory is on a GPU the peak of a call, less what was allocated before it (weights, the
optimizer's state, what the other forms keep), and on a CPU what is kept for backward passes,
weights excepted.
The last column is the share of the rate at which the device multiplies large matrices in
that precision, measured first. (PyTorch does not count attention of all crops at once, on a
GPU.) Last come the losses of DINO-MC steps, ours and those of the slow form.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from torchgeo_softcon._compat import HAS_TASKS
from torchgeo_softcon.losses.dino import multi_crop_cross_entropy
from torchgeo_softcon.models import create_encoder, is_vit
from torchgeo_softcon.modules.ema import make_teacher, update_ema
from torchgeo_softcon.modules.masking import MaskMode, SiameseMasking
from torchgeo_softcon.tasks import DINOMCTask, SoftConTask
from torchgeo_softcon.tasks.optimizers import create_optimizer, parameter_groups
from torchgeo_softcon.transforms import MultiCropView, RandomView

from . import slow
from .harness import DEVICE, HEADER, Timing, circumstances, compare, matrix_rate

Forms = dict[str, Callable[[], Any]]


class Given(nn.Module):
    """Crops that were drawn before, in turns."""

    def __init__(self, crops: list[list[Tensor]]) -> None:
        super().__init__()
        self.crops = iter(crops)

    def forward(self, image: Tensor) -> list[Tensor]:
        """The next crops."""
        return next(self.crops)


class Bench:
    """The rows, at one size."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        shape = (args.batch, args.channels, args.image, args.image)
        self.image = torch.rand(shape, device=DEVICE)
        label = (torch.rand(args.batch, 11) > 0.5).float()
        self.batch = {'image': self.image, 'label': label.to(DEVICE)}

    def loss(self) -> Forms:
        """Loss of 2 + 6 crops and its gradient."""
        shape = (8, self.args.batch, self.args.prototypes)
        student = torch.randn(shape, device=DEVICE, requires_grad=True)
        target = torch.randn(2, *shape[1:], device=DEVICE).mul_(9).softmax(-1)

        def form(function: Callable[..., Tensor]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(function(student, target), student)

        return {
            'loop over pairs': form(slow.cross_entropy),
            'ours': form(multi_crop_cross_entropy),
        }

    def ema(self) -> Forms:
        """Moving average of the encoder. The floor is one pass over as much memory."""
        student = create_encoder(self.args.model, self.args.channels).to(DEVICE)
        teacher = make_teacher(student)
        with torch.no_grad():
            parameters = torch.cat([p.flatten() for p in student.parameters()])
            average = parameters.clone()
        return {
            'loop over parameters': lambda: slow.ema(student, teacher, 0.99),
            'lightly': lambda: update_momentum(student, teacher, 0.99),
            'ours': lambda: update_ema(student, teacher, 0.99),
            'floor: one tensor': lambda: average.lerp_(parameters, 0.01),
        }

    def optimizer(self) -> Forms:
        """One step of AdamW."""
        forms: Forms = {}
        for name in ('default', 'ours'):
            model = create_encoder(self.args.model, self.args.channels).to(DEVICE)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            groups = parameter_groups([model], 0.1)
            forms[name] = (
                torch.optim.AdamW(groups, lr=1e-4).step
                if name == 'default'
                else create_optimizer('adamw', groups, 1e-4, fused=True).step
            )
        return forms

    def views(self) -> Forms:
        """One view of each image, with the shares and probabilities of TorchGeo's.

        kornia's are not equal: brightness adds and contrast multiplies there, both clip,
        and the blur always has as many taps (23 for 224 pixels). Those of one image after
        the other have the distribution of ours, and are made on the CPU.
        """
        kornia = self.moco().augmentation1.to(DEVICE)
        size, scale, flip, blur = self.args.size, (0.08, 1.0), 0.5, 1.0
        ours = RandomView(size, scale, vertical_flip=flip, blur_probability=blur)
        images = self.image.cpu()
        return {
            "kornia, TorchGeo's MoCo": lambda: kornia(self.image),
            'image by image': lambda: slow.views_one_by_one(
                images, size, scale, flip, blur
            ).to(DEVICE),
            'ours': lambda: ours(self.image),
        }

    def crops(self) -> Forms:
        """All crops of DINO-MC of each image."""
        sizes = self.args.size, self.args.local_sizes
        kornia = slow.multi_crop(*sizes, self.args.channels).to(DEVICE)
        ours = MultiCropView(*sizes)
        return {'kornia': lambda: kornia(self.image), 'ours': lambda: ours(self.image)}

    def masking(self) -> Forms:
        """The encoder of SoftCon alone, by mask ratio, with its backward pass."""
        encoder = create_encoder(self.args.model, self.args.channels).to(DEVICE)
        image = self.image[..., : self.args.size, : self.args.size]
        mode: MaskMode = 'drop' if is_vit(encoder) else 'pixel'

        def form(ratio: float) -> Callable[[], Any]:
            masking = SiameseMasking(mode, ratio)

            def run() -> None:
                loss = (
                    self.cast(lambda: masking(encoder, image)).float().square().mean()
                )
                torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True)

            return run

        return {f'mask_ratio = {ratio}': form(ratio) for ratio in (0, 0.5, 0.75)}

    def softcon(self) -> Forms:
        """A step of SoftCon, by mask ratio."""
        return {
            f'mask_ratio = {ratio}': self.step(
                SoftConTask(**self.options(), mask_ratio=ratio)
            )
            for ratio in (0, 0.5, 0.75)
        }

    def two_views(self) -> Forms:
        """A step of MoCo v3, views included, and the same with masked views."""
        forms = {"TorchGeo's MoCo v3": self.step(self.moco())}
        for ratio in (0, 0.5, 0.75):
            task = SoftConTask(
                **self.options(), mask_ratio=ratio, soft_weight=0, symmetric=True
            )
            forms[f'ours, mask_ratio = {ratio}'] = self.step(task)
        return forms

    def dino_mc(self) -> Forms:
        """A step of DINO-MC, with the same views."""
        options = {
            **self.options(),
            'local_sizes': self.args.local_sizes,
            'output_dim': self.args.prototypes,
        }
        plain = DINOMCTask(**options, channels_last=False)
        step = slow.DINOMCStep(plain.to(DEVICE))
        return {
            'size by size, with loops': lambda: self.cast(lambda: step(self.image)),
            'ours': self.step(DINOMCTask(**options)),
        }

    def dino_mc_losses(self, steps: int = 5) -> float:
        """How far losses are from those of the slow form in float32.

        Args:
            steps: Number of steps, from the same start with the same crops.

        Returns:
            The largest relative difference.
        """
        views = MultiCropView(self.args.size, self.args.local_sizes)
        crops = [views(self.image) for _ in range(steps)]
        options = {
            **self.options(),
            'local_sizes': self.args.local_sizes,
            'output_dim': self.args.prototypes,
            'drop_path_rate': 0,
        }
        losses: list[list[float]] = []
        for ours in (False, True):
            torch.manual_seed(0)
            task = DINOMCTask(
                **options,
                augmentations=Given(crops),
                channels_last=None if ours else False,
            ).to(DEVICE)
            if ours:
                run = self.step(task)
                losses.append([float(run()) for _ in range(steps)])
            else:
                step = slow.DINOMCStep(task)
                losses.append([step(self.image) for _ in range(steps)])
        return max(abs(b / a - 1) for a, b in zip(*losses, strict=True))

    def options(self) -> dict[str, Any]:
        """What the tasks have in common."""
        names = {'model': 'model', 'in_channels': 'channels', 'size': 'size'}
        options = {key: getattr(self.args, name) for key, name in names.items()}
        return options | ({'hidden_dim': 16} if self.args.toy else {})

    def moco(self) -> Any:
        """TorchGeo's task as it comes."""
        module = import_module('torchgeo.tasks' if HAS_TASKS else 'torchgeo.trainers')
        return getattr(module, 'MoCo' if HAS_TASKS else 'MoCoTask')(**self.options())

    def cast(self, run: Callable[[], Any]) -> Any:
        """Run in the precision that was asked for."""
        bf16 = self.args.precision == 'bf16'
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            return run()

    def step(self, task: Any) -> Callable[[], Any]:
        """A training step as Lightning does it, without Lightning."""
        task.to(DEVICE).train()
        task.log = task.log_step = lambda *args, **kwargs: None
        ours = isinstance(task, DINOMCTask | SoftConTask)
        optimizer = (
            create_optimizer(
                'adamw',
                parameter_groups([task], task.hparams['weight_decay']),
                1e-4,
                fused=True,
            )
            if ours
            else torch.optim.AdamW(task.parameters(), lr=1e-4)
        )
        task._trainer = SimpleNamespace(
            global_step=0,
            current_epoch=9,
            max_epochs=200,
            global_rank=0,
            optimizers=[optimizer],
        )

        def run() -> Tensor:
            loss: Tensor = self.cast(lambda: task.training_step(self.batch, 0))
            loss.backward()  # type: ignore[no-untyped-call]
            if isinstance(task, DINOMCTask):  # the others leave it to Lightning
                task.configure_gradient_clipping(optimizer)
            task.optimizer_step(0, 0, optimizer, lambda: None)
            # Here, so that gradients are memory of this call, and of no other form's
            optimizer.zero_grad()
            return loss.detach()

        return run


ROWS = (
    'loss',
    'ema',
    'optimizer',
    'views',
    'crops',
    'masking',
    'softcon',
    'two_views',
    'dino_mc',
)

#: Sizes at which all rows take seconds. test_vit is made for 160 pixels.
TOY = {'model': 'test_vit', 'channels': 2, 'batch': 2, 'image': 160, 'size': 160}
TOY |= {'local_sizes': [48, 32], 'prototypes': 64, 'rounds': 1}


def run(args: argparse.Namespace, peak: float) -> Iterator[Timing]:
    """Time the rows."""
    torch.manual_seed(0)
    for row in args.rows:
        forms = getattr(Bench(args), row)()
        yield from compare(row, forms, args.rounds, args.batch, peak)


def main(args: Sequence[str] | None = None) -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='vit_small_patch16_224')
    parser.add_argument('--channels', type=int, default=13)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--image', type=int, default=264)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument(
        '--local-sizes', type=int, nargs='*', default=[184, 164, 144, 124, 104, 84]
    )
    parser.add_argument('--prototypes', type=int, default=65536)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--precision', choices=('fp32', 'bf16'), default='fp32')
    parser.add_argument('--rows', nargs='+', choices=ROWS, default=ROWS)
    parser.add_argument('--toy', action='store_true', help='everything in seconds')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the table')
    options = parser.parse_args(args)
    if options.toy:
        vars(options).update(TOY)

    torch.set_num_threads(options.threads)
    peak = matrix_rate(options.precision == 'bf16', 64 if options.toy else 0)
    facts = circumstances() | {'GFLOP/s': round(peak / 1e9, 1)}
    print(', '.join(f'{key} {value}' for key, value in facts.items()))
    print(HEADER)
    timings = []
    for timing in run(options, peak):
        timings.append(timing)
        print(timing, flush=True)
    if 'dino_mc' in options.rows:
        facts['loss difference'] = Bench(options).dino_mc_losses()
        print(
            'DINO-MC losses of 5 steps, largest relative difference to the slow form in '
            f'fp32: {facts["loss difference"]:.1e}'
        )
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != 'json'}
        rows = [asdict(timing) for timing in timings]
        table = {**facts, 'options': settings, 'rows': rows}
        options.json.write_text(json.dumps(table, indent=2) + '\n')


if __name__ == '__main__':
    main()
