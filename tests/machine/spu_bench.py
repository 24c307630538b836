"""One SPU on a bench: a program of one kind of operation, registers set by hand, no driver and no KVM around it."""

from __future__ import annotations

from typing import Any

import numpy as np

from spepolicy.alias import TABLE_DRAWS, alias_table
from spepolicy.machine.scenario import Cpu, Guest, Host, Migration, Scenario, Workload

from .interpreted import Lane, module

OP_PS = 300
PAGE = 4096
FIXED = Cpu(max_record_bytes=64, align_bytes=64)


def one_kind(kind: int = 2, events: int = 0b10, latency: int = 1, spread: int = 0) -> Workload:
    """A program that executes operations of one type, with the same events and the same latency (if *spread* is 0)."""
    threshold, choice = alias_table([TABLE_DRAWS])
    zero = np.zeros(1, dtype=np.int64)
    return Workload(
        function_names=("f",), distribution_names=("d",), op_ps=zero + OP_PS, alias_threshold=threshold[None],
        alias_outcome=choice[None], weight=np.ones((1, 1)), outcome_function=zero, outcome_type=zero + kind,
        outcome_events=zero + events, outcome_latency_cycles=zero + latency, outcome_spread_cycles=zero + spread,
        phase_user=zero, phase_kernel=zero, phase_ps=zero + 10**12, syscall_gap_ps=zero + 10**12,
        syscall_ps=zero + 10**6,
    )  # fmt: skip


class Bench(Lane):
    """A lane whose vCPU executes at EL0 with profiling enabled, PMBPTR_EL1 at the start of its buffer."""

    def __init__(
        self,
        *,
        cpu: Cpu = FIXED,
        interval: int = 512,
        jitter: bool = False,
        buffer_pages: int = 4,
        limit_pages: int = 0,
        virtualized: bool = False,
        workload: Workload | None = None,
        guest: dict[str, Any] | None = None,
        migration: Migration | None = None,
        host: Host | None = None,
        log_rows: int = 0,
        **behaviour: Any,
    ) -> None:
        plain: dict[str, Any] = {
            "ram_pages": 256,
            "buffer_pages": buffer_pages,
            "period_ops": interval,
            "jitter": jitter,
        }
        whole = Guest(**(plain | (guest or {})))
        super().__init__(
            Scenario(
                workload=workload or one_kind(),
                cpu=cpu,
                guest=whole,
                migration=migration or Migration(),
                host=host or Host(),
            ),
            log_rows,
            virtualized=virtualized,
            **behaviour,
        )
        v = self.v
        v.segment, v.level, v.distribution = 0, 0, 0
        v.segment_end_ps = v.segment_ps = 1 << 50
        self.start = int(v.buffer_va)
        self.limit = self.start + (limit_pages or buffer_pages) * PAGE
        v.pmbptr, v.pmblimitr, v.pmbsr = self.start, self.limit | 1, 0
        v.pmscr = 3
        v.pmsirr = interval | int(jitter)

    def run(self, until_ps: int) -> int:
        """Execute until *until_ps* of guest time, or until the SPU stops; return the time reached."""
        spu = module("machine.spu")
        if spu.profiling_enabled(self.v):
            with np.errstate(over="ignore"):
                self.call("spu.run_counter", 0, OP_PS)
            self.v.now_ps = self.call("spu.sample_until", 0, until_ps)
        else:
            self.v.now_ps = until_ps
        return int(self.v.now_ps)

    def advance(self, until_ps: int) -> None:
        """Let the lane's own loop execute until *until_ps*, or until the SPU stops."""
        self.call("lane._advance", 0, until_ps)

    def write_records(self, count: int) -> int:
        """Execute until *count* more records are written, or the SPU stops; return how many were."""
        before = int(self.tr.written)
        while self.tr.written < before + count and not self.stopped:
            self.run(int(self.v.now_ps) + (int(self.v.pmsirr) & 0xFFFF_FF00) * OP_PS)
        return int(self.tr.written) - before

    @property
    def stopped(self) -> bool:
        return bool(self.v.pmbsr & (1 << 17))

    @property
    def syndrome(self) -> dict[str, int]:
        """PMBSR_EL1 by its fields (spe.md 1.8)."""
        word = int(self.v.pmbsr)
        return {
            "EC": (word >> 26) & 0x3F, "DL": (word >> 19) & 1, "EA": (word >> 18) & 1, "S": (word >> 17) & 1,
            "COLL": (word >> 16) & 1, "MSS": word & 0xFFFF,
        }  # fmt: skip

    def edit_stage1(self, n: int, edit: Any) -> None:
        """Let the guest change its descriptor of buffer page *n*, without a TLBI."""
        slot, entry = self.stage1_leaf(self.start + n * PAGE)
        self.m.pool[0, slot, entry] = edit(int(self.m.pool[0, slot, entry]))

    def edit_stage2(self, page: int, edit: Any) -> None:
        """Let KVM change its descriptor of guest page *page*, without a TLBI."""
        ipa = (int(self.par.ram_page0) + page) << 12
        slot, entry = module("machine.pagetables").ipa_leaf(self.m, 0, ipa)
        self.m.pool[0, slot, entry] = edit(int(self.m.pool[0, slot, entry]))
