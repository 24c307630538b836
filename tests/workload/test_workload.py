"""spepolicy.workload: tables realise their description exactly, and a wrong one gets one clear message."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spepolicy.errors import ConfigurationError
from spepolicy.machine.scenario import OpType, Workload
from spepolicy.workload import DRIVER, Events, build_workload, outcome_counts

WHERE = "conf/workload/example.yaml"
LEVELS = ("l1", "l2", "llc", "dram", "remote")


def description() -> dict[str, Any]:
    """Return a small valid description; every latency is different, so that an outcome can be told by it."""
    return {
        "source": "made up for a test",
        "latencies": {
            "other": {"cycles": 1, "spread": 1},
            "branch": {"cycles": 2, "spread": 0},
            "mispredict": {"cycles": 13, "spread": 5},
            "store": {"cycles": 3, "spread": 2},
            "l1": {"cycles": 4, "spread": 0},
            "l2": {"cycles": 11, "spread": 3},
            "llc": {"cycles": 50, "spread": 20},
            "dram": {"cycles": 300, "spread": 100},
            "remote": {"cycles": 700, "spread": 200},
            "atomic": {"cycles": 17, "spread": 7},
            "walk": {"cycles": 1000, "spread": 400},
        },
        "behaviours": {
            "quick": {
                "ipc": 2,
                "taken": 0.6,
                "mispredict": 0.01,
                "mix": {"load": 0.25, "store": 0.15, "branch": 0.2, "other": 0.4},
                "served": {"l1": 0.97, "l2": 0.03},
            },
            "slow": {
                "ipc": 0.4,
                "wait_cycles": 30,
                "walk": 0.2,
                "taken": 0.5,
                "mispredict": 0.05,
                "mix": {"load": 0.4, "store": 0.1, "atomic": 0.05, "branch": 0.15, "other": 0.3},
                "served": {"l1": 0.6, "l2": 0.15, "llc": 0.1, "dram": 0.1, "remote": 0.05},
            },
        },
        "functions": {"parse": "quick", "search": "slow", "el0_svc": "quick"},
        "distributions": {"busy": {"parse": 0.7, "search": 0.3}, "calls": {"el0_svc": 1}},
        "phases": {
            "first": {"user": "busy", "kernel": "calls", "length": "12ms", "syscall_gap": "25us", "syscall": "2.5us"}
        },
        "other": {"user": "calls", "kernel": "calls"},
    }


def build(spec: dict[str, Any]) -> Workload:
    return build_workload(spec, where=WHERE)


def share_of(workload: Workload, distribution: str, chosen: NDArray[np.bool_]) -> Fraction:
    """Return the exact probability that an operation of *distribution* is one of the chosen outcomes."""
    counts = outcome_counts(workload)[workload.distribution_names.index(distribution)]
    return Fraction(int(counts[chosen].sum()), 1 << 32)


def of_function(workload: Workload, name: str) -> NDArray[np.bool_]:
    return np.equal(workload.outcome_function, workload.function_names.index(name))


def close(actual: Fraction, wanted: Fraction, outcomes: int) -> bool:
    """Each outcome may be off by less than 2**-32, so a sum over some of them by that many times as much."""
    return abs(actual - wanted) < Fraction(outcomes, 1 << 32)


# ---- what the tables realise ----------------------------------------------------------------------------------------


def shares(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, float]]:
    """Draw shares in whole ten-thousandths, some of them 0, that sum to 1 as decimals."""

    def from_cuts(cuts: list[int]) -> dict[str, float]:
        edges = [0, *sorted(cuts), 10_000]
        return {name: (b - a) / 10_000 for name, a, b in zip(names, edges, edges[1:], strict=False)}

    return st.lists(st.integers(0, 10_000), min_size=len(names) - 1, max_size=len(names) - 1).map(from_cuts)


probabilities = st.integers(0, 10_000).map(lambda n: n / 10_000)
behaviours = st.fixed_dictionaries(
    {
        "ipc": st.integers(1, 800).map(lambda n: n / 100),
        "taken": probabilities,
        "mispredict": probabilities,
        "mix": shares(("load", "store", "atomic", "branch", "other")),
        "served": shares(LEVELS),
    },
    optional={"walk": probabilities, "wait_cycles": st.integers(0, 5000)},
)


@settings(max_examples=60, deadline=None)
@given(quick=behaviours, slow=behaviours, busy=shares(("parse", "search")))
def test_probabilities_are_those_described(quick: dict[str, Any], slow: dict[str, Any], busy: dict[str, float]) -> None:
    spec = description() | {"behaviours": {"quick": quick, "slow": slow}}
    spec["distributions"]["busy"] = busy
    workload = build(spec)
    op, events = workload.outcome_type, workload.outcome_events
    total = len(op)
    memory = op & (OpType.LOAD | OpType.STORE) != 0
    for function, behaviour in (("parse", quick), ("search", slow)):
        here = of_function(workload, function)
        share = Fraction(str(busy[function]))

        def check(chosen: NDArray[np.bool_], wanted: Fraction, here: Any = here, share: Fraction = share) -> None:
            assert close(share_of(workload, "busy", here & chosen), share * wanted, total)

        mix = {name: Fraction(str(value)) for name, value in behaviour["mix"].items()}
        served = {name: Fraction(str(value)) for name, value in behaviour["served"].items()}
        beyond_llc = served["dram"] + served["remote"]
        readers = memory & (op & OpType.LOAD != 0)
        check(np.ones(total, bool), Fraction(1))
        check(op == OpType.OTHER, mix["other"])
        check(op == OpType.LOAD, mix["load"])
        check(op == OpType.STORE, mix["store"])
        check(op == OpType.LOAD | OpType.STORE, mix["atomic"])
        check(events & Events.NOT_TAKEN != 0, mix["branch"] * (1 - Fraction(str(behaviour["taken"]))))
        check(events & Events.MISPREDICTED != 0, mix["branch"] * Fraction(str(behaviour["mispredict"])))
        accesses = mix["load"] + mix["store"] + mix["atomic"]
        check(events & Events.L1D_REFILL != 0, accesses * (1 - served["l1"]))
        walk = Fraction(str(behaviour.get("walk", 0)))
        check(events & Events.TLB_WALK != 0, accesses * (1 - served["l1"]) * walk)
        check(readers & (events & Events.LLC_MISS != 0), (mix["load"] + mix["atomic"]) * beyond_llc)
        check(events & Events.REMOTE != 0, (mix["load"] + mix["atomic"]) * served["remote"])


@settings(max_examples=60, deadline=None)
@given(quick=behaviours, slow=behaviours, busy=shares(("parse", "search")))
def test_weight_is_what_the_tables_realise(quick: dict[str, Any], slow: dict[str, Any], busy: dict[str, float]) -> None:
    spec = description() | {"behaviours": {"quick": quick, "slow": slow}}
    spec["distributions"]["busy"] = busy
    workload = build(spec)
    assert (workload.weight.sum(axis=1) == 1).all()
    for d, distribution in enumerate(workload.distribution_names):
        for f, function in enumerate(workload.function_names):
            exact = share_of(workload, distribution, of_function(workload, function))
            assert Fraction(float(workload.weight[d, f])) == exact


@settings(max_examples=60, deadline=None)
@given(quick=behaviours, slow=behaviours)
def test_outcomes_are_legal_records(quick: dict[str, Any], slow: dict[str, Any]) -> None:
    """Events of SPEv1p0 only, and no event without those that it implies (spe.md 4.3)."""
    workload = build(description() | {"behaviours": {"quick": quick, "slow": slow}})
    op, events = workload.outcome_type, workload.outcome_events
    assert (events & ~0x7FE == 0).all()
    assert (events & Events.RETIRED != 0).all()
    for event, implied in (
        (Events.L1D_REFILL, Events.L1D_ACCESS),
        (Events.TLB_WALK, Events.TLB_ACCESS),
        (Events.LLC_ACCESS, Events.L1D_REFILL),
        (Events.LLC_MISS, Events.LLC_ACCESS),
        (Events.REMOTE, Events.LLC_MISS),
    ):
        assert (events[events & event != 0] & implied != 0).all()
    accesses = op & (OpType.LOAD | OpType.STORE) != 0
    assert ((events & Events.L1D_ACCESS != 0) == accesses).all()
    assert ((events & Events.TLB_ACCESS != 0) == accesses).all()
    assert (op[events & (Events.NOT_TAKEN | Events.MISPREDICTED) != 0] == OpType.BRANCH).all()
    assert (workload.outcome_latency_cycles >= 0).all()
    assert (workload.outcome_spread_cycles >= 0).all()


def test_latencies_add_up() -> None:
    """A level, what an atomic and a walk add to it, and the behaviour's own wait."""
    workload = build(description())
    here = of_function(workload, "search")

    def latency(op: OpType, events: Events) -> tuple[int, int]:
        (k,) = np.flatnonzero(here & (workload.outcome_type == op) & (workload.outcome_events == events))
        return int(workload.outcome_latency_cycles[k]), int(workload.outcome_spread_cycles[k])

    hit = Events.RETIRED | Events.L1D_ACCESS | Events.TLB_ACCESS
    miss = hit | Events.L1D_REFILL
    dram = miss | Events.LLC_ACCESS | Events.LLC_MISS
    assert latency(OpType.OTHER, Events.RETIRED) == (1, 1 + 30)
    assert latency(OpType.BRANCH, Events.RETIRED) == (2, 30)
    assert latency(OpType.BRANCH, Events.RETIRED | Events.MISPREDICTED) == (13, 5 + 30)
    assert latency(OpType.LOAD, hit) == (4, 30)
    assert latency(OpType.LOAD, dram) == (300, 100 + 30)
    assert latency(OpType.LOAD, dram | Events.TLB_WALK) == (1300, 500 + 30)
    assert latency(OpType.LOAD | OpType.STORE, dram | Events.TLB_WALK) == (1317, 507 + 30)
    assert latency(OpType.STORE, miss) == (3, 2 + 30)
    assert latency(OpType.STORE, miss | Events.TLB_WALK) == (1003, 402 + 30)


