"""Recording runs in MLflow, by way of a process that imports it: `spepolicy.lab.mlflow_writer`.

One flat MLflow run a policy: the chosen one and each baseline, so that MLflow's table and charts compare them without
unfolding anything. The default store is the embedded SQLite database `mlflow.db` in the current folder with artifacts
in `mlruns` beside it, which is where `mlflow ui` looks by itself.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

from spepolicy.errors import OutputError

__all__ = ["RunRecord", "Tracked", "Tracker", "TrackingSettings", "flat_params", "without_password"]

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https", "databricks")
ANSWER_TIMEOUT_S = 180.0
PARAM_LENGTH = 500  # MLflow's columns hold more, its table does not show it


@dataclass(frozen=True)
class TrackingSettings:
    """The configuration group `tracking`."""

    kind: str = "mlflow"
    uri: str | None = None  # None: MLFLOW_TRACKING_URI if it is set, else sqlite:///mlflow.db in the current folder
    experiment: str = "spepolicy"
    run_name: str | None = None  # None: the policy and the seed


@dataclass(frozen=True)
class RunRecord:
    """One MLflow run."""

    name: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    series: list[tuple[str, int, float]]  # metric, step, value
    files: list[str] = field(default_factory=list)  # absolute paths
    dataset: dict[str, str | None] | None = None  # name, digest, source_type, source, schema, profile, context
    status: str = "FINISHED"  # or KILLED
    start_ms: int = 0
    end_ms: int = 0


@dataclass(frozen=True)
class Tracked:
    """Where the runs went."""

    uri: str
    experiment_id: str
    run_ids: tuple[str, ...]
    sweep: str = ""  # the runs are those with this tag `sweep`

    def ui_command(self) -> str | None:
        """Return the command that shows the store, None if it is a server that shows itself."""
        if urlsplit(self.uri).scheme.split("+")[0] in SERVERS:
            return None
        return "mlflow ui" if self._is_default() else f"mlflow ui --backend-store-uri '{without_password(self.uri)}'"

    def _is_default(self) -> bool:
        """True if `mlflow ui` finds the store by itself. It prefers an old file store in ./mlruns: meta.yaml files."""
        here = Path.cwd()
        return self.uri == f"sqlite:///{here / 'mlflow.db'}" and not any(here.glob("mlruns/[0-9]*/meta.yaml"))

    def link(self) -> str:
        """Return the address, in a UI at MLflow's default port or on the server itself, that compares the runs."""
        base = (
            without_password(self.uri).rstrip("/")
            if urlsplit(self.uri).scheme in ("http", "https")
            else "http://127.0.0.1:5000"
        )
        if self.sweep:
            # Sorted by a metric, the table is flat, and the charts draw what the filter leaves.
            chosen = quote(f"tags.sweep = '{self.sweep}' and tags.kind = 'configuration'")
            order = quote("metrics.`excess_blackout_pct`")
            return (
                f"{base}/#/experiments/{self.experiment_id}/runs?searchFilter={chosen}&orderByKey={order}"
                "&orderByAsc=true&compareRunsMode=CHART"
            )
        experiments = quote(json.dumps([self.experiment_id], separators=(",", ":")))
        if len(self.run_ids) == 1:
            return f"{base}/#/experiments/{self.experiment_id}/runs/{self.run_ids[0]}"
        runs = quote(json.dumps(list(self.run_ids), separators=(",", ":")))
        return f"{base}/#/compare-runs?runs={runs}&experiments={experiments}"


def without_password(uri: str) -> str:
    """Return *uri* with *** for a password in it: messages and files are read by others."""
    return re.sub(r"(://[^/@:]*:)[^/@]*@", r"\1***@", uri)


