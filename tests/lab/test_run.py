"""spepolicy.lab.run and summary: from results to a report, files and messages; the simulation itself is replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spepolicy.drivers.compiling
import spepolicy.drivers.simulate
import spepolicy.plugins
from spepolicy.drivers.result import Result
from spepolicy.errors import OutputError
from spepolicy.hookspecs import hookimpl
from spepolicy.judge.errata import Erratum
from spepolicy.judge.records import ConservationError
from spepolicy.lab.run import Plan, Report, TrackingSettings, execute
from spepolicy.lab.summary import WIDTH

from ..judge.hand_made_results import eventful_result, scenario
from .stored_runs import read_back

FILES = {
    "metrics.json", "config.json", "lanes.parquet", "blackouts.parquet", "errata.json", "errata.md", "errata.rst",
    "blackout.png"
}  # fmt: skip
BLACKOUT_MS = {"sample": 100, "bare_metal": 5, "pin_vm": 20}


@dataclass
class SamplePolicy:
    """A policy that documents one limitation."""

    depth: int = 3

    @hookimpl
    def stage2_fault(self, faults: Any) -> None:
        raise AssertionError("nothing is simulated here")

    @hookimpl
    def errata(self) -> list[Erratum]:
        return [Erratum("SAMPLE-1", "Never tested", "always", "all", "none", "none", "low", "kvm")]


@dataclass
class BareMetal:
    """No virtualization."""

    @hookimpl
    def virtualization(self) -> bool:
        return False


def plan(folder: Path, **changes: Any) -> Plan:
    policies: dict[str, object] = {"sample": SamplePolicy(), "bare_metal": BareMetal(), "pin_vm": SamplePolicy(depth=9)}
    fields: dict[str, Any] = {
        "chosen": "sample",
        "policies": policies,
        "scenario": scenario(),
        "replicates": 4,
        "threads": 1,
        "run_dir": folder / "run",
        "tracking": TrackingSettings(kind="none"),
        "config": {
            "seed": 1,
            "policy": {"depth": 3},
            "tracking": {"kind": "none", "uri": "https://me:secret@host"},
            "guest": {"filter": {"load": False}},
            "workload": {"source": "by hand", "phases": [1, 2], "functions": {"a": 1}},
        },
        "notes": ("host time is scaled",),
    }
    return Plan(**(fields | changes))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Result], Result]], None]:
    """Replace the simulation by results made by hand; the returned function changes what it returns."""

    def install(change: Callable[[Result], Result]) -> None:
        def simulate(work: Any, policy: object, *, name: str, replicates: Any, threads: int | None) -> Result:
            result = eventful_result(name, tuple(replicates), BLACKOUT_MS[name])
            return change(replace(result, scenario=work))

        monkeypatch.setattr(spepolicy.drivers.simulate, "simulate", simulate)
        monkeypatch.setattr(spepolicy.drivers.compiling, "compile_machine", lambda say: None)

    install(lambda result: result)
    return install


def run(plan: Plan) -> Report:
    said: list[str] = []
    return execute(plan, said.append)


@pytest.mark.usefixtures("simulated")
def test_files_and_report(tmp_path: Path) -> None:
    said: list[str] = []
    report = execute(plan(tmp_path), said.append)
    assert set(report.files) == FILES == {path.name for path in (tmp_path / "run").iterdir()}
    assert [line.split()[1].rstrip(":") for line in said] == ["sample", "bare_metal", "pin_vm"]
    assert "mlflow" not in sys.modules
    assert not report.interrupted
    assert report.finished == {"sample": 4, "bare_metal": 4, "pin_vm": 4}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics == report.metrics
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert metrics["excess_blackout_pct"] == pytest.approx(metrics["blackout_pct"] - metrics["bare_metal.blackout_pct"])
    assert metrics["bare_metal.excess_blackout_pct"] == 0.0
    assert metrics["blackout_pct_ci95"] > 0
    assert metrics["pin_vm.replicates_finished"] == 4
    assert "https://me:***@host" in (tmp_path / "run" / "config.json").read_text()
    errata = json.loads((tmp_path / "run" / "errata.json").read_text())
    assert errata["policy"] == "sample"
    assert set(errata["baselines"]) == {"bare_metal", "pin_vm"}
    assert {e["id"]: e["documented"] for e in errata["errata"]} == {"SPE-KVM-12": False, "SAMPLE-1": True}
    assert "SAMPLE-1: Never tested" in (tmp_path / "run" / "errata.md").read_text()
    assert metrics["errata_found"] == 1
    assert set(errata["facts"]["hooks"]) == {"stage2_fault", "errata"}


@pytest.mark.usefixtures("simulated")
def test_lanes_and_windows_of_all_policies(tmp_path: Path) -> None:
    import pyarrow.parquet

    run(plan(tmp_path))
    lanes = pyarrow.parquet.read_table(tmp_path / "run" / "lanes.parquet").to_pylist()
    assert [(row["policy"], row["replicate"]) for row in lanes] == [
        (policy, replicate) for policy in BLACKOUT_MS for replicate in range(4)
    ]
    assert pyarrow.parquet.read_table(tmp_path / "run" / "blackouts.parquet").num_rows == 3 * 4 * 2


@pytest.mark.usefixtures("simulated")
def test_summary_is_narrow_ascii_and_complete(tmp_path: Path) -> None:
    report = run(plan(tmp_path))
    text = report.summary()
    text.encode("ascii")
    assert all(len(line) <= WIDTH for line in text.splitlines() if str(tmp_path) not in line)
    head = next(line for line in text.splitlines() if line.startswith("mean +-"))
    assert head.split()[-3:] == ["sample", "bare_metal", "pin_vm"]
    row = next(line for line in text.splitlines() if line.startswith("blackout, %"))
    assert row.count("+-") == 3
    assert "SPE-KVM-12" in text
    assert "Gaps in the profile" in text
    assert "note: host time is scaled" in text
    assert str(tmp_path / "run") in text
    assert all(name in text for name in FILES)
    assert "of cause stage2 host" in text
    assert "of cause ring full" not in text  # did not occur
    assert "VMM does not look" not in text  # neither


@pytest.mark.usefixtures("simulated")
def test_divergence_is_told_where_there_is_some(tmp_path: Path) -> None:
    report = run(plan(tmp_path))
    report.verdicts["sample"].measured.values["diverged_samples_pct"] = 12.5
    (row,) = (line for line in report.summary().splitlines() if "VMM does not look" in line)
    assert row.split()[8] == "12.5"


def many_baselines(tmp_path: Path) -> Plan:
    names = ["sample", "bare_metal", *(f"policy_with_a_long_name_{i}" for i in range(6))]
    BLACKOUT_MS.update(dict.fromkeys(names[2:], 7))
    policies: dict[str, object] = {name: BareMetal() if name == "bare_metal" else SamplePolicy() for name in names}
    return plan(tmp_path, policies=policies)


@pytest.mark.usefixtures("simulated")
def test_many_baselines_make_several_tables_led_by_the_chosen_policy(tmp_path: Path) -> None:
    text = run(many_baselines(tmp_path)).summary()
    heads = [line.split()[6:] for line in text.splitlines() if line.startswith("mean +-")]
    assert len(heads) > 1
    assert all(head[0] == "sample" for head in heads)
    assert [name for head in heads for name in head[1:]] == [
        "bare_metal", *(f"policy_with_a_long_name_{i}" for i in range(6))
    ]  # fmt: skip
    assert all(len(line) <= WIDTH for line in text.splitlines() if str(tmp_path) not in line)


def test_a_lane_that_breaks_conservation_stops_the_run(tmp_path: Path, simulated: Any) -> None:
    def broken(result: Result) -> Result:
        result.truth["kept"][2, 0] += 1
        return result

    simulated(broken)
    with pytest.raises(ConservationError, match="replicate 2"):
        run(plan(tmp_path))


def test_what_finished_before_ctrl_c_is_judged_and_written(tmp_path: Path, simulated: Any) -> None:
    calls: list[str] = []

    def interrupted(result: Result) -> Result:
        calls.append(result.policy)
        if result.policy == "bare_metal":
            result.truth["selected"][1] += 5  # an unfinished lane need not add up
            return replace(result, finished=np.array([True, False, True, False]))
        return result

    simulated(interrupted)
    report = run(plan(tmp_path))
    assert calls == ["sample", "bare_metal"]
    assert report.interrupted
    assert report.finished == {"sample": 4, "bare_metal": 2}
    assert set(report.files) == FILES
    assert report.metrics["replicates_finished"] == 4
    excess = report.verdicts["sample"].measured.lanes["excess_blackout_pct"]
    assert np.isnan(excess).tolist() == [False, True, False, True]
    assert "INTERRUPTED. Replicates finished: sample 4, bare_metal 2." in report.summary()


def test_ctrl_c_before_anything_finished_leaves_a_summary_and_no_files(tmp_path: Path, simulated: Any) -> None:
    def interrupted(result: Result) -> Result:
        raise KeyboardInterrupt

    simulated(interrupted)
    report = run(plan(tmp_path))
    assert report.interrupted
    assert report.metrics == {}
    assert report.files == {}
    assert "No replicate finished" in report.summary()
    assert report.summary().splitlines()[-1] == "files: none"


@pytest.mark.usefixtures("simulated")
def test_ctrl_c_while_compiling_ends_the_run_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(say: Callable[[str], None]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spepolicy.drivers.compiling, "compile_machine", interrupted)
    report = run(plan(tmp_path))
    assert report.interrupted
    assert report.files == {}


@pytest.mark.usefixtures("simulated")
def test_an_unwritable_folder_is_known_before_the_simulation(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    said: list[str] = []
    with pytest.raises(OutputError, match="cannot write"):
        execute(plan(tmp_path), said.append)
    assert said == []


class BadReporter:
    """Raises in one hook, returns nonsense in none."""

    @hookimpl
    def report_errata(self, findings: Any) -> list[Erratum]:
        raise RuntimeError("broken reporter")


class WrongReporter:
    """Returns what is no erratum, and watches the end of a run."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    @hookimpl
    def report_errata(self, findings: Any) -> Any:
        return ["not an erratum"]

    @hookimpl
    def run_finished(self, report: Any) -> None:
        self.reports.append(report)


