# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Share of a run that the callbacks take, at their defaults.

Runs the quick start, in the current folder, and prints the processor and wall-clock time
spent in the callbacks, as a share of all training. Options are those of `torchgeo fit`:

    python tests/benchmarks/callback_cost.py [--trainer.max_epochs 2 ...]
"""

import functools
import sys
import time
from pathlib import Path
from typing import Any

from torchgeo.main import main

from torchgeo_softcon.callbacks import CollapseMonitor, KNNProbe

CONFIG = Path(__file__).parents[2] / 'examples' / 'quickstart.yaml'

#: Processor and wall-clock time by what they are spent in.
spent: dict[str, list[float]] = {}


def timed(owner: type, name: str, key: str) -> None:
    """Count the time that a method takes."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            total = spent.setdefault(key, [0.0, 0.0])
            total[0] += time.process_time() - cpu
            total[1] += time.perf_counter() - wall

    setattr(owner, name, wrapper)


if __name__ == '__main__':
    from lightning.pytorch.loops import _FitLoop

    for callback in (KNNProbe, CollapseMonitor):
        for hook in ('on_train_start', 'on_train_batch_end', 'on_train_epoch_end'):
            timed(callback, hook, callback.__name__)
    timed(_FitLoop, 'run', 'training')
    callbacks = '[{class_path: torchgeo_softcon.callbacks.KNNProbe}, '
    callbacks += '{class_path: torchgeo_softcon.callbacks.CollapseMonitor}]'
    options = ['--config', str(CONFIG), '--trainer.enable_progress_bar', 'false']
    main(['fit', *options, '--trainer.callbacks', callbacks, *sys.argv[1:]])

    extra = [
        sum(spent[name][i] for name in spent if name != 'training') for i in (0, 1)
    ]
    net = [spent['training'][i] - extra[i] for i in (0, 1)]
    for name in ('KNNProbe', 'CollapseMonitor'):
        cpu, wall = (spent[name][i] / net[i] for i in (0, 1))
        print(f'{name:16} {cpu:6.2%} of the processor time, {wall:6.2%} of the time')
    cpu, wall = (extra[i] / net[i] for i in (0, 1))
    print(f'{"both":16} {cpu:6.2%} of {net[0]:.0f} s, {wall:6.2%} of {net[1]:.0f} s')
