"""Random sequences of events, lawful and not, on one lane: what must hold after each of them.

The events are those of the explorer, on the machine that it drives: what the guest's driver, its CPU, a bare or hostile
guest, the SPU, KVM, the host and a migration can do next, in any order that hypothesis thinks of. It shortens what
fails. The rules are looked at with other code than what keeps them: descriptors by the walker, counts by counting.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from spepolicy.explore.acts import Act, Event, Taint
from spepolicy.explore.bench import Bench
from spepolicy.explore.model import Settings, make_model
from spepolicy.machine.hostpage import FRAME, HOLE, PIN_MASK, PIN_ONE, PRESENT, SHARED, SKIPPED
from spepolicy.machine.scenario import Bug, Handling, MigrationKind
from spepolicy.mmu.walker import OA_MASK, S2_WRITE, STAGE1, STAGE2, VALID
from spepolicy.plugins import build_policy
from tests.machine.interpreted import module

POLICIES = ("eager_pin", "pin_on_fault", "map_on_fault", "synthetic_fault", "best_effort_pin", "pin_cache")
_OFTEN: dict[str, Any] = {
    "buffer_pages": 2, "max_switches": 99, "max_renewals": 99, "max_edits": 99, "max_register_writes": 99,
    "max_host_ops": 99, "max_syscalls": 99, "max_exits": 99, "memlock_pages": 6,
    "host_targets": ("buffer", "former", "table"),
    "host_ops": ("reclaim", "ksm", "numa_scan", "move", "fork", "dontneed", "munmap", "age", "mprotect", "dirty_log"),
}  # fmt: skip
SCENES: dict[str, dict[str, Any]] = {
    "lawful": {"edits": "disabled"},
    "hostile": {"edits": "any", "tlbi": (True, False), "vcpus": 2},
    "bare": {"guest": "bare", "edits": "any", "tlbi": (True, False)},
    "pre-copy": {"migration": MigrationKind.PRECOPY, "handling": Handling.REPORT_DIRTY, "max_migration_rounds": 9},
    "post-copy": {"migration": MigrationKind.POSTCOPY},
    "a leak": {"bug": Bug.LEAK_PIN},
    "a skipped page": {"bug": Bug.SKIP_PAGE},
}


@cache
def _bench(policy: str, scene: str) -> Bench:
    return Bench(make_model(Settings(**(_OFTEN | SCENES[scene])), build_policy(policy, {}), policy), 4)


class Lane(RuleBasedStateMachine):
    """One lane, to which anything that can happen happens."""

    bench: Bench

    @initialize(policy=st.sampled_from(POLICIES), scene=st.sampled_from(sorted(SCENES)))
    def boot(self, policy: str, scene: str) -> None:
        self.scene = scene
        self.bench = _bench(policy, scene)
        self.bench.put(self.bench.base)
        self.bench.m.truth[0] = np.zeros((), self.bench.m.truth.dtype)
        self.bench.m.lost[0] = 0
        self.flight = self.bench.m.vcpu["flight"][0].copy()
        self.last: Event | None = None

    @rule(choices=st.lists(st.integers(0, 2**16), min_size=1, max_size=6))
    def happen(self, choices: list[int]) -> None:
        for choice in choices:
            possible = np.flatnonzero(self.bench.possible())
            if not len(possible):
                return
            self.last = self.bench.model.events[int(possible[choice % len(possible)])]
            event(self.last.act.name)
            self.flight = self.bench.m.vcpu["flight"][0].copy()
            self.bench.step(self.last)
            self.check()

    @rule()
    def save_and_restore(self) -> None:
        """A lane is its image: nothing that happens next may depend on anything else."""
        self.bench.put(self.bench.state())
        self.bench.m.lost[0] = 0
        self.last = None

    @invariant()
    def check(self) -> None:
        self.records_are_conserved()
        self.pins_balance()
        self.stage2_is_what_the_host_shows()
        self.tables_count_their_entries()
        self.the_walker_and_the_tables_agree()

    # ---- what must hold ---------------------------------------------------------------------------------------------

    def records_are_conserved(self) -> None:
        """Each operation in flight ends in one place, and each record written is kept, discarded or not yet known."""
        truth, lost = self.bench.m.truth[0], self.bench.m.lost[0].sum(axis=1)
        assert np.array_equal(truth["written"], truth["kept"] + truth["pending"] + truth["discarded"])
        if self.last is None:
            return
        flight = self.bench.m.vcpu["flight"][0]
        for k in range(self.bench.image.vcpus):
            ended = int(truth["written"][k] + truth["filtered"][k] + lost[k])
            begun = int(self.flight[k]) - int(flight[k])
            if self.last.vcpu == k and self.last.act is Act.SELECT:
                begun += 1
            if self.last.vcpu == k and self.last.act is Act.WRITE:
                assert ended >= 1, "the SPU writes, and nothing comes of it"
            else:
                assert ended == begun, self.last

    def pins_balance(self) -> None:
        """KVM's count is that of the pages' own pins, of its lists, and within the limit."""
        m = self.bench.m
        vm, words = m.vm[0], m.host_page[0]
        of_pages = int(((words & PIN_MASK) // PIN_ONE).sum())
        listed = int(m.vcpu["pin_count"][0].sum())
        skipped = sum(
            int(
                (
                    words[m.pins[0, k, int(m.vcpu["pin_list"][0, k]), : int(m.vcpu["pin_count"][0, k])]] & SKIPPED != 0
                ).sum()
            )
            for k in range(self.bench.image.vcpus)
        )
        assert vm["pinned_pages"] >= 0
        if self.scene != "a skipped page":
            assert of_pages == vm["pinned_pages"], "the pages' pins are KVM's"
            assert skipped == 0
        if self.scene not in ("a leak", "a skipped page"):
            assert listed == vm["pinned_pages"], "KVM's lists hold what it has pinned"
        assert of_pages <= vm["pinned_pages"]
        if not self.bench.aux[0, 0] & Taint.NO_LIMIT:
            assert vm["pinned_pages"] <= int(m.par["memlock_pages"][0])

    def stage2_is_what_the_host_shows(self) -> None:
        """A stage 2 entry points at the frame that the VMM's page table shows, present; the SPU's TLB has no other."""
        m = self.bench.m
        entry_of = module("machine.pagetables").ipa_entry
        first = int(m.par["ram_page0"][0])
        frames = {}
        for page, word in enumerate(m.host_page[0].tolist()):
            slot, index, level = entry_of(m, 0, (first + page) << 12)
            leaf = int(m.pool[0, slot, index])
            if leaf & VALID:
                assert level == 3
                frames[first + page] = leaf
                shown = word & HOLE == 0 and word & (PRESENT | SHARED) and (leaf & OA_MASK) >> 12 == word & FRAME
                assert shown or word & PIN_MASK, f"page {page}: stage 2 {leaf:#x}, host {word:#x}, after {self.last}"
        for k in range(self.bench.image.vcpus):
            for va_page, frame, ipa_page, _ in m.tlb[0, k].tolist():
                if va_page != -1:
                    assert ipa_page in frames, f"page {ipa_page:#x} is in the TLB only, after {self.last}"
                    assert (frames[ipa_page] & OA_MASK) >> 12 == frame

    def tables_count_their_entries(self) -> None:
        """The count of a stage 2 table's entries, by which KVM frees it, is that of its valid descriptors."""
        m = self.bench.m
        for page in range(m.host_page.shape[1]):
            slot, _, level = module("machine.pagetables").ipa_entry(m, 0, (int(m.par["ram_page0"][0]) + page) << 12)
            if level == 3:
                assert m.pool_refs[0, slot] == int((m.pool[0, slot] & VALID).sum())

    def the_walker_and_the_tables_agree(self) -> None:
        """What the SPU would find is what the descriptors of both stages say, page by page of each buffer."""
        m = self.bench.m
        tables, walker, nothing = (
            module("machine.pagetables"),
            module("mmu.walker"),
            module("mmu.memory").NO_ZERO_RANGES,
        )
        w = module("machine.rows").walk_row(m, 0)
        for k in range(self.bench.image.vcpus):
            for n in range(self.bench.image.buffer_pages):
                va = int(m.vcpu["buffer_va"][0, k]) + (n << 12)
                slot, index, _ = tables.va_leaf(m, 0, va)
                leaf1 = int(m.pool[0, slot, index]) if slot >= 0 else 0
                with np.errstate(over="ignore"):
                    walker.translate(
                        m.frames[0].copy(), m.pool[0].copy(), nothing, m.regime[0], w, np.int64(va), walker.WRITE
                    )
                status = int(w.status)
                if status == 0:
                    ipa = leaf1 & OA_MASK
                    at, entry, _ = tables.ipa_entry(m, 0, ipa)
                    leaf2 = int(m.pool[0, at, entry])
                    assert leaf1 & VALID
                    if int(m.par["virtualized"][0]):
                        assert leaf2 & VALID
                        assert leaf2 & S2_WRITE
                    assert int(w.pa) & ~0xFFF == leaf2 & OA_MASK
                elif (
                    status & STAGE2 and slot >= 0 and leaf1 & VALID and int(w.address) >> 12 == (leaf1 & OA_MASK) >> 12
                ):
                    at, entry, _ = tables.ipa_entry(m, 0, leaf1 & OA_MASK)
                    leaf2 = int(m.pool[0, at, entry])
                    assert not (leaf2 & VALID and leaf2 & S2_WRITE), f"{status:#x} at {va:#x}"
                elif status & STAGE1:
                    assert slot < 0 or leaf1 & VALID == 0 or leaf1 & walker.S1_READ_ONLY or status & 0x3F >= 0x8


def _run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Lane,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_what_must_hold_holds_after_every_event() -> None:
    _run(25, 25)


@pytest.mark.slow
def test_what_must_hold_holds_after_very_many_events() -> None:
    _run(150, 50)
