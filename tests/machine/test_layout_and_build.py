"""How a lane begins: its keys, its layout of memory, its parameters; that nothing of the one before is left."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.scenario import Guest, Host, HostKind, Scenario
from spepolicy.machine.state import NEVER
from spepolicy.recording.model import NO_NOTIFIER, Recording

from ..properties.scenarios import busy_host, guest, scenario
from .interpreted import Lane, module
from .spu_bench import Bench, one_kind

WRAP = (1 << 64) - 1


# ---- keys ------------------------------------------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """Return the output of SplitMix64 at state *x* (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x + 0x9E37_79B9_7F4A_7C15) & WRAP
    x = (x ^ x >> 30) * 0xBF58_476D_1CE4_E5B9 & WRAP
    x = (x ^ x >> 27) * 0x94D0_49BB_1331_11EB & WRAP
    return x ^ x >> 31


def test_a_key_is_splitmix64_over_seed_replicate_stream_and_vcpu() -> None:
    """And the reference above gives the published first output of seed 0."""
    assert splitmix64(0) == 0xE220_A839_7B1D_CDAF
    stream_key = module("machine.draw").stream_key
    signs = set()
    for parts in itertools.product((0, 1, 2**63 + 5, -3), (0, 7), (0, 16), (0, 63)):
        key = 0
        for part in parts:
            key = splitmix64((key + part) & WRAP)
        found = stream_key(*parts)
        assert found & WRAP == key
        assert -(1 << 63) <= found < 1 << 63
        signs.add(found < 0)
    assert signs == {False, True}


# ---- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 3])
def test_rings_of_vcpus_and_sessions_have_pages_of_their_own_until_memory_is_used_up(vcpus: int) -> None:
    bench = Bench(virtualized=True, guest={"vcpus": vcpus, "ram_pages": 256})
    layout = module("machine.layout")
    generations = layout.reserve_generations(bench.par) + 1
    assert generations == (256 - int(bench.par.guest_tables)) // (4 * vcpus) > 3
    rings = {
        (generation, k): tuple(int(layout.guest_page(bench.par, k, generation, n)) for n in range(4))
        for generation in range(generations) for k in range(vcpus)
    }  # fmt: skip
    pages = [page for ring in rings.values() for page in ring]
    assert len(set(pages)) == len(pages)
    assert 0 <= min(pages) <= max(pages) < 256
    tables = {int(layout.scatter(bench.par, n)) for n in range(int(bench.par.guest_tables))}
    assert not tables & set(pages)
    for (generation, k), ring in rings.items():
        again = [int(layout.guest_page(bench.par, k, generation + generations, n)) for n in range(4)]
        assert again == list(ring), "then it starts over"


def test_the_layout_is_a_draw_of_the_replicate_and_each_page_comes_once() -> None:
    drawn = []
    for replicate in range(6):
        lane = Lane(scenario(guest=guest(ram_pages=256)), virtualized=True)
        module("machine.build").reset(lane.m, scenario(guest=guest(ram_pages=256)), [replicate])
        assert sorted(int(module("machine.layout").scatter(lane.par, n)) for n in range(256)) == list(range(256))
        drawn.append([int(lane.m.par[name][0]) for name in ("scatter_a", "scatter_b", "scatter_c")])
        assert all(0 < value < 1 << 32 for value in drawn[-1])
        assert drawn[-1][0] % 2 == drawn[-1][1] % 2 == 1, "odd factors: a bijection"
    assert len({tuple(row) for row in drawn}) == 6
    assert len({row[2] for row in drawn}) == 6


@pytest.mark.parametrize("mapped", [False, True])
def test_at_the_start_stage_2_maps_what_the_guest_has_touched(mapped: bool) -> None:
    """All of its memory, but for rings whose pages no CPU has zeroed. Nobody is to blame for what was never mapped."""
    bench = Bench(virtualized=True, guest={"buffer_mapped": mapped})
    hostpage = module("machine.hostpage")
    ring = {bench.buffer_page(n) for n in range(4)}
    for page in range(int(bench.par.ram_pages)):
        leaf = bench.stage2_leaf(page)
        assert bool(leaf & 1) == (mapped or page not in ring)
        if leaf & 1:
            assert leaf & 0x80
            assert (leaf & 0xFFFF_FFFF_F000) >> 12 == hostpage.RAM_FRAME0 + page
        word = int(bench.m.host_page[0, page])
        assert word & hostpage.GONE_MASK == 0
        assert word & hostpage.PRESENT
        assert word & hostpage.FRAME == hostpage.RAM_FRAME0 + page
        assert (word & hostpage.ROLE_MASK == hostpage.ROLE_BUFFER << hostpage.ROLE_SHIFT) == (page in ring)


