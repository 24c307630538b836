"""conf/workload: every shipped workload composes, builds, and is what its header says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spepolicy.machine.data_addresses import SHARE_BITS
from spepolicy.machine.scenario import OpType, Workload
from spepolicy.workload import Events, build_workload, outcome_counts

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "workload"
KINDS = {"file", "capture"}  # of workloads that are made from something else (spepolicy.workload_source)
NAMES = sorted({path.stem for path in FOLDER.glob("*.yaml")} - KINDS)
RECORDED = ["lua", "lua_list", "sqlite", "tsort", "zstd"]


def load(name: str) -> Workload:
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        spec: Any = OmegaConf.to_container(compose(name), resolve=True)
    return build_workload(spec, where=f"{name}.yaml")


def probability(workload: Workload) -> np.ndarray[Any, np.dtype[np.float64]]:
    return outcome_counts(workload) / 2**32


def test_synthetic_and_recorded_ones_are_there() -> None:
    assert {"service", "pointer_chaser", "compressor", "syscall_heavy", *RECORDED} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_builds(name: str) -> None:
    workload = load(name)
    assert (workload.weight.sum(axis=1) == 1).all()
    assert (workload.op_ps > 0).all()
    assert ("recorded" if name in RECORDED else "synthetic") in workload.source


@pytest.mark.parametrize("name", NAMES)
def test_a_real_core_could_hold_what_is_in_flight(name: str) -> None:
    """Little's law: operations per cycle x mean latency is the number in flight, at most a Neoverse N1's 128."""
    workload = load(name)
    latency = probability(workload) @ (workload.outcome_latency_cycles + workload.outcome_spread_cycles)
    ops_per_cycle = 333 / workload.op_ps
    assert (ops_per_cycle * latency <= 128).all()


@pytest.mark.parametrize(
    "path", sorted(p for p in FOLDER.rglob("*.yaml") if p.stem not in KINDS), ids=lambda path: path.stem
)
def test_says_whether_it_is_synthetic_or_recorded_and_where_numbers_come_from(path: Path) -> None:
    text = path.read_text()
    assert ("recorded" if path.stem in RECORDED else "synthetic") in text[: text.index("\n\n")].lower()
    for section in ("behaviours", "functions", "distributions", "phases", "other"):
        if re.search(rf"^{section}:", text, re.MULTILINE):
            above = text[: text.index(f"\n{section}:")].splitlines()
            comment = []
            while above and above[-1].startswith("#"):
                comment.append(above.pop())
            assert "source: " in " ".join(comment), f"{section} of {path.name} has no source"


def test_service_changes_over_tens_of_ms_and_has_a_rare_phase() -> None:
    workload = load("service")
    names = workload.distribution_names
    assert len(workload.phase_ps) >= 4
    assert workload.phase_ps.sum() < 150e9
    rare = int(workload.phase_ps.argmin())
    assert workload.phase_ps[rare] / workload.phase_ps.sum() < 0.05
    collect = int(workload.phase_user[rare])
    assert names[collect] == "collect"
    elsewhere = [d for d in range(len(names)) if d != collect]
    only_here = (workload.weight[collect] > 0) & (workload.weight[elsewhere].sum(axis=0) == 0)
    assert workload.weight[collect][only_here].sum() > 0.5
    user = [d for d in set(workload.phase_user.tolist()) if d != collect]
    # Each pair of common phases differs in most of its operations: total variation distance above one half.
    distances = [abs(workload.weight[a] - workload.weight[b]).sum() / 2 for a in user for b in user if a < b]
    assert min(distances) > 0.5


def test_service_runs_many_functions() -> None:
    workload = load("service")
    user = workload.weight[workload.phase_user].sum(axis=0) > 0
    kernel = workload.weight[workload.phase_kernel].sum(axis=0) > 0
    assert user.sum() >= 16
    assert kernel.sum() >= 10
    assert (user & kernel).sum() <= 1  # memcpy at most: one list of names must not mix levels


def test_pointer_chaser_waits_for_dram() -> None:
    workload = load("pointer_chaser")
    loads = workload.outcome_type == OpType.LOAD
    missed = loads & (workload.outcome_events & Events.LLC_MISS != 0)
    p = probability(workload)
    for name in ("walk_one", "walk_many"):
        row = p[workload.distribution_names.index(name)]
        assert row[missed].sum() > 0.4 * row[loads].sum()


def test_compressor_is_at_el0_and_syscall_heavy_is_not() -> None:
    def kernel_share(workload: Workload) -> float:
        level1 = workload.syscall_ps / (workload.syscall_ps + workload.syscall_gap_ps)
        return float((level1 * workload.phase_ps).sum() / workload.phase_ps.sum())

    assert kernel_share(load("compressor")) < 0.01
    assert kernel_share(load("syscall_heavy")) > 0.5


@pytest.mark.parametrize("name", RECORDED)
def test_addresses_of_recorded_programs_lie_in_their_memory(name: str) -> None:
    """Extents lie in a region, but for memory that was unmapped before the end; what is accessed most is known; and
    misses range over more memory than hits.
    """
    workload = load(name)
    data = workload.data
    assert data is not None
    last = data.begin + (data.places.astype(np.uint64) - np.uint64(1)) * data.step
    inside = np.zeros(len(data.begin), bool)
    for region in data.regions:
        inside |= (data.begin >= region.begin) & (last < region.begin + region.size)
    assert inside.mean() > 0.95
    assert {"[heap]", "[stack]"} <= {region.name for region in data.regions}
    p = outcome_counts(workload)[workload.phase_user[0]] / 2**32
    memory = (workload.outcome_type == OpType.LOAD) | (workload.outcome_type == OpType.STORE)
    known = data.list_of[workload.outcome_function].max(axis=1) >= 0
    assert p[memory & known].sum() > 0.97 * p[memory].sum()

    def spread(kind: int) -> float:
        """Mean logarithm of how many places the extents of all functions' accesses of a kind have."""
        lists = data.list_of[:, kind]
        below = data.below / (1 << SHARE_BITS)
        share = np.where(np.floor(np.r_[0.0, below[:-1]]) == np.ceil(below) - 1, below - np.r_[0.0, below[:-1]], 0)
        of_kind = np.isin(np.ceil(below).astype(int) - 1, lists[lists >= 0])
        return float((share * np.log(data.places) * of_kind).sum() / (share * of_kind).sum())

    assert spread(1) > spread(0)


