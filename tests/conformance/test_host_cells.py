"""The machine against a real kernel's memory management: every measured cell is played and compared.

As in the experiment, a VM of 2 MiB whose CPU has touched eight pages; the operation; then a read and a write of page 3
by the guest's CPU. Compared are the notifier calls that cover the page, ageing, change_pte and write protection, every
fault with its level, what backs the page, whether its content is there, and what a long-term pin sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import spepolicy.recording.effect_table as effect_table
from spepolicy.machine.dirtylog import KEEP_NONE
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.hostpage import GONE_HOST
from spepolicy.machine.scenario import Cpu, Host
from spepolicy.recording.effect_table import FOLDER, NOT_CONCLUSIVE, OPERATION_OF, make_table, text_of
from spepolicy.recording.pin_cells import EVENTS, Cell, read_cells

from ..machine.interpreted import Lane, module
from ..properties.scenarios import guest, scenario

PAGE, PAGES = 3, 512
CELLS = read_cells(FOLDER / "pin_cells.tsv")
KERNELS = {"6.1": Kernel.V6_1, "6.12": Kernel.V6_12}
BACKINGS = {"A": Backing.ANONYMOUS, "H": Backing.THP, "S": Backing.SHMEM}
ON_PAGE = {
    HostOp.DONTNEED, HostOp.FREE, HostOp.PAGEOUT_PART, HostOp.MPROTECT, HostOp.MPROTECT_READ, HostOp.MPROTECT_NONE,
    HostOp.MUNMAP, HostOp.MREMAP, HostOp.MAP_FIXED, HostOp.KSM, HostOp.MOVE, HostOp.SOFT_OFFLINE, HostOp.REMOVE,
    HostOp.PUNCH_HOLE, HostOp.DIRECT_READ,
}  # fmt: skip
FAULTS = {1: "translation", 2: "access_flag", 3: "permission"}


class Experiment:
    """One cell on the machine."""

    def __init__(self, cell: Cell) -> None:
        host = Host(
            kernel=KERNELS[cell.kernel], backing=BACKINGS[cell.backing], locked=cell.state in "MB",
            zone_movable=cell.run == "movablecore",
        )  # fmt: skip
        self.access_flag = cell.run != "no_hafdbs"
        cpu = Cpu(hardware_access_flag=self.access_flag)
        self.lane = Lane(scenario(guest=guest(ram_pages=PAGES), host=host, cpu=cpu), virtualized=True)
        self.pages = self.lane.m.host_page[0]
        self.word = module("machine.hostpage")
        self.pages &= ~self.word.ROLE_MASK  # the experiment's guest has its MMU off
        self.seen: Counter[str] = Counter()
        self.hinted = False
        self.lane.call("operations.drop", 0, PAGES)
        for page in (PAGE, *range(8)):
            self.lane.call("hostpage.cpu_touch", page, int(page == PAGE))
        self.lane.m.host_calls[:] = 0
        slot = int(self.lane.vm.pool_used)
        self.lane.vm.pool_used = slot + 1
        module("mmu.memory").attach(self.lane.m.frames[0], self.frame, slot)  # its content, to know it again
        self.slot, self.first_frame = slot, self.frame
        self.pinned_frame = -1
        if cell.state in "PB":
            self.pages += self.word.PIN_ONE
            self.pinned_frame = self.frame

    @property
    def frame(self) -> int:
        return int(self.pages[PAGE]) & self.word.FRAME

    @property
    def content(self) -> bool:
        return self.lane.slot_of(self.frame) == self.slot

    def has(self, bit: int) -> bool:
        return bool(int(self.pages[PAGE]) & bit)

    def operate(self, op: HostOp, times: int = 1) -> None:
        first, last = (PAGE, PAGE + 1) if op in ON_PAGE else (0, PAGES)
        for _ in range(times):
            self.lane.call("operations.operate", int(op), first, last)
        self.hinted = op == HostOp.NUMA_SCAN

    def pin(self) -> None:
        for page in range(PAGES):
            assert self.lane.call("hostpage.pin_page", page) >= 0
        self.pinned_frame = self.frame

    def access(self, write: int) -> str:
        """Let the guest's CPU access the page until it can; return how it ended."""
        for _ in range(5):
            fault = self.lane.call("hostpage.fault_of", PAGE, write, int(self.access_flag))
            if fault == 0:
                return "ok"
            self.seen[f"{FAULTS[fault >> 2]}{fault & 3}"] += 1
            if fault >> 2 == 2:
                self.lane.call("hostpage.cpu_touch", PAGE, 0)
                continue
            if self.hinted:
                self.hinted = False
                before = self.seen["CLEAR"]
                self.lane.call("operations.operate", int(HostOp.NUMA_MIGRATE), PAGE, PAGE + 1)
                if self.seen["CLEAR"] != before:
                    continue  # mmu_notifier_retry
            if self.lane.call("hostpage.fault_in", PAGE, write) < 0:
                return "error"
        raise AssertionError("the guest never gets on")

    def events(self) -> Counter[str]:
        """Return what came since the last call."""
        seen, self.seen = self.seen, Counter()
        protected = int(self.lane.m.host_calls[0, module("machine.effects").KIND_WRITE_PROTECT])
        self.lane.m.host_calls[:] = 0
        return +(seen + Counter({"wrprotect": protected}))


