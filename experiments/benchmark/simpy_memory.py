"""Memory of the SimPy model: two stages of translation and the host's pages, as dicts with an entry a page."""

from __future__ import annotations

import random

from spepolicy.machine.host import COPY_ON_WRITE, EFFECT, LOSE, MOVE, REPLACE, SHARE, SWAP, UNMAP, WRITE_PROTECT
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Scenario

EFFECTS = EFFECT.tolist()  # [HostOp][pinned]: what a real kernel did to a page
PAGES_PER_TABLE = 512
STAGE1, STAGE2 = "stage 1 fault", "stage 2 fault"


class Memory:
    """Guest stage 1, KVM's stage 2 and the VMM's pages, as dicts; a translation that the SPU caches; pins."""

    def __init__(self, scenario: Scenario, rng: random.Random) -> None:
        pages, ring = scenario.guest.ram_pages, scenario.guest.buffer_pages
        chosen = rng.sample(range(pages), ring - (-ring // PAGES_PER_TABLE))
        self.stage1 = dict(enumerate(chosen[:ring]))  # page of the AUX buffer -> guest page, scattered as by vmap()
        self.tables = dict(enumerate(chosen[ring:]))  # level 3 tables, each maps 512 of them
        self.own = set(chosen)
        self.frame = {page: page for page in range(pages)}
        self.next_frame = pages
        self.stage2 = {page: (page, True) for page in range(pages)}  # guest page -> frame, writable
        for page in () if scenario.guest.buffer_mapped else self.stage1.values():
            del self.stage2[page]
        self.swapped: set[int] = set()
        self.shared: set[int] = set()
        self.holes: set[int] = set()
        self.pins: set[int] = set()
        self.tlb = (-1, -1)  # buffer page and guest page of the last record
        self.costs = scenario.costs

    def translate(self, page: int) -> str:
        """Cache the translation of a buffer page for the SPU; return "" or the kind of fault (spe.md 6a)."""
        if self.tables[page // PAGES_PER_TABLE] not in self.stage2:
            return STAGE2
        if page not in self.stage1:
            return STAGE1
        if not self.writable(self.stage1[page]):
            return STAGE2
        self.tlb = (page, self.stage1[page])
        return ""

    def writable(self, page: int) -> bool:
        return page in self.stage2 and self.stage2[page][1]

    def map(self, page: int, write: bool) -> int:
        """Fault a guest page in and map it at stage 2; return the cost in ps."""
        cost = self.costs.map_page_ps
        if page in self.holes:
            return cost
        if page in self.swapped:
            self.swapped.discard(page)
            cost += self.costs.swap_in_ps
        if write and page in self.shared:
            self.shared.discard(page)
            self.renew(page)
            cost += self.costs.copy_page_ps
        self.stage2[page] = (self.frame[page], page not in self.shared)
        return cost

    def renew(self, page: int) -> None:
        self.frame[page] = self.next_frame
        self.next_frame += 1

    def host_operation(self, op: int, page: int, write: bool) -> None:
        if op == HostOp.CPU_TOUCH:
            if page not in self.own and not (self.writable(page) if write else page in self.stage2):
                self.map(page, write)
            return
        effect = EFFECTS[op][page in self.pins]
        if page in self.holes or (effect & (SHARE | REPLACE | LOSE) and page in self.tables.values()):
            return
        if effect & WRITE_PROTECT and page in self.stage2:
            self.stage2[page] = (self.stage2[page][0], False)
        if effect & UNMAP:
            self.stage2.pop(page, None)
        if effect & (UNMAP | WRITE_PROTECT) and self.tlb[1] == page:
            self.tlb = (-1, -1)
        if effect & (MOVE | REPLACE):
            self.renew(page)
        if effect & SWAP:
            self.swapped.add(page)
        if effect & (COPY_ON_WRITE | SHARE):
            self.shared.add(page)
        if effect & SHARE:
            self.stage2[page] = (self.frame[page], False)
        if effect & LOSE:
            self.holes.add(page)
