"""Images: they hold all of a state, and their hash is that of the state, not of the names in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spepolicy.explore import expand
from spepolicy.explore.bench import Bench
from spepolicy.explore.image import VCPU_PASSING, VM_NAMES, VM_PASSING
from spepolicy.machine.fields import VCPU, VM
from spepolicy.machine.hostops import Backing
from spepolicy.machine.hostpage import FRAME
from spepolicy.machine.scenario import MigrationKind
from spepolicy.mmu.walker import OA_MASK, VALID

from .conftest import model_of

EVERYTHING: dict[str, Any] = {
    "edits": "any", "tlbi": (True, False), "max_edits": 5, "in_flight": True, "max_switches": 9, "max_renewals": 9,
    "host_ops": ("reclaim", "age", "ksm", "numa_scan", "move", "fork", "dontneed", "munmap", "dirty_log"),
    "host_targets": ("buffer", "former", "table"), "max_host_ops": 9, "max_syscalls": 9, "max_exits": 9,
}  # fmt: skip


def walked(bench: Bench, seed: int, steps: int) -> list[np.ndarray[Any, Any]]:
    """Let events happen at random; return the images on the way."""
    rng = np.random.default_rng(seed)
    bench.put(bench.base)
    images = [bench.base]
    for _ in range(steps):
        possible = np.flatnonzero(bench.possible())
        if not len(possible):
            break
        bench.step(bench.model.events[int(rng.choice(possible))])
        images.append(bench.state())
    return images


@pytest.mark.parametrize(
    "more",
    [{}, {"migration": MigrationKind.PRECOPY}, {"migration": MigrationKind.POSTCOPY}, {"vcpus": 2},
     {"backing": Backing.THP, "host_ops": ("numa_scan", "thp", "thp_split", "mprotect", "dontneed", "fork", "move")}],
    ids=["plain", "precopy", "postcopy", "two_vcpus", "huge_pages"],
)  # fmt: skip
@pytest.mark.parametrize("policy", ["eager_pin", "pin_on_fault", "map_on_fault"])
@pytest.mark.parametrize("seed", range(4))
def test_a_restored_lane_is_the_lane_that_was_saved(policy: str, seed: int, more: dict[str, Any]) -> None:
    bench = Bench(model_of(policy, **(EVERYTHING | more)), 4)
    for image in walked(bench, seed, 150):
        bench.put(image)
        # Lane 1 has done nothing since it booted: whatever is not in an image it does not have.
        expand.put(bench.views, bench.layout, 1, image)
        for name in ("pool", "pool_refs", "host_page", "dirty", "frames", "tlb"):
            array = getattr(bench.m, name)
            assert np.array_equal(array[0], array[1]), name
        vcpus = ((bench.m.vcpu[:, k], VCPU_PASSING) for k in range(bench.image.vcpus))
        for rows, passing in ((bench.m.vm, VM_PASSING), *vcpus):
            for name in rows.dtype.names or ():
                assert name in passing or rows[name][0] == rows[name][1], name
        assert np.array_equal(bench.rows[0], bench.rows[1])


def test_what_is_left_out_of_a_state_are_fields_of_the_machine() -> None:
    assert set(VM.names or ()) >= VM_PASSING | VM_NAMES
    assert set(VCPU.names or ()) >= VCPU_PASSING


@pytest.mark.parametrize("seed", range(6))
def test_other_names_for_frames_do_not_change_the_hash(seed: int) -> None:
    bench = Bench(model_of("pin_on_fault", **EVERYTHING), 4)
    image = walked(bench, seed, 60)[-1]
    renamed = image.copy()
    layout = bench.image
    first = layout.offset("host_page")
    pages = layout.lengths["host_page"]
    shift = 0x1234
    for at in range(first, first + pages):  # every frame that backs a page, wherever it appears
        frame = int(image[at]) & FRAME
        if frame >= 0x80_0000 and frame < 0x100_0000:
            continue  # the frame that KSM merges into has a meaning
        renamed[at] += shift
        for other in layout.leaf2.tolist():
            word = int(image[other])
            if word & VALID and (word & OA_MASK) >> 12 == frame:
                renamed[other] = word + (shift << 12)
        for entry in range(layout.offset("tlb"), layout.offset("pins"), 4):
            if image[entry] != -1 and image[entry + 1] == frame:
                renamed[entry + 1] += shift
    assert not np.array_equal(renamed, image)
    assert bench.hash_of(renamed) == bench.hash_of(image)


def test_a_session_on_the_other_pages_is_the_same_session() -> None:
    """perf's second session has other pages behind the same addresses, and nothing else is different."""
    bench = Bench(model_of("map_on_fault", max_renewals=2), 1)
    names = ["open {1,1}", "driver", "renew", "driver"]
    hashes = []
    for _ in range(2):
        for name in names:
            event = next(e for e in bench.model.events if expand_name(e) == name)
            bench.step(event)
        image = bench.state()
        image[bench.image.offset("aux") :] = 0  # how often there was a new session is a difference
        hashes.append(bench.hash_of(image))
    assert hashes[0] == hashes[1]


def expand_name(event: Any) -> str:
    from spepolicy.explore.acts import event_name

    return event_name(event)


@pytest.mark.parametrize("field", ["pmscr", "pmbptr", "pmblimitr", "pmbsr", "guest_pmbsr", "virq", "level", "flight"])
def test_a_difference_in_a_register_is_a_difference_of_states(field: str) -> None:
    bench = Bench(model_of("eager_pin"), 1)
    image = walked(bench, 1, 20)[-1]
    other = image.copy()
    other[bench.image.offset("vcpu") + (VCPU.names or ()).index(field)] ^= 1
    assert bench.hash_of(other) != bench.hash_of(image)


def test_hashes_of_different_states_differ() -> None:
    bench = Bench(model_of("pin_on_fault", **EVERYTHING), 4)
    seen: dict[tuple[int, int], bytes] = {}
    for seed in range(8):
        for image in walked(bench, seed, 120):
            bench.put(image)
            key = bench.hash_of(image)
            plain = image[bench.image.plain].tobytes()
            assert seen.setdefault(key, plain) == plain
    assert len(seen) > 200