def observe(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note every call of a notifier that covers the page."""

    def spy(name: str, label: Callable[..., tuple[str, int, int, int]]) -> None:
        plain = getattr(experiment.word, name)

        def noted(m: Any, i: int, *arguments: int) -> Any:
            kind, first, last, times = label(*arguments)
            if first <= PAGE < last:
                experiment.seen[kind] += int(times)
            return plain(m, i, *arguments)

        for where in ("machine.hostpage", "machine.operations", "machine.host"):
            if hasattr(module(where), name):
                monkeypatch.setattr(module(where), name, noted)

    change_pte = experiment.lane.par.change_pte
    spy("notify", lambda event, _why, first, last, times: (EVENTS[event], first, last, times))
    spy("age", lambda first, last, times: ("age", first, last, times))
    spy("repoint", lambda page: ("set_spte", page, page + 1, change_pte))


def play(experiment: Experiment, cell: Cell) -> None:
    """Do what the experiment's operation did."""
    name, call = cell.operation, experiment.lane.call
    by_name = {text: op for op, text in OPERATION_OF.items() if op != HostOp.NUMA_MIGRATE}
    composites: dict[str, tuple[Callable[[], Any], ...]] = {
        "none_control": (),
        "host_cpu_write": (lambda: call("hostpage.resident", PAGE, 1),),
        "madvise_FREE_then_PAGEOUT": (
            lambda: experiment.operate(HostOp.FREE), lambda: experiment.operate(HostOp.PAGEOUT_PART),
        ),
        "madvise_PAGEOUT_then_host_swapin": (
            lambda: experiment.operate(HostOp.PAGEOUT), lambda: call("hostpage.resident", PAGE, 0),
        ),
        "madvise_PAGEOUT_region_twice": (lambda: experiment.operate(HostOp.PAGEOUT, 2),),
        "fork_child_alive_host_write": (
            lambda: experiment.operate(HostOp.FORK), lambda: call("hostpage.resident", PAGE, 1),
        ),
        "fork_with_WIPEONFORK": (lambda: experiment.operate(HostOp.FORK_EXCLUDED),),
        "ksm_no_duplicate": (),
        "act_of_pinning": (experiment.pin,),
        "act_of_unpinning": (lambda: experiment.pages.__isub__(experiment.word.PIN_ONE),),
        "act_of_mlock": (lambda: setattr(experiment.lane.vm, "locked", 1),),
        "act_of_munlock": (lambda: setattr(experiment.lane.vm, "locked", 0),),
        "fork_then_pin": (lambda: experiment.operate(HostOp.FORK), experiment.pin),
        "ksm_merge_then_pin": (lambda: experiment.operate(HostOp.KSM), experiment.pin),
        "pageout_then_pin": (lambda: experiment.operate(HostOp.PAGEOUT), experiment.pin),
        "kvm_dirty_log_enable": (lambda: call("dirtylog.begin_log", KEEP_NONE, GONE_HOST),),
        "kvm_dirty_log_write_get": (
            lambda: call("dirtylog.begin_log", KEEP_NONE, GONE_HOST), lambda: experiment.access(1),
            lambda: call("dirtylog.collect_dirty", 0, PAGES, KEEP_NONE, GONE_HOST),
        ),
        "kvm_dirty_log_on_write_off": (
            lambda: call("dirtylog.begin_log", KEEP_NONE, GONE_HOST), lambda: experiment.access(1),
            lambda: call("dirtylog.end_log"),
        ),
    }  # fmt: skip
    if name in composites:
        for step in composites[name]:
            step()
        return
    op = by_name[name]
    times = 1
    if op == HostOp.NUMA_SCAN:
        times = cell.counts("events").get("PROTECTION_VMA", 1)  # as many scans as the four seconds had
    elif op == HostOp.KSM:
        times = 4  # passes of ksmd
    experiment.operate(op, times)


def conclusive(cell: Cell) -> bool:
    return not effect_table._not_conclusive(cell)


def label(cell: Cell) -> str:
    return "-".join(filter(None, (cell.kernel, cell.run, cell.operation, cell.backing, cell.state)))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if conclusive(cell)], ids=label)
