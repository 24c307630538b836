"""Making lanes: from `Scenario` to the arrays of `Machine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.ownership import (
    Controls,
    collects_context,
    collects_physical_address,
    kvm_controls,
    traps,
)
from spepolicy.arch.registers import REGISTERS
from spepolicy.arch.versions import Feature, features_of
from spepolicy.machine.draw import exponential_table, stream_key
from spepolicy.machine.effects import effects
from spepolicy.machine.fields import PARAMS, TRUTH, VCPU, VM, WINDOW
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.hostpage import NEW_FRAME0
from spepolicy.machine.scenario import PAGE_BYTES, Guest, HostKind, MigrationKind, Scenario, Workload
from spepolicy.machine.state import LOST_CAUSES, NEVER, WINDOW_LOG, Machine
from spepolicy.mmu.memory import FREE
from spepolicy.mmu.regime import STAGE
from spepolicy.mmu.walker import STATE

# Streams of random draws; a stream never gets another number, or results change.
_PROGRAM, _SAMPLE, _KVM, _HOST, _LAYOUT, _LOG, _BUG = range(7)
_ACT = 16

CONTEXT_PACKET_BYTES, ADDRESS_PACKET_BYTES = 5, 9  # header and payload (spe.md 4.1)

PAGE_TABLE_ARRAYS = ("pool", "host_page")


@dataclass(frozen=True)
class Behaviour:
    """What the set-up hooks of a policy said."""

    virtualized: bool = True
    trap_pmb: bool = False
    trap_pms: bool = False
    hidden: bool = False  # the guest has no SPE
    own_buffer: bool = False  # KVM owns the buffer, E2PB=0b00
    physical: bool = False  # PMSCR_EL2.EnVM: the guest may set PMBLIMITR_EL1.nVM
    notifier_filter: int = 0  # mask of mmu_notifier_event
    hooks: int = 0  # 1 << Hook for each hook that is implemented


def _table_pages(scenario: Scenario) -> tuple[int, int]:
    """Return how many pages stage 1 tables and all tables of a lane need at most."""
    guest = scenario.guest
    leaves = guest.vcpus * (-(-guest.buffer_pages // 512))
    middle = -(-guest.vcpus * (1 << 27) // (1 << 30)) + 1
    stage1 = 2 + middle + leaves
    stage2 = 2 + -(-guest.ram_pages // (1 << 18)) + 1 + -(-guest.ram_pages // 512)
    return stage1, stage1 + stage2 + (2 if guest.acts else 0)


def _fill_parameters(m: Machine, lanes: slice, scenario: Scenario, behaviour: Behaviour) -> None:
    guest, cpu, kvm, costs, host = scenario.guest, scenario.cpu, scenario.kvm, scenario.costs, scenario.host
    stage1_pages, _ = _table_pages(scenario)
    mdcr_el2 = kvm_controls(behaviour.trap_pmb, behaviour.trap_pms, behaviour.own_buffer or behaviour.hidden)
    features = features_of(cpu.spe_version, cpu.features)
    # What a record has; E0SPE and E1SPE come with the session.
    pmscr = REGISTERS["PMSCR_EL1"].pack(TS=1, PA=guest.physical_addresses, CX=guest.context)
    # KVM leaves PMSCR_EL2.PA clear: the addresses would be the host's (rule 26).
    controls = Controls(features, mdcr_el2=mdcr_el2, pmscr_el1=pmscr, el2_enabled=behaviour.virtualized)
    values: dict[str, int] = {
        "virtualized": behaviour.virtualized,
        "ram_page0": guest.ram_base // PAGE_BYTES,
        "latency_max": (1 << cpu.counter_bits) - 1,
        "tlb_mask": cpu.tlb_entries - 1,
        "secondary_counter": Feature.ERND in features,
        "pmscr": pmscr,
        "context_bytes": CONTEXT_PACKET_BYTES * collects_context(controls, 1)[0],
        "access_bytes": ADDRESS_PACKET_BYTES * collects_physical_address(controls),
        "duration_ps": scenario.duration_ps,
        "reader_ps_per_kib": 1024 * 1_000_000 // guest.reader_bytes_per_us,
        "memlock_pages": (1 << 40) if kvm.memlock_unlimited else kvm.memlock_pages,
        "next_exit_only": int(kvm.irq_delivery),
        # A guest that has been told that there is no SPE accesses nothing.
        "trap_pmb": behaviour.virtualized and not behaviour.hidden and traps("PMBLIMITR_EL1", mdcr_el2),
        "trap_pms": behaviour.virtualized and not behaviour.hidden and traps("PMSCR_EL1", mdcr_el2),
        "hidden": behaviour.virtualized and behaviour.hidden,
        "own_buffer": behaviour.virtualized and behaviour.own_buffer,
        "hooks": behaviour.hooks if behaviour.virtualized else 0,
        # PMBIDR_EL1.AddrMode=1 says so to the guest; where EL1 is the host's EL2 EnVM is taken as 1 (spe.md 1.3, 1.9).
        "physical": guest.physical_buffer
        and Feature.NVM in features
        and (behaviour.physical or not behaviour.virtualized)
        and not (behaviour.own_buffer or behaviour.hidden),
        "notifier_filter": behaviour.notifier_filter,
        # On bare metal the host is the guest: nothing happens behind its back.
        "host_kind": int(host.kind) if behaviour.virtualized else int(HostKind.SILENT),
        "recording_scale_q16": host.time_scale_q16,
        "backing": int(host.backing),
        "zone_movable": int(host.zone_movable),
        # Both went with Linux 6.10 (change_pte), or before 6.12 (measured): spepolicy.machine.hostpage.
        "change_pte": host.kernel == Kernel.V6_1,
        "swap_read_only": host.kernel == Kernel.V6_1 and host.backing in (Backing.ANONYMOUS, Backing.THP),
        "recording_span_ps": _recording_span_ps(scenario),
        "acts": len(guest.acts),
        **_migration(scenario, behaviour),
        "phases": len(scenario.workload.phase_ps),
        "guest_tables": stage1_pages,
    }
    for part in (guest, cpu, kvm, costs):
        for name in part.__dataclass_fields__:
            if name in PARAMS.names and name not in values:  # type: ignore[operator]
                values[name] = int(getattr(part, name))
    for name, value in values.items():
        m.par[name][lanes] = int(value)


def _migration(scenario: Scenario, behaviour: Behaviour) -> dict[str, int]:
    """Return the parameters of the migration. Bare metal does not migrate."""
    migration = scenario.migration
    rate = migration.dirty_bytes_per_us
    return {
        "migration_kind": migration.kind if behaviour.virtualized else MigrationKind.NONE,
        "migration_handling": migration.handling,
        "migration_start_ps": migration.start_ps,
        "migration_page_ps": PAGE_BYTES * 1_000_000 // migration.bandwidth_bytes_per_us,
        "migration_max_downtime_ps": migration.max_downtime_ps,
        "migration_rounds": migration.rounds,
        "migration_switch_ps": migration.switch_ps,
        "migration_dirty_page_ps": PAGE_BYTES * 1_000_000 // rate if rate else 0,
        "migration_working_set": migration.working_set_pages,
        "migration_cancel_round": migration.cancel_round,
        "migration_abort": migration.abort,
        "migration_retry_ps": migration.retry_ps,
        "migration_request_ps": migration.request_ps,
    }


def _recording(scenario: Scenario) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return (time in ps, first page, end page, operation with write bit), clipped to the guest's RAM."""
    recording = scenario.host.recording
    if scenario.host.kind != HostKind.RECORDED or recording is None:
        empty = np.zeros(1, dtype=np.int32)
        return np.zeros(1, dtype=np.int64), empty, empty, np.zeros(1, dtype=np.uint8)
    pages = scenario.guest.ram_pages
    first = np.minimum(recording.first_page, pages)  # type: ignore[attr-defined]
    end = np.minimum(recording.end_page, pages)  # type: ignore[attr-defined]
    keep = end > first
    time = recording.time_us[keep].astype(np.int64) * 1_000_000  # type: ignore[attr-defined]
    op = recording.op[keep].astype(np.uint8) | (recording.write[keep].astype(np.uint8) << 7)  # type: ignore[attr-defined]
    return time, first[keep].astype(np.int32), end[keep].astype(np.int32), op


