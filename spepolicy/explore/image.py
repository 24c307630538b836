"""What of a lane is its state, and where it is: the image of a lane, an array of 64-bit words.

An image has a word for everything that an act may change, in this order: three parameters (which levels the guest
profiles, and whether KVM's injected bug strikes), the VM's row, the vCPUs' rows, the SPU's TLB, the pages in the
current list of pins, the VMM's page table, the table entries that can ever be used, their reference counts, the hash of
frames, the policy's state, and `Aux`. Clocks, counters and random keys are words of the rows, but never part of a
state: they have one value in all of them.

A state is stored as a bitmap of the words that differ from the initial image, and these words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.explore.acts import Aux
from spepolicy.jit import entry
from spepolicy.machine.fields import PARAMS, VCPU, VM
from spepolicy.machine.hostops import Backing
from spepolicy.machine.hostpage import FRAME
from spepolicy.machine.layout import guest_page
from spepolicy.machine.pagetables import ipa_entry
from spepolicy.machine.rows import context, params, pool
from spepolicy.machine.state import Machine
from spepolicy.mmu.memory import KEY, SLOT_SHIFT
from spepolicy.mmu.tables import STAGE2_FRAME0

Ints = NDArray[np.int64]

__all__ = ["SECTIONS", "Image", "Views", "views_of"]

# Fields that are no state: counters, clocks, keys, and what is set before each act.
_VM_PASSING = """
key_host hook hook_vcpu host_next_ps host_index host_draws host_events notifier_calls notifier_ignored stage2_unmapped
stage2_maps pinned_peak_pages charged_peak_pages pinned_since_ps pinned_page_ps pin_calls pin_refused stale_pins
startup_ps window_count log_count key_bug bug_draws host_op migration_next_ps migration_sent migration_resent
migration_resent_buffer migration_downtime_ps migration_begin_ps migration_end_ps migration_demanded
migration_unlogged migration_refused
"""
_VCPU_PASSING = """
now_ps host_ps key_program key_sample key_kvm program_draws sample_draws kvm_draws counting select_ps left_ops rate_ps
busy_until_ps flight_latency stop_ps exit_next_ps preempt_next_ps segment_end_ps segment_ps resume_left_ps
resume_whole_ps phase phase_left_ps switch_left_ps syscall_left_ps renew_next_ps distribution resume_distribution
walk_status answered claim pin_fresh window_open window_start_ps window_start_host_ps window_cause window_ps
window_missed_ops hook_next key_log key_act act_draws flight_counter act_next_ps act_index act_armed logged_segment
logged_profiling walk_lo walk_hi blocked_since_ps ecount_ops population_ps
"""
VM_PASSING, VCPU_PASSING = frozenset(_VM_PASSING.split()), frozenset(_VCPU_PASSING.split())
# Stored, since they must not repeat, but two states that differ in them only are equal: names of fresh frames.
VM_NAMES = frozenset({"next_frame"})
# Compared by what they mean, not by their value: see `spepolicy.explore.canonical`.
VCPU_NAMES = frozenset({"buffer_generation", "pin_list"})
VM_FIELDS = VM.names or ()
HUGE = (int(Backing.THP), int(Backing.HUGETLB))
_PINS = 32  # of a list: two sets of buffer and tables, and more
PARAMETERS = ("profile_user", "profile_kernel", "bug_rate_q16")

SECTIONS = ("par", "vm", "vcpu", "tlb", "pins", "host_page", "dirty", "pool", "refs", "frames", "policy", "aux")


@entry
def page_behind(m: Machine, k: int, generation: int, n: int, out: Ints) -> None:
    """Write the guest page behind page *n* of vCPU *k*'s buffer in session *generation* of lane 0 to *out*."""
    out[0] = guest_page(params(m, 0), k, generation, n)


@entry
def stage2_of(m: Machine, page: int, out: Ints) -> None:
    """Write the descriptor that a stage 2 walk of guest page *page* of lane 0 ends at, and its level, to *out*."""
    slot, index, level = ipa_entry(m, 0, (params(m, 0).ram_page0 + page) << 12)
    out[0] = pool(m, 0)[slot, index]
    out[1] = level


@dataclass(frozen=True)
class Views:
    """The arrays of a batch of N lanes as 64-bit words, which is how they are saved and restored."""

    handle: Any  # spepolicy.machine.rows.context
    par: Ints  # [N, words of PARAMS]
    vm: Ints  # [N, words of VM]
    vcpu: Ints  # [N, vCPUs x words of VCPU]
    truth: Ints  # [N, vCPUs x words of TRUTH]
    lost: Ints  # [N, vCPUs x causes]
    tlb: Ints  # [N, vCPUs x entries x 4]
    pins: NDArray[np.int32]  # [N, vCPUs, 2, pages]
    host_page: Ints  # [N, RAM pages]
    dirty: NDArray[np.uint8]  # [N, RAM pages, or 1 without migration]
    pool: Ints  # [N, table pages x 512]
    refs: NDArray[np.int32]  # [N, table pages]
    frames: Ints  # [N, hash words]
    policy: Ints  # [N, words]
    aux: Ints  # [N, Aux.END]

    def arrays(self) -> tuple[Any, ...]:
        """Return what compiled code takes, in the order of the fields after `handle`."""
        return (
            self.par, self.vm, self.vcpu, self.truth, self.lost, self.tlb, self.pins, self.host_page, self.dirty,
            self.pool, self.refs, self.frames, self.policy, self.aux,
        )  # fmt: skip


