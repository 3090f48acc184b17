# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Functions for workers, in a module that they import fast."""

import os
import signal
import time
from pathlib import Path


def square(number: int) -> int:
    return number**2


def die_once(unit: tuple[Path, int]) -> int:
    """Kill the worker the first time that unit 3 comes up."""
    marker, number = unit
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int) -> int:
    raise ValueError(f'number {number}')


def process(number: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def stop(number: int) -> int:
    time.sleep(0 if number < 3 else 300)
    return os.getpid()


def blocked_signals(number: int) -> set[int]:
    return {*signal.pthread_sigmask(signal.SIG_BLOCK, ())}
