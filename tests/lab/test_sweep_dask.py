"""A sweep on Dask workers: a real scheduler, two worker processes, and a worker that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .sweeps import SMALL, SWEEP, Run, folder_of
from .test_sweep_run import rows, same

DASK = "hydra/launcher=dask"
LONGER = (
    "-m", "+policy=eager_pin,pin_on_fault", "guest.buffer=64KiB,128KiB", "seed=range(0,60)", *SMALL, "duration=40ms"
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """A scheduler's address and its two workers, as their commands start them."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    begin = [*dask, "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    work = [
        sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1",
        "--no-dashboard", "--no-nanny", "--local-directory", str(folder),
    ]  # fmt: skip
    log = (folder / "log").open("w")
    scheduler = subprocess.Popen(begin, cwd=folder, stdout=log, stderr=log, text=True)
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = [subprocess.Popen(work, cwd=folder, stdout=log, stderr=log, text=True) for _ in range(2)]
    import json

    yield json.loads(file.read_text())["address"], workers
    for process in (*workers, scheduler):
        if process.poll() is None:
            process.terminate()
    for process in (*workers, scheduler):
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_rows_are_those_of_a_local_sweep_though_a_worker_is_killed(
    cluster: tuple[str, list[subprocess.Popen[str]]], run: Run, tmp_path: Path
) -> None:
    address, workers = cluster
    sweep = [sys.executable, "-m", "spepolicy", *LONGER, DASK, f"hydra.launcher.scheduler={address}"]
    process = subprocess.Popen(sweep, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    store = tmp_path / "outputs" / "store"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and not list(store.glob("*.parquet")):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    os.kill(workers[0].pid, signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "2 workers of the Dask cluster" in out
    assert "Traceback" not in err
    assert workers[0].wait() == -signal.SIGKILL
    status, local, _ = run(*LONGER, "sweep.store=local")
    assert status == 0
    assert (folder_of(out) / "configurations.csv").read_text() == (folder_of(local) / "configurations.csv").read_text()
    far, near = rows(store), rows("local")
    assert len(far) == 720
    same(far, near)


def test_a_local_cluster_needs_no_address(run: Run) -> None:
    status, out, err = run(*SWEEP, DASK, "hydra.launcher.workers=2")
    assert (status, err) == (0, "")
    assert "2 workers of a local Dask cluster" in out
    assert len(rows()) == 24


def test_nobody_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spepolicy.lab.sweep.dask_engine.CONNECT_S", 1.0)
    status, _, err = run(*SWEEP, DASK, "hydra.launcher.scheduler=tcp://127.0.0.1:9")
    assert status == 2
    assert "hydra.launcher.scheduler=tcp://127.0.0.1:9: no scheduler answers there" in err
    assert "Traceback" not in err


PLUGIN = '''
from dataclasses import dataclass
from spepolicy.hookspecs import hookimpl

@dataclass
class Local:
    """Known only where the sweep was started."""

    @hookimpl
    def stage2_fault(self, faults):
        faults.resume()
'''


def test_a_plugin_that_a_worker_lacks_is_named(
    cluster: tuple[str, list[subprocess.Popen[str]]], run: Run, install: object
) -> None:
    """The workers were started before the plugin was installed here."""
    install(PLUGIN, {"local": "Local"})  # type: ignore[operator]
    words = ("-m", "+policy=local,pin_on_fault", *SMALL, DASK, f"hydra.launcher.scheduler={cluster[0]}")
    status, _, err = run(*words)
    assert status == 2
    assert "job 0 (+policy=local" in err
    assert "policy 'local' is not installed" in err
    assert "Dask worker tcp://" in err
    assert "Traceback" not in err
    assert set(rows()["policy"]) == {"bare_metal", "pin_on_fault"}, "what the workers have did run"
