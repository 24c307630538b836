"""A sweep in MLflow: flat runs that can be compared, and rows that are safe whatever MLflow does."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import unquote

import pandas
import pytest

from spepolicy.lab.mlflow_writer import _git_tags

from .stored_runs import read_back
from .sweeps import TRACKED, Run, folder_of

GIT_HEAD = ["git", "-C", str(Path(__file__).parents[2]), "rev-parse", "HEAD"]


def test_a_configuration_is_a_flat_run_and_the_sweep_one_more(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*TRACKED)
    assert (status, err) == (0, "")
    runs = read_back(tmp_path, "blackout_over_time_ms_per_s")
    sweep = "/".join(folder_of(out).parts[-2:])
    assert {each["tags"]["sweep"] for each in runs} == {sweep}
    assert not any("mlflow.parentRunId" in each["tags"] for each in runs)
    (summary,) = [each for each in runs if each["tags"]["kind"] == "summary"]
    single = [each for each in runs if each["tags"]["kind"] == "configuration"]
    assert len(single) == 6
    assert {each["status"] for each in runs} == {"FINISHED"}
    assert sorted(each["name"] for each in single)[:3] == [
        "bare_metal buffer=128KiB", "bare_metal buffer=64KiB", "eager_pin buffer=128KiB"
    ]  # fmt: skip
    listed = pandas.read_csv(folder_of(out) / "configurations.csv").set_index(["policy", "guest.buffer"])
    for each in single:
        assert set(each["params"]) == {"policy", "guest.buffer"}, "only what varies, and the policy"
        row = listed.loc[(each["params"]["policy"], each["params"]["guest.buffer"])]
        assert each["metrics"]["stolen_pct"] == row["stolen_pct"]
        assert each["metrics"].get("ci95/stolen_pct") == row["stolen_pct_ci95"]
        assert each["metrics"]["lanes"] == 4
        steps = [step for step, _ in each["series"]]
        assert 10 < len(steps) <= 100
        assert max(steps) < 1000, "steps are us of guest time"
        assert [contexts for _, contexts in each["datasets"]] == [["workload"]]
        commit = subprocess.run(GIT_HEAD, capture_output=True, text=True, check=False).stdout.strip()
        if commit:  # else the checkout is a copy without its history, as .ci/run makes one
            assert each["tags"]["mlflow.source.git.commit"] == each["tags"]["git_commit"] == commit
        else:
            assert "git_commit" not in each["tags"]
    assert {"sweep.json", "configurations.csv", "errata.json"} <= set(summary["files"])
    assert "eager_pin buffer=64KiB" in summary["tags"]["mlflow.note.content"]
    link = unquote(next(line.strip() for line in out.splitlines() if "/#/experiments/" in line))
    assert link.startswith(f"http://127.0.0.1:5000/#/experiments/{summary['experiment_id']}/runs?")
    assert f"searchFilter=tags.sweep = '{sweep}' and tags.kind = 'configuration'&" in link


@pytest.mark.slow
def test_an_unreachable_server_costs_no_row(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*TRACKED, "tracking.uri=http://127.0.0.1:9")
    assert status == 2
    assert "tracking store 'http://127.0.0.1:9' cannot be used" in err
    assert "No result is lost: all rows are in the store 'outputs/store'" in err
    assert "Traceback" not in err
    assert len(pandas.read_parquet("outputs/store")) == 24
    assert (folder_of(out) / "configurations.csv").exists()
    status, out, _ = run(*TRACKED, "sweep.resume=true")
    assert status == 0
    assert "(24 of them from the store)" in out
    assert len(read_back(tmp_path)) == 7


def test_a_store_that_cannot_be_one_is_told_before_anything_runs(run: Run) -> None:
    status, out, err = run(*TRACKED, "tracking.uri=file:///nowhere")
    assert status == 2
    assert "cannot be used" in err
    assert "lanes" not in out


def test_the_commit_is_recorded_of_a_work_tree_and_of_nothing_else(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert _git_tags(str(tmp_path)) == {}
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    expected = {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "git_commit": git("rev-parse", "HEAD")}
    assert _git_tags(str(tmp_path)) == {**expected, "git_dirty": "false"}
    (tmp_path / "file").write_text("new")
    assert _git_tags(str(tmp_path)) == {**expected, "git_dirty": "true"}
    (tmp_path / "installed").mkdir()
    assert _git_tags(str(tmp_path / "installed")) == {}, "an installed copy inside somebody else's work tree"
