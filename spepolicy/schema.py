"""Every setting of a run, in one table: its type, unit, range, meaning and source.

The dataclasses are the schema that Hydra composes into, so an unknown key or a wrong type is an error. They hold no
values: these are in `conf/`, beside their sources. The metadata of each field is a `Setting`, from which
`spepolicy.config` checks ranges and converts to `spepolicy.machine.scenario`, and from which the help prints.

Nothing here imports Hydra or OmegaConf, so that the help stays fast. More than 500 lines: it is one table, and what is
looked up in it must not depend on knowing where it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_type_hints

from spepolicy.arch.versions import EVENT_NAMES, OPTIONAL
from spepolicy.machine.guestacts import GuestAct, Moment
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import PAGE_BYTES, ExternalAbort, Handling

__all__ = ["GROUPS", "HOST_KINDS", "Kind", "Root", "Setting", "setting_at", "setting_names", "settings_of"]

MISSING = "???"  # OmegaConf's mark for a value that a file in conf/ must give
MEAN = "4s"  # longest mean that the machine draws: spepolicy.machine.draw, 2**42 ps


class Kind(Enum):
    """How the value of a setting is written."""

    DURATION = "duration"
    SIZE = "size"
    COUNT = "count"
    NUMBER = "number"
    FLAG = "true or false"
    CHOICE = "choice"
    NAMES = "list of names"
    TEXT = "text"


@dataclass(frozen=True)
class Setting:
    """What is known about one setting. Bounds are written as the value is, with its unit, and are inclusive."""

    doc: str
    kind: Kind
    minimum: str | int | float | None = None
    maximum: str | int | float | None = None
    zero: str = ""  # what 0 means, if 0 is allowed although *minimum* is above it
    unit: str = ""  # of a count or number
    choices: tuple[str, ...] = ()
    power_of_two: bool = False
    multiple_of: str | int = 1
    per: int = 1  # base units (ps, bytes) in one unit of the field *to*
    to: str = ""  # field of the dataclass in spepolicy.machine.scenario; empty if it has no field of its own
    source: str = "assumption"

    def rule(self) -> str:
        """Describe the allowed values, for messages and help."""
        if self.kind is Kind.FLAG:
            return "true or false"
        if self.choices:
            return f"{'any of' if self.kind is Kind.NAMES else 'one of'} {', '.join(self.choices)}"
        parts = []
        if self.power_of_two:
            parts.append("a power of two")
        if self.multiple_of != 1:
            parts.append(f"a multiple of {self.multiple_of}")
        if self.minimum is not None or self.maximum is not None:
            parts.append(f"{self.minimum}..{self.maximum}" + (f" or 0 ({self.zero})" if self.zero else ""))
        unit = f" [{self.unit}]" if self.unit else ""
        return (", ".join(parts) or self.kind.value) + unit


def _field(setting: Setting, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"setting": setting})


def _duration(doc: str, low: str, high: str, to: str, source: str = "assumption", *, zero: str = "") -> Any:
    return _field(Setting(doc, Kind.DURATION, low, high, zero=zero, to=to, source=source))


def _size(doc: str, low: str, high: str, to: str, source: str = "assumption", **more: Any) -> Any:
    return _field(Setting(doc, Kind.SIZE, low, high, to=to, source=source, **more))


def _count(doc: str, low: int, high: int, to: str, source: str = "assumption", **more: Any) -> Any:
    return _field(Setting(doc, Kind.COUNT, low, high, to=to, source=source, **more))


def _flag(doc: str, to: str, source: str = "assumption") -> Any:
    return _field(Setting(doc, Kind.FLAG, to=to, source=source))


def _choice(doc: str, choices: tuple[str, ...], to: str = "", source: str = "") -> Any:
    return _field(Setting(doc, Kind.CHOICE, choices=choices, to=to, source=source))


def _names(doc: str, choices: tuple[str, ...] = (), source: str = "assumption") -> Any:
    return _field(Setting(doc, Kind.NAMES, choices=choices, source=source))


def _text(doc: str, default: Any = MISSING) -> Any:
    return _field(Setting(doc, Kind.TEXT, source=""), default)


@dataclass
class CpuSettings:
    """The processor: clock and SPE implementation."""

    spe_version: int = _count(
        "ID_AA64DFR0_EL1.PMSVer: 1 FEAT_SPE, 2 v1p1 ... 6 v1p5", 1, 6, "spe_version", "spe.md 1.1"
    )
    cycle: str = _duration("one CPU cycle", "100ps", "100ns", "cycle_ps", "data sheet")
    max_record: str = _size(
        "largest record, 1 << PMSIDR_EL1.MaxSize", "16B", "2KiB", "max_record_bytes", "spe.md 1.5", power_of_two=True
    )
    align: str = _size(
        "record alignment, 1 << PMBIDR_EL1.Align; equal to max_record means records of fixed size",
        "1B", "2KiB", "align_bytes", "spe.md 1.9", power_of_two=True,
    )  # fmt: skip
    counter_bits: int = _field(
        Setting("bits of the latency counters, PMSIDR_EL1.CountSize", Kind.COUNT, 12, 16, multiple_of=4,
                to="counter_bits", source="spe.md 1.5")
    )  # fmt: skip
    hardware_access_flag: bool = _flag("PMBIDR_EL1.F: the SPU honours HA", "hardware_access_flag", "spe.md 1.9")
    data_loss_at_boundary: bool = _flag(
        "PMBSR_EL1.DL is set by a fault at a record boundary too (IMPLEMENTATION DEFINED)", "data_loss_at_boundary",
        "spe.md rule 38, RYZJQX",
    )  # fmt: skip
    tlb_entries: int = _count("TLB entries of the SPU, direct mapped", 1, 1024, "tlb_entries", power_of_two=True)
    irq_latency: str = _duration("PMBSR_EL1.S=1 until the core takes PMBIRQ", "0ps", "1ms", "irq_latency_ps")
    fine_grained_traps: bool = _flag(
        "FEAT_FGT: KVM can trap ERET and PMBIDR_EL1", "fine_grained_traps", "spe.md 1.11; kvm.md 1.4"
    )
    features: list[str] = _names(  # noqa: RUF009 - it is a dataclasses.field
        "optional features of the SPE version", tuple(OPTIONAL), "spe.md 1.1"
    )
    external_abort: str = _choice(
        "how an external abort on a buffer write shows itself",
        ("by_version", *(way.name.lower() for way in ExternalAbort)),
        "external_abort",
        "spe.md rule 42",
    )
    external_abort_every: int = _count(
        "mean number of records between external aborts", 2, 1 << 40, "external_abort_every", zero="none",
        unit="records",
    )  # fmt: skip
    late_fault_samples: int = _count(
        "samples that are lost after a faulting one, before it is reported", 0, 1024, "late_fault_samples",
        "spe.md rule 40: SPEv1p5 only", unit="samples",
    )  # fmt: skip
    pick_granule: int = _count(
        "the sampled operation is the first of so many in a row, in a workload of loops", 1, 64, "pick_granule_ops",
        "spe_data.md 4b", unit="ops",
    )  # fmt: skip
    store_slip: float = _field(
        Setting(
            "probability that a store's sample goes to a later operation", Kind.NUMBER, 0, 1, source="spe_data.md 4b"
        )
    )
    store_slip_granules: int = _count("at most so many granules later", 1, 64, "store_slip_granules", "spe_data.md 4b")


EVENT_BITS: Mapping[str, int] = EVENT_NAMES
"""Names of `guest.filter.events` and their bits in PMSEVFR_EL1 (spe.md 4.3)."""
DATA_SOURCES: Mapping[str, int] = {"l1": 0x0, "l2": 0x8, "llc": 0xB, "remote": 0xD, "dram": 0xE}
"""Names of `guest.filter.data_sources` and their bits in PMSDSFR_EL1: Neoverse cores' numbers (spe.md 4.5)."""


