"""A sweep from the command line to rows: lanes of one batch, a store that survives, failures that are named."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pytest

from .sweeps import SMALL, SWEEP, Run, folder_of

BREAKS = '''
from dataclasses import dataclass, field
from spepolicy.hookspecs import Trap, doc, hookimpl

@dataclass
class Breaks:
    """Raise when profiling becomes enabled on a large buffer."""
    size: int = field(default=40000, metadata=doc("above which it raises", unit="B", minimum=0))

    @hookimpl
    def traps(self):
        return Trap.PMB | Trap.PMS

    @hookimpl
    def profiling_enabled(self, vcpus):
        if (vcpus.buffer_hi - vcpus.buffer_lo > self.size).any():
            raise RuntimeError("not at this size")

    @hookimpl
    def stage2_fault(self, faults):
        faults.resume()
'''


def rows(folder: str | Path = "outputs/store") -> pandas.DataFrame:
    """The rows of a store without what differs from run to run, in one order."""
    frame = pandas.read_parquet(folder).drop(columns="written_utc")
    return frame.sort_values("lane_hash").reset_index(drop=True)


def same(one: pandas.DataFrame, other: pandas.DataFrame) -> None:
    text = one.select_dtypes("category").columns
    series = "blackout_over_time_ms_per_s"
    for frame in (one, other):
        frame[text] = frame[text].astype(str)
    assert np.array_equal(np.stack(one.pop(series)), np.stack(other.pop(series)))
    pandas.testing.assert_frame_equal(one, other, check_exact=True)


def test_a_sweep_is_listed_run_and_stored_once(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*SWEEP)
    assert (status, err) == (0, "")
    first, second, third = [line for line in out.splitlines() if not line.startswith("compiling")][:3]
    assert first == "8 jobs: 4 configurations and 2 baselines, 24 lanes"
    assert second == "policies: bare_metal, eager_pin, pin_on_fault"
    assert third.startswith("about ")
    assert "MiB of memory for lanes" in third
    table = rows()
    assert len(table) == 24
    assert table["lane_hash"].is_unique
    groups = table.groupby(["policy", "config_hash"], observed=True).size()
    assert groups.tolist() == [4] * 6
    assert set(zip(table["seed"], table["replicate"], strict=True)) == {(s, r) for s in (1, 2) for r in (0, 1)}
    config = json.loads(table["config"][0])
    assert config["duration"] == "1ms"
    assert config["policy"]["name"] == table["policy"][0]
    assert table["commit"].nunique() == table["source"].nunique() == 1
    assert polars.read_parquet("outputs/store/*.parquet").height == 24
    assert polars.read_parquet("outputs/store").height == 24
    listed = pandas.read_csv(folder_of(out) / "configurations.csv")
    assert listed["lanes"].tolist() == [4] * 6
    assert set(listed["guest.buffer"]) == {"64KiB", "128KiB"}
    assert {path.name for path in Path("outputs").rglob("*") if ".store.writing" in path.parts} == {
        ".store.writing", "lock"
    }  # fmt: skip


def test_a_lane_of_a_sweep_is_the_lane_of_a_single_run(run: Run, tmp_path: Path) -> None:
    assert run(*SWEEP)[0] == 0
    assert run("+policy=eager_pin", "guest.buffer=64KiB", "seed=2", *SMALL, "output.dir=single")[0] == 0
    (alone,) = tmp_path.glob("single/*/*/lanes.parquet")
    single = pandas.read_parquet(alone).set_index(["policy", "replicate"]).sort_index()
    swept = rows()
    size = swept["config"].astype(str).map(lambda text: json.loads(text)["guest"]["buffer"])
    swept = swept[(swept["seed"] == 2) & (size == "64KiB")].set_index(["policy", "replicate"]).sort_index()
    for name in single.columns.intersection(swept.columns):
        for policy in ("eager_pin", "bare_metal"):
            assert np.array_equal(single.loc[policy, name], swept.loc[policy, name], equal_nan=True), name
    assert len(single.columns.intersection(swept.columns)) > 100
    (metrics,) = tmp_path.glob("single/*/*/metrics.json")
    numbers = json.loads(metrics.read_text())
    assert numbers["excess_blackout_pct"] == pytest.approx(numbers["blackout_pct"] - numbers["bare_metal.blackout_pct"])


def test_the_same_sweep_again_adds_nothing(run: Run) -> None:
    """Without resume all is computed again, and compared with what is stored; with it, nothing is computed."""
    assert run(*SWEEP)[0] == 0
    before = rows()
    status, out, _ = run(*SWEEP)
    assert status == 0
    assert "from the store" not in out
    same(rows(), before.copy())
    status, out, _ = run(*SWEEP, "sweep.resume=true")
    assert status == 0
    assert "24 lanes (24 of them are in the store)" in out
    assert "(24 of them from the store)" in out
    same(rows(), before.copy())


def test_a_larger_sweep_computes_what_is_new(run: Run) -> None:
    assert run(*SWEEP)[0] == 0
    status, out, _ = run(*SWEEP[:3], "seed=1,2,3", *SMALL, "replicates=3", "sweep.resume=true")
    assert status == 0
    assert "6 configurations" not in out
    assert "54 lanes (24 of them are in the store)" in out
    table = rows()
    assert len(table) == table["lane_hash"].nunique() == 54


def test_summaries_do_not_depend_on_where_rows_come_from(run: Run) -> None:
    """From the store, from threads or from processes, in any cut."""
    outcomes = []
    for more in (["threads=1"], ["threads=3"], ["sweep.processes=2"], ["sweep.resume=true"]):
        status, out, err = run(*SWEEP, *more)
        assert (status, err) == (0, "")
        outcomes.append((folder_of(out) / "configurations.csv").read_text())
    assert len(set(outcomes)) == 1


def test_a_failing_job_is_named_and_the_others_finish(run: Run, install: Any) -> None:
    install(BREAKS, {"breaks": "Breaks"})
    status, out, err = run("-m", "+policy=breaks,pin_on_fault", "guest.buffer=64KiB,128KiB,1MB", *SMALL)
    assert status == 2
    errors = err.splitlines()
    assert [error.partition(" (")[0] for error in errors] == ["error: job 2", "error: job 5", "error: job 1"]
    assert "(+policy=breaks guest.buffer=128KiB host=silent" in errors[2]
    assert "hook profiling_enabled() raised RuntimeError: not at this size" in errors[2]
    assert "3 jobs failed" in out
    table = rows()
    assert table.groupby("policy", observed=True).size().to_dict() == {"bare_metal": 4, "breaks": 2, "pin_on_fault": 4}


def test_nothing_but_the_wrong_is_wrong(run: Run) -> None:
    status, out, err = run("-m", "+policy=eager_pin", "guest.buffer=1MB,2MB", *SMALL)
    assert status == 2
    assert out == ""
    assert err.count("error: job") == 2


def test_two_sweeps_cannot_share_a_store(run: Run) -> None:
    from spepolicy.lab.sweep.store import Store

    with Store(Path("outputs/store")):
        status, _, err = run(*SWEEP)
    assert status == 2
    assert f"in use by process {os.getpid()}" in err
    assert "sweep.store=FOLDER" in err
    assert run(*SWEEP)[0] == 0


def test_a_damaged_file_is_named_and_its_rows_come_back(run: Run) -> None:
    assert run(*SWEEP, "threads=1")[0] == 0
    before = rows()
    file = sorted(Path("outputs/store").glob("*.parquet"))[0]
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2], b"", whole[:200] + b"x" * 400 + whole[600:]):
        file.write_bytes(damaged)
        status, _, err = run(*SWEEP, "sweep.resume=true")
        assert status == 2, len(damaged)
        assert file.name in err
        assert "Move it away" in err
        assert "Traceback" not in err
    file.unlink()
    assert run(*SWEEP, "sweep.resume=true")[0] == 0
    same(rows(), before)


def test_rows_of_another_version_do_not_mix(run: Run) -> None:
    assert run(*SWEEP)[0] == 0
    for file in Path("outputs/store").glob("*.parquet"):  # more than one where the sweep took more than a second
        pandas.read_parquet(file).drop(columns="stolen_pct").to_parquet(file)
    status, _, err = run("-m", "+policy=eager_pin", "seed=3,4", *SMALL)
    assert status == 2
    assert "columns differ (stolen_pct)" in err
    assert run("-m", "+policy=eager_pin", "seed=3,4", *SMALL, "sweep.store=other")[0] == 0


def test_a_full_disk_loses_nothing_that_was_stored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from the second file on."""
    import pyarrow.parquet

    write, calls = pyarrow.parquet.write_table, []

    def until_full(table: Any, where: Any, **options: Any) -> None:
        calls.append(where)
        if len(calls) > 1:
            Path(where).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(table, where, **options)

    with monkeypatch.context() as patched:
        patched.setattr("spepolicy.lab.sweep.run.STORE_EVERY_S", 0.0)
        patched.setattr(pyarrow.parquet, "write_table", until_full)
        status, _, err = run(*SWEEP, "threads=1")
    assert status == 2
    assert "No space left on device" in err
    assert "Make room" in err
    there = len(rows())
    assert 0 < there < 24
    status, out, _ = run(*SWEEP, "sweep.resume=true")
    assert status == 0
    assert f"({there} of them are in the store)" in out
    assert len(rows()) == 24


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_with_nothing_lost_or_doubled(tmp_path: Path) -> None:
    """kill -9, eight times, then to the end: the rows are those of a sweep that nobody killed."""
    sweep = [
        sys.executable, "-m", "spepolicy", "-m", "+policy=eager_pin,pin_on_fault", "guest.buffer=64KiB,128KiB",
        "seed=range(0,40)", *SMALL, "duration=200ms", "sweep.resume=true", "threads=1",
    ]  # fmt: skip
    rng = random.Random(8)
    had = 0
    cut_short = 0
    for _ in range(8):
        process = subprocess.Popen(sweep, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
        store = tmp_path / "outputs" / "store"
        before = len(list(store.glob("*.parquet"))) if store.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(store.glob("*.parquet"))) > before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        cut_short += process.wait() == -signal.SIGKILL
        have = len(rows(store)) if list(store.glob("*.parquet")) else 0
        assert have >= had, "what was stored stays"
        had = have
    assert cut_short > 2
    assert subprocess.run(sweep, cwd=tmp_path, check=False).returncode == 0
    assert subprocess.run([*sweep, "sweep.store=whole"], cwd=tmp_path, check=False).returncode == 0
    killed, whole = rows(tmp_path / "outputs" / "store"), rows(tmp_path / "whole")
    assert len(killed) == len(whole) == 480
    same(killed, whole)