def flat_params(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return *config* as flat dotted keys with texts as values; lists and what is in them become JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flat_params(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            flat[name] = json.dumps(value, default=str)[:PARAM_LENGTH]
        else:
            flat[name] = str(value)[:PARAM_LENGTH]
    return flat


def store_uri(settings: TrackingSettings) -> tuple[str, str]:
    """Return (URI with an absolute path, folder of the store); raise `OutputError` for a URI that cannot be one."""
    uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    where = "tracking.uri" if settings.uri or "MLFLOW_TRACKING_URI" not in os.environ else "MLFLOW_TRACKING_URI"
    shown = without_password(uri)
    scheme, separator, rest = uri.partition("://")
    kind = scheme.split("+")[0]
    if uri != "databricks" and (not separator or kind not in (*DATABASES, *SERVERS)):
        raise OutputError(
            f"tracking store '{shown}' (from {where}) cannot be used. It must be the URI of a database "
            f"({', '.join(DATABASES)}) or of a server ({', '.join(SERVERS)}); MLflow no longer writes plain folders. "
            "Use for example tracking.uri=sqlite:///mlflow.db, or tracking=none."
        )
    if kind != "sqlite":
        return uri, os.getcwd()
    path = Path(rest.removeprefix("/").partition("?")[0])
    if not rest.startswith("/") or path.name in ("", ":memory:"):
        raise OutputError(
            f"tracking store '{shown}' (from {where}) names no file. It must be sqlite:///relative/file.db or "
            "sqlite:////absolute/file.db: a database in memory would be gone when the run ends. Give a file, "
            "or use tracking=none."
        )
    path = Path.cwd() / path
    unusable = _why_not_writable(path)
    if unusable:
        raise OutputError(
            f"tracking store '{shown}' (from {where}) cannot be written: {unusable}. The database and the folder it is "
            "in must be writable. Choose another one with tracking.uri=sqlite:///..., or tracking=none."
        )
    query = rest.partition("?")[2]
    return f"{scheme}:///{path}" + (f"?{query}" if query else ""), str(path.parent)


def _why_not_writable(path: Path) -> str:
    if not path.parent.is_dir():
        return f"'{path.parent}' is not a folder"
    if not os.access(path.parent, os.W_OK):
        return f"folder '{path.parent}' is not writable"
    if path.is_dir():
        return "it is a folder"
    if path.exists() and not os.access(path, os.W_OK):
        return "the file is not writable"
    return ""


class Tracker:
    """Writes `RunRecord`s. Made when a run begins, so that MLflow is ready when the run has ended.

    Use it as a context manager. `check` and `write` raise `OutputError` if the store cannot be used.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        self._uri, folder = store_uri(settings)
        self._experiment_id = ""
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        writer = Path(__file__).with_name("mlflow_writer.py")
        # -P: nothing in the writer's folder or the current one may stand in for a module of MLflow's.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the simulation; the results so far are still recorded
        )
        source = str(Path(__file__).resolve().parents[2])
        self._send({"uri": self._uri, "experiment": settings.experiment, "folder": folder, "source": source})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the writer end by itself: it may still be making its database, which must not be cut short."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._stderr.close()
        if error is None:
            self._process.wait()

    def check(self) -> None:
        """Raise `OutputError` if the writer has already found that the store cannot be used; never wait."""
        if not self._experiment_id and self._readable(0.0):
            self._await_ready()

    def wait_until_ready(self) -> None:
        """Wait until MLflow has opened its store, or raise `OutputError` that it cannot."""
        if not self._experiment_id:
            self._await_ready()

    def write(self, records: Sequence[RunRecord]) -> Tracked:
        """Write *records*, one MLflow run each, and return where they are.

        The last is written first: MLflow's table shows the newest run on top, and the first record leads.
        """
        self.wait_until_ready()
        self._send([vars(record) for record in reversed(records)])
        ids = [str(run_id) for run_id in self._answer("run_ids")]
        return Tracked(self._uri, self._experiment_id, tuple(reversed(ids)))

    def _await_ready(self) -> None:
        self._experiment_id = str(self._answer("ready")["experiment_id"])

    def _send(self, content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError):  # it has failed, and what it said is there to be read
            pipe.write(json.dumps(content) + "\n")
            pipe.flush()

    def _readable(self, timeout_s: float) -> bool:
        pipe = self._process.stdout
        assert pipe is not None
        return bool(select.select([pipe], [], [], timeout_s)[0])

    def _answer(self, key: str) -> Any:
        pipe = self._process.stdout
        assert pipe is not None
        if not self._readable(ANSWER_TIMEOUT_S):
            raise self._failed(f"no answer within {ANSWER_TIMEOUT_S:g} s")
        line = pipe.readline()
        if not line:
            raise self._failed(self._last_words() or "MLflow's process ended without a word")
        answer = json.loads(line)
        if "error" in answer:
            raise self._failed(f"{answer['kind']}: {answer['error']}")
        return answer[key]

    def _last_words(self) -> str:
        deadline = time.monotonic() + 2.0
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        return lines[-1] if lines else ""

    def _failed(self, reason: str) -> OutputError:
        reason = " ".join(reason.split())
        return OutputError(
            f"tracking store '{without_password(self._uri)}' cannot be used: {reason[:600].rstrip('.')}. It must be a "
            "store that the installed MLflow can open and write. Correct tracking.uri or tracking.experiment, or run "
            "with tracking=none."
        )