def _recording_span_ps(scenario: Scenario) -> int:
    recording = scenario.host.recording
    if scenario.host.kind != HostKind.RECORDED or recording is None:
        return 1
    return int(recording.duration_us) * 1_000_000 + 1  # type: ignore[attr-defined]


def _seed_lane(m: Machine, i: int, scenario: Scenario, replicate: int) -> None:
    """Give lane *i* its hash keys, its memory layout, and its place in the recording."""
    seed = scenario.seed
    layout = [stream_key(seed, replicate, _LAYOUT, n) for n in range(4)]
    m.par["scatter_a"][i] = (layout[0] & 0xFFFF_FFFF) | 1
    m.par["scatter_b"][i] = (layout[1] & 0x7FFF) | 1
    m.par["scatter_c"][i] = layout[2] & 0xFFFF_FFFF
    m.vm["key_bug"][i] = stream_key(seed, replicate, _BUG, 0)
    m.vm["key_host"][i] = stream_key(seed, replicate, _HOST, 0)
    for k in range(scenario.guest.vcpus):
        m.vcpu["key_program"][i, k] = stream_key(seed, replicate, _PROGRAM, k)
        m.vcpu["key_sample"][i, k] = stream_key(seed, replicate, _SAMPLE, k)
        m.vcpu["key_kvm"][i, k] = stream_key(seed, replicate, _KVM, k)
        m.vcpu["key_log"][i, k] = stream_key(seed, replicate, _LOG, k)
        m.vcpu["key_act"][i, k] = stream_key(seed, replicate, _ACT, k)
    # Replicates enter the recording at different places, so that together they see all of it.
    m.vm["host_index"][i] = (layout[3] & 0xFFFF_FFFF) % len(m.rec_ps) if scenario.host.kind == HostKind.RECORDED else 0