def test_a_cell_is_what_was_measured(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(cell)
    observe(experiment, monkeypatch)
    merged = cell.operation.startswith("ksm") and cell.state in "UM" and bool(cell.events)
    play(experiment, cell)
    during = experiment.events()
    faults = {name for name in during if name[:-1] in FAULTS.values()}  # of the guest's write within the operation
    expected = Counter({name: n for name, n in cell.counts("events").items() if name not in faults})
    expected = Counter({name: n for name, n in expected.items() if name[:-1] not in FAULTS.values()})
    assert Counter({name: n for name, n in during.items() if name not in faults}) == expected

    hole = experiment.has(experiment.word.HOLE)
    if not hole and not merged:
        swapped = not experiment.has(experiment.word.PRESENT) and not experiment.has(experiment.word.EMPTY)
        backed = {"moved": experiment.frame != experiment.first_frame, "swapped": swapped}
        backed["none"] = experiment.has(experiment.word.EMPTY) or not experiment.content
        backed["same"] = experiment.frame == experiment.first_frame and not swapped
        if cell.backing == "S" and cell.read == "same":  # an empty entry in the VMM, and the file has the page
            backed["none"] = backed["same"] or swapped
        disk = cell.operation == "o_direct_read_into_page"
        assert backed[cell.page]
        assert experiment.content == (cell.read != "lost" or disk)
    read = experiment.access(0)
    assert (read == "error") == (cell.read == "error")
    assert experiment.events() == Counter(cell.counts("read_events"))
    written = experiment.access(1)
    assert (written == "ok") == (cell.write == "ok")
    assert experiment.events() == Counter(cell.counts("write_events"))
    if cell.pin:
        stale = experiment.frame != experiment.pinned_frame
        assert stale == (cell.pin == "stale")
        assert bool(experiment.lane.vm.stale_pins) == stale


def test_every_cell_is_played_but_those_that_say_nothing() -> None:
    left = [cell for cell in CELLS if not conclusive(cell)]
    assert len(CELLS) == 554
    assert len(left) == sum(len(key[3]) * len(key[4]) for key in NOT_CONCLUSIVE)


def test_the_table_is_made_from_the_cells() -> None:
    assert (FOLDER / "host_effects.tsv").read_text(encoding="utf-8") == text_of(make_table(CELLS))


def test_every_row_says_where_it_comes_from() -> None:
    rows = make_table(CELLS)
    assert len(rows) == len(Kernel) * len(Backing) * len(HostOp) * 4
    for row in rows.values():
        assert row.basis == "measured" or (row.basis.startswith("inferred: ") and len(row.basis) > 20)
        assert np.any(row.integers()) == bool(row.steps or row.outcome)