def shares(workload: Workload, distribution: str) -> dict[str, float]:
    row = workload.weight[workload.distribution_names.index(distribution)]
    return {name: float(share) for name, share in zip(workload.function_names, row, strict=True) if share > 0}


def test_recorded_programs_are_what_they_are() -> None:
    """Facts about the programs that a wrong recorder would not show."""
    sqlite = load("sqlite")
    everywhere = {name for name in sqlite.distribution_names if name.startswith("phase")}
    # sqlite's bytecode interpreter and its B-trees take most of a join, and the program's start is the loader's.
    assert shares(sqlite, "phase 2")["sqlite3VdbeExec"] > 0.2
    assert sum(share for name, share in shares(sqlite, "phase 1").items() if name.startswith("ld-linux")) > 0.3
    assert len(everywhere) >= 4
    # tsort searches names in a tree: it compares them, and the tree and the names are where it waits.
    tsort = load("tsort")
    assert shares(tsort, "phase 1")["strcmp"] > 0.25
    p = probability(tsort)[tsort.phase_user[0]]
    loads = tsort.outcome_type == OpType.LOAD
    strcmp = tsort.outcome_function == tsort.function_names.index("strcmp")
    beyond_l2 = loads & (tsort.outcome_events & Events.LLC_ACCESS != 0)
    assert p[strcmp & beyond_l2].sum() > 0.1 * p[strcmp & loads].sum()
    assert tsort.op_ps[tsort.phase_user[0]] > 1.5 * load("zstd").op_ps[load("zstd").phase_user].max()
    # A program that waits for memory executes an order of magnitude fewer operations in a second than a compressor.
    slow, fast = (load(name) for name in ("lua_list", "zstd"))
    assert slow.op_ps[slow.phase_user].min() > 4 * fast.op_ps[fast.phase_user].max()
    p = probability(slow)[slow.phase_user[0]]
    missed = slow.outcome_events & Events.LLC_MISS != 0
    assert 0.004 < p[missed].sum() < 0.05
