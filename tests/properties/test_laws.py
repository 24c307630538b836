"""What must hold in every lane, whatever happens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.judge.records import check_conservation, check_profile, check_time
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Host
from spepolicy.machine.state import LostCause

from .scenarios import ARRAYS, MS, POLICIES, QUIET, busy_host, conserved, guest, policy, random_scenario, scenario


@pytest.mark.parametrize("seed", range(40))
def test_samples_are_conserved_and_time_adds_up(seed: int) -> None:
    """The conservation law and the laws of time and profile hold in random scenarios of every kind."""
    name, fields, drawn = random_scenario(random.Random(seed))
    result = simulate(drawn, policy(name, **fields), name=name, replicates=range(3), threads=1)
    assert conserved(result).all()
    check_conservation(result)
    check_profile(result)
    check_time(result)
    assert result.truth["selected"].sum() > 0 or result.truth["refused"].sum() > 0


@pytest.mark.parametrize("host", [Host(), busy_host()], ids=["silent", "busy"])
def test_bare_metal_is_black_only_for_a_full_buffer_or_ring(host: Host) -> None:
    result = simulate(scenario(host=host), policy("bare_metal"), name="bare_metal", replicates=range(8))
    others = [cause for cause in LostCause if cause not in (LostCause.BUFFER_FULL, LostCause.RING_FULL)]
    assert result.blackout_ps[:, :, others].sum() == 0
    assert result.lost[:, :, others].sum() == 0
    assert result.truth["buffer_full"].sum() > 0, "the scenario must fill buffers, or this shows nothing"
    assert result.host_ops.sum() == 0


@pytest.mark.parametrize(
    "changes",
    [{}, {"jitter": False}, {"type_filter": 6}, {"min_latency_cycles": 20}, {"vcpus": 2}, {"renew_ps": 400_000_000}],
    ids=str,
)
def test_pin_vm_on_a_silent_host_equals_bare_metal_record_for_record(changes: dict[str, int]) -> None:
    """No other exits either: each drains the record in flight, which may move a buffer-full event by some ns."""
    quiet = scenario(kvm=QUIET, guest=guest(**changes))
    metal = simulate(quiet, policy("bare_metal"), name="bare_metal", replicates=range(8))
    pinned = simulate(quiet, policy("pin_vm"), name="pin_vm", replicates=range(8))
    for field in ("digest", "selected", "written", "kept", "collided", "filtered"):
        assert np.array_equal(metal.truth[field], pinned.truth[field]), field
    assert np.array_equal(metal.seen, pinned.seen)
    assert metal.truth["written"].sum() > 1000


def _lanes(result: Result) -> dict[int, list[bytes]]:
    """All that a result holds, by replicate."""
    held: dict[int, list[bytes]] = {}
    for n, replicate in enumerate(result.replicates):
        windows = result.windows[result.windows["lane"] == n].copy()
        windows["lane"] = 0
        held[int(replicate)] = [getattr(result, name)[n].tobytes() for name in ARRAYS[:-1]] + [windows.tobytes()]
    return held


@pytest.mark.parametrize("name", ["eager_pin", "pin_on_fault"])
def test_a_lane_does_not_depend_on_batch_order_or_threads(name: str) -> None:
    """Batches of 1, 7 and all, in any order, with 1, 2 and 4 threads: the same to the bit."""
    busy = scenario(host=busy_host(HostOp.NUMA_SCAN, HostOp.NUMA_MIGRATE, HostOp.RECLAIM), guest=guest(vcpus=2))
    replicates = list(range(21))
    whole = _lanes(simulate(busy, policy(name), name=name, replicates=replicates, threads=1))
    shuffled = random.Random(3).sample(replicates, len(replicates))
    for threads, batches in ((2, [replicates]), (4, [shuffled]), (1, [[r] for r in replicates[:5]]),
                             (2, [replicates[n : n + 7] for n in range(0, 21, 7)])):  # fmt: skip
        for batch in batches:
            part = _lanes(simulate(busy, policy(name), name=name, replicates=batch, threads=threads))
            assert part == {replicate: whole[replicate] for replicate in batch}


def test_policies_at_one_seed_see_the_same_guest_and_host() -> None:
    """Common random numbers: the program's draws and the host's operations do not depend on the policy."""
    busy = scenario(host=busy_host(HostOp.NUMA_SCAN), kvm=QUIET, duration_ps=2 * MS)
    results = [simulate(busy, policy(name), name=name, replicates=range(4)) for name in POLICIES]
    assert all(np.array_equal(results[0].vcpu["key_program"], result.vcpu["key_program"]) for result in results)
    first, second = results[2], results[4]  # both leave the guest's time alone but for microseconds
    assert np.abs(first.truth["wanted_ps"] - second.truth["wanted_ps"]).max() < 0.05 * first.truth["wanted_ps"].max()


def test_another_seed_gives_another_result() -> None:
    one, two = (simulate(scenario(seed=s), policy("pin_vm"), name="pin_vm", replicates=range(2)) for s in (1, 2))
    assert not np.array_equal(one.truth["digest"], two.truth["digest"])