def test_time_per_operation_is_that_of_the_mix() -> None:
    workload = build(description())
    busy = workload.distribution_names.index("busy")
    # 70 % of the operations take 1/2 cycle, 30 % take 1/0.4: cycles add up, rates do not.
    assert workload.op_ps[busy] == round(333 * (0.7 / 2 + 0.3 / 0.4))
    slower = build_workload(description(), where=WHERE, cycle_ps=1000)
    assert slower.op_ps[busy] == 1100
    assert (slower.alias_threshold == workload.alias_threshold).all()


def test_phases_and_roles_refer_to_distributions() -> None:
    spec = description()
    spec["phases"]["second"] = {
        "user": "calls", "kernel": "busy", "length": "1.5ms", "syscall_gap": "1us", "syscall": "500ns"
    }  # fmt: skip
    spec["other"] = {"user": "busy", "kernel": "calls"}
    workload = build(spec)
    names = workload.distribution_names
    assert [names[d] for d in workload.phase_user] == ["busy", "calls"]
    assert [names[d] for d in workload.phase_kernel] == ["calls", "busy"]
    assert workload.phase_ps.tolist() == [12_000_000_000, 1_500_000_000]
    assert workload.syscall_gap_ps.tolist() == [25_000_000, 1_000_000]
    assert workload.syscall_ps.tolist() == [2_500_000, 500_000]
    assert (names[workload.other_user], names[workload.other_kernel]) == ("busy", "calls")
    assert workload.source == "made up for a test"