def test_bare_metal_translates_to_the_guests_own_addresses() -> None:
    """Without EL2 there is one stage, and a table is where the guest put it."""
    bench = Bench(virtualized=False)
    for n in range(4):
        page = int(bench.par.ram_page0) + bench.buffer_page(n)
        status, pa, _, reads = bench.translate(bench.start + n * 4096)
        assert (status, pa >> 12, reads) == (0, page, 4)


# ---- parameters ------------------------------------------------------------------------------------------------------


def parameters(host: Host | None = None, **behaviour: bool | int) -> dict[str, int]:
    lane = Scenario(workload=one_kind(), guest=Guest(ram_pages=256, buffer_pages=4), host=host or Host())
    build = module("machine.build")
    m = build.allocate(lane, build.Behaviour(**behaviour), 1)
    return {name: int(m.par[name][0]) for name in m.par.dtype.names}


@pytest.mark.parametrize("name", ["own_buffer", "hidden"])
def test_without_a_vm_there_is_no_kvm_between(name: str) -> None:
    """What a policy's set-up says of KVM holds in a VM only; hooks and the host's events likewise."""
    ops = ((int(HostOp.AGE), 1000, 1),)
    host = Host(kind=HostKind.RANDOM, random_ops=ops)
    for virtualized in (False, True):
        par = parameters(host, virtualized=virtualized, trap_pmb=True, trap_pms=True, hooks=6, **{name: True})
        assert par[name] == int(virtualized)
        assert par["hooks"] == (6 if virtualized else 0)
        assert par["host_kind"] == (int(HostKind.RANDOM) if virtualized else int(HostKind.SILENT))
        assert par["virtualized"] == int(virtualized)
        trapped = virtualized and name != "hidden"
        assert (par["trap_pmb"], par["trap_pms"]) == (int(trapped), int(trapped))
    plain = parameters(virtualized=True)
    assert plain[name] == 0


@pytest.mark.parametrize("kernel", list(Kernel))
@pytest.mark.parametrize("backing", [it for it in Backing if it is not Backing.GUEST_MEMFD])
def test_what_went_with_a_kernel_is_a_parameter_of_it(kernel: Kernel, backing: Backing) -> None:
    """change_pte went with Linux 6.10; only anonymous memory comes read-only from swap, and not on 6.12 (measured)."""
    par = parameters(Host(kernel=kernel, backing=backing))
    old = kernel == Kernel.V6_1
    assert par["change_pte"] == int(old)
    assert par["swap_read_only"] == int(old and backing in (Backing.ANONYMOUS, Backing.THP))


def test_rows_of_a_recording_that_lie_behind_the_guests_memory_are_left_out() -> None:
    """A row that begins inside is cut; one that begins at the end or behind has no page left."""
    first, end = [0, 250, 255, 256, 300], [1, 300, 256, 300, 301]
    n = len(first)
    recording = Recording(
        time_us=np.arange(n, dtype=np.int64), first_page=np.array(first, np.int32), end_page=np.array(end, np.int32),
        op=np.full(n, HostOp.CPU_TOUCH, np.uint8), notifier=np.full(n, NO_NOTIFIER, np.uint8),
        write=np.array([1, 0, 1, 0, 1], np.bool_), ram_pages=512, duration_us=77, scenario="by hand", kernel="",
        source="by hand",
    )  # fmt: skip
    host = Host(kind=HostKind.RECORDED, recording=recording)
    lane = Lane(scenario(host=host, guest=guest(ram_pages=256)), virtualized=True)
    rows = zip(lane.m.rec_ps, lane.m.rec_first, lane.m.rec_end, lane.m.rec_op & 0x7F, lane.m.rec_op >> 7, strict=True)
    touch = int(HostOp.CPU_TOUCH)
    assert [tuple(map(int, row)) for row in rows] == [
        (0, 0, 1, touch, 1), (1_000_000, 250, 256, touch, 0), (2_000_000, 255, 256, touch, 1),
    ]  # fmt: skip
    assert lane.par.recording_span_ps == 77_000_001
    assert parameters(Host(kind=HostKind.RECORDED))["recording_span_ps"] == 1, "no recording, no span"
    assert parameters(Host(recording=recording))["recording_span_ps"] == 1, "one that is not played has none"
    silent = Lane(scenario(guest=guest(ram_pages=256)), virtualized=True)
    assert silent.par.recording_span_ps == 1
    assert silent.m.rec_ps.tolist() == silent.m.rec_end.tolist() == [0]


