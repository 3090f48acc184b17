# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Memory for batches that is used again when a batch is no longer needed."""

import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

#: Unused memory that is kept, in batches.
_KEPT = 4


class BufferPool:
    """Gives arrays, and takes their memory back when nobody refers to them any more.

    The kernel clears new memory page by page. For batches of tens of megabytes that takes
    as long as reading them.
    """

    def __init__(self) -> None:
        """Initialize a new BufferPool instance."""
        self._free: deque[memoryview] = deque(maxlen=_KEPT)

    def __reduce__(self) -> Any:
        """Another process has its own memory."""
        return BufferPool, ()

    def empty(self, rows: int, width: int) -> npt.NDArray[np.uint8]:
        """Return an array of shape (rows, width) whose values are arbitrary."""
        memory = np.empty(0, np.uint8).data
        while self._free and len(memory) != rows * width:
            memory = self._free.popleft()
        if len(memory) != rows * width:
            memory = np.empty(rows * width, np.uint8).data
        # Whatever is made of this array, by slicing or by torch.from_numpy, keeps it: a
        # view of an array that has its memory from elsewhere refers to that array
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array.reshape(rows, width)
