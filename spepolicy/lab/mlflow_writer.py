"""A process of its own that imports MLflow and writes runs into its store; `spepolicy.lab.tracking.Tracker` starts it.

MLflow takes two seconds to import and, in a new folder, one more to make its database. Here both happen while the
simulation runs, and the simulating process never imports MLflow. This file is run by its path and imports nothing of
spepolicy.

Protocol: one JSON object a line. First line of stdin: {"uri", "experiment", "folder", "source"}; the answer is
{"ready": {...}}. Each further line is a list of runs, each {"name", "tags", "params", "metrics", "series", "files",
"dataset", "status", "start_ms", "end_ms"}; the answer is {"run_ids"}. Any failure is answered {"error", "kind"}. The
end of stdin ends the process: it is never killed, for a database that is half made would stop every later run.

A run costs 40 ms by MLflow's client, most of it a dozen small transactions. A sweep's many runs go into a database in
one, through the tables that MLflow itself defines; a test holds both ways to the same content. Where these tables are
not as expected, or the store is a server, the client does it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# One request to MLflow's store may hold 100 parameters and 1,000 items in all.
BATCH_METRICS = 900
BATCH_PARAMS = 100
MANY = 3  # runs that are worth a transaction of their own
CONTEXT = "mlflow.data.context"  # tag that says what a dataset is to a run


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
            records = json.loads(line)
            for record in records:
                record["tags"] |= provenance
            answer({"run_ids": _write_runs(client, experiment_id, records)})
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


def _write_runs(client: Any, experiment_id: str, records: list[dict[str, Any]]) -> list[str]:
    """Write *records* in order, many of them in one transaction; return their run ids."""
    run_ids = None
    if len(records) >= MANY:
        run_ids = _write_at_once(client, experiment_id, records)
    if run_ids is None:
        return [_write_run(client, experiment_id, record) for record in records]
    folder = _local_folder(client, experiment_id)
    for run_id, record in zip(run_ids, records, strict=True):
        for path in record["files"]:
            if folder is None:
                client.log_artifact(run_id, path)
            else:
                target = os.path.join(folder, run_id, "artifacts")
                os.makedirs(target, exist_ok=True)
                shutil.copy(path, target)
    return run_ids


def _write_run(client: Any, experiment_id: str, record: dict[str, Any]) -> str:
    """Write one run by MLflow's client."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    run = client.create_run(experiment_id, start_time=record["start_ms"], run_name=record["name"], tags=record["tags"])
    run_id = str(run.info.run_id)
    end_ms = record["end_ms"]
    metrics = [Metric(name, value, end_ms, 0) for name, value in record["metrics"].items()]
    metrics += [Metric(name, value, end_ms, step) for name, step, value in record["series"]]
    params = [Param(name, value) for name, value in record["params"].items()]
    batches = max(-(-len(metrics) // BATCH_METRICS), -(-len(params) // BATCH_PARAMS))
    for n in range(batches):
        client.log_batch(
            run_id,
            metrics=metrics[n * BATCH_METRICS : (n + 1) * BATCH_METRICS],
            params=params[n * BATCH_PARAMS : (n + 1) * BATCH_PARAMS],
        )
    if record["dataset"]:
        tag = InputTag(CONTEXT, record["dataset"]["context"])
        described = {key: value for key, value in record["dataset"].items() if key != "context"}
        client.log_inputs(run_id, datasets=[DatasetInput(Dataset(**described), [tag])])
    for path in record["files"]:
        client.log_artifact(run_id, path)
    client.set_terminated(run_id, status=record["status"], end_time=end_ms)
    return run_id


# ---- many runs at once -----------------------------------------------------------------------------------------------


def _local_folder(client: Any, experiment_id: str) -> str | None:
    """Return the folder below which artifacts lie, if they lie in one of this machine."""
    location = str(client.get_experiment(experiment_id).artifact_location)
    path = location.removeprefix("file://")
    return path if path.startswith("/") else None


def _write_at_once(client: Any, experiment_id: str, records: list[dict[str, Any]]) -> list[str] | None:
    """Write *records* through MLflow's own tables, all of them or none; None if that is not possible here."""
    try:
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        store = client._tracking_client.store
        if not isinstance(store, SqlAlchemyStore):
            return None
        location = str(client.get_experiment(experiment_id).artifact_location)
        run_ids = [uuid.uuid4().hex for _ in records]
        with store.ManagedSessionMaker(read_only=False) as session:
            for model, rows in _table_rows(session, int(experiment_id), location, run_ids, records):
                if rows:
                    session.execute(model.__table__.insert(), rows)
        return run_ids
    except Exception as error:  # nothing was written; the client will do it, or say what is wrong
        print(f"writing runs one by one: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return None


def _table_rows(
    session: Any, experiment_id: int, location: str, run_ids: list[str], records: list[dict[str, Any]]
) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Yield (MLflow's table, rows), in an order in which each row finds what it refers to."""
    from mlflow.entities import LifecycleStage, RunStatus, SourceType
    from mlflow.store.tracking.dbmodels import models
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

    numbered = list(zip(run_ids, records, strict=True))
    yield (
        models.SqlRun,
        [
            {
                "run_uuid": run_id,
                "name": record["name"],
                "artifact_uri": f"{location}/{run_id}/artifacts",
                "experiment_id": experiment_id,
                "source_type": SourceType.to_string(SourceType.UNKNOWN),
                "source_name": "",
                "entry_point_name": "",
                "user_id": "unknown",
                "status": RunStatus.to_string(RunStatus.from_string(record["status"])),
                "start_time": record["start_ms"],
                "end_time": record["end_ms"],
                "deleted_time": None,
                "source_version": "",
                "lifecycle_stage": LifecycleStage.ACTIVE,
            }
            for run_id, record in numbered
        ],
    )
    for model, name in ((models.SqlTag, "tags"), (models.SqlParam, "params")):
        yield (
            model,
            [
                {"run_uuid": run_id, "key": key, "value": value}
                for run_id, record in numbered
                for key, value in (record[name] | ({MLFLOW_RUN_NAME: record["name"]} if name == "tags" else {})).items()
            ],
        )
    metrics: dict[tuple[str, str, int], dict[str, Any]] = {}
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for run_id, record in numbered:
        points = [(name, 0, value) for name, value in record["metrics"].items()] + record["series"]
        for name, step, value in points:
            row = {
                "run_uuid": run_id, "key": name, "value": value, "timestamp": record["end_ms"], "step": step,
                "is_nan": False,
            }  # fmt: skip
            metrics[run_id, name, step] = row
            if (run_id, name) not in latest or latest[run_id, name]["step"] <= step:
                latest[run_id, name] = row
    yield models.SqlMetric, list(metrics.values())
    yield models.SqlLatestMetric, list(latest.values())
    yield from _dataset_rows(session, models, experiment_id, numbered)


def _dataset_rows(
    session: Any, models: Any, experiment_id: int, numbered: list[tuple[str, dict[str, Any]]]
) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    known = {
        (row.name, row.digest): row.dataset_uuid
        for row in session.query(models.SqlDataset).filter(models.SqlDataset.experiment_id == experiment_id)
    }
    datasets, inputs, tags = [], [], []
    for run_id, record in numbered:
        it = record["dataset"]
        if not it:
            continue
        if (it["name"], it["digest"]) not in known:
            known[it["name"], it["digest"]] = uuid.uuid4().hex
            datasets.append(
                {
                    "dataset_uuid": known[it["name"], it["digest"]],
                    "experiment_id": experiment_id,
                    "name": it["name"],
                    "digest": it["digest"],
                    "dataset_source_type": it["source_type"],
                    "dataset_source": it["source"],
                    "dataset_schema": it["schema"],
                    "dataset_profile": it["profile"],
                }
            )
        input_id = uuid.uuid4().hex
        inputs.append(
            {
                "input_uuid": input_id,
                "source_type": "DATASET",
                "source_id": known[it["name"], it["digest"]],
                "destination_type": "RUN",
                "destination_id": run_id,
                "step": 0,
            }
        )
        tags.append({"input_uuid": input_id, "name": CONTEXT, "value": it["context"]})
    yield models.SqlDataset, datasets
    yield models.SqlInput, inputs
    yield models.SqlInputTag, tags


if __name__ == "__main__":
    main()