def test_a_lane_that_is_reset_is_as_new() -> None:
    """Whatever the replicate before did: all arrays but the page tables, which laying out writes, are those of a new
    machine.
    """
    where = scenario(host=busy_host(HostOp.RECLAIM, HostOp.MOVE, HostOp.FORK), guest=guest(ram_pages=256), seed=3)
    used = Lane(where, virtualized=True, trap_pmb=True)
    fresh = Lane(where, virtualized=True, trap_pmb=True)
    build = module("machine.build")
    assert int(used.tr.first_fault_ps) == NEVER, "no fault yet"
    own = fresh.m._fields[1 : fresh.m._fields.index("pool")]
    for name in (*own, "pool_refs", "frames", "dirty"):
        array = getattr(used.m, name)
        for field in array.dtype.names or (...,):
            array[field] = 5
    build.reset(used.m, where, [0])
    with np.errstate(over="ignore"):
        module("machine.lane").start_lanes(used.m, np.array([0]))
    for name in (*own, "pool_refs", "frames", "dirty", "host_page"):
        assert np.array_equal(getattr(used.m, name), getattr(fresh.m, name)), name


# ---- which events of the host matter to an SPU -----------------------------------------------------------------------


def test_only_a_cpus_touch_of_an_ordinary_page_is_out_of_the_spus_reach() -> None:
    """A recorded touch of one page that holds neither buffer nor tables, below a stage 2 table that is there."""
    first = [40, 41, 42, 43]
    n = len(first)
    bench = Bench(virtualized=True)
    ordinary = np.flatnonzero(bench.m.host_page[0] >> 56 == 0)[:2].tolist()
    buffer = bench.buffer_page(0)
    rows = [(ordinary[0], 1, HostOp.CPU_TOUCH), (ordinary[0], 2, HostOp.CPU_TOUCH), (buffer, 1, HostOp.CPU_TOUCH),
            (ordinary[1], 1, HostOp.AGE)]  # fmt: skip
    recording = Recording(
        time_us=np.arange(n, dtype=np.int64), first_page=np.array([r[0] for r in rows], np.int32),
        end_page=np.array([r[0] + r[1] for r in rows], np.int32), op=np.array([r[2] for r in rows], np.uint8),
        notifier=np.full(n, NO_NOTIFIER, np.uint8), write=np.zeros(n, np.bool_), ram_pages=256, duration_us=77,
        scenario="by hand", kernel="", source="by hand",
    )  # fmt: skip
    lane = Bench(virtualized=True, host=Host(kind=HostKind.RECORDED, recording=recording))
    assert lane.buffer_page(0) == buffer, "the layout does not depend on the host"
    found = []
    for index in range(n):
        lane.vm.host_index = index
        found.append(bool(lane.call("host.is_out_of_reach")))
    assert found == [True, False, False, False]
    lane.vm.host_index = 0
    lane.call("hostpage.notify", 1, module("machine.hostpage").WHY_ZAP, 0, 256, 1)
    assert not lane.call("host.is_out_of_reach"), "a touch makes the table"


def test_what_a_recorded_guest_touches_is_mapped_but_for_what_ours_uses_otherwise() -> None:
    bench = Bench(virtualized=True)
    ordinary = int(np.flatnonzero(bench.m.host_page[0] >> 56 == 0)[0])
    for page, comes in ((ordinary, True), (bench.buffer_page(0), False)):
        recording = Recording(
            time_us=np.zeros(1, np.int64), first_page=np.array([page], np.int32),
            end_page=np.array([page + 1], np.int32), op=np.array([HostOp.CPU_TOUCH], np.uint8),
            notifier=np.full(1, NO_NOTIFIER, np.uint8), write=np.ones(1, np.bool_), ram_pages=256, duration_us=9,
            scenario="by hand", kernel="", source="by hand",
        )  # fmt: skip
        lane = Bench(virtualized=True, host=Host(kind=HostKind.RECORDED, recording=recording))
        lane.edit_stage2(page, lambda d: 0)
        lane.call("host.host_event")
        assert bool(lane.stage2_leaf(page) & 1) == comes
        assert lane.vm.host_events == 1
