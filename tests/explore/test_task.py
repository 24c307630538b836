"""`task=explore` from the command line: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spepolicy.cli import main
from spepolicy.explore.properties import PROPERTIES
from spepolicy.explore.scenario import read, run
from spepolicy.plugins import build_policy

from ..lab.stored_runs import read_back


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def explore(*words: str) -> int:
    return main(["task=explore", "tracking=none", "host=silent", "output.dir=out", *words])


def result(folder: Path) -> Path:
    (found,) = folder.glob("out/*/*/exploration.json")
    return found.parent


def test_a_run_writes_a_table_traces_and_scenarios_that_can_be_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        explore("+policy=eager_pin", "explore=quiet_host", "explore.max_depth=6", "explore.compare=[map_on_fault]") == 0
    )
    text = capsys.readouterr().out
    assert "holds to depth 6" in text
    assert "Not covered: longer traces" in text
    assert "1. guest: perf opens a session with {E0SPE,E1SPE} = {1,0}" in text
    where = result(folder)
    content = json.loads((where / "exploration.json").read_text())
    assert set(content) == {"eager_pin", "map_on_fault"}
    assert content["eager_pin"]["properties"]["no_blackout"] == "broken in 4 steps"
    for policy, told in content.items():
        for violation in told["violations"]:
            assert (where / violation["trace"]).exists()
            file = (where / violation["trace"]).with_suffix(".yaml")
            scenario = read(file)
            broken = run(file, build_policy(policy, {})).broken()
            assert violation["property"] in broken
            assert set(broken) == set(scenario.verdicts[0].breaks)
            assert file.with_suffix(".pftrace").stat().st_size > 1000
    table = (where / "properties.txt").read_text()
    number = [rule.name for rule in PROPERTIES].index("no_blackout") + 1
    assert f"eager_pin {number}: open {{1,0}}, driver, driver, write\n" in table


def test_a_run_that_a_bound_ended_can_be_resumed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("+policy=pin_on_fault", "explore=quiet_host")
    assert explore(*words, "explore.max_depth=4") == 0
    first = result(folder)
    first.rename(folder / "first")
    assert explore(*words, "explore.max_depth=7", "explore.resume=first") == 0
    second = json.loads((result(folder) / "exploration.json").read_text())["pin_on_fault"]
    result(folder).rename(folder / "second")
    assert explore(*words, "explore.max_depth=7") == 0
    third = json.loads((result(folder) / "exploration.json").read_text())["pin_on_fault"]
    for told in (second, third):
        for name in ("seconds", "cpu_seconds", "bytes_per_visited_state"):
            del told[name]
    assert second == third


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("explore.sessions=[]", "perf opens no session"),
        ("explore.sessions=[el2]", "explore.sessions=el2"),
        ("explore.buffer_pages=3", "power of two"),
        ("explore.compare=[eager_pi]", "Did you mean 'eager_pin'"),
        ("explore.resume=nowhere", "cannot be read"),
        ("explore=hostil_guest", "hostile_guest"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, capsys: pytest.CaptureFixture[str], word: str, message: str) -> None:
    assert explore("+policy=pin_on_fault", "explore.max_depth=1", word) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_an_exploration_goes_to_mlflow_a_run_a_policy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+policy=eager_pin", "policy.pin_stage1_tables=true", "explore=quiet_host", "explore.max_depth=6"]
    command = ["task=explore", "host=silent", "output.dir=out", *words, "explore.compare=[map_on_fault]"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "mlflow ui" in out
    told = json.loads((result(folder) / "exploration.json").read_text())
    runs = {row["params"]["policy"]: row for row in read_back(folder, "states_by_depth")}
    assert set(runs) == set(told) == {"eager_pin", "map_on_fault"}
    for policy, row in runs.items():
        mine = told[policy]
        assert (row["name"], row["status"], row["tags"]["task"]) == (f"explore {policy}", "FINISHED", "explore")
        assert (row["metrics"]["states"], row["metrics"]["depth"], row["metrics"]["complete"]) == (
            mine["states"], mine["depth"], 0.0
        )  # fmt: skip
        assert [value for _, value in row["series"]] == mine["states_by_depth"]
        shortest = {
            f"steps_to_break/{v['property']}": min(
                w["steps"] for w in mine["violations"] if w["property"] == v["property"]
            )
            for v in mine["violations"]
        }
        assert {name: value for name, value in row["metrics"].items() if name.startswith("steps_")} == shortest
        files = {v["trace"] for v in mine["violations"]}
        assert files | {"exploration.json", "properties.txt"} <= set(row["files"])
        assert row["params"]["explore.max_depth"] == "6"
    assert runs["eager_pin"]["params"]["policy.pin_stage1_tables"] == "True"
    assert "map_on_fault" in out


def test_a_policy_that_cannot_run_here_is_left_out_of_a_comparison(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explore("+policy=pin_on_fault", "explore=quiet_host", "explore.max_depth=2", "explore.compare=[all]") == 0
    told = json.loads((result(folder) / "exploration.json").read_text())
    assert "eager_pin" in told
    assert "bare_metal" not in told