@dataclass
class FilterSettings:
    """Which samples the guest's perf asks for. Everything off means no filter."""

    load: bool = _flag("keep loads (PMSFCR_EL1.LD)", "", "spe.md 3.1")
    store: bool = _flag("keep stores (PMSFCR_EL1.ST)", "", "spe.md 3.1")
    branch: bool = _flag("keep branches (PMSFCR_EL1.B)", "", "spe.md 3.1")
    min_latency: int = _count(
        "keep from this latency on (PMSLATFR_EL1.MINLAT)", 0, 65535, "min_latency_cycles", "spe.md 1.4", unit="cycles"
    )
    events: list[str] = _names(  # noqa: RUF009 - it is a dataclasses.field
        "events that must all have occurred (PMSEVFR_EL1)", tuple(EVENT_BITS), "spe.md 1.4"
    )
    not_events: list[str] = _names(  # noqa: RUF009 - as above
        "events of which none may have occurred (PMSNEVFR_EL1, FnE)", tuple(EVENT_BITS), "spe.md 1.4"
    )
    exactly: list[str] = _names(  # noqa: RUF009 - as above
        "types that must be as load, store and branch say, whatever the others (PMSFCR_EL1 masks, EFT)",
        ("load", "store", "branch"), "spe.md rule 20",
    )  # fmt: skip
    data_sources: list[str] = _names(  # noqa: RUF009 - as above
        "of loads, keep those served from here (PMSDSFR_EL1, FDS)", tuple(DATA_SOURCES), "spe.md rule 19"
    )


