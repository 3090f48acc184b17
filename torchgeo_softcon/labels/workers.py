# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Work units on the processes of this machine, or on a Dask cluster."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

Unit = TypeVar('Unit')
Result = TypeVar('Result')

#: How often a unit is tried whose worker died. What kills three workers is the unit, or
#: the lack of memory.
_TRIES = 3

#: Units that are handed out per worker, so that none waits for the next one.
_AHEAD = 2

#: How long a scheduler has to answer.
_TIMEOUT = '30s'


class Workers(Protocol):
    """Runner of work units."""

    #: How many units run at once.
    count: int

    def map(
        self, function: Callable[[Unit], Result], units: Iterable[Unit]
    ) -> Iterator[Result]:
        """Run a function on every unit.

        Args:
            function: A function of a module.
            units: Its arguments, taken one after the other as workers are free.

        Yields:
            What it returns, in the order in which it is done.
        """
        ...


class InProcess:
    """Runs units here, one after the other."""

    count = 1

    def map(
        self, function: Callable[[Unit], Result], units: Iterable[Unit]
    ) -> Iterator[Result]:
        """See :class:`Workers`."""
        return map(function, units)


class LocalWorkers:
    """Runs units in processes of this machine. Those that die are replaced."""

    def __init__(self, count: int) -> None:
        """Initialize a new LocalWorkers instance.

        Args:
            count: Number of processes.
        """
        self.count = count

    def map(
        self, function: Callable[[Unit], Result], units: Iterable[Unit]
    ) -> Iterator[Result]:
        """See :class:`Workers`.

        Raises:
            RuntimeError: If a unit kills its worker again and again.
        """
        source = iter(units)
        again: list[tuple[Unit, int]] = []
        while True:
            running: dict[Future[Result], tuple[Unit, int]] = {}
            pool = ProcessPoolExecutor(self.count, initializer=_end_with_parent)
            try:
                while True:
                    while len(running) < _AHEAD * self.count:
                        unit = again.pop() if again else _next(source)
                        if unit is None:
                            break
                        try:
                            running[pool.submit(function, unit[0])] = unit
                        except BrokenProcessPool:  # while nobody waited for results
                            again.append(unit)
                            raise
                    if not running:
                        return
                    done = concurrent.futures.wait(
                        running, return_when=FIRST_COMPLETED
                    ).done
                    for future in done:
                        result = future.result()
                        del running[future]
                        yield result
            except BrokenProcessPool as error:
                again += [(unit, tries + 1) for unit, tries in running.values()]
                if max(tries for _, tries in again) >= _TRIES:
                    raise RuntimeError(
                        f'worker processes died {_TRIES} times in a row, which a lack '
                        'of memory does: use fewer workers'
                    ) from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


class DaskWorkers:
    """Runs units on a Dask cluster, which replaces workers that die."""

    def __init__(self, client: Any) -> None:
        """Initialize a new DaskWorkers instance.

        Args:
            client: A client of the cluster.
        """
        self.client = client
        self.count = max(sum(client.nthreads().values()), 1)

    def map(
        self, function: Callable[[Unit], Result], units: Iterable[Unit]
    ) -> Iterator[Result]:
        """See :class:`Workers`."""
        from distributed import as_completed

        source = iter(units)

        def submit() -> Any:
            unit = next(source, None)
            if unit is None:
                return None
            return self.client.submit(function, unit, pure=False, retries=_TRIES)

        first = [submit() for _ in range(_AHEAD * self.count)]
        running = as_completed(
            [future for future in first if future is not None], loop=self.client.loop
        )
        for future in running:
            result = future.result()
            future.release()
            following = submit()
            if following is not None:
                running.add(following)
            yield result


@contextlib.contextmanager
def open_workers(count: int, scheduler: str | None) -> Iterator[Workers]:
    """Workers for a run.

    Args:
        count: Number of processes of this machine, 1 for this process itself.
        scheduler: Address of a Dask scheduler to use instead, like
            ``tcp://10.0.0.1:8786``. Its workers need this package, and the same paths.

    Yields:
        The workers.

    Raises:
        ImportError: If Dask is not installed.
        OSError: If the scheduler does not answer.
    """
    if scheduler is None:
        yield InProcess() if count == 1 else LocalWorkers(count)
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            f'scheduler {scheduler} needs Dask: pip install "torchgeo-softcon[dask]"'
        ) from error
    try:
        client = Client(scheduler, timeout=_TIMEOUT, set_as_default=False)
    except OSError as error:
        raise OSError(f'scheduler {scheduler} does not answer ({error})') from error
    with client:
        yield DaskWorkers(client)


def _next(source: Iterator[Unit]) -> tuple[Unit, int] | None:
    """The next unit, which was not tried yet."""
    for unit in source:
        return unit, 0
    return None


def _end_with_parent() -> None:
    """Do not outlive the process that waits for the results, not even a killed one."""
    # Ctrl-C reaches all processes of a terminal, and the parent ends these
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
