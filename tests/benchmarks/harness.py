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

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@dataclass(frozen=True)
class Timing:
    """How long a form takes.

    Attributes:
        row: What is computed.
        form: How.
        seconds: Of each round, CPU time on a CPU, and between events on a GPU.
        ratio: Median of the first form of the row / median of this one.
        memory: Peak memory on a GPU in bytes, else 0.
    """

    row: str
    form: str
    seconds: list[float]
    ratio: float
    memory: int

    def __str__(self) -> str:
        """A line of the table."""
        median, low, high = (f(self.seconds) for f in (statistics.median, min, max))
        return (
            f'{self.row:26} {self.form:26} {median:10.5f} {low:10.5f} {high:10.5f} '
            f'{self.ratio:7.2f} {self.memory / 2**20:9.0f}'
        )


HEADER = (
    f'{"row":26} {"form":26} {"median s":>10} {"min s":>10} {"max s":>10} '
    f'{"ratio":>7} {"peak MiB":>9}'
)


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


def compare(row: str, forms: dict[str, Callable[[], Any]], rounds: int) -> list[Timing]:
    """Time forms in turns, after two calls of each that are not counted.

    Args:
        row: What is computed.
        forms: Forms by name. The first is what the others are compared with.
        rounds: Number of calls of each form.

    Returns:
        A timing per form.
    """
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    memory = dict.fromkeys(forms, 0)
    for turn in range(-2, rounds):
        for form, run in forms.items():
            if DEVICE == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            second = timed(run)
            if turn >= 0:
                seconds[form].append(second)
            if DEVICE == 'cuda':
                memory[form] = torch.cuda.max_memory_allocated()
    first = statistics.median(next(iter(seconds.values())))
    return [
        Timing(row, form, s, first / max(statistics.median(s), 1e-12), memory[form])
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