@dataclass
class ActSettings:
    """One thing that a misbehaving guest does, at random times or once."""

    every: str = _field(
        Setting("mean guest time between two, of each vCPU", Kind.DURATION, "1us", MEAN, zero="never",
                source="assumption"), "0"
    )  # fmt: skip
    at: str = _field(
        Setting("guest time at which it happens once, instead of every", Kind.DURATION, "1ps", "1000s", zero="never",
                source="assumption"), "0"
    )  # fmt: skip
    moment: str = _field(
        Setting("what it waits for when it is due", Kind.CHOICE, choices=tuple(m.name.lower() for m in Moment),
                source="kvm.md 4.1 G1 to G3"), "any"
    )  # fmt: skip
    tlbi: bool = _field(
        Setting("the guest invalidates TLBs after it has changed a translation, as it must", Kind.FLAG,
                source="spe.md rule 32"), True
    )  # fmt: skip
    pages: int = _field(
        Setting("pages of the buffer, from the one that is written next", Kind.COUNT, 1, 16384, unit="pages",
                source="assumption"), 1
    )  # fmt: skip


@dataclass
class GuestSettings:
    """The guest: its memory, and how its perf uses SPE."""

    vcpus: int = _count("virtual CPUs", 1, 64, "vcpus", "a limit of the lab")
    memory: str = _size("guest RAM", "16MiB", "16GiB", "ram_pages", per=PAGE_BYTES, power_of_two=True)
    memory_base: str = _size(
        "IPA of guest RAM", "0B", "512GiB", "ram_base", "QEMU and kvmtool: 1GiB and 2GiB", multiple_of="2MiB"
    )
    buffer: str = _size(
        "AUX ring of each vCPU (perf record -m,SIZE)", "16KiB", "64MiB", "buffer_pages",
        "perf: 4MiB privileged, 128KiB not (kvm.md 3.2); the driver needs 2 pages (spe.md 3.2)",
        per=PAGE_BYTES, power_of_two=True,
    )  # fmt: skip
    buffer_mapped: bool = _flag("stage 2 maps the AUX pages at the start: the guest has zeroed them", "buffer_mapped")
    driver: str = _choice(
        "whose SPE driver the guest has", ("linux", "freebsd", "windows"), "driver", "spe.md 3, kvm.md 4.1 G18"
    )
    session: str = _choice("how perf opened the event", ("per_task", "per_cpu"), "session", "kvm.md 2.2, P9f")
    profile_user: bool = _flag("PMSCR_EL1.E0SPE", "profile_user", "spe.md 1.2")
    profile_kernel: bool = _flag("PMSCR_EL1.E1SPE", "profile_kernel", "spe.md 1.2")
    period: int = _count(
        "operations between samples, PMSIRR_EL1.INTERVAL", 256, 0xFFFFFF00, "period_ops", "spe.md 3.1",
        multiple_of=256, unit="ops",
    )  # fmt: skip
    jitter: bool = _flag("PMSIRR_EL1.RND", "jitter", "spe.md 1.4")
    discard: bool = _flag(
        "PMBLIMITR_EL1.FM=discard: PMU events only, no records (SPEv1p2)", "discard", "spe.md rule 23"
    )
    physical_addresses: bool = _flag("PMSCR_EL1.PA, perf's pa_enable=1", "physical_addresses", "spe.md 3.1")
    context: bool = _flag("PMSCR_EL1.CX: CONFIG_PID_IN_CONTEXTIDR and perf run as root", "context", "spe.md 3.1")
    filter: FilterSettings = field(default_factory=FilterSettings)
    task_on: str = _duration("mean time the profiled task runs until it is switched out", "1us", MEAN, "task_on_ps")
    task_off: str = _duration("mean time the other task then runs", "1us", MEAN, "task_off_ps")
    start: str = _duration("guest instructions of arm_spe_pmu_start, without traps", "1ns", "10ms", "start_ps")
    stop: str = _duration("guest instructions of arm_spe_pmu_stop, without traps", "1ns", "10ms", "stop_ps")
    irq_entry: str = _duration("exception entry until the handler reads PMBSR_EL1", "1ns", "10ms", "irq_entry_ps")
    irq_handler: str = _duration("rest of the interrupt handler", "1ns", "10ms", "irq_handler_ps")
    reader_latency: str = _duration("AUX wakeup until perf has the data", "1us", MEAN, "reader_latency_ps")
    reader_rate: int = _count(
        "perf copies AUX data to its file at this rate", 1, 1_000_000, "reader_bytes_per_us", unit="MB/s"
    )
    paravirtual: bool = _flag(
        "the SPE driver tells KVM by a hypercall which buffer it is about to use", "paravirtual", "kvm.md 2.2, P11"
    )
    physical_buffer: bool = _flag(
        "the SPE driver gives the SPU physical addresses of a contiguous ring (PMBLIMITR_EL1.nVM), where "
        "PMBIDR_EL1.AddrMode offers that", "physical_buffer", "spe.md 1.6, rule 50; kvm.md 2.2, P13",
    )  # fmt: skip
    renew: str = _duration(
        "mean time between perf sessions, each with new AUX pages behind the same VA", "1ms", MEAN, "renew_ps",
        "kvm.md 4.1 G2", zero="never",
    )  # fmt: skip
    misbehaviour: dict[str, ActSettings] = field(
        default_factory=lambda: {act.name.lower(): ActSettings() for act in GuestAct}
    )


