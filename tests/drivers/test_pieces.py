"""Lanes of different scenarios in one batch: none can tell who is beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spepolicy.drivers.simulate import Machines, Piece, Runner, chunks_of, simulate
from spepolicy.machine.build import allocate, shape_of, shared_key
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Costs, Cpu, Host, HostKind, Scenario, SessionMode
from spepolicy.machine.state import Machine

from ..properties.scenarios import ARRAYS, MS, QUIET, US, busy_host, guest, kvm, policy, scenario

HOST = busy_host(HostOp.NUMA_SCAN, HostOp.RECLAIM)
MIXED = [
    scenario(host=HOST),
    scenario(host=HOST, seed=2, duration_ps=MS),
    scenario(host=HOST, costs=Costs(trap_ps=9 * US, pin_page_ps=0)),
    scenario(host=HOST, kvm=QUIET, guest=guest(period_ops=256, session=SessionMode.PER_CPU)),
    scenario(host=HOST, cpu=Cpu(align_bytes=16, data_loss_at_boundary=True), kvm=kvm(memlock_pages=2)),
    scenario(host=HOST, guest=guest(profile_kernel=False, buffer_mapped=False, renew_ps=400 * US)),
]


def _pieces(scenarios: list[Scenario], lanes: int = 3) -> list[Piece]:
    return [Piece(each, np.arange(n, n + lanes)) for n, each in enumerate(scenarios)]


@pytest.mark.parametrize("name", ["bare_metal", "eager_pin", "pin_on_fault"])
@pytest.mark.parametrize("lanes", [1, 5, 512])
def test_mixed_scenarios_give_what_each_gives_alone(name: str, lanes: int) -> None:
    """On one machine that is used for chunk after chunk, in the order given and reversed."""
    pieces = _pieces(MIXED)
    alone = [simulate(p.scenario, policy(name), name=name, replicates=p.replicates, threads=1) for p in pieces]
    assert len({result.truth["digest"].tobytes() for result in alone}) == len(MIXED)
    which = {id(each): n for n, each in enumerate(MIXED)}
    for order in (pieces, pieces[::-1]):
        runner, machines = Runner(policy(name), name), Machines()
        seen: list[list[int]] = [[] for _ in MIXED]
        for chunk in chunks_of(order, lanes):
            for part in runner.run(chunk, machines):
                whole = alone[which[id(part.scenario)]]
                at = np.flatnonzero(np.isin(whole.replicates, part.replicates))
                seen[which[id(part.scenario)]] += part.replicates.tolist()
                for array in ARRAYS:
                    if array == "windows":
                        theirs = whole.windows[np.isin(whole.windows["lane"], at)].copy()
                        theirs["lane"] -= at[0]
                        assert np.array_equal(part.windows, theirs)
                    else:
                        assert np.array_equal(getattr(part, array), getattr(whole, array)[at]), array
                assert part.finished.all()
        assert [sorted(got) for got in seen] == [result.replicates.tolist() for result in alone]


def test_a_chunk_holds_only_what_can_share_a_kernel_call() -> None:
    other = replace(MIXED[0], guest=guest(buffer_pages=8))
    busier = replace(MIXED[0], host=busy_host(interval_ps=10 * US))
    twice = Piece(MIXED[1], np.arange(4))
    chunks = chunks_of([*_pieces([MIXED[0], other, busier]), twice], 5)
    names = {id(MIXED[0]): "first", id(MIXED[1]): "second", id(other): "other", id(busier): "busier"}
    assert [[(names[id(piece.scenario)], piece.replicates.tolist()) for piece in chunk] for chunk in chunks] == [
        [("first", [0, 1, 2]), ("second", [0, 1])],
        [("second", [2, 3])],
        [("other", [1, 2, 3])],
        [("busier", [2, 3, 4])],
    ]
    with pytest.raises(AssertionError, match="do not fit"):
        Machines().fitting([Piece(MIXED[0], np.arange(1)), Piece(other, np.arange(1))], None)  # type: ignore[arg-type]


def test_the_scale_of_a_recording_is_a_lanes_own() -> None:
    slow, fast = (Host(kind=HostKind.RECORDED, recording=None, time_scale_q16=q) for q in (1 << 16, 1 << 20))
    assert shared_key(replace(MIXED[0], host=slow)) == shared_key(replace(MIXED[0], host=fast))


@pytest.mark.parametrize("each", MIXED[1:])
def test_equal_shapes_have_equal_arrays(each: Scenario) -> None:
    """`shape_of` names everything that the size of an array depends on."""
    from spepolicy.machine.build import Behaviour

    assert shape_of(each) == shape_of(MIXED[0])
    mine, first = (allocate(which, Behaviour(), 2) for which in (each, MIXED[0]))
    for name in Machine._fields:
        assert getattr(mine, name).shape == getattr(first, name).shape, name
