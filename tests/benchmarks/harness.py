# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Times forms of the same computation side by side."""

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@dataclass(frozen=True)
class Timing:
    """How long a form takes.

    Attributes:
        row: What is computed.
        form: How.
        seconds: Of each round, CPU time on a CPU, and between events on a GPU.
        ratio: Median of the first form of the row / median of this one.
        memory: Bytes: on a GPU the peak of a call, less what was allocated before it
            (weights, the optimizer's state, what other forms keep), on a CPU what is kept
            for backward passes, weights excepted.
        flops: Floating-point operations of matrix products, convolutions and attention.
        images: Number of images.
        peak: Matrix products of this device and precision, in operations per second.
    """

    row: str
    form: str
    seconds: list[float]
    ratio: float
    memory: int
    flops: int
    images: int
    peak: float

    def __str__(self) -> str:
        """A line of the table."""
        median, low, high = (f(self.seconds) for f in (statistics.median, min, max))
        return (
            f'{self.row:10} {self.form:24} {median:10.5f} {low:10.5f} {high:10.5f} '
            f'{self.ratio:7.2f} {self.memory / self.images / 2**20:10.1f} '
            f'{self.flops / self.images / 1e9:13.2f} '
            f'{self.flops / max(median, 1e-12) / self.peak:7.1%}'
        )


HEADER = (
    f'{"row":10} {"form":24} {"median s":>10} {"min s":>10} {"max s":>10} {"ratio":>7} '
    f'{"MiB/image":>10} {"GFLOP/image":>13} {"of peak":>7}'
)


class Kept:
    """Bytes that forward passes keep for backward passes."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor, once for each memory, unless it is there anyway."""
        if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            # Held, or its address would be used again
            self._seen[storage.data_ptr()] = tensor
            self.total += storage.nbytes()
        return tensor


def counted(run: Callable[[], Any]) -> tuple[int, int]:
    """Operations of a call, and bytes that it keeps for backward passes."""
    kept = Kept()
    with (
        FlopCounterMode(display=False) as counter,
        saved_tensors_hooks(kept.pack, lambda tensor: tensor),
    ):
        run()
    return counter.get_total_flops(), kept.total


def matrix_rate(bf16: bool, side: int = 0) -> float:
    """Operations per second of large matrix products, the floor of all that follows."""
    side = side or (8192 if DEVICE == 'cuda' else 1024)
    dtype = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * side**3 / min(timed(lambda: torch.mm(a, b)) for _ in range(7))


def timed(run: Callable[[], Any]) -> float:
    """Seconds of a call: CPU time on a CPU, device time on a GPU."""
    if DEVICE == 'cpu':
        begin = time.process_time()
        run()
        return time.process_time() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()  # type: ignore[no-untyped-call]
    run()
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def compare(
    row: str,
    forms: dict[str, Callable[[], Any]],
    rounds: int,
    images: int = 1,
    peak: float = 1.0,
) -> list[Timing]:
    """Time forms in turns, after two calls of each that are not timed.

    Args:
        row: What is computed.
        forms: Forms by name. The first is what the others are compared with. What a form
            keeps from call to call does not count as memory: it should keep no gradients.
        rounds: Number of calls of each form.
        images: Number of images of a call.
        peak: See :class:`Timing`.

    Returns:
        A timing per form.
    """
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    counts = {form: counted(run) for form, run in forms.items()}
    memory = {form: kept for form, (_, kept) in counts.items()}
    before = 0
    for turn in range(-1, rounds):
        for form, run in forms.items():
            if DEVICE == 'cuda':
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            second = timed(run)
            if turn >= 0:
                seconds[form].append(second)
            if DEVICE == 'cuda':
                memory[form] = torch.cuda.max_memory_allocated() - before
    first = statistics.median(next(iter(seconds.values())))
    return [
        Timing(
            row,
            form,
            s,
            first / max(statistics.median(s), 1e-12),
            memory[form],
            counts[form][0],
            images,
            peak,
        )
        for form, s in seconds.items()
    ]


def circumstances() -> dict[str, Any]:
    """Device, threads, versions and date of a table."""
    name = torch.cuda.get_device_name() if DEVICE == 'cuda' else platform.processor()
    packages = ('torch', 'torchgeo', 'timm', 'kornia', 'lightly', 'torchgeo-softcon')
    return {
        'device': f'{DEVICE} {name}'.strip(),
        'threads': torch.get_num_threads(),
        'date': datetime.date.today().isoformat(),
        'python': platform.python_version(),
        **{package: version(package) for package in packages},
    }