@dataclass
class KvmSettings:
    """KVM's behaviour apart from the policy."""

    exit_interval: str = _duration(
        "mean guest time between exits that have nothing to do with SPE", "1us", MEAN, "exit_interval_ps", zero="none"
    )
    preempt_interval: str = _duration(
        "mean guest time between preemptions of the vCPU", "10us", MEAN, "preempt_interval_ps", zero="none"
    )
    preempt: str = _duration("mean length of a preemption", "1us", MEAN, "preempt_ps")
    memlock: str = _field(
        Setting("RLIMIT_MEMLOCK of the VMM, or unlimited (CAP_IPC_LOCK)", Kind.SIZE, "0B", "1TiB", multiple_of="4KiB",
                per=PAGE_BYTES, to="memlock_pages", source="kvm.md 4.1 G7")
    )  # fmt: skip
    irq_delivery: str = _choice(
        "how KVM learns of a buffer management event",
        ("forced_exit", "next_exit"),
        "irq_delivery",
        "kvm.md 2.5: I4, I3",
    )
    guest_memfd: bool = _flag(
        "the kernel can back a VM by a guest_memfd and map it before the VM runs (KVM_PRE_FAULT_MEMORY)",
        "guest_memfd", "kvm.md 2.2, P2e",
    )  # fmt: skip
    bug: str = _choice(
        "a bug of KVM to inject: can it be told from a legitimate fault?",
        ("none", "skip_page", "leak_pin", "missed_notifier"), "bug", "kvm.md 4.5",
    )  # fmt: skip
    bug_rate: float = _field(
        Setting("chance a page that the bug strikes, when it is pinned, unpinned or unmapped", Kind.NUMBER, 0, 1,
                source="assumption")
    )  # fmt: skip


_EXITS = "kvm.md 3.3: SYS64 exit min 2.07us, mean 6.57us; DABT_LOW mean 6.24us"


