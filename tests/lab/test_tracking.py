"""spepolicy.lab.tracking: MLflow gets the runs, shows them without a setting, and says clearly when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from spepolicy.errors import OutputError
from spepolicy.lab.tracking import (
    RunRecord,
    Tracked,
    Tracker,
    TrackingSettings,
    flat_params,
    store_uri,
    without_password,
)

from .stored_runs import read_back


def record(name: str, **changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "name": name,
        "tags": {"policy": name, "role": "chosen"},
        "params": {f"group.key{i}": str(i) for i in range(130)},
        "metrics": {f"metric{i}_pct": i / 7 for i in range(60)},
        "series": [("over_time/x", step, step / 3) for step in range(1200)],
        "start_ms": 1_000,
        "end_ms": 61_000,
    }
    return RunRecord(**(fields | changes))


def test_runs_are_found_by_mlflow_with_no_further_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "errata.md").write_text("the page")
    with Tracker(TrackingSettings(experiment="test of tracking")) as tracker:
        tracked = tracker.write(
            [record("eager_pin", files=[str(tmp_path / "errata.md")]), record("pin_vm", status="KILLED")]
        )
    assert tracked.ui_command() == "mlflow ui"
    assert len(set(tracked.run_ids)) == 2
    runs = {run["name"]: run for run in read_back(tmp_path, "over_time/x")}
    assert set(runs) == {"eager_pin", "pin_vm"}
    first = runs["eager_pin"]
    assert first["experiment"] == "test of tracking"
    assert (first["status"], runs["pin_vm"]["status"]) == ("FINISHED", "KILLED")
    assert first["params"] == record("x").params
    assert {name: value for name, value in first["metrics"].items() if name != "over_time/x"} == record("x").metrics
    assert first["series"] == [[step, step / 3] for step in range(1200)]
    assert first["files"] == ["errata.md"]
    assert (tmp_path / unquote(urlsplit(first["artifacts"]).path) / "errata.md").read_text() == "the page"
    assert first["tags"]["role"] == "chosen"
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlruns", "errata.md"}


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path: Path) -> None:
    bad = tmp_path / "notes.txt"
    bad.write_text("not a database, but longer than a header of one would be: " * 40)
    with Tracker(TrackingSettings(uri=f"sqlite:///{bad}")) as tracker, pytest.raises(OutputError) as caught:
        tracker.write([record("a")])
    message = str(caught.value)
    assert str(bad) in message
    assert "not a database" in message
    assert "tracking=none" in message
    assert "\n" not in message


def test_check_finds_a_bad_store_before_the_end_of_the_run(tmp_path: Path) -> None:
    bad = tmp_path / "bad.db"
    bad.write_text("x" * 5000)
    with Tracker(TrackingSettings(uri=f"sqlite:///{bad}")) as tracker:

        def simulate_for_as_long_as_it_takes() -> None:
            while True:
                tracker.check()

        with pytest.raises(OutputError, match=r"bad\.db"):
            simulate_for_as_long_as_it_takes()


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:///no/such/folder/mlflow.db", "is not a folder"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("file:///somewhere/mlruns", "no longer writes plain folders"),
        ("results", "must be the URI of a database"),
        ("htp://server:5000", "must be the URI of a database"),
    ],
)
def test_a_bad_uri_is_refused_at_once(uri: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError) as caught:
        Tracker(TrackingSettings(uri=uri))
    message = str(caught.value)
    assert uri in message
    assert "tracking.uri" in message
    assert reason in message
    assert "tracking=none" in message


def test_the_environment_is_asked_if_nothing_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri(TrackingSettings()) == (f"sqlite:///{tmp_path / 'mlflow.db'}", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    assert store_uri(TrackingSettings())[0] == "http://tracking.example:5000"
    assert store_uri(TrackingSettings(uri="sqlite:///own.db"))[0] == f"sqlite:///{tmp_path / 'own.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense")
    with pytest.raises(OutputError, match="from MLFLOW_TRACKING_URI"):
        store_uri(TrackingSettings())


def test_ui_command_names_a_store_that_mlflow_would_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Tracked(f"sqlite:///{tmp_path / 'mlflow.db'}", "1", ("a",))
    assert here.ui_command() == "mlflow ui"
    elsewhere = Tracked("sqlite:////data/runs.db", "1", ("a",))
    assert elsewhere.ui_command() == "mlflow ui --backend-store-uri 'sqlite:////data/runs.db'"
    # An old file store in the same folder is what MLflow would show instead.
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("")
    assert "--backend-store-uri" in str(here.ui_command())
    assert Tracked("https://server:5000/", "1", ("a",)).ui_command() is None


def test_link_compares_all_runs() -> None:
    assert Tracked("https://server/", "7", ("a",)).link() == "https://server/#/experiments/7/runs/a"
    link = Tracked("sqlite:////x.db", "7", ("a", "b")).link()
    assert link == "http://127.0.0.1:5000/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%227%22%5D"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("https://me:s:ecret@host:5000/", "https://me:***@host:5000/"),
        ("https://host:5000/a@b", "https://host:5000/a@b"),
        ("sqlite:////home/me:you@x/mlflow.db", "sqlite:////home/me:you@x/mlflow.db"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str) -> None:
    assert without_password(uri) == shown
    tracked = Tracked(uri, "1", ("a", "b"))
    assert "secret" not in tracked.link() + str(tracked.ui_command())


def test_a_refused_uri_is_shown_without_its_password() -> None:
    with pytest.raises(OutputError) as caught:
        store_uri(TrackingSettings(uri="oracle://me:secret@host/db"))
    assert "oracle://me:***@host/db" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_parameters_are_flat_texts() -> None:
    nested = {"seed": 1, "guest": {"buffer": "4MiB", "deep": {"x": None}}, "baselines": ["a", "b"], "long": "y" * 9999}
    assert flat_params(nested) == {
        "seed": "1",
        "guest.buffer": "4MiB",
        "guest.deep.x": "None",
        "baselines": '["a", "b"]',
        "long": "y" * 500,
    }


DATASET = {
    "name": "program", "digest": "0123abcd", "source_type": "code", "source": "{}", "schema": None,
    "profile": '{"functions": 4}', "context": "workload",
}  # fmt: skip

BOTH_WAYS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import mlflow_writer as writer
writer._quiet_environment()
from mlflow.tracking import MlflowClient
records = json.load(open("records.json"))
found = []
for way in (1, 10**9):
    writer.MANY = way
    client = MlflowClient(tracking_uri=f"sqlite:///way{way}.db")
    experiment = writer._experiment(client, "x")
    fallen_back = writer._write_at_once
    if way == 1:
        def fallen_back_is_wrong(*a):
            ids = fallen_back(*a)
            assert ids is not None, "MLflow's tables are not as expected"
            return ids
        writer._write_at_once = fallen_back_is_wrong
    half = len(records) // 2
    ids = []
    for part in (records[:half], records[half:]):
        ids += writer._write_runs(client, experiment, part)
    runs = []
    for run_id in ids:
        run = client.get_run(run_id).to_dictionary()
        info = {k: v for k, v in run["info"].items() if "id" not in k and "uri" not in k}
        histories = {name: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run_id, name)]
                     for name in run["data"]["metrics"]}
        inputs = run["inputs"]["dataset_inputs"]
        files = [open(client.download_artifacts(run_id, item.path)).read() for item in client.list_artifacts(run_id)]
        beside = run["info"]["artifact_uri"].endswith(f"/{run_id}/artifacts")
        runs.append([info, run["data"], histories, inputs, files, beside])
    searched = client.search_runs([experiment], "metrics.metric1_pct > 0.1 and params.key = '1' and tags.policy = 'p1'")
    found.append([runs, [r.info.run_name for r in searched]])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_many_runs_at_once_are_what_the_client_writes(tmp_path: Path) -> None:
    """MLflow's tables, filled in one transaction, read the same as those that its client filled, run by run."""
    (tmp_path / "page.md").write_text("a page")
    records = []
    for n in range(6):
        fields = {
            "tags": {"policy": f"p{n % 3}", "odd": "ö"},
            "params": {"key": str(n % 2)},
            "metrics": {f"metric{i}_pct": i / 7 + n for i in range(4)},
            "series": [("over_time/x", step, step / 3 + n) for step in (0, 5, 10)],
            "files": [str(tmp_path / "page.md")] if n % 2 else [],
            "dataset": None if n == 4 else DATASET | {"digest": f"{n % 2}"},
            "status": "KILLED" if n == 3 else "FINISHED",
        }
        records.append(vars(record(f"run {n}", **fields)))
    (tmp_path / "records.json").write_text(json.dumps(records))
    import spepolicy.lab

    folder = Path(spepolicy.lab.__file__).parent
    answer = subprocess.run(
        [sys.executable, "-c", BOTH_WAYS, str(folder)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    at_once, one_by_one = json.loads(answer.stdout.splitlines()[-1])
    assert at_once == one_by_one
    assert len(at_once[0]) == 6
    assert at_once[1] == ["run 1"]
    assert at_once[0][1][4] == ["a page"]
