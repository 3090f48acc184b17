# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Counts what a step asks of a GPU, without one.

Tensors on PyTorch's ``meta`` device have no values, but everything else: code that is
not for CPUs takes the path that it takes on a GPU, at the price of a shape.

What is counted are calls of PyTorch's operators, which is a fair model of a GPU where each
is one kernel: matrix products, elementwise operations, copies, norms, reductions. It is
not one where

* one operator is several kernels: the backward pass of attention is two or three, so are
  sorts and large reductions, and fused optimizers have one for every few tensors;
* a library does more: convolutions may reorder memory first;
* attention runs: forward and backward count as one each, whichever kernel would be chosen;
* the precision matters: all is float32 here, under autocast every weight is cast once more
  per pass, and attention runs once per layer instead of once per size (``varlen``).

Whether the host waits is told by name alone; :mod:`tests.test_gpu` asks CUDA itself.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

#: Allocate, or look at memory in another way, but compute nothing.
_FREE = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided'}
_FREE |= {'_unsafe_view', '_reshape_alias'}

#: Have results, or shapes of results, that the host must wait for.
_READ = {'_local_scalar_dense', 'equal', 'is_nonzero', 'item', 'masked_select'}
_READ |= {
    'nonzero',
    'repeat_interleave',
    '_unique2',
    'unique_dim',
    'unique_consecutive',
}


class Operations(TorchDispatchMode):
    """Counts operations on a device, and how often the host waits for it.

    An operator on a list of tensors (``_foreach_*``, ``_fused_*``) counts as one. Views
    and allocations do not count, nor does what happens on the host alone.

    Attributes:
        device: Operations by name.
        host: Operations by name for which the host waits: values that are read, and
            copies between host and device that are not asynchronous.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device: Counter[str] = Counter()
        self.host: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        places = {t.device.type for t in _tensors(args, kwargs)}
        if 'meta' not in places | {str(kwargs.get('device'))}:
            return func(*args, **kwargs)

        source = args[0].device.type if args and isinstance(args[0], Tensor) else None
        if name == '_to_copy' and 'cpu' == str(kwargs.get('device')) != source:
            self._note(name, waits=not kwargs.get('non_blocking'))
            # There is nothing to copy
            return func(torch.zeros_like(args[0], device='cpu'), **kwargs)
        if name == '_local_scalar_dense':
            self._note(name, waits=True)
            return 1
        uploads = (name == '_to_copy' and source == 'cpu') or (
            name == 'copy_' and args[1].device.type == 'cpu'
        )
        boolean = name in (
            'index',
            'index_put',
            'index_put_',
            '_index_put_impl_',
        ) and any(t is not None and t.dtype == torch.bool for t in args[1])
        waits = name in _READ or boolean
        waits |= uploads and not (kwargs.get('non_blocking') or args[-1] is True)
        if not func.is_view and name not in _FREE:
            self._note(name, waits)
        return func(*args, **kwargs)

    def _note(self, name: str, waits: bool) -> None:
        self.device[name] += 1
        self.host[name] += waits


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Event:
    """A CUDA event that never comes."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return False


def _attention(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """Attention in one operation, as on a GPU, where it is five on ``meta``."""
    out: Tensor = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, q.requires_grad
    )[0]
    return out


def _autocast(*args: Any, **kwargs: Any) -> nullcontext[None]:
    """Float32 all over."""
    return nullcontext()


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Let ``meta`` do what only a GPU does: fused optimizers and attention, events."""
    with (
        mock.patch('torch.nn.functional.scaled_dot_product_attention', _attention),
        mock.patch('torch.cuda.Event', Event),
        mock.patch('torchgeo_softcon.tasks.guard._ASYNCHRONOUS', ('meta',)),
        mock.patch('torch.autocast', _autocast),
        mock.patch('torch.is_autocast_enabled', return_value=False),
        mock.patch(
            'torch.optim.optimizer._get_fused_kernels_supported_devices',
            return_value=['meta'],
        ),
    ):
        yield