@dataclass
class CostSettings:
    """What each thing that KVM does costs, in host time."""

    trap: str = _duration("one trapped register access: exit, emulation, entry", "100ns", "100us", "trap_ps", _EXITS)
    exit: str = _duration("one exit and entry without SPE state", "100ns", "100us", "exit_ps", _EXITS)
    spe_switch: str = _duration(
        "more per exit when SPE is the guest's: PSB CSYNC, DSB, MDCR_EL2", "0ps", "100us", "spe_switch_ps"
    )
    event: str = _duration("reading PMBSR_EL1 and deciding, on top of the exit", "0ps", "100us", "event_ps")
    inject: str = _duration("making the virtual PMBIRQ pending", "0ps", "100us", "inject_ps")
    walk_read: str = _duration(
        "one descriptor read by KVM's walk of the guest's stage 1", "0ps", "10us", "walk_read_ps"
    )
    pin_page: str = _duration("pinning one resident page", "0ps", "100us", "pin_page_ps")
    unpin_page: str = _duration("unpinning one page", "0ps", "100us", "unpin_page_ps")
    map_page: str = _duration("one stage 2 leaf, with the lock", "0ps", "100us", "map_page_ps")
    swap_in: str = _duration("one page from swap", "1us", "100ms", "swap_in_ps")
    copy_page: str = _duration("breaking copy-on-write or KSM sharing of one page", "0ps", "1ms", "copy_page_ps")
    copy_out_page: str = _duration(
        "4 KiB of records copied from KVM's own SPE buffer to the guest's", "0ps", "100us", "copy_out_page_ps"
    )
    vmm_exit: str = _duration("one exit to the VMM and back, with what it does there", "1us", "100ms", "vmm_exit_ps")
    cpu_fault: str = _duration("an ordinary stage 2 fault of the guest's CPU", "100ns", "4ms", "cpu_fault_ps", _EXITS)


@dataclass
class HostSettings:
    """What every kind of host has: whose memory management it is, and what it manages."""

    kernel: str = _field(
        Setting("host kernel whose measured effects hold", Kind.CHOICE, choices=("6.1", "6.12"),
                source="spepolicy/machine/effects"), "6.1",
    )  # fmt: skip
    backing: str = _field(
        Setting("what backs the guest's memory", Kind.CHOICE,
                choices=("anonymous", "thp", "shmem", "hugetlb", "guest_memfd"),
                source="spepolicy/machine/effects: hugetlb and guest_memfd are inferred"), "anonymous",
    )  # fmt: skip
    mlock: bool = _field(
        Setting("the VMM has mlocked the guest's memory", Kind.FLAG, source="spepolicy/machine/effects"), False
    )
    zone_movable: bool = _field(
        Setting("the memory is in ZONE_MOVABLE: a long-term pin moves each page out first", Kind.FLAG,
                source="spepolicy/machine/effects"), False,
    )  # fmt: skip


@dataclass
class SilentHostSettings(HostSettings):
    """A host that never touches the guest's memory."""

    kind: str = _choice("kind of host", ("silent",))


@dataclass
class RecordedHostSettings(HostSettings):
    """A host that repeats what was recorded from a real one."""

    kind: str = _choice("kind of host", ("recorded",))
    path: str = _text("name of a shipped recording, or a file")
    time_scale: float = _field(
        Setting("recording seconds per simulated second", Kind.NUMBER, 0.01, 10_000.0,
                source="assumption: emulation is that much slower than hardware")
    )  # fmt: skip
    placement: str = _field(
        Setting("where recorded pages lie in the guest: at the 'same' place, all memory 'scale'd to the guest's, or "
                "'fold'ed into it", Kind.CHOICE, choices=("same", "scale", "fold"),
                source="spepolicy/recording/placement.py"), "same",
    )  # fmt: skip
    offset: str = _field(
        Setting("moves every recorded page up by this", Kind.SIZE, "0B", "16GiB", multiple_of="4KiB", per=PAGE_BYTES,
                source="spepolicy/recording/placement.py"), "0B",
    )  # fmt: skip
    recorded_base: str = _field(
        Setting("IPA of the recorded guest's RAM, for a trace", Kind.SIZE, "0B", "512GiB", multiple_of="4KiB",
                per=PAGE_BYTES, source="QEMU: 1GiB"), "1GiB",
    )  # fmt: skip
    recorded_memory: str = _field(
        Setting("size of the recorded guest's RAM, for a trace", Kind.SIZE, "4KiB", "4TiB", multiple_of="4KiB",
                per=PAGE_BYTES, source="the recorded VM"), "256MiB",
    )  # fmt: skip
    unknown_op: str | None = _text(
        "operation of unmaps whose reason a trace does not show, such as reclaim; null: such a trace is refused", None
    )