def _words(array: NDArray[Any]) -> Ints:
    lanes = array.shape[0]
    return array.view(np.int64).reshape(lanes, -1)


def policy_rows(state: np.dtype[Any], lanes: int, vcpus: int) -> tuple[NDArray[np.void], Ints]:
    """Return (rows [lanes, vcpus] with the fields of *state*, the same memory as words)."""
    size = -(-state.itemsize // 8) * 8
    if state.names is None or size == 0:
        return np.zeros((lanes, vcpus), dtype=state), np.zeros((lanes, 0), dtype=np.int64)
    fields = state.fields
    assert fields is not None
    padded = np.dtype(
        {
            "names": list(state.names),
            "formats": [fields[name][0] for name in state.names],
            "offsets": [fields[name][1] for name in state.names],
            "itemsize": size,
        }
    )
    raw = np.zeros((lanes, vcpus, size // 8), dtype=np.int64)
    rows = np.ndarray((lanes, vcpus), dtype=padded, buffer=raw.data)
    return rows, raw.reshape(lanes, -1)


def views_of(m: Machine, policy: Ints, aux: Ints) -> Views:
    """Return the words of the lanes of *m*."""
    return Views(
        handle=context(m),
        par=_words(m.par),
        vm=_words(m.vm),
        vcpu=_words(m.vcpu),
        truth=_words(m.truth),
        lost=_words(m.lost),
        tlb=_words(m.tlb),
        pins=m.pins,
        host_page=m.host_page,
        dirty=m.dirty,
        pool=m.pool.reshape(m.pool.shape[0], -1),
        refs=m.pool_refs,
        frames=m.frames,
        policy=policy,
        aux=aux,
    )


class Image:
    """Where each word of an image comes from, for machines of one scenario: fixed when lane 0 has been started."""

    def __init__(self, m: Machine, policy_words: int) -> None:
        par = m.par[0]
        self.vcpus, self.buffer_pages = int(par["vcpus"]), int(par["buffer_pages"])
        self.pool_at = _table_words(m)
        self.pins = min(m.pins.shape[3], _PINS)
        names = PARAMS.names or ()
        self.par_at = np.array([names.index(name) for name in PARAMETERS], dtype=np.int64)
        lengths = {
            "par": len(PARAMETERS),
            "vm": len(VM.names or ()),
            "vcpu": self.vcpus * len(VCPU.names or ()),
            "tlb": m.tlb[0].size,
            "pins": self.vcpus * self.pins,
            "host_page": m.host_page.shape[1],
            "dirty": m.dirty.shape[1],
            "pool": len(self.pool_at),
            "refs": m.pool_refs.shape[1],
            "frames": m.frames.shape[1],
            "policy": policy_words,
            "aux": int(Aux.END),
        }
        ends = np.cumsum([lengths[name] for name in SECTIONS])
        self.words = int(ends[-1])
        self.offsets: Ints = np.concatenate([[0], ends]).astype(np.int64)
        self.lengths = lengths
        passing = self._positions("vm", VM.names or (), VM_PASSING) | self._positions(
            "vcpu", VCPU.names or (), VCPU_PASSING
        )
        names_only = self._positions("vm", VM.names or (), VM_NAMES) | self._positions(
            "vcpu", VCPU.names or (), VCPU_NAMES
        )
        every = set(range(self.words))
        self.stored: Ints = np.array(sorted(every - passing), dtype=np.int64)
        self.passing: Ints = np.array(sorted(passing), dtype=np.int64)
        special = {
            at
            for section in ("tlb", "pins", "host_page", "dirty", "frames")
            for at in range(self.offset(section), self.offset(section) + lengths[section])
        }
        self._find_leaves(m)
        leaves = {int(at) for at in (*self.leaf1.ravel(), *self.leaf2) if at >= 0}
        self.plain: Ints = np.array(sorted(every - passing - names_only - special - leaves), dtype=np.int64)
        self.map_words = -(-len(self.stored) // 64)

    def offset(self, section: str) -> int:
        """Return the first word of *section*."""
        return int(self.offsets[SECTIONS.index(section)])

    def _positions(self, section: str, names: tuple[str, ...], chosen: frozenset[str]) -> set[int]:
        """Return the words of the fields *chosen* in every row of *section*."""
        missing = chosen - set(names)
        if missing:
            raise AssertionError(f"spepolicy.explore.image names fields that {section} does not have: {missing}")
        first, count = self.offset(section), self.lengths[section]
        width = len(names)
        return {first + at for at in range(count) if names[at % width] in chosen}

    def _find_leaves(self, m: Machine) -> None:
        """Find the words of an image that hold the level 3 descriptors: of the buffers, and of guest RAM at stage 2."""
        first = self.offset("pool")
        where = {int(at): first + n for n, at in enumerate(self.pool_at)}
        ram, page0 = m.host_page.shape[1], int(m.par["ram_page0"][0])
        leaves = [where[slot * 512 + entry] for slot, entry in _stage1_leaves(m)]
        self.leaf1: Ints = np.array(leaves, dtype=np.int64).reshape(self.vcpus, self.buffer_pages)
        # The two pages that take turns behind each page of a buffer: stage 1 maps the first, session 1 takes the other.
        self.pairs: Ints = np.array(
            [
                [[page_of(m, k, generation, n) for generation in (0, 1)] for n in range(self.buffer_pages)]
                for k in range(self.vcpus)
            ],
            dtype=np.int64,
        )
        self.leaf2: Ints = np.full(ram, -1, dtype=np.int64)
        # Into which table a huge page is split depends on the path.
        if m.par["virtualized"][0] and int(m.par["backing"][0]) not in HUGE:
            slot = _stage2_table(m, page0 << 12)
            self.leaf2[:] = [where[slot * 512 + ((page0 + page) & 511)] for page in range(ram)]


def _slot_of(m: Machine, frame: int) -> int:
    words = m.frames[0]
    held = words[(words & KEY) == frame + 1]
    return int(held[0] >> SLOT_SHIFT) if len(held) else -1


def _stage1_path(m: Machine, va: int) -> list[tuple[int, int]]:
    """Return (pool slot, entry) of each descriptor of *va*, from level 0 to 3, in lane 0."""
    s = m.regime[0, 1]
    page0 = int(m.par["ram_page0"][0])
    table = int(m.vm["ttbr1"][0]) & 0xFFFF_FFFF_F000
    path = []
    for level in range(4):
        frame = int(m.host_page[0, (table >> 12) - page0]) & FRAME
        slot = _slot_of(m, frame)
        entry = (va >> _level_shift(s, level)) & 511
        path.append((slot, entry))
        table = int(m.pool[0, slot, entry]) & 0xFFFF_FFFF_F000
    return path


def _level_shift(s: Any, level: int) -> int:
    stride = int(s["stride"])
    return stride + 3 + stride * (3 - level)


def page_of(m: Machine, k: int, generation: int = 0, n: int = 0) -> int:
    """Return `layout.guest_page` of lane 0."""
    out = np.zeros(1, dtype=np.int64)
    page_behind(context(m), k, generation, n, out)
    return int(out[0])


def _stage2_table(m: Machine, ipa: int) -> int:
    """Return the pool slot of the level 3 table of *ipa* at stage 2 in lane 0. Tables are freed and made again in the
    order of a stack, so it is always the same one.
    """
    slot = (int(m.vm["vttbr"][0]) >> 12) - STAGE2_FRAME0
    for level in (1, 2):
        descriptor = int(m.pool[0, slot, (ipa >> (12 + 9 * (3 - level))) & 511])
        slot = ((descriptor & 0xFFFF_FFFF_F000) >> 12) - STAGE2_FRAME0
    return slot


def _stage1_leaves(m: Machine) -> list[tuple[int, int]]:
    par = m.par[0]
    return [
        _stage1_path(m, int(m.vcpu["buffer_va"][0, k]) + (n << 12))[3]
        for k in range(int(par["vcpus"]))
        for n in range(int(par["buffer_pages"]))
    ]


def _table_words(m: Machine) -> Ints:
    """Return the words of the pool, slot * 512 + entry, that can ever be other than zero in use."""
    par = m.par[0]
    ram, page0 = m.host_page.shape[1], int(par["ram_page0"])
    chosen: set[int] = set()
    stage1_slots = set()
    for k in range(int(par["vcpus"])):
        for n in range(int(par["buffer_pages"])):
            for slot, index in _stage1_path(m, int(m.vcpu["buffer_va"][0, k]) + (n << 12)):
                chosen.add(slot * 512 + index)
                stage1_slots.add(slot)
    if par["virtualized"]:
        first, last = page0 << 12, (page0 + ram - 1) << 12
        for slot in set(range(m.pool.shape[1])) - stage1_slots:
            for level in (1, 2, 3):
                shift = 12 + 9 * (3 - level)
                chosen |= {slot * 512 + ((ipa >> shift) & 511) for ipa in range(first, last + 1, 4096)}
            chosen.add(slot * 512)  # where a free table page keeps the link to the next
    return np.array(sorted(chosen), dtype=np.int64)
