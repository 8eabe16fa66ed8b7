"""Tasks for several processes: one that dies ends the run with a message, and none outlives it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Lock:
    """An open file that holds an flock. Workers get it too, so the lock is held until the last of them is gone."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.descriptor),)


def _received(duplicate: Any) -> Lock:
    return Lock(duplicate.detach())


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    work: Callable[[T], R], tasks: Iterable[T], *, num_workers: int, lock: Lock, preload: str
) -> Generator[R]:
    """Results of `work`, as they come; which worker does what follows from who is free first.

    Args:
        num_workers: 1 works in this process.
        lock: stays held while any worker lives.
        preload: module that `work` needs, imported once for all workers.
    Raises:
        ChildProcessError: a worker died, which names the signal. And whatever `work` raises, from the first task where
            it does; the other workers are ended at once.
    """
    if num_workers == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy the threads of torch half
    context.set_forkserver_preload([__name__, preload])
    resource_tracker.ensure_running()  # by itself it starts with the first worker, and then lets SIGINT through again
    workers: dict[Connection, Any] = {}
    queue = iter(tasks)
    try:
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs, lock), daemon=True)
            with _interrupts_held():  # Ctrl-C reaches every process of the group; only this one answers it
                process.start()
            theirs.close()
            workers[ours] = process
        busy = [connection for connection in workers if _send_next(connection, queue, workers)]
        while busy:
            for connection in wait(busy):
                assert isinstance(connection, Connection)
                yield _result(connection, workers)
                if not _send_next(connection, queue, workers):
                    busy.remove(connection)
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.join()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Children inherit the mask of their parent, and so never see the signal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send_next(connection: Connection, queue: Iterator[Any], workers: dict[Connection, Any]) -> bool:
    for task in queue:
        try:
            connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            raise _died(workers[connection]) from None
        return True
    return False


def _result(connection: Connection, workers: dict[Connection, Any]) -> Any:
    try:
        error, result = connection.recv()
    except (EOFError, ConnectionResetError):
        raise _died(workers[connection]) from None
    if error is not None:
        raise error
    return result


def _died(process: Any) -> ChildProcessError:
    process.join(10)
    code = process.exitcode
    if code == -signal.SIGKILL:
        why = "was killed (SIGKILL), as happens when memory runs out; try again with fewer --workers"
    elif code is not None and code < 0:
        why = f"was ended by signal {-code} ({signal.Signals(-code).name})"
    else:
        why = f"ended with status {code}"
    return ChildProcessError(f"worker process {process.pid} {why}; what is finished is kept for the next run")


def _serve(work: Callable[[Any], Any], connection: Connection, lock: Lock) -> None:
    """What a worker does: tasks, until there are no more or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        answer: tuple[Exception | None, Any]
        try:
            answer = (None, work(task))
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = (error, None)
        connection.send(answer)


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