def test_arrays_have_the_types_of_the_contract() -> None:
    workload = build(description())
    d, f, k = len(workload.distribution_names), len(workload.function_names), len(workload.outcome_type)
    shapes = {"op_ps": (d,), "alias_threshold": (d, 256), "alias_outcome": (d, 256, 2), "weight": (d, f)}
    for field in fields(workload):
        value = getattr(workload, field.name)
        if isinstance(value, np.ndarray):
            assert value.dtype == (np.float64 if field.name == "weight" else np.int64), field.name
            assert value.flags.c_contiguous, field.name
            per_row = (k,) if field.name.startswith("outcome_") else (1,)
            assert value.shape == shapes.get(field.name, per_row), field.name
    assert (workload.outcome_function < f).all()


def test_same_description_same_bits() -> None:
    """Also when written with integers, shares that are off by less than the tolerance, or keys in another order."""
    one = build(description())
    spec = description()
    spec["behaviours"]["quick"]["ipc"] = 2.0
    spec["distributions"]["calls"] = {"parse": 0.0, "el0_svc": 0.9999998}
    spec = dict(reversed(spec.items()))
    for field in fields(one):
        first, second = getattr(one, field.name), getattr(build(spec), field.name)
        assert np.array_equal(first, second) if isinstance(first, np.ndarray) else first == second, field.name


