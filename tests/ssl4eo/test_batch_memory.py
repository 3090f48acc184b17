# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

import pickle

import torch

from torchgeo_softcon.ssl4eo.record_archive import BufferPool


def test_memory_is_used_again_when_nobody_refers_to_it() -> None:
    pool = BufferPool()
    array = pool.empty(4, 8)
    address = array.ctypes.data
    tensor, row = torch.from_numpy(array)[1:3], array[2]
    del array
    assert pool.empty(4, 8).ctypes.data != address
    held = [pool.empty(4, 8)]
    del tensor
    held.append(pool.empty(4, 8))
    # A slice is enough to keep it
    assert address not in [a.ctypes.data for a in held]
    del row
    assert pool.empty(4, 8).ctypes.data == address


def test_other_sizes_get_other_memory() -> None:
    pool = BufferPool()
    address = pool.empty(4, 8).ctypes.data
    assert pool.empty(2, 16).ctypes.data == address
    assert pool.empty(3, 8).shape == (3, 8)


def test_another_process_starts_empty() -> None:
    pool = BufferPool()
    pool.empty(4, 8)
    assert not pickle.loads(pickle.dumps(pool))._free
