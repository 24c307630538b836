"""A process of its own that imports MLflow and writes runs into its store; `spepolicy.lab.tracking.Tracker` starts it.

MLflow takes two seconds to import and, in a new folder, one more to make its database. Here both happen while the
simulation runs, and the simulating process never imports MLflow. This file is run by its path and imports nothing of
spepolicy.

Protocol: one JSON object a line. First line of stdin: {"uri", "experiment", "folder", "source"}; the answer is
{"ready": {...}}. Each further line is a run: {"name", "tags", "params", "metrics", "series", "files", "status",
"start_ms", "end_ms"}; the answer is {"run_id"}. Any failure is answered {"error", "kind"}. The end of stdin ends the
process: it is never killed, for a database that is half made would stop every later run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# One request to MLflow's store may hold 100 parameters and 1,000 items in all.
BATCH_METRICS = 900
BATCH_PARAMS = 100


def main() -> None:
    """Serve the protocol above on stdin and stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # MLflow and its migrations may print; the protocol keeps the real stdout for itself.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        _quiet_environment()
        from mlflow.tracking import MlflowClient

        opening = json.loads(sys.stdin.readline() or "null")
        if opening is None:
            return
        os.chdir(opening["folder"])  # MLflow puts ./mlruns beside the database
        with _alone_in(opening["folder"], opening["uri"]):
            client = MlflowClient(tracking_uri=opening["uri"])
            experiment_id = _experiment(client, opening["experiment"])
        provenance = _git_tags(opening["source"])
        answer({"ready": {"experiment_id": experiment_id}})
        for line in sys.stdin:
            record = json.loads(line)
            record["tags"] |= provenance
            answer({"run_id": _write_run(client, experiment_id, record)})
    except BrokenPipeError:
        pass  # the simulation ended without results
    except Exception as error:  # every failure of MLflow is the user's to read, in the simulating process
        answer({"error": str(error).strip() or repr(error), "kind": type(error).__name__})
    finally:
        sys.stderr.flush()
        os._exit(0)  # MLflow's thread pools and modules take half a second to come down


def _quiet_environment() -> None:
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # The defaults try a server that is not there for minutes.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def _alone_in(folder: str, uri: str) -> Iterator[None]:
    """Let one process at a time make a database in *folder*: MLflow's migrations fail when two run at once."""
    if not uri.startswith("sqlite:"):
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _experiment(client: Any, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return str(client.create_experiment(name))
    if experiment.lifecycle_stage != "active":
        raise ValueError(f"experiment '{name}' was deleted in this store; restore it or choose another name")
    return str(experiment.experiment_id)


def _git_tags(source: str) -> dict[str, str]:
    """Commit and state of the work tree that *source* is the top of, if it is one and git is there."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", source, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not os.path.samefile(git("rev-parse", "--show-toplevel"), source):
            return {}  # an installed copy inside somebody else's work tree
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git_commit": commit, "git_dirty": str(dirty).lower()}


def _write_run(client: Any, experiment_id: str, record: dict[str, Any]) -> str:
    from mlflow.entities import Metric, Param

    now_ms = int(time.time() * 1000)
    run = client.create_run(experiment_id, start_time=record["start_ms"], run_name=record["name"], tags=record["tags"])
    run_id = str(run.info.run_id)
    metrics = [Metric(name, value, now_ms, 0) for name, value in record["metrics"].items()]
    metrics += [Metric(name, value, now_ms, step) for name, step, value in record["series"]]
    params = [Param(name, value) for name, value in record["params"].items()]
    batches = max(-(-len(metrics) // BATCH_METRICS), -(-len(params) // BATCH_PARAMS))
    for n in range(batches):
        client.log_batch(
            run_id,
            metrics=metrics[n * BATCH_METRICS : (n + 1) * BATCH_METRICS],
            params=params[n * BATCH_PARAMS : (n + 1) * BATCH_PARAMS],
        )
    for path in record["files"]:
        client.log_artifact(run_id, path)
    client.set_terminated(run_id, status=record["status"], end_time=record["end_ms"])
    return run_id


if __name__ == "__main__":
    main()