@pytest.mark.usefixtures("simulated")
def test_a_broken_reporter_loses_nothing_but_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = WrongReporter()
    reporters = {**spepolicy.plugins.installed_reporters(), "bad": BadReporter(), "wrong": wrong}
    monkeypatch.setattr(spepolicy.plugins, "installed_reporters", lambda: reporters)
    report = run(plan(tmp_path))
    assert {erratum.id for erratum in report.errata} == {"SPE-KVM-12", "SAMPLE-1"}
    notes = "\n".join(report.notes)
    assert "BadReporter" in notes
    assert "RuntimeError: broken reporter" in notes
    assert "WrongReporter" in notes
    assert "must be a list of Erratum" in notes
    assert wrong.reports == [report]


@pytest.mark.usefixtures("simulated")
def test_mlflow_gets_one_run_a_policy_and_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    report = run(plan(tmp_path, tracking=TrackingSettings()))
    assert "mlflow ui" in report.summary()
    assert report.tracked is not None
    assert report.tracked.link() in report.summary()
    assert "mlflow" not in sys.modules
    runs = {run["tags"]["policy"]: run for run in read_back(tmp_path)}
    names = {run["name"]: run["tags"]["role"] for run in runs.values()}
    assert names == {
        "sample seed=1": "chosen",
        "bare_metal (baseline of sample seed=1)": "baseline",
        "pin_vm (baseline of sample seed=1)": "baseline",
    }
    params, metrics = runs["sample"]["params"], runs["sample"]["metrics"]
    assert len(params.pop("workload.content_hash")) == 12
    assert params == {
        "policy": "sample",
        "policy.depth": "3",
        "seed": "1",
        "guest.filter.load": "False",
        "workload.source": "by hand",
    }
    assert runs["pin_vm"]["params"]["policy.depth"] == "9"
    assert set(runs["sample"]["files"]) == FILES
    assert metrics["blackout_pct"] == report.metrics["blackout_pct"]
    assert metrics["ci95/blackout_pct"] == report.metrics["blackout_pct_ci95"]
    assert "blackout_over_time/stage2_host_ms_per_s" in metrics
    assert runs["pin_vm"]["metrics"]["blackout_pct"] == report.metrics["pin_vm.blackout_pct"]


def test_importing_the_lab_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys, spepolicy.lab.run, spepolicy.lab.summary, spepolicy.lab.tracking, spepolicy.lab.mlflow_runs\n"
        "import spepolicy.lab.output\n"
        "heavy = [m for m in ('mlflow', 'matplotlib', 'pyarrow', 'numba', 'hydra') if m in sys.modules]\n"
        "import spepolicy.lab.figures, spepolicy.judge.tables\n"
        "print(heavy + [m for m in ('mlflow', 'matplotlib', 'pyarrow', 'pandas', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []
