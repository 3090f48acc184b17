# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""The processor cores of this process."""

import os


def count_cores() -> int:
    """Count the processor cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):  # not so on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
