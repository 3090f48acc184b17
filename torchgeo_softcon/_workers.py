# Copyright (c) torchgeo-softcon contributors. All rights reserved.
# Licensed under the MIT License.

"""Work units on the processes of this machine, or on a Dask cluster."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar
from urllib.parse import urlsplit

Unit = TypeVar('Unit')
Result = TypeVar('Result')

#: How often a unit is tried whose worker died. What kills three workers is the unit, or
#: the lack of memory.
_TRIES = 3

#: Units that are handed out per worker, so that none waits for the next one.
_AHEAD = 2

#: How long a scheduler has to answer, and the seconds in which it must be reached.
_ANSWER, _REACHED = '30s', 5.0


class Workers:
    """Runs work units: here, one after the other."""

    #: How many units run at once.
    count = 1

    def map(
        self, function: Callable[[Unit], Result], units: Iterable[Unit]
    ) -> Iterator[Result]:
        """Run a function on every unit."""
        return map(function, units)


class ExecutorWorkers(Workers):
    """Runs work units on an executor, such as that of a Dask cluster."""

    #: Seconds without any result after which to give up, None for never.
    limit: float | None = None

    def __init__(self, start: Callable[[], Executor], count: int) -> None:
        """Start an executor of *count* workers, and another one when they have died."""
        self.start, self.count = start, count
        self.executor = start()

    def map(
        self, function: Callable[[Unit], Result], units: Iterable[Unit]
    ) -> Iterator[Result]:
        """Run a function on every unit, see :meth:`Workers.map`."""
        source = ((unit, 1) for unit in units)
        again: list[tuple[Unit, int]] = []
        running: dict[Future[Result], tuple[Unit, int]] = {}
        while True:
            try:
                while len(running) < _AHEAD * self.count:
                    unit = again.pop() if again else next(source, None)
                    if unit is None:
                        break
                    again.append(unit)  # until it is handed out
                    running[self.executor.submit(function, unit[0])] = unit
                    again.pop()
                if not running:
                    return
                done, _ = concurrent.futures.wait(
                    running, self.limit, concurrent.futures.FIRST_COMPLETED
                )
                if not done:
                    raise TimeoutError(
                        f'workers gave no result for {self.limit:.0f} s. What is done is '
                        'kept: start again to go on, with workers = 1 if they stop again'
                    )
                for future in done:
                    result = future.result()
                    del running[future]
                    yield result
            except BrokenExecutor as error:
                again += [(unit, tries + 1) for unit, tries in running.values()]
                running = {}
                if max(tries for _, tries in again) > _TRIES:
                    raise BrokenExecutor(
                        f'worker processes died {_TRIES} times in a row, which a lack '
                        'of memory does: use fewer workers'
                    ) from error
                self.close(kill=True)
                self.executor = self.start()

    def close(self, kill: bool) -> None:
        """End the workers, or kill those that are at work."""
        self.executor.shutdown(wait=not kill)


class LocalWorkers(ExecutorWorkers):
    """Runs work units in processes of this machine. Those that die are replaced.

    They are new processes, not forks: what another thread of this one has locked, as PROJ,
    sqlite and GDAL do, would stay locked in a fork for ever.
    """

    # The largest unit takes seconds with tiles on a disk, minutes with those on a server
    limit = 3600.0

    def __init__(self, count: int) -> None:
        """Start *count* processes."""
        self._context = _Context()
        options = count, self._context, _end_with_parent
        super().__init__(partial(ProcessPoolExecutor, *options), count)

    def close(self, kill: bool) -> None:
        """End the workers, or kill those that are at work."""
        if kill:
            started = [p for p in self._context.started if p.pid is not None]
            for process in started:
                process.kill()
            for process in started:
                process.join()
        super().close(kill)
        self._context.started.clear()


class _Process(SpawnProcess):
    """A process that needs the modules of work units, and not the main one.

    The main module would be imported, too: a script that labels without asking for its
    ``__name__`` would start once more in every worker.
    """

    _starting = threading.Lock()

    def start(self) -> None:
        with self._starting:
            main = sys.modules['__main__']
            sys.modules['__main__'] = types.ModuleType('__main__')
            # Ctrl-C reaches all processes of a terminal. The parent ends these, which
            # inherit that it is blocked
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                sys.modules['__main__'] = main


class _Context(SpawnContext):
    """Starts such processes, and knows those it has started."""

    def __init__(self) -> None:
        self.started: list[_Process] = []

    def Process(self, *args: Any, **kwargs: Any) -> _Process:  # type: ignore[override]
        process = _Process(*args, **kwargs)
        self.started.append(process)
        return process


def _end_with_parent() -> None:
    """Do not outlive the process that waits for the results, not even a killed one."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def open_workers(count: int, scheduler: str | None) -> Iterator[Workers]:
    """Open workers for a run.

    Args:
        count: Number of processes of this machine, 1 for this process itself.
        scheduler: Address of a Dask scheduler to use instead, like
            ``tcp://10.0.0.1:8786``. Its workers need this package, and the same paths.

    Raises:
        ImportError: If Dask is not installed.
        OSError: If the scheduler does not answer.
    """
    if scheduler is None and count == 1:
        yield Workers()
        return
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            workers: ExecutorWorkers = LocalWorkers(count)
        else:
            client = stack.enter_context(_connect(scheduler))
            # A unit may fail for a reason of the worker it is on
            start = partial(client.get_executor, pure=False, retries=_TRIES)
            workers = ExecutorWorkers(start, max(sum(client.nthreads().values()), 1))
        try:
            yield workers
        except BaseException:
            workers.close(kill=True)
            raise
        workers.close(kill=False)


def _connect(scheduler: str) -> Any:
    """Connect to a Dask cluster."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            f'scheduler {scheduler} needs Dask: pip install "torchgeo-softcon[dask]"'
        ) from error
    check_scheduler(scheduler)
    try:
        return Client(scheduler, timeout=_ANSWER, set_as_default=False)
    except OSError as error:
        raise OSError(f'scheduler {scheduler} does not answer ({error})') from error


def check_scheduler(address: str) -> None:
    """Find out at once whether a scheduler is there, for which Dask takes half a minute.

    Raises:
        OSError: If its address cannot be reached.
    """
    try:
        url = urlsplit(address if '://' in address else f'tcp://{address}')
        if url.scheme in ('tcp', 'tls') and url.hostname and url.port:
            socket.create_connection((url.hostname, url.port), _REACHED).close()
    except (OSError, ValueError) as error:
        raise OSError(f'scheduler {address} does not answer ({error})') from error
