"""The driver on hosts recorded from a real kernel: laws in every lane, and lanes that do not know their neighbours."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest

from spepolicy.drivers import simulate as driver
from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.judge.records import check_conservation, check_profile, check_time
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Cpu, Host, HostKind, Scenario, SessionMode
from spepolicy.recording import open_recording
from spepolicy.recording.catalogue import shipped

from ..properties.scenarios import ARRAYS, MS, POLICIES, conserved, guest, policy, scenario

RECORDINGS = sorted(shipped())
VARIABLE = Cpu(max_record_bytes=256, align_bytes=4, tlb_entries=4)


@cache
def recorded(name: str, times: int = 2000) -> Host:
    """A shipped recording, *times* faster than it was recorded: tens of operations in a millisecond."""
    return Host(kind=HostKind.RECORDED, recording=open_recording(name), time_scale_q16=times << 16)


def on(name: str, **changes: Any) -> Scenario:
    """A guest of 64 MiB on a recorded host: the part of the recording that falls into its memory."""
    values: dict[str, Any] = {"host": recorded(name), "guest": guest(ram_pages=16384), "duration_ps": 2 * MS}
    return scenario(**(values | changes))


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("chosen", POLICIES)
def test_laws_hold_on_every_recorded_host(name: str, chosen: str) -> None:
    """Fixed and variable records, both kinds of session, one to four vCPUs."""
    ops = 0
    for vcpus, cpu, session in ((1, Cpu(), 0), (2, VARIABLE, 1), (4, VARIABLE, 0)):
        the_guest = guest(ram_pages=16384, vcpus=vcpus, session=SessionMode(session), buffer_pages=16)
        result = simulate(
            on(name, guest=the_guest, cpu=cpu), policy(chosen), name=chosen, replicates=range(2), threads=1
        )
        assert conserved(result).all()
        check_conservation(result)
        check_profile(result)
        check_time(result)
        assert (result.vcpu["now_ps"] == 2 * MS).all()
        ops += int(result.host_ops.sum())
    assert (ops > 0) == (chosen != "bare_metal")


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_recording_does_what_it_holds(name: str) -> None:
    """Only operations that were recorded, in the recording's own proportions over a whole round."""
    recording = open_recording(name)
    span_ps = recording.duration_us * 1_000_000
    once = Host(kind=HostKind.RECORDED, recording=recording, time_scale_q16=(span_ps // MS) << 16)
    quiet = on(name, host=once, guest=guest(ram_pages=65536, period_ops=1 << 20), duration_ps=MS)
    result = simulate(quiet, policy("pin_vm"), name="pin_vm", replicates=[0], threads=1)
    counts = np.array([recording.counts().get(op, 0) for op in HostOp])
    rounds = result.vm["host_events"][0] / len(recording)
    assert rounds > 0.9
    assert np.abs(result.host_ops[0] - counts * rounds).max() <= 0.2 * counts.max()
    assert (result.host_ops[0][counts == 0] == 0).all()


def _by_replicate(result: Result) -> dict[int, list[bytes]]:
    held: dict[int, list[bytes]] = {}
    for n, replicate in enumerate(result.replicates):
        windows = result.windows[result.windows["lane"] == n].copy()
        windows["lane"] = 0
        arrays = [getattr(result, name)[n].tobytes() for name in ARRAYS if name != "windows"]
        held[int(replicate)] = [*arrays, windows.tobytes(), result.host_elapsed_ps[n].tobytes()]
    return held


@pytest.mark.parametrize("chosen", ["eager_pin", "pin_on_fault"])
def test_a_lane_on_a_recorded_host_is_the_same_in_any_company(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in sevens or all together, in any order, on 1, 2 or 4 threads, on a fresh machine or a used one."""
    there = on("numa", guest=guest(ram_pages=16384, vcpus=2))
    replicates = list(range(15))
    whole = _by_replicate(simulate(there, policy(chosen), name=chosen, replicates=replicates, threads=1))
    assert len({value[2] for value in whole.values()}) == len(replicates), "replicates differ from each other"
    shuffled = random.Random(5).sample(replicates, len(replicates))
    batches = [[replicates], [shuffled], [[r] for r in shuffled[:6]], [shuffled[:7], shuffled[7:14]]]
    for threads, chunk in ((1, 256), (2, 256), (4, 256), (1, 2), (2, 3)):
        monkeypatch.setattr(driver, "CHUNK_LANES", chunk)  # small: a machine is used for one chunk after the other
        for batch in (part for parts in batches for part in parts):
            part = _by_replicate(simulate(there, policy(chosen), name=chosen, replicates=batch, threads=threads))
            assert part == {replicate: whole[replicate] for replicate in batch}


def test_another_seed_is_another_world() -> None:
    results = [
        simulate(on("numa", seed=seed), policy("pin_on_fault"), name="p", replicates=range(3), threads=1)
        for seed in (1, 1, 2)
    ]
    digests = [result.truth["digest"].tolist() for result in results]
    assert digests[0] == digests[1]
    assert not set(map(tuple, digests[0])) & set(map(tuple, digests[2]))


def test_progress_is_told_and_ends_at_one() -> None:
    told: list[float] = []
    longer = scenario(guest=guest(period_ops=256), duration_ps=60 * MS)
    simulate(longer, policy("map_on_fault"), name="m", replicates=range(200), threads=2, progress=told.append)
    assert told
    assert told == sorted(told)
    assert all(0 <= share <= 1 for share in told)
    assert told[-1] == pytest.approx(1)