def _shared(scenario: Scenario) -> dict[str, NDArray[Any]]:
    """Return the arrays that all lanes of a machine share, by name: workload, host events, the guest's misbehaviour."""
    workload = scenario.workload
    rec_ps, rec_first, rec_end, rec_op = _recording(scenario)
    return {
        "op_ps": workload.op_ps,
        "alias_threshold": workload.alias_threshold,
        "alias_outcome": workload.alias_outcome,
        "outcome_function": workload.outcome_function,
        "outcome_type": workload.outcome_type,
        "outcome_events": workload.outcome_events,
        "outcome_latency": workload.outcome_latency_cycles,
        "outcome_spread": workload.outcome_spread_cycles,
        "loop_first": workload.op_ps * 0 if workload.loop_first is None else workload.loop_first,
        "loop_length": workload.op_ps * 0 if workload.loop_length is None else workload.loop_length,
        "loop_outcome": np.zeros(1, np.int64) if workload.loop_outcome is None else workload.loop_outcome,
        "phase": np.stack(
            [
                workload.phase_user,
                workload.phase_kernel,
                workload.phase_ps,
                workload.syscall_gap_ps,
                workload.syscall_ps,
            ],
            axis=1,
        ).astype(np.int64),
        "roles": np.array([workload.other_user, workload.other_kernel, workload.driver], dtype=np.int64),
        "rec_ps": rec_ps,
        "rec_first": rec_first,
        "rec_end": rec_end,
        "rec_op": rec_op,
        "random_op": np.array(scenario.host.random_ops or [(0, 1, 1)], dtype=np.int64),
        "act": np.array(scenario.guest.acts or [(0, 0, 0, 0, 0, 0)], dtype=np.int64),
        "effect_table": np.ascontiguousarray(effects(scenario.host.kernel, scenario.host.backing)),
        "exponential": exponential_table(),
    }


def shape_of(scenario: Scenario) -> tuple[int, ...]:
    """Return what decides the size of a lane. Lanes of scenarios with equal shapes fit into the same machine.

    Sizes are never rounded up to a neighbour's: a limit such as the length of the list of pins must not depend on
    which other lanes are in the batch.
    """
    guest, workload = scenario.guest, scenario.workload
    functions, distributions = len(workload.function_names), len(workload.op_ps)
    return (
        guest.vcpus, guest.ram_pages, guest.buffer_pages, scenario.cpu.tlb_entries, functions, distributions,
        bool(guest.acts), bool(scenario.migration.kind),
    )  # fmt: skip


def shared_key(scenario: Scenario) -> tuple[Any, ...]:
    """Return what the lanes of one machine must have in common: shape, workload, host events, acts of their guests.

    Workloads and recordings are compared by identity: whoever wants two scenarios in one batch gives them one object.
    """
    host = {name: getattr(scenario.host, name) for name in scenario.host.__dataclass_fields__}
    del host["time_scale_q16"]  # a parameter of the lane
    host["recording"] = id(scenario.host.recording) if scenario.host.recording is not None else 0
    return (*shape_of(scenario), id(scenario.workload), scenario.guest.acts, *host.values())


def share(m: Machine, scenario: Scenario) -> Machine:
    """Return a machine with the lanes of *m*, which is not to be used any more, and the workload and host events of
    *scenario*, which has the shape that *m* was made for.
    """
    return m._replace(**_shared(scenario))


