"""The search: what it visits, how it ends, and that neither threads, disk nor a break change anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spepolicy.errors import ConfigurationError
from spepolicy.explore.acts import Act, event_name, parse_event
from spepolicy.explore.added import AddedProperty, States
from spepolicy.explore.bench import Bench
from spepolicy.explore.properties import KINDS
from spepolicy.explore.search import INTERRUPTED, Bounds, Outcome, Progress, search
from spepolicy.hookspecs import hookimpl
from spepolicy.machine.scenario import MigrationKind
from spepolicy.plugins import build_policy

from .conftest import explored, model_of

DEPTH = 14
PinOnFault: Any = type(build_policy("pin_on_fault", {}))


def essence(outcome: Outcome) -> tuple[Any, ...]:
    """Return all that must not depend on how a search was run."""
    return outcome.states, outcome.transitions, outcome.levels, outcome.depth, outcome.complete, outcome.found


def busy() -> Any:
    return model_of("pin_on_fault", host_ops=("numa_scan", "dontneed"))


def test_threads_and_disk_do_not_change_the_result(tmp_path: Path) -> None:
    plain = search(busy(), Bounds(max_depth=DEPTH))
    assert plain.states > 4096  # more than one unit, or threads would have nothing to share
    assert essence(search(busy(), Bounds(max_depth=DEPTH), threads=3)) == essence(plain)
    spilled = search(busy(), Bounds(max_depth=DEPTH, frontier_bytes=4096), threads=2, spill_dir=str(tmp_path))
    assert spilled.spilled_bytes > 100_000
    assert essence(spilled) == essence(plain)
    assert not list(tmp_path.iterdir())  # what was spilled is gone with the search


@pytest.mark.parametrize("bound", [{"max_states": 700}, {"max_states": 3001}, {"max_depth": 9}])
def test_a_search_that_a_bound_ended_goes_on_as_if_it_had_not_stopped(tmp_path: Path, bound: dict[str, int]) -> None:
    path = tmp_path / "saved.npz"
    first = search(busy(), Bounds(**bound), save_to=path, threads=2)
    assert first.stopped_by
    assert not first.complete
    assert first.left > 0
    assert first.states <= bound.get("max_states", 10**9)
    second = search(busy(), Bounds(max_depth=DEPTH), resume_from=path)
    assert essence(second) == essence(search(busy(), Bounds(max_depth=DEPTH)))


def test_a_bound_on_time_ends_the_search_and_what_is_left_is_told() -> None:
    outcome = search(busy(), Bounds(max_seconds=0.0))
    assert outcome.stopped_by == "explore.max_time=0s"
    assert not outcome.complete
    assert outcome.left > 0
    assert outcome.states == sum(outcome.levels)


def test_progress_is_told() -> None:
    told: list[Progress] = []
    outcome = search(busy(), Bounds(max_depth=6), progress=told.append)
    last = told[-1]
    assert (last.states, last.depth, last.found) == (outcome.states, outcome.depth, len(outcome.found))
    assert last.waiting == outcome.left == outcome.levels[-1]


@dataclass
class Interrupted(PinOnFault):
    """Somebody presses Ctrl-C when the search comes to a fault that KVM has seen."""

    @hookimpl
    def explore_properties(self) -> list[AddedProperty]:
        def pressed(states: States) -> NDArray[np.bool_]:
            if states.vcpu("event_seen").any():
                raise KeyboardInterrupt
            return np.zeros(len(states), dtype=np.bool_)

        return [AddedProperty("calm", "nobody is in a hurry", "a test", pressed)]


def test_ctrl_c_ends_a_search_with_what_it_has() -> None:
    outcome = search(model_of(Interrupted()), Bounds())
    assert outcome.stopped_by == INTERRUPTED
    assert 0 < outcome.states < 1000
    assert outcome.left > 0
    assert not outcome.complete


def test_a_search_is_resumed_only_by_its_own_model(tmp_path: Path) -> None:
    path = tmp_path / "saved.npz"
    search(busy(), Bounds(max_depth=3), save_to=path)
    with pytest.raises(ConfigurationError, match="another policy"):
        search(model_of("eager_pin"), Bounds(max_depth=4), resume_from=path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        search(busy(), Bounds(max_depth=4), resume_from=tmp_path / "nothing.npz")
    for damaged in (b"", path.read_bytes()[:1000], b"PK\x05\x06" + bytes(18)):
        path.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match="cannot be read"):
            search(busy(), Bounds(max_depth=4), resume_from=path)


def test_a_model_without_anything_left_is_complete() -> None:
    outcome = explored("map_on_fault", 200, sessions=("el1",), max_switches=0, max_renewals=0, max_syscalls=0)
    assert outcome.complete
    assert not outcome.stopped_by
    assert outcome.left == 0
    assert sum(outcome.levels) == outcome.states
    assert outcome.depth == len(outcome.levels) - 1


def all_states(model: Any, depth: int) -> tuple[dict[bytes, int], dict[int, int]]:
    """Search without hashes and symmetry: every image is a state of its own. Return (image: depth, kind: steps)."""
    bench = Bench(model, 1)
    seen = {bench.base.tobytes(): 0}
    level = [bench.base]
    kinds: dict[int, int] = {}
    for d in range(depth):
        following = []
        for image in level:
            bench.put(image)
            for e in np.flatnonzero(bench.possible()).tolist():
                bench.put(image)
                bits, _ = bench.step(model.events[e])
                for kind in KINDS:
                    if bits >> kind & 1:
                        kinds.setdefault(kind, d + 1)
                after = bench.state()
                after[passing(bench)] = bench.base[passing(bench)]
                if after.tobytes() not in seen:
                    seen[after.tobytes()] = d + 1
                    following.append(after)
        level = following
    return seen, kinds


def passing(bench: Bench) -> Any:
    """Return the words of an image that are no state."""
    mask = np.ones(bench.image.words, dtype=bool)
    mask[bench.image.stored] = False
    return mask


HOST: dict[str, Any] = {"host_ops": ("ksm", "dontneed"), "edits": "any", "tlbi": (True, False)}


@pytest.mark.parametrize(
    ("policy", "settings", "depth"),
    [
        ("eager_pin", HOST, 6),
        ("pin_on_fault", HOST, 6),
        ("pin_on_fault", {"migration": MigrationKind.PRECOPY, "edits": "any", "host_ops": ("dontneed",)}, 6),
        ("map_on_fault", {"migration": MigrationKind.POSTCOPY, "edits": "any", "host_ops": ("dontneed",)}, 6),
        ("eager_pin", {"vcpus": 2, "host_ops": ("dontneed",), "memlock_pages": 1, "edits": "any"}, 5),
    ],
)
def test_symmetry_loses_no_violation_and_delays_none(policy: str, settings: dict[str, Any], depth: int) -> None:
    model = model_of(policy, **settings)
    images, kinds = all_states(model, depth)
    outcome = search(model, Bounds(max_depth=depth))
    assert outcome.states < len(images)  # or symmetry would have been of no use
    found: dict[int, int] = {}
    for violation in outcome.found:
        found[violation.kind] = min(found.get(violation.kind, 99), len(violation.events))
    assert found == kinds


def test_names_of_events_are_unique_and_can_be_read_back() -> None:
    events = model_of(
        "eager_pin", guest="bare", edits="any", tlbi=(True, False), host_ops=("ksm", "numa_scan"), vcpus=2,
        host_targets=("buffer", "former", "table"),
    ).events  # fmt: skip
    names = [event_name(event) for event in events]
    assert len(set(names)) == len(names)
    assert [parse_event(name, events) for name in names] == list(events)
    assert {event.act for event in events} >= {Act.WRITE_PMSCR, Act.FORGE_PMBSR, Act.MOVE_PAGE, Act.HOST, Act.WRITE}


def test_a_visited_state_takes_at_most_64_bytes() -> None:
    outcome = explored("eager_pin", 40, max_switches=2, in_flight=True)
    assert outcome.states > 30_000  # below, the index is mostly empty
    assert outcome.bytes_per_state <= 64