def test_description_is_not_changed() -> None:
    spec = description()
    before = copy.deepcopy(spec)
    build(spec)
    assert spec == before


# ---- the SPE driver -------------------------------------------------------------------------------------------------


def test_driver_is_built_in() -> None:
    workload = build(description())
    assert workload.distribution_names[workload.driver] == "spe_driver"
    running = {name for f, name in enumerate(workload.function_names) if workload.weight[workload.driver, f] > 0}
    assert running == set(DRIVER["functions"])
    assert {"arm_spe_pmu_start", "arm_spe_pmu_irq_handler"} <= running


def test_driver_can_be_described() -> None:
    spec = description() | {"driver": "calls"}
    workload = build(spec)
    assert workload.distribution_names == ("busy", "calls")
    assert workload.driver == 1
    assert "arm_spe_pmu_start" not in workload.function_names


# ---- errors ---------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]
ERRORS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "unknown section": (lambda s: s.update(phasses={}), ("'phasses'", "Did you mean 'phases'?")),
    "missing section": (lambda s: s.pop("latencies"), ("has no 'latencies'", "Add 'latencies'")),
    "no phases": (lambda s: s.update(phases={}), ("'phases'", "at least one entry")),
    "phases empty in YAML": (lambda s: s.update(phases=None), ("'phases' is None", "mapping")),
    "source not text": (lambda s: s.update(source=3), ("'source' is 3", "text")),
    "shares": (
        lambda s: s["distributions"]["busy"].update(parse=0.6),
        ("'distributions.busy'", "sum to 0.9", "within 1e-06", "by +0.1"),
    ),
    "mix": (
        lambda s: s["behaviours"]["slow"]["mix"].update(load=0.5),
        ("'behaviours.slow.mix'", "sum to 1.1", "by -0.1"),
    ),
    "unknown function": (
        lambda s: s["distributions"].update(busy={"parze": 1}),
        ("'distributions.busy.parze'", "Did you mean 'parse'?"),
    ),
    "unknown behaviour": (
        lambda s: s["functions"].update(parse="quik"),
        ("'functions.parse' is 'quik'", "Did you mean 'quick'?"),
    ),
    "unknown distribution": (
        lambda s: s["phases"]["first"].update(user="bussy"),
        ("'phases.first.user' is 'bussy'", "Did you mean 'busy'?"),
    ),
    "distribution of the other task": (
        lambda s: s["other"].update(kernel=7),
        ("'other.kernel' is 7", "Known: busy, calls"),
    ),
    "unknown driver": (lambda s: s.update(driver="cals"), ("'driver' is 'cals'", "Did you mean 'calls'?")),
    "clash with the driver": (
        lambda s: s["functions"].update(arm_spe_pmu_start="quick"),
        ("'functions.arm_spe_pmu_start'", "built-in SPE driver", "Rename"),
    ),
    "unknown level": (
        lambda s: s["behaviours"]["quick"].update(served={"l1": 0.9, "l3": 0.1}),
        ("'behaviours.quick.served.l3'", "llc"),
    ),
    "unknown operation": (
        lambda s: s["behaviours"]["quick"].update(mix={"loads": 1}),
        ("'behaviours.quick.mix.loads'", "Did you mean 'load'?"),
    ),
    "unknown key of a behaviour": (
        lambda s: s["behaviours"]["quick"].update(wait=3),
        ("'behaviours.quick.wait' is 3", "wait_cycles"),
    ),
    "negative share": (
        lambda s: s["distributions"].update(busy={"parse": 1.2, "search": -0.2}),
        ("'distributions.busy.parse' is 1.2", "from 0 to 1"),
    ),
    "negative latency": (
        lambda s: s["latencies"]["dram"].update(cycles=-1),
        ("'latencies.dram.cycles' is -1", "from 0 to"),
    ),
    "huge latency": (
        lambda s: s["latencies"]["dram"].update(spread=2**20 + 1),
        ("'latencies.dram.spread' is 1048577", "from 0 to 1048576 (cycles)"),
    ),
    "fraction of a cycle": (
        lambda s: s["latencies"]["l1"].update(cycles=3.5),
        ("'latencies.l1.cycles' is 3.5", "whole number (cycles)"),
    ),
    "latency missing": (lambda s: s["latencies"].pop("walk"), ("'latencies' has no 'walk'",)),
    "no ipc": (
        lambda s: s["behaviours"]["quick"].update(ipc=0),
        ("'behaviours.quick.ipc' is 0", "operations per cycle"),
    ),
    "number as text": (
        lambda s: s["behaviours"]["quick"].update(ipc="fast"),
        ("'behaviours.quick.ipc' is 'fast'", "must be a number"),
    ),
    "truth value": (
        lambda s: s["behaviours"]["quick"].update(taken=True),
        ("'behaviours.quick.taken' is True", "must be a number"),
    ),
    "not a number": (lambda s: s["behaviours"]["quick"].update(walk=float("nan")), ("is nan", "from 0 to 1")),
    "probability": (lambda s: s["behaviours"]["quick"].update(mispredict=1.5), ("1.5", "from 0 to 1 (probability)")),
    "time without unit": (
        lambda s: s["phases"]["first"].update(length=12),
        ("phases.first.length=12", "unit is missing", "ms"),
    ),
    "time of nothing": (
        lambda s: s["phases"]["first"].update(syscall_gap="0"),
        ("'phases.first.syscall_gap' is '0'", "from 1ns to 4s"),
    ),
    "long time": (
        lambda s: s["phases"]["first"].update(length="5s"),
        ("'phases.first.length' is '5s'", "from 1ns to 4s"),
    ),
    "list for a mapping": (lambda s: s.update(functions=["parse"]), ("'functions'", "must be a mapping")),
    "name not text": (lambda s: s["functions"].update({7: "quick"}), ("name 7", "quotes")),
    "too many outcomes": (
        lambda s: (
            s["functions"].update({f"f{n}": "slow" for n in range(15)}),
            s["distributions"].update(calls={f"f{n}": 1 / 15 for n in range(15)}),
        ),
        ("'distributions.calls'", "can hold 256", "fewer functions"),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_names_place_value_rule_and_remedy(name: str) -> None:
    change, parts = ERRORS[name]
    spec = description()
    change(spec)
    with pytest.raises(ConfigurationError) as error:
        build(spec)
    message = str(error.value)
    assert message.startswith(WHERE)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_error_for_something_else_than_a_mapping() -> None:
    with pytest.raises(ConfigurationError, match="the description is 'service', but it must be a mapping"):
        build_workload("service", where=WHERE)  # type: ignore[arg-type]