@dataclass
class RandomOpSettings:
    """One kind of host operation at random times."""

    every: str = _duration("mean host time between two", "10us", MEAN, "", zero="never")
    pages: int = _count("guest pages in each", 1, 1 << 22, "", unit="pages")


@dataclass
class RandomHostSettings(HostSettings):
    """A host whose operations come at random times, each kind at a rate of its own."""

    kind: str = _choice("kind of host", ("random",))
    ops: dict[str, RandomOpSettings] = field(default_factory=dict)


@dataclass
class NoMigrationSettings:
    """The VM stays where it is."""

    kind: str = _choice("kind of migration", ("none",))


@dataclass
class PostcopySettings:
    """The VM goes to its target at once, and its pages follow."""

    kind: str = _choice("kind of migration", ("postcopy",))
    handling: str = _choice(
        "what KVM does with SPE meanwhile",
        ("plain", "stop_trap", "prefault_target", "unlock_relock"),
        "handling",
        "kvm.md 2.3, M4, M7, M9",
    )
    start: str = _duration("host time at which the VMM begins", "1us", "1000s", "start_ps")
    bandwidth: int = _count("of the link, for memory", 1, 100_000, "bandwidth_bytes_per_us", unit="MB/s")
    switch: str = _duration("downtime for the state of vCPUs and devices", "0ps", "10s", "switch_ps")
    request: str = _duration("one page on demand, there and back", "1us", "1s", "request_ps")


@dataclass
class PrecopySettings:
    """The VM's pages are sent while it runs, those that it writes to again, and at last it stops for what is left."""

    kind: str = _choice("kind of migration", ("precopy",))
    handling: str = _choice(
        "what KVM does with SPE meanwhile",
        tuple(handling.name.lower() for handling in Handling),
        "handling",
        "kvm.md 2.3, M1 to M9",
    )
    vmm: str = _choice("what the VMM does on an exit because of SPE", ("hold", "give_up"), "", "kvm.md 2.3, M3")
    start: str = _duration("host time at which the VMM begins", "1us", "1000s", "start_ps")
    bandwidth: int = _count("of the link, for memory", 1, 100_000, "bandwidth_bytes_per_us", unit="MB/s")
    max_downtime: str = _duration("stop when what is left can be sent in this time", "1us", "100s", "max_downtime_ps")
    rounds: int = _count("stop after so many rounds, whatever is left", 1, 1000, "rounds")
    switch: str = _duration("downtime for the state of vCPUs and devices", "0ps", "10s", "switch_ps")
    dirty_rate: int = _count(
        "the guest's CPUs write new pages at this rate, faults of the log included",
        0,
        100_000,
        "dirty_bytes_per_us",
        unit="MB/s",
    )
    working_set: str = _size("but no more of them than these", "4KiB", "16GiB", "working_set_pages", per=PAGE_BYTES)
    cancel_after: int = _count("the VMM gives up after so many rounds", 0, 1000, "cancel_round", zero="never")
    retry: str = _duration("a migration that KVM refused is tried again after this", "1us", "100s", "retry_ps")


@dataclass
class TrackingSettings:
    """Where MLflow records the run."""

    kind: str = _choice("tracking back end", ("mlflow", "none"))
    uri: str | None = _text("MLflow tracking URI; null: SQLite file mlflow.db in the current folder", None)
    experiment: str = _text("MLflow experiment", "spepolicy")
    run_name: str | None = _text("name of the MLflow run; null: made from the policy and what differs", None)


