"""Where tasks run: threads of this process, a pool of processes, or the workers of a Dask cluster.

An engine takes tasks and yields their rows in the order in which they end. Rows do not depend on the engine: a lane is
a function of its configuration and seed. A worker that dies takes only what it was doing with it, and that is done
again elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Protocol

from spepolicy.errors import WorkerError
from spepolicy.lab.sweep.work import Rows, Task, run_task, start_tasks, stop_tasks

__all__ = ["Engine", "Processes", "Threads", "engine_for"]

ATTEMPTS = 3  # at a task whose worker died: it may be the task that kills it
PATIENCE_S = 0.2


class Engine(Protocol):
    """Runs tasks."""

    def workers(self) -> int:
        """Return how many tasks run at once."""

    def describe(self) -> str:
        """Return where tasks run, in words."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Rows | None]:
        """Yield the rows of every task, in the order in which they end, and None now and then meanwhile."""

    def close(self) -> None:
        """End the workers."""


def engine_for(processes: int | None, threads: int | None) -> Engine:
    """Return threads, or with *processes* a pool of so many processes."""
    return Processes(processes) if processes else Threads(threads)


class Threads:
    """Threads of this process: the compiled machine runs without the interpreter lock."""

    def __init__(self, count: int | None = None) -> None:
        """*count*: threads; None for one per processor."""
        start_tasks()
        self._count = count or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._count)

    def workers(self) -> int:
        """Return how many tasks run at once."""
        return self._count

    def describe(self) -> str:
        """Return where tasks run, in words."""
        return f"{self._count} threads"

    def run(self, tasks: Sequence[Task]) -> Iterator[Rows | None]:
        """Yield the rows of every task, in the order in which they end, and None now and then meanwhile."""
        pending = {self._pool.submit(run_task, task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=PATIENCE_S, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
            if not done:
                yield None

    def close(self) -> None:
        """End the threads; tasks that run are stopped, those that wait are dropped."""
        stop_tasks()
        self._pool.shutdown(cancel_futures=True)


class Processes:
    """A pool of processes on this machine, each with one thread. A worker that dies is replaced."""

    def __init__(self, count: int) -> None:
        """*count*: processes."""
        self._count = count
        self._pool = self._new_pool()

    def workers(self) -> int:
        """Return how many tasks run at once."""
        return self._count

    def describe(self) -> str:
        """Return where tasks run, in words."""
        return f"{self._count} processes"

    def run(self, tasks: Sequence[Task]) -> Iterator[Rows | None]:
        """Yield the rows of every task, in the order in which they end, and None now and then meanwhile.

        Raises `WorkerError` for a task whose process died `ATTEMPTS` times.
        """
        attempts = {task.number: 0 for task in tasks}
        waiting = list(tasks)
        while waiting:
            pending: dict[Future[Rows], Task] = {self._pool.submit(run_in_process, task): task for task in waiting}
            waiting = []
            while pending:
                done, _ = wait(pending, timeout=PATIENCE_S, return_when=FIRST_COMPLETED)
                for future in done:
                    task = pending.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        waiting.append(task)
                if not done:
                    yield None
            if waiting:
                # Nobody knows which of the tasks under way killed its process: those that were started count.
                for task in waiting[: 2 * self._count]:
                    attempts[task.number] += 1
                    if attempts[task.number] >= ATTEMPTS:
                        raise WorkerError(died(task, ATTEMPTS))
                self._pool.shutdown(wait=False)
                self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        import multiprocessing

        # A fork of a process with threads may deadlock; a server that forks clean children starts them as fast.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["spepolicy.drivers.simulate", "spepolicy.judge.metrics"])
        return ProcessPoolExecutor(self._count, mp_context=context, initializer=_quiet_worker)

    def close(self) -> None:
        """End the processes; what they are doing is dropped."""
        children = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            with suppress(ProcessLookupError):
                child.terminate()


def _quiet_worker() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that holds the results


def run_in_process(task: Task) -> Rows:
    """Run *task* in a worker process and say which it was."""
    return run_task(task, where=f"process {os.getpid()}")


def died(task: Task, attempts: int) -> str:
    """Return the message for a task whose worker died *attempts* times."""
    return (
        f"a worker died {attempts} times at the same {task.lanes()} lanes of policy '{task.policy.name}'. It may lack "
        "memory, or the plugin may crash the interpreter. What was finished is in the store: give each worker more "
        "memory or use fewer workers, and continue with sweep.resume=true."
    )
