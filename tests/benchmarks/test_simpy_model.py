"""experiments/benchmark/simpy_model.py: the opponent in the benchmark runs the same scenario as the machine."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spepolicy.errors import ConfigurationError
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Guest, Host, HostKind, Kvm, Scenario, SessionMode
from spepolicy.recording import open_recording
from spepolicy.workload import build_workload

ROOT = Path(__file__).resolve().parents[2]
MS = 1_000_000_000  # ps
Run = Callable[[Scenario, int], dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Import the model as `run.py` does: from its own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmark"))
    import simpy_model

    return simpy_model.run


def scenario(name: str = "service", **more: Any) -> Scenario:
    with initialize_config_dir(str(ROOT / "conf" / "workload"), version_base="1.3"):
        spec: Any = OmegaConf.to_container(compose(name), resolve=True)
    chosen: dict[str, Any] = {"duration_ps": 20 * MS, "guest": Guest(ram_pages=8192, buffer_pages=64)}
    return Scenario(workload=build_workload(spec, where=name), **chosen | more)


def recorded(time_scale: int) -> Host:
    """KSM unmaps about every page of the guest, again and again."""
    return Host(HostKind.RECORDED, recording=open_recording("ksm"), time_scale_q16=time_scale << 16)


def total(counts: dict[str, int], *names: str) -> int:
    return sum(counts.get(name, 0) for name in names)


SCENARIOS: dict[str, Callable[[], Scenario]] = {
    "silent": scenario,
    "recorded": lambda: scenario(host=recorded(1000)),
    "collisions": lambda: scenario("pointer_chaser", guest=Guest(ram_pages=8192, buffer_pages=64, period_ops=256)),
    "system calls": lambda: scenario("syscall_heavy", guest=Guest(ram_pages=8192, buffer_pages=64, profile_user=False)),
    "slow reader": lambda: scenario(guest=Guest(ram_pages=8192, buffer_pages=4, reader_latency_ps=2 * MS)),
    "little room to pin": lambda: scenario(kvm=Kvm(memlock_pages=40)),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_records_are_conserved(run: Run, name: str) -> None:
    result = run(SCENARIOS[name](), 0)
    counts = result["counts"]
    assert result["samples"] == counts.get("selected", 0) == total(counts, "kept", "lost", "collided")
    assert sum(result["seen"].values()) == counts.get("kept", 0)
    assert result["vm_seconds"] == pytest.approx(0.02)


def test_a_silent_host_takes_nothing(run: Run) -> None:
    counts = run(scenario(), 0)["counts"]
    assert counts["kept"] > 1000
    assert counts["buffer full"] > 0
    assert total(counts, "lost", "stage 2 fault", "host operations") == 0


def test_each_fault_takes_one_record(run: Run) -> None:
    counts = run(scenario(host=recorded(1000)), 0)["counts"]
    assert counts["stage 2 fault"] == counts["lost"] > 0


@pytest.mark.parametrize(
    ("op", "pinned", "stays"),
    [
        (HostOp.COMPACT, False, False),
        (HostOp.COMPACT, True, True),
        (HostOp.NUMA_SCAN, False, False),
        (HostOp.NUMA_SCAN, True, False),
        (HostOp.AGE, False, True),
    ],
)
def test_pinning_keeps_some_mappings(run: Run, op: HostOp, pinned: bool, stays: bool) -> None:
    """Compaction leaves pinned pages alone, NUMA scans unmap them all the same (kvm_real, findings 1 and 2)."""
    from simpy_memory import STAGE2, Memory

    memory = Memory(scenario(), random.Random(1))
    page = memory.stage1[3]
    memory.pins = {page} if pinned else set()
    assert memory.translate(3) == ""
    memory.host_operation(op, page, False)
    assert (memory.tlb == (3, page)) == stays
    assert memory.translate(3) == ("" if stays else STAGE2)
    memory.map(page, True)
    assert memory.translate(3) == ""


def test_long_latencies_collide(run: Run) -> None:
    often = run(SCENARIOS["collisions"](), 0)["counts"]
    seldom = run(scenario("pointer_chaser"), 0)["counts"]
    assert often["collided"] > 0.005 * often["selected"]
    assert seldom.get("collided", 0) == 0


def test_a_slow_reader_fills_the_ring(run: Run) -> None:
    assert run(SCENARIOS["slow reader"](), 0)["counts"]["ring full"] > 0


def test_memlock_limit_refuses_the_session(run: Run) -> None:
    counts = run(scenario(kvm=Kvm(memlock_pages=8)), 0)["counts"]
    assert counts["implementation defined"] > 0
    assert counts.get("kept", 0) == 0


def test_replicates_repeat_and_differ(run: Run) -> None:
    one, again, other = (run(scenario(), replicate) for replicate in (0, 0, 1))
    assert one["counts"] == again["counts"]
    assert one["seen"] == again["seen"]
    assert one["seen"] != other["seen"]


def test_it_says_what_it_cannot_do(run: Run) -> None:
    with pytest.raises(ConfigurationError, match=r"guest\.session must be PER_TASK"):
        run(scenario(guest=Guest(session=SessionMode.PER_CPU)), 0)
    with pytest.raises(ConfigurationError, match=r"guest\.vcpus must be 1"):
        run(scenario(guest=Guest(vcpus=2)), 0)


def test_it_agrees_with_the_machine(run: Run) -> None:
    """Means over replicates of both models, in a program of one phase, differ by less than 4 standard errors."""
    from spepolicy.drivers.simulate import simulate
    from spepolicy.plugins import build_policy

    # Ops that hurt pinned pages, often enough that each replicate sees some.
    case = scenario(host=recorded(1000), duration_ps=40 * MS)
    phase = int(case.workload.phase_ps.argmax())
    one_phase = {
        name: getattr(case.workload, name)[phase : phase + 1]
        for name in ("phase_user", "phase_kernel", "phase_ps", "syscall_gap_ps", "syscall_ps")
    }
    case = replace(case, workload=replace(case.workload, **one_phase))
    machine = simulate(case, build_policy("eager_pin", {}), name="eager_pin", replicates=range(200, 264), threads=1)
    plain = [run(case, replicate)["counts"] for replicate in range(24)]
    pairs = {
        "selected": machine.truth["selected"][:, 0],
        "kept": machine.truth["kept"][:, 0],
        "lost": machine.lost.sum(axis=(1, 2)),
        "buffer full": machine.truth["buffer_full"][:, 0],
        "stage 2 fault": machine.truth["stage2_faults"][:, 0],
        "host operations": machine.host_ops.sum(axis=1),
    }
    for name, ours in pairs.items():
        theirs = np.array([counts.get(name, 0) for counts in plain])
        error = np.hypot(ours.std() / len(ours) ** 0.5, theirs.std() / len(theirs) ** 0.5)
        assert ours.mean() > 0, name
        assert abs(ours.mean() - theirs.mean()) < 4 * error + 1e-9, (name, ours.mean(), theirs.mean(), error)