@dataclass
class OutputSettings:
    """Where results go."""

    dir: str = _text("folder that gets one folder a run")
    perf_data: bool = _flag("write perf.data files that stock perf decodes, of the lanes below", "", "")
    timeline: bool = _flag("write timelines for Perfetto, of the lanes below", "", "")
    lanes: list[str] = _names("lanes to write: REPLICATE, or POLICY:REPLICATE", source="")  # noqa: RUF009 - as above


_ORDER = "a limit of the lab; each more multiplies the states"


@dataclass
class ExploreSettings:
    """The small machine of `task=explore`, what can happen to it, and where the search ends."""

    guest: str = _choice("who writes the registers: Linux's driver, or one write at a time", ("linux", "bare"), "guest")
    vcpus: int = _count("virtual CPUs", 1, 2, "vcpus", _ORDER)
    buffer_pages: int = _count("pages of each vCPU's AUX ring", 2, 8, "buffer_pages", _ORDER, power_of_two=True)
    buffer_mapped: bool = _flag("stage 2 maps the buffer's pages at the start", "buffer_mapped")
    sessions: list[str] = _names(  # noqa: RUF009 - it is a dataclasses.field
        "what perf may profile: PMSCR_EL1.{E0SPE,E1SPE}", ("el0_el1", "el0", "el1"), "kvm.md 4.1 G1"
    )
    edits: str = _choice(
        "when the guest may change the translations of its buffer: while it is disabled, while profiling is off, ever",
        ("never", "disabled", "profiling_off", "any"), "edits", "kvm.md 4.1 G2, G3",
    )  # fmt: skip
    tlbi: list[str] = _names("how it changes them", ("with", "without"), "spe.md rule 32")  # noqa: RUF009 - as above
    host_ops: list[str] = _names(  # noqa: RUF009 - as above
        "what the host may do to a page", tuple(op.name.lower() for op in HostOp if op > HostOp.CPU_TOUCH)
    )
    host_targets: list[str] = _names(  # noqa: RUF009 - as above
        "to which pages: of the buffer, formerly of the buffer, of the stage 1 table", ("buffer", "former", "table")
    )
    in_flight: bool = _flag("a sample may be in flight for a while", "in_flight", "spe.md rule 48")
    max_switches: int = _count("context switches of the guest", 0, 100, "max_switches", _ORDER)
    max_renewals: int = _count("perf sessions after the first, each with new pages", 0, 100, "max_renewals", _ORDER)
    max_edits: int = _count("changes of translations", 0, 100, "max_edits", _ORDER)
    max_register_writes: int = _count("register writes of a bare guest", 0, 100, "max_register_writes", _ORDER)
    max_host_ops: int = _count("host operations, each kind once", 0, 100, "max_host_ops", _ORDER)
    max_syscalls: int = _count("system calls", 0, 100, "max_syscalls", _ORDER)
    max_exits: int = _count("exits that SPE is not the reason of", 0, 100, "max_exits", _ORDER)
    max_migration_rounds: int = _count("rounds of pre-copy after the first", 0, 100, "max_migration_rounds", _ORDER)
    memlock: str = _size(
        "RLIMIT_MEMLOCK of the VMM", "0B", "1GiB", "memlock_pages", "kvm.md 4.1 G7", multiple_of="4KiB", per=PAGE_BYTES
    )
    max_states: int = _count("states at which the search ends", 1, 1_000_000_000, "")
    max_depth: int = _count("events after which the search ends", 1, 1_000_000, "")
    max_time: str = _duration("time after which the search ends", "1s", "1000000s", "")
    frontier_memory: str = _size("of the states that wait; the rest is on disk", "1MiB", "1TiB", "")
    spill_dir: str | None = _text("folder for what is on disk; null: the system's folder for temporary files", None)
    resume: str | None = _text("folder of an exploration that a bound ended, which goes on; null: begin", None)
    compare: list[str] = _names("other policies to explore, with their default fields; [all]: every one")  # noqa: RUF009


@dataclass
class SweepSettings:
    """How a sweep (-m) runs. Of a sweep all jobs have the same."""

    store: str | None = _text("folder that collects a row a lane; null: the folder 'store' in output.dir", None)
    resume: bool = _flag("take rows that the store already has instead of computing them again", "", "")
    processes: int | None = _field(
        Setting("processes that share the lanes; null: threads of one process", Kind.COUNT, 1, 1024), None
    )
    sensitivity: list[str] = _names(  # noqa: RUF009 - it is a dataclasses.field
        "cost constants to move through their ranges, to see which conclusions survive; all: every one",
        source="",
    )


