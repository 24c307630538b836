"""Tasks on the workers of a Dask cluster: several machines, or a local cluster for trying it out.

A task is plain data and `run_task` depends on nothing else, so rows are those of a local sweep. Dask gives the task of
a worker that dies to another; a task at which several workers died ends the sweep with a message, for it may be what
kills them. Rows are stored by the process that started the sweep: workers need the same spepolicy and plugins, and no
shared folder.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from spepolicy.errors import ConfigurationError, WorkerError
from spepolicy.lab.sweep.engines import ATTEMPTS, PATIENCE_S, died
from spepolicy.lab.sweep.work import Rows, Task, run_task

__all__ = ["Dask"]

CONNECT_S = 20.0
WORKERS_S = 60.0  # how long to wait for the first worker of a scheduler


class Dask:
    """The workers of a scheduler, or of a local cluster."""

    def __init__(self, scheduler: str | None = None, workers: int | None = None) -> None:
        """*scheduler*: its address, tcp://host:port; None to start a local cluster of *workers* processes (default: one
        per processor), each with one thread.

        Raises `ConfigurationError` if Dask is not installed, and `WorkerError` if the scheduler does not answer or has
        no workers.
        """
        try:
            import distributed
        except ImportError as error:
            raise ConfigurationError(
                "hydra/launcher=dask needs Dask distributed, which is not installed. Install it with "
                "pip install 'spepolicy[dask]'."
            ) from error
        # Hydra sends whatever is logged to the terminal, and Dask logs every connection.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        self._distributed: Any = distributed
        self._cluster: Any = None
        self._address = scheduler or ""
        try:
            if scheduler is None:
                import os

                self._cluster = self._distributed.LocalCluster(
                    n_workers=workers or len(os.sched_getaffinity(0)),
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address=None,
                    silence_logs=40,
                )
                scheduler = self._cluster.scheduler_address
            self._client: Any = self._distributed.Client(scheduler, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            self._close_cluster()
            raise WorkerError(
                f"hydra.launcher.scheduler={self._address}: no scheduler answers there ({error}). It must be the "
                "address that dask scheduler prints, such as tcp://host:8786. Start it, or leave the address out for a "
                "local cluster."
            ) from error
        try:
            self._client.wait_for_workers(1, timeout=WORKERS_S)
        except TimeoutError as error:
            self.close()
            raise WorkerError(
                f"the Dask scheduler {self._address} had no worker for {WORKERS_S:g} s. Start workers with "
                f"dask worker {self._address}, in an environment with the same spepolicy and plugins."
            ) from error

    def workers(self) -> int:
        """Return how many tasks run at once, by the workers that are there now."""
        threads: dict[str, int] = self._client.nthreads()
        return max(1, sum(threads.values()))

    def describe(self) -> str:
        """Return where tasks run, in words."""
        where = f"the Dask cluster {self._address}" if self._address else "a local Dask cluster"
        return f"{self.workers()} workers of {where}"

    def run(self, tasks: Sequence[Task]) -> Iterator[Rows | None]:
        """Yield the rows of every task, in the order in which they end, and None now and then meanwhile.

        Raises `WorkerError` for a task at which workers died `ATTEMPTS` times, and what a worker that is not fit for
        the sweep says.
        """
        attempts = {task.number: 0 for task in tasks}
        ended: queue.Queue[Any] = queue.Queue()
        pending = {self._submit(task, ended): task for task in tasks}
        while pending:
            try:
                future = ended.get(timeout=PATIENCE_S)
            except queue.Empty:
                yield None
                continue
            task = pending.pop(future)
            rows = self._result(future, task, attempts)
            if rows is None:
                pending[self._submit(task, ended)] = task
            else:
                yield rows

    def _submit(self, task: Task, ended: queue.Queue[Any]) -> Any:
        # pure=False: Dask must not take two tasks for one. The task of a worker that dies, Dask gives to another.
        future = self._client.submit(run_on_worker, task, pure=False, priority=-task.number)
        future.add_done_callback(ended.put)
        return future

    def _result(self, future: Any, task: Task, attempts: dict[int, int]) -> Rows | None:
        """Return the rows of a task that has ended, None if it has to be tried again."""
        try:
            rows: Rows = future.result()
        except (self._distributed.scheduler.KilledWorker, self._distributed.CancelledError) as error:
            attempts[task.number] += 1
            if attempts[task.number] >= ATTEMPTS:
                raise WorkerError(died(task, ATTEMPTS)) from error
            return None
        except (ModuleNotFoundError, AttributeError) as error:  # it could not even read the task
            raise WorkerError(
                f"a Dask worker cannot run spepolicy: {error}. Install the same spepolicy and plugins in the "
                "environment of every worker, and start the workers anew."
            ) from error
        return rows

    def close(self) -> None:
        """Let the workers go; those of a local cluster end."""
        with suppress(Exception):
            self._client.close(timeout=5)
        self._close_cluster()

    def _close_cluster(self) -> None:
        if self._cluster is not None:
            with suppress(Exception):
                self._cluster.close(timeout=10)


def run_on_worker(task: Task) -> Rows:
    """Run *task* on a Dask worker and say which it was."""
    from distributed import get_worker

    return run_task(task, where=f"Dask worker {get_worker().address}")
