"""The project's Hydra plugins: a sweeper and a launcher that take all jobs of a sweep at once.

Hydra's own sweeper composes every job to validate it, and its launcher composes each again and runs one after the
other: 0.2 s a job before anything is simulated. Here the jobs go to `spepolicy.launch.Session.sweep` as they are.

Hydra looks for plugins in a package `hydra_plugins` and executes every module of it in every Hydra program of the
environment. That is not needed: the program registers its plugins itself, and gives the classes the name that Hydra
insists on.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher

from spepolicy.errors import ConfigurationError

if TYPE_CHECKING:
    from spepolicy.lab.sweep.engines import Engine
    from spepolicy.launch import Session

__all__ = ["DaskLauncher", "LanesLauncher", "LanesSweeper", "register_plugins"]


class LanesSweeper(BasicSweeper):
    """Hydra's sweeper, which leaves checking the jobs to a launcher that does it faster."""

    __module__ = "hydra_plugins.spepolicy"

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose every job unless the launcher will."""
        if not isinstance(self.launcher, LanesLauncher):
            super().validate_batch_is_legal(batch)


class LanesLauncher(Launcher):
    """Runs all jobs of a sweep as lanes of one batch, on threads or processes of this machine."""

    __module__ = "hydra_plugins.spepolicy"

    def __init__(self) -> None:
        super().__init__()
        self._session: Session | None = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Take what Hydra hands over; *task_function* is `Session.job`."""
        self._loader = hydra_context.config_loader
        self._config = config
        session = getattr(task_function, "__self__", None)
        if not hasattr(session, "sweep"):
            raise ConfigurationError("hydra/launcher=lanes runs spepolicy only. Use hydra/launcher=basic.")
        self._session = session

    def engine(self, config: Any) -> Engine:
        """Return where the lanes are to run; *config* is that of the first job."""
        from spepolicy.lab.sweep.engines import engine_for

        return engine_for(config["sweep"]["processes"], config["threads"])

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs. What fails is told by the session, which counts it; so no job has a return value."""
        assert self._session is not None
        setup_globals()
        self._session.sweep(self, self._loader, self._config, job_overrides, initial_job_idx)
        return [JobReturn(overrides=list(job), status=JobStatus.COMPLETED) for job in job_overrides]


class DaskLauncher(LanesLauncher):
    """Runs all jobs of a sweep as lanes on the workers of a Dask cluster."""

    __module__ = "hydra_plugins.spepolicy"

    def __init__(self, scheduler: str | None = None, workers: int | None = None) -> None:
        """*scheduler*: its address; None for a local cluster of *workers* processes."""
        super().__init__()
        self._scheduler, self._workers = scheduler, workers

    def engine(self, config: Any) -> Engine:
        """Return where the lanes are to run."""
        from spepolicy.lab.sweep.dask_engine import Dask

        return Dask(self._scheduler, self._workers)


def register_plugins() -> None:
    """Make the plugins known to Hydra."""
    from hydra.core.plugins import Plugins

    plugins = Plugins.instance()  # scans the package hydra_plugins, where there is one
    for plugin in (LanesSweeper, LanesLauncher, DaskLauncher):
        plugins.register(plugin)
    try:
        package = importlib.import_module("hydra_plugins")
    except ImportError:
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    package.spepolicy = sys.modules["hydra_plugins.spepolicy"] = sys.modules[__name__]  # type: ignore[attr-defined]
