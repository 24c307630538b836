"""The main scenario as a plain SimPy model: what a careful user of a discrete-event library would write.

One VM with one vCPU under the policy `eager_pin`. Its processes share one `simpy.Environment`, whose time is host time
in integer ps: the vCPU (program, driver, exits, handler), the SPU, the host's memory management, PMBIRQ, and perf's
reader. Every selected sample is one SimPy event. Rules are those of spe.md, and the effects of host operations are the
measured table of `spepolicy.machine.host`, so that both run the same scenario; all else is written independently.

Where it is simpler than the machine it is faster, so a comparison errs in SimPy's favour: tables are dicts with an
entry a page, a record is written when its operation is selected (collisions still use its latency), and no metrics are
kept but sums. Draws come from `random`: results agree with the machine in distribution, not in bits.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Generator
from typing import Any

import numpy as np
import simpy
from simpy_memory import PAGES_PER_TABLE, STAGE2, Memory

from spepolicy.errors import ConfigurationError
from spepolicy.machine.scenario import PAGE_BYTES, HostKind, IrqDelivery, Scenario, SessionMode

Process = Generator[Any, Any, None]

FULL, IMPDEF = "buffer full", "implementation defined"


class Lane:
    """One VM: SPU, guest with its SPE driver, KVM with the policy, host."""

    def __init__(self, env: simpy.Environment, scenario: Scenario, replicate: int) -> None:
        self.env: Any = env  # SimPy types its time as float or int; here it is int
        self.scenario = scenario
        self.guest, self.cpu, self.kvm, self.costs = scenario.guest, scenario.cpu, scenario.kvm, scenario.costs
        self.rng = random.Random(f"{scenario.seed}/{replicate}")
        self.memory = Memory(scenario, self.rng)
        w = scenario.workload
        self.op_ps, self.threshold, self.alias = w.op_ps.tolist(), w.alias_threshold.tolist(), w.alias_outcome.tolist()
        self.outcomes = np.stack([w.outcome_function, w.outcome_latency_cycles, w.outcome_spread_cycles], 1).tolist()
        self.phases = np.stack([w.phase_user, w.phase_kernel, w.phase_ps, w.syscall_gap_ps, w.syscall_ps], 1).tolist()
        # SPE registers; pointers are offsets into the AUX buffer.
        self.sampling = self.enabled = self.stopped = self.data_loss = False
        self.pointer = self.limit = self.busy_until = self.distribution = 0
        self.event = ""
        self.rate: int | None = None  # ps per operation while the interval counter runs
        self.left_ops = self.interval()
        self.idle: simpy.Event | None = None
        # AUX ring: bytes since it was opened (spe.md 3.2).
        self.size = self.guest.buffer_pages * PAGE_BYTES
        self.head = self.tail = self.wakeup = self.handle_head = self.pending = 0
        self.active, self.handle_open, self.reading = True, False, False
        self.count, self.seen = Counter[str](), Counter[int]()
        self.guest_ps = self.task = 0
        self.interruptible = False
        self.interrupts: list[str] = []
        self.exit_left, self.preempt_left = (
            self.after(self.kvm.exit_interval_ps),
            self.after(self.kvm.preempt_interval_ps),
        )
        self.spu_process, self.vcpu_process = env.process(self.spu()), env.process(self.vcpu())
        if scenario.host.kind is HostKind.RECORDED:
            env.process(self.host(scenario.host.recording))

    def exponential(self, mean_ps: int) -> int:
        return int(self.rng.expovariate(1) * mean_ps) + 1

    def after(self, mean_ps: int) -> int:
        return self.exponential(mean_ps) if mean_ps else 1 << 62

    def host(self, recording: Any) -> Process:
        columns = (recording.time_us, recording.first_page, recording.end_page, recording.op, recording.write)
        rows = [row for row in zip(*map(np.ndarray.tolist, columns), strict=True) if row[1] < self.guest.ram_pages]
        at = self.rng.randrange(len(rows))
        before = rows[at][0]
        while True:
            now, first, end, op, write = rows[at]
            gap_us = now - before if now >= before else recording.duration_us - before + now
            yield self.env.timeout((gap_us * 1_000_000 << 16) // self.scenario.host.time_scale_q16)
            for page in range(first, min(end, self.guest.ram_pages)):
                self.memory.host_operation(op, page, write)
            self.count["host operations"] += 1
            before, at = now, (at + 1) % len(rows)

    # ---- SPU ---------------------------------------------------------------------------------------------------------

    def interval(self) -> int:
        """Operations until the next selection (rules 10 and 11)."""
        return self.guest.period_ops + 1 + (self.rng.getrandbits(8) if self.guest.jitter else 0)

    def spu(self) -> Process:
        while True:
            begin, rate = self.env.now, self.rate
            try:
                if rate is None:
                    self.idle = self.env.event()
                    yield self.idle
                else:
                    yield self.env.timeout(self.left_ops * rate)
                    self.left_ops = self.interval()
                    self.select()
            except simpy.Interrupt:  # other code runs, or profiling is off: the counter keeps what is left (rule 13)
                if rate is not None:
                    self.left_ops = max(self.left_ops - (self.env.now - begin) // rate, 1)

    def select(self) -> None:
        self.count["selected"] += 1
        now = self.env.now
        if now < self.busy_until:  # rule 14
            self.count["collided"] += 1
            return
        bits = self.rng.getrandbits(32)
        slot = bits >> 24
        side = bits & 0xFFFFFF >= self.threshold[self.distribution][slot]
        function, latency, spread = self.outcomes[self.alias[self.distribution][slot][side]]
        self.busy_until = now + int(latency + self.rng.expovariate(1) * spread) * self.cpu.cycle_ps
        page = self.pointer // PAGE_BYTES
        fault = self.memory.translate(page) if self.memory.tlb[0] != page else ""
        if fault:
            self.count["lost"] += 1
            self.stop(fault)
            return
        self.pointer += self.cpu.max_record_bytes
        self.pending += 1
        self.seen[function] += 1
        if self.pointer > self.limit - self.cpu.max_record_bytes:  # rule 37
            self.stop(FULL)

    def stop(self, event: str) -> None:
        self.stopped, self.event, self.rate = True, event, None
        self.count[event] += 1
        self.env.process(self.pmbirq())

    def pmbirq(self) -> Process:
        yield self.env.timeout(self.cpu.irq_latency_ps)
        self.interrupt("pmbirq")

    def tune(self, level: int | None, distribution: int = 0) -> None:
        """From now on the vCPU executes operations of *distribution* at *level*, or none."""
        self.distribution = distribution
        wanted = level is not None and (self.guest.profile_kernel if level else self.guest.profile_user)
        on = wanted and self.sampling and self.enabled and not self.stopped
        rate = self.op_ps[distribution] if on else None
        if rate == self.rate:
            return
        self.rate = rate
        if self.idle is not None:
            self.idle.succeed()
            self.idle = None
        else:
            self.spu_process.interrupt()

    # ---- vCPU: the program, and KVM ----------------------------------------------------------------------------------

    def interrupt(self, reason: str) -> None:
        self.interrupts.append(reason)
        if self.interruptible:
            self.interruptible = False
            self.vcpu_process.interrupt()

    def execute(self, length: int, level: int, distribution: int, masked: bool = False) -> Process:
        """Execute *length* ps of guest code, with the exits and interrupts that come in between."""
        while length > 0 and self.guest_ps < self.scenario.duration_ps:
            if self.interrupts and not masked:
                yield from self.take(self.interrupts.pop(0))
                continue
            self.tune(level, distribution)
            begin = self.env.now
            self.interruptible = not masked
            left = self.scenario.duration_ps - self.guest_ps
            try:
                yield self.env.timeout(min(length, left, self.exit_left, self.preempt_left))
            except simpy.Interrupt:
                self.count["interrupts"] += 1
            self.interruptible = False
            ran = self.env.now - begin
            length -= ran
            self.guest_ps += ran
            self.exit_left -= ran
            self.preempt_left -= ran
            if self.exit_left <= 0:
                self.exit_left = self.after(self.kvm.exit_interval_ps)
                yield from self.pause(self.costs.exit_ps + self.enabled * self.costs.spe_switch_ps)
            if self.preempt_left <= 0:
                self.preempt_left = self.after(self.kvm.preempt_interval_ps)
                yield from self.pause(self.costs.exit_ps + self.exponential(self.kvm.preempt_ps))

    def pause(self, cost_ps: int) -> Process:
        """The guest does not execute while KVM or another task of the host has the core."""
        self.tune(None)
        yield self.env.timeout(cost_ps)

    def trap(self, accesses: int) -> Process:
        yield from self.pause(accesses * self.costs.trap_ps)

    def take(self, reason: str) -> Process:
        if reason == "restart":
            if self.task == 0 and not self.handle_open:
                yield from self.start()
        elif self.stopped:
            costs = self.costs
            yield from self.pause(costs.exit_ps + costs.spe_switch_ps + costs.event_ps + costs.inject_ps)
            if self.event == STAGE2:  # eager_pin's answer to what should not happen: data was lost
                self.event, self.data_loss = IMPDEF, True
            yield from self.handle_interrupt()

    def profiling_enabled(self) -> Process:
        """eager_pin: pin the buffer, then unpin what was pinned before."""
        memory, costs = self.memory, self.costs
        pages = [memory.stage1[page] for page in range(self.pointer // PAGE_BYTES, self.limit // PAGE_BYTES)]
        cost = (len(pages) + 3 * -(-len(pages) // PAGES_PER_TABLE)) * costs.walk_read_ps
        if len(memory.pins) + len(pages) > self.kvm.memlock_pages and not self.kvm.memlock_unlimited:
            self.data_loss = True
            self.stop(IMPDEF)
        else:
            cost += len(pages) * costs.pin_page_ps + len(memory.pins) * costs.unpin_page_ps
            cost += sum(memory.map(page, True) for page in pages if not memory.writable(page))
            memory.pins = set(pages)
        yield from self.pause(cost)

    def vcpu(self) -> Process:
        guest, phases = self.guest, self.phases
        phase = self.rng.randrange(len(phases))
        phase_left, syscall_left = self.exponential(phases[phase][2]), self.exponential(phases[phase][3])
        switch_left = self.after(guest.task_on_ps if guest.task_off_ps else 0)
        yield from self.start()
        while self.guest_ps < self.scenario.duration_ps:
            if switch_left <= 0:
                if self.task == 0:
                    yield from self.stop_session()
                self.task = 1 - self.task
                switch_left = self.after(guest.task_off_ps if self.task else guest.task_on_ps)
                if self.task == 0 and self.active:
                    yield from self.start()
            if self.task == 0 and phase_left <= 0:
                phase = (phase + 1) % len(phases)
                phase_left = self.exponential(phases[phase][2])
            user, kernel, _, gap_ps, syscall_ps = phases[phase]
            if self.task:
                user, kernel = self.scenario.workload.other_user, self.scenario.workload.other_kernel
            if syscall_left <= 0:
                length, syscall_left = self.exponential(syscall_ps), self.exponential(gap_ps)
                yield from self.execute(length, 1, kernel)
            else:
                length = min(syscall_left, switch_left, switch_left if self.task else phase_left)
                yield from self.execute(length, 0, user)
                syscall_left -= length
            switch_left -= length
            phase_left -= 0 if self.task else length

    # ---- the guest's SPE driver and perf (spe.md 3) ------------------------------------------------------------------

    def driver(self, length_ps: int) -> Process:
        yield from self.execute(length_ps, 1, self.scenario.workload.driver, masked=True)

    def start(self) -> Process:
        yield from self.driver(self.guest.start_ps)
        yield from self.open_handle()
        if self.enabled:
            yield from self.trap(6)
            self.sampling = True
            yield from self.profiling_enabled()

    def stop_session(self) -> Process:
        self.sampling = False
        yield from self.trap(1)
        yield from self.driver(self.guest.stop_ps)
        self.enabled = False
        self.data_loss = self.data_loss or (self.stopped and self.event == STAGE2)  # KVM sees it at the first trap
        yield from self.trap(5 if self.handle_open else 1)
        if self.handle_open:
            self.close_handle()

    def open_handle(self) -> Process:
        """perf_aux_output_begin(), then the choice of PMBPTR_EL1 and PMBLIMITR_EL1 (spe.md 3.2)."""
        self.enabled = self.data_loss = False
        free = self.size - 1 - (self.head - self.tail)
        head, end, wakeup = self.head % self.size, self.head + max(free, 0), self.wakeup + self.size // 2
        limit = self.size if end % self.size <= head else end % self.size // PAGE_BYTES * PAGE_BYTES
        if wakeup < end and head <= wakeup % self.size:
            limit = min(limit, -(-(wakeup % self.size) // PAGE_BYTES) * PAGE_BYTES)
        if free <= 0 or limit - head < self.cpu.max_record_bytes:
            self.count["ring full"] += 1
            self.active = False
            self.wake_reader()
            yield from self.trap(1)
            return
        self.handle_open = self.enabled = True
        self.handle_head, self.pointer, self.limit = self.head, head, limit
        yield from self.trap(2)

    def close_handle(self) -> None:
        """perf_aux_output_end(). Records of fixed size end at PMBPTR_EL1, so the whole ones are kept even with DL=1."""
        self.head = self.handle_head + self.pointer - self.handle_head % self.size
        if self.head - self.wakeup >= self.size // 2:
            self.wakeup = self.head - self.head % (self.size // 2)
            self.wake_reader()
        if self.data_loss:  # PERF_AUX_FLAG_TRUNCATED: the event is off until perf has read
            self.active = False
            self.wake_reader()
        self.count["kept"] += self.pending
        self.pending = 0
        self.handle_open = self.stopped = False

    def handle_interrupt(self) -> Process:
        yield from self.driver(self.guest.irq_entry_ps)
        yield from self.trap(2)
        full = self.event == FULL
        self.close_handle()
        if full:
            yield from self.open_handle()
            yield from self.trap(1)
        if self.enabled and full:
            yield from self.profiling_enabled()
        else:
            self.sampling = self.enabled = False
            yield from self.trap(3)
        yield from self.driver(self.guest.irq_handler_ps)

    def wake_reader(self) -> None:
        if not self.reading:
            self.reading = True
            self.env.process(self.reader())

    def reader(self) -> Process:
        copy_ps = (self.head - self.tail) * 1_000_000 // self.guest.reader_bytes_per_us
        yield self.env.timeout(self.guest.reader_latency_ps + copy_ps)
        for page in range(self.tail // PAGE_BYTES, -(-self.head // PAGE_BYTES)):
            ipa = self.memory.stage1[page % self.guest.buffer_pages]
            if ipa not in self.memory.stage2:
                self.memory.map(ipa, False)
        self.tail, self.reading = self.head, False
        if not self.active:
            self.active = True
            self.interrupt("restart")


def run(scenario: Scenario, replicate: int) -> dict[str, Any]:
    """Run one VM. Return samples (selected), seconds (wall-clock, no set-up), vm_seconds (guest time), counts and seen.

    :raises ConfigurationError: if *scenario* needs what this model does not have.
    """
    guest, cpu = scenario.guest, scenario.cpu
    limits = {
        "guest.vcpus must be 1": guest.vcpus == 1,
        "guest.session must be PER_TASK": guest.session is SessionMode.PER_TASK,
        "guest.renew_ps must be 0": guest.renew_ps == 0,
        "samples must not be filtered": not (guest.type_filter or guest.event_filter or guest.min_latency_cycles),
        "records must be of fixed size": cpu.align_bytes == cpu.max_record_bytes,
        "cpu.hardware_access_flag must be set": cpu.hardware_access_flag,
        "cpu.data_loss_at_boundary must not be set": not cpu.data_loss_at_boundary,
        "kvm.irq_delivery must be FORCED_EXIT": scenario.kvm.irq_delivery is IrqDelivery.FORCED_EXIT,
        "host.kind must be RECORDED or SILENT": scenario.host.kind is not HostKind.RANDOM,
    }
    for rule, kept in limits.items():
        if not kept:
            raise ConfigurationError(f"scenario: the SimPy model cannot run it, {rule}. Change the scenario.")
    env = simpy.Environment()
    lane = Lane(env, scenario, replicate)
    begin = time.perf_counter()
    env.run(until=lane.vcpu_process)
    seconds = time.perf_counter() - begin
    lane.count["kept"] += lane.pending
    return {
        "samples": lane.count["selected"],
        "seconds": seconds,
        "vm_seconds": lane.guest_ps / 1e12,
        "counts": dict(lane.count),
        "seen": {scenario.workload.function_names[f]: n for f, n in lane.seen.items()},
    }