@dataclass
class StopSettings:
    """When a sweep has enough replicates."""

    precision: float | None = _field(
        Setting("stop when 95 % intervals are so narrow (half of them); null: after `replicates`", Kind.NUMBER, 0,
                None, unit="unit of the metric", source=""),
        None,
    )  # fmt: skip
    metric: str = _text("the metric whose paired differences between policies are looked at")
    maximum: int = _count("replicates of a seed at most, however wide the intervals are", 1, 1_000_000, "")


@dataclass
class Root:
    """The whole configuration of a run. A group is a field whose value comes from a file in the folder of that name."""

    task: str = _choice("what to do", ("simulate", "explore", "plugins", "catalogue"))
    policy: Any = MISSING
    seed: int = _count("seed of all random draws", 0, 2**63 - 1, "seed")
    replicates: int = _count("VMs simulated per policy, each with draws of its own", 1, 1_000_000, "")
    duration: str = _duration("guest time that each vCPU executes", "1us", "1000s", "duration_ps", "a limit of the lab")
    baselines: list[str] = _names("policies to compare with; bare_metal always is")  # noqa: RUF009 - as above
    threads: int | None = _field(
        Setting("threads that share the lanes; null: one per processor", Kind.COUNT, 1, 1024), None
    )
    output: OutputSettings = field(default_factory=OutputSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    stop: StopSettings = field(default_factory=StopSettings)
    guest: GuestSettings = field(default_factory=GuestSettings)
    workload: Any = MISSING
    host: Any = MISSING
    migration: Any = MISSING
    cpu: CpuSettings = field(default_factory=CpuSettings)
    kvm: KvmSettings = field(default_factory=KvmSettings)
    costs: CostSettings = field(default_factory=CostSettings)
    explore: ExploreSettings = field(default_factory=ExploreSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)


HOST_KINDS: Mapping[str, type] = {
    "silent": SilentHostSettings,
    "random": RandomHostSettings,
    "recorded": RecordedHostSettings,
}

MIGRATION_KINDS: Mapping[str, type] = {
    "none": NoMigrationSettings,
    "precopy": PrecopySettings,
    "postcopy": PostcopySettings,
}

# Groups in the order of the help, with what they choose.
GROUPS: Mapping[str, str] = {
    "task": "what to do",
    "policy": "KVM's policy, from an installed plugin: +policy=NAME",
    "guest": "the VM, and how its perf profiles",
    "workload": "the program that the guest profiles",
    "host": "the host's memory management",
    "migration": "a live migration, and what KVM does with SPE meanwhile",
    "cpu": "the processor and its SPE",
    "kvm": "KVM apart from the policy",
    "costs": "what KVM's work costs",
    "explore": "task=explore: the small machine, what can happen to it, bounds",
    "tracking": "where MLflow records the run",
    "experiment": "a ready question: +experiment=NAME",
}


def settings_of(cls: type) -> dict[str, Setting]:
    """Return the settings that are direct fields of *cls*, by key."""
    return {f.name: f.metadata["setting"] for f in fields(cls) if "setting" in f.metadata}


def setting_names() -> list[str]:
    """Return the dotted key of every setting, those of all kinds of hosts included."""
    return list(_all_settings())


def setting_at(key: str) -> Setting | None:
    """Return the setting with the dotted *key*, or None."""
    return _all_settings().get(key)


@cache
def _all_settings() -> dict[str, Setting]:
    found = dict(_below(Root, ""))
    for cls in HOST_KINDS.values():
        found.update(_below(cls, "host."))
    for cls in MIGRATION_KINDS.values():
        found.update(_below(cls, "migration."))
    return found


def _below(cls: type, prefix: str) -> Iterator[tuple[str, Setting]]:
    settings = settings_of(cls)
    for name, hint in get_type_hints(cls).items():
        if name in settings:
            yield f"{prefix}{name}", settings[name]
        elif is_dataclass(hint) and isinstance(hint, type):
            yield from _below(hint, f"{prefix}{name}.")