def allocate(scenario: Scenario, behaviour: Behaviour, lanes: int, log_rows: int = 0) -> Machine:
    """Allocate a machine for *lanes* lanes with an event log of *log_rows* rows each. `reset` makes it ready; it can be
    used for one set of replicates after the other.
    """
    vcpus, workload = scenario.guest.vcpus, scenario.workload
    functions, distributions = len(workload.function_names), len(workload.op_ps)
    _, pool_pages = _table_pages(scenario)
    hash_size = 1 << (2 * pool_pages - 1).bit_length()

    def lane_array(*shape: int, dtype: np.dtype[np.void] | type[np.generic] = np.int64) -> NDArray[Any]:
        return np.zeros((lanes, *shape), dtype=dtype)

    m = Machine(
        par=lane_array(dtype=PARAMS),
        vm=lane_array(dtype=VM),
        regime=lane_array(4, dtype=STAGE),
        walk=lane_array(dtype=STATE),
        vcpu=lane_array(vcpus, dtype=VCPU),
        truth=lane_array(vcpus, dtype=TRUTH),
        window=lane_array(WINDOW_LOG + 4 * vcpus, dtype=WINDOW),
        log=lane_array(log_rows, 5),
        lost=lane_array(vcpus, LOST_CAUSES),
        blackout_ps=lane_array(vcpus, LOST_CAUSES),
        claims=lane_array(6, 6),
        host_ops=lane_array(len(HostOp)),
        host_calls=lane_array(12),
        exposure_ps=lane_array(vcpus, distributions),
        seen=lane_array(vcpus, functions),
        unseen=lane_array(vcpus, functions),
        tlb=lane_array(vcpus, scenario.cpu.tlb_entries, 4),
        pins=lane_array(vcpus, 2, scenario.guest.buffer_pages + 64, dtype=np.int32),
        pool=lane_array(pool_pages, 512),
        pool_refs=lane_array(pool_pages, dtype=np.int32),
        frames=lane_array(hash_size),
        dirty=lane_array(scenario.guest.ram_pages if scenario.migration.kind else 1, dtype=np.uint8),
        host_page=lane_array(scenario.guest.ram_pages),
        **_shared(scenario),
    )
    _fill_parameters(m, slice(0, lanes), scenario, behaviour)
    return m


def reset(
    m: Machine,
    scenario: Scenario,
    replicates: Sequence[int] | NDArray[np.int64],
    behaviour: Behaviour | None = None,
    first: int = 0,
) -> None:
    """Give len(replicates) lanes of *m*, from lane *first* on, their initial state; `lane.start_lanes` then lays out
    their memory. With *behaviour*, they also get the parameters of *scenario*, which has the shape and the shared
    arrays of *m* but may differ from the scenario of the lanes beside them.

    The page tables are not cleared: laying out writes every word of them that is read before.
    """
    lanes = slice(first, first + len(replicates))
    for name in Machine._fields[1 : Machine._fields.index("pool")]:
        getattr(m, name)[lanes] = 0
    m.pool_refs[lanes] = 0
    m.tlb[lanes] = -1
    m.frames[lanes] = FREE
    m.dirty[lanes] = 0
    m.vm["pool_free"][lanes] = -1
    m.vm["next_frame"][lanes] = NEW_FRAME0
    m.vm["locked"][lanes] = int(scenario.host.locked)
    m.vcpu["tlb_page"][lanes] = -1
    m.vcpu["irq_ps"][lanes] = NEVER
    m.vcpu["reader_ps"][lanes] = NEVER
    m.vcpu["timer_ps"][lanes] = NEVER
    m.vcpu["claim"][lanes] = -1
    m.vcpu["logged_profiling"][lanes] = -1
    m.truth["first_fault_ps"][lanes] = NEVER
    if behaviour is not None:
        _fill_parameters(m, lanes, scenario, behaviour)
    for i, replicate in enumerate(replicates, first):
        _seed_lane(m, i, scenario, int(replicate))


def bytes_per_lane(m: Machine) -> dict[str, int]:
    """Return the bytes of a lane: "page_tables" (guest stage 1, KVM stage 2, the VMM's), and "other", all else that
    grows with lanes.
    """
    lanes = len(m.par)
    own = Machine._fields[: Machine._fields.index("host_page") + 1]
    sizes = {name: getattr(m, name).nbytes // lanes for name in own}
    tables = sum(sizes[name] for name in PAGE_TABLE_ARRAYS)
    return {"page_tables": tables, "other": sum(sizes.values()) - tables}


def smallest_machine() -> Machine:
    """Return a machine that is never run: something to compile the entry points for."""
    one = np.ones(1, dtype=np.int64)
    workload = Workload(
        function_names=("none",),
        distribution_names=("none",),
        op_ps=one,
        alias_threshold=np.zeros((1, 256), np.int64),
        alias_outcome=np.zeros((1, 256, 2), np.int64),
        weight=np.ones((1, 1)),
        outcome_function=0 * one,
        outcome_type=0 * one,
        outcome_events=0 * one,
        outcome_latency_cycles=one,
        outcome_spread_cycles=one,
        phase_user=0 * one,
        phase_kernel=0 * one,
        phase_ps=one,
        syscall_gap_ps=one,
        syscall_ps=one,
    )
    return allocate(Scenario(workload=workload, guest=Guest(ram_pages=512, buffer_pages=4)), Behaviour(), 1)
