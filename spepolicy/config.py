"""From a composed configuration to what the machine understands.

`to_scenario` checks every value against `spepolicy.schema` and against the others, and converts it to the integers of
`spepolicy.machine.scenario`; the host is the business of `spepolicy.host_choice`. `register` hands the schema to Hydra.
A configuration is accepted as Hydra composed it or as plain containers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from spepolicy.arch.registers import REGISTERS
from spepolicy.arch.versions import VERSIONS, AbortReport, Feature, features_of
from spepolicy.check import checked, checked_fields, group_at, known_keys, value_at
from spepolicy.errors import ConfigurationError, nearest
from spepolicy.host_choice import host_of
from spepolicy.lane_choice import NO_LANES, ChosenLanes, parse_lanes
from spepolicy.machine.guestacts import GuestAct, Moment
from spepolicy.machine.scenario import (
    PAGE_BYTES,
    Bug,
    Costs,
    Cpu,
    ExternalAbort,
    Guest,
    GuestDriver,
    Handling,
    IrqDelivery,
    Kvm,
    Migration,
    MigrationKind,
    OpType,
    Scenario,
    SessionMode,
    Workload,
)
from spepolicy.schema import (
    DATA_SOURCES,
    EVENT_BITS,
    HOST_KINDS,
    MIGRATION_KINDS,
    ActSettings,
    CostSettings,
    CpuSettings,
    FilterSettings,
    GuestSettings,
    KvmSettings,
    OutputSettings,
    Root,
    TrackingSettings,
    settings_of,
)
from spepolicy.units import format_size

__all__ = ["Options", "register", "to_options", "to_scenario"]

GUEST_ACTS = {act.name.lower(): act for act in GuestAct}
UNLIMITED = "unlimited"
_PLUGINS = "hydra_plugins.spepolicy"  # Hydra accepts no other package; nothing of that name is on the disk
SWEEPER: dict[str, Any] = {"_target_": f"{_PLUGINS}.LanesSweeper", "max_batch_size": None, "params": None}
LAUNCHERS: dict[str, dict[str, Any]] = {
    "lanes": {"_target_": f"{_PLUGINS}.LanesLauncher"},
    "dask": {"_target_": f"{_PLUGINS}.DaskLauncher", "scheduler": None, "workers": None},
}


@dataclass(frozen=True)
class Options:
    """What a run needs besides the scenario."""

    task: str
    replicates: int
    threads: int | None
    baselines: tuple[str, ...]
    tracking: Mapping[str, Any]  # kind, uri, experiment, run_name
    lanes: ChosenLanes = NO_LANES  # files of single lanes


def register() -> None:
    """Store the schema in Hydra's ConfigStore: `root` for config.yaml, `schema/host/KIND` for files of group host, and
    the settings of the sweeper and the launchers of `spepolicy.lab.sweep.launcher`.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="root", node=Root, provider="spepolicy")
    for name, launcher in LAUNCHERS.items():
        store.store(group="hydra/launcher", name=name, node=launcher, provider="spepolicy")
    store.store(group="hydra/sweeper", name="lanes", node=SWEEPER, provider="spepolicy")
    for kind, cls in HOST_KINDS.items():
        store.store(group="schema/host", name=kind, node=cls, provider="spepolicy")
    for kind, cls in MIGRATION_KINDS.items():
        store.store(group="schema/migration", name=kind, node=cls, provider="spepolicy")


def to_scenario(cfg: Any) -> Scenario:
    """Return the scenario that *cfg* describes.

    *cfg*: an omegaconf DictConfig or plain mapping with the groups guest, workload, host, cpu, kvm and costs, and with
    seed and duration. Raises `ConfigurationError` for a value with a wrong type, unit or range or that does not fit
    another, and `RecordingError` for a recording that cannot be read.
    """
    config = plain(cfg)
    root = settings_of(Root)
    known_keys(config, {item.name: item for item in fields(Root)}, "")
    cpu = _cpu(group_at(config, "cpu"))
    guest = _guest(group_at(config, "guest"), cpu)
    return Scenario(
        workload=_workload(group_at(config, "workload"), cpu),
        duration_ps=checked(value_at(config, "duration"), root["duration"], "duration"),
        cpu=cpu,
        guest=guest,
        kvm=_kvm(group_at(config, "kvm")),
        costs=Costs(**checked_fields(group_at(config, "costs"), CostSettings, "costs")),
        host=host_of(group_at(config, "host"), guest),
        migration=_migration(group_at(config, "migration")),
        seed=checked(value_at(config, "seed"), root["seed"], "seed"),
    )


def to_options(cfg: Any) -> Options:
    """Return the settings of *cfg* that are no part of the scenario, checked as `to_scenario` does."""
    config = plain(cfg)
    root = settings_of(Root)
    threads = value_at(config, "threads")
    tracking = group_at(config, "tracking")
    known_keys(tracking, settings_of(TrackingSettings), "tracking")
    checked(value_at(tracking, "kind", "tracking."), settings_of(TrackingSettings)["kind"], "tracking.kind")
    replicates = checked(value_at(config, "replicates"), root["replicates"], "replicates")
    return Options(
        task=checked(value_at(config, "task"), root["task"], "task"),
        replicates=replicates,
        threads=None if threads is None else checked(threads, root["threads"], "threads"),
        baselines=tuple(checked(value_at(config, "baselines"), root["baselines"], "baselines")),
        tracking=tracking,
        lanes=_chosen_lanes(group_at(config, "output"), replicates),
    )


def _chosen_lanes(values: Mapping[str, Any], replicates: int) -> ChosenLanes:
    settings = settings_of(OutputSettings)
    known_keys(values, settings, "output")
    lanes, perf_data, timeline = (
        checked(value_at(values, name, "output."), settings[name], f"output.{name}")
        for name in ("lanes", "perf_data", "timeline")
    )
    return ChosenLanes(parse_lanes(lanes, replicates), perf_data, timeline)


def plain(cfg: Any) -> Mapping[str, Any]:
    """Return *cfg* as plain containers, interpolations resolved."""
    if isinstance(cfg, dict):
        return cfg
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


@dataclass(frozen=True)
class _Described:
    """A description, compared by its text."""

    text: str
    values: Mapping[str, Any] = field(compare=False)


def _workload(values: Mapping[str, Any], cpu: Cpu) -> Workload:
    """Build the workload. Jobs of a sweep that describe the same one get the same object."""
    content = [json.dumps(values, default=str)]
    if isinstance(path := values.get("path"), str) and Path(path).expanduser().is_file():
        state = Path(path).expanduser().stat()
        content.append(f"{state.st_ino} {state.st_size} {state.st_mtime_ns}")
    return _built_workload(_Described(" ".join(content), values), cpu.cycle_ps)


@lru_cache(maxsize=64)
def _built_workload(described: _Described, cycle_ps: int) -> Workload:
    from spepolicy.workload_source import workload_of

    return workload_of(described.values, cycle_ps)


# ---- groups ----------------------------------------------------------------------------------------------------------


def _cpu(values: Mapping[str, Any]) -> Cpu:
    chosen = checked_fields(values, CpuSettings, "cpu")
    slip = checked(value_at(values, "store_slip", "cpu."), settings_of(CpuSettings)["store_slip"], "cpu.store_slip")
    chosen["features"] = tuple(checked(value_at(values, "features", "cpu."), settings_of(CpuSettings)["features"],
                                       "cpu.features"))  # fmt: skip
    if chosen["external_abort"] == "by_version":
        reported = AbortReport.TO_SPU in VERSIONS[chosen["spe_version"]].aborts
        chosen["external_abort"] = "synchronous" if reported else "serror"
    chosen["external_abort"] = ExternalAbort[chosen["external_abort"].upper()]
    cpu = Cpu(**chosen, store_slip_q16=round(slip * (1 << 16)))
    _check_version(cpu)
    if cpu.align_bytes > cpu.max_record_bytes:
        raise ConfigurationError(
            f"cpu.align={values['align']}: larger than cpu.max_record={values['max_record']}. A record is a multiple "
            f"of its alignment (spe.md 1.9). Set cpu.align={values['max_record']} or cpu.max_record={values['align']}."
        )
    if cpu.counter_bits not in (12, 16):
        raise ConfigurationError(
            f"cpu.counter_bits={cpu.counter_bits}: PMSIDR_EL1.CountSize knows 12 and 16 only (spe.md 1.5). "
            "Set cpu.counter_bits=12 or cpu.counter_bits=16."
        )
    if VERSIONS[cpu.spe_version].access_flag_required and not cpu.hardware_access_flag:
        raise ConfigurationError(
            f"cpu.hardware_access_flag=false: not permitted with cpu.spe_version={cpu.spe_version}; from SPEv1p3 (4) "
            "on the SPU manages the access flag like any access (spe.md 1.9). Set cpu.hardware_access_flag=true, or "
            "cpu.spe_version=3 or less."
        )
    return cpu


_ABORT_REPORT = {
    ExternalAbort.IGNORED: AbortReport.IGNORED,
    ExternalAbort.SERROR: AbortReport.SERROR,
    ExternalAbort.MMU_FAULT: AbortReport.MMU_FAULT,
    ExternalAbort.SYNCHRONOUS: AbortReport.TO_SPU,
    ExternalAbort.ASYNCHRONOUS: AbortReport.TO_SPU,
}


def _check_version(cpu: Cpu) -> None:
    """See that the SPE version permits what the implementation is said to do."""
    version = VERSIONS[cpu.spe_version]
    features_of(cpu.spe_version, cpu.features)
    if _ABORT_REPORT[cpu.external_abort] not in version.aborts:
        allowed = [way.name.lower() for way, report in _ABORT_REPORT.items() if report in version.aborts]
        raise ConfigurationError(
            f"cpu.external_abort={cpu.external_abort.name.lower()}: {version.name} does not report external aborts to "
            f"the SPU (spe.md rule 42). Set one of {', '.join(allowed)}, or cpu.spe_version=3 or less."
        )
    if cpu.late_fault_samples and not version.late_faults:
        raise ConfigurationError(
            f"cpu.late_fault_samples={cpu.late_fault_samples}: before SPEv1p5 a fault stops the SPU before it takes "
            f"another sample (spe.md rule 40). Set cpu.late_fault_samples=0 or cpu.spe_version=6."
        )


def _guest(values: Mapping[str, Any], cpu: Cpu) -> Guest:
    chosen = checked_fields(values, GuestSettings, "guest", special=("filter", "misbehaviour"))
    chosen["session"] = SessionMode[chosen["session"].upper()]
    chosen["driver"] = GuestDriver[chosen["driver"].upper()]
    if chosen["driver"] != GuestDriver.LINUX and chosen["session"] != SessionMode.PER_CPU:
        raise ConfigurationError(
            f"guest.driver={values['driver']} with guest.session=per_task: the drivers of FreeBSD and Windows profile "
            "CPUs only (ENOTSUP for threads). Set guest.session=per_cpu, or choose guest=freebsd or guest=windows."
        )
    chosen |= _filter(group_at(values, "filter", "guest."), cpu)
    chosen["acts"] = _acts(values.get("misbehaviour") or {}, chosen)
    guest = Guest(**chosen)
    if guest.discard and not VERSIONS[cpu.spe_version].discard_mode:
        raise ConfigurationError(
            f"guest.discard=true: cpu.spe_version={cpu.spe_version} has no discard mode (spe.md 1.6). "
            "Set guest.discard=false or cpu.spe_version=3 or more."
        )
    if not (guest.profile_user or guest.profile_kernel):
        raise ConfigurationError(
            "guest.profile_user=false and guest.profile_kernel=false: nothing is profiled. At least one exception "
            "level must be. Set guest.profile_user=true or guest.profile_kernel=true."
        )
    needed = 4 * guest.vcpus * guest.buffer_pages
    if needed > guest.ram_pages:
        remedy = 1 << (needed - 1).bit_length()
        raise ConfigurationError(
            f"guest.buffer={values['buffer']}: too large for guest.memory={values['memory']} with "
            f"guest.vcpus={guest.vcpus}. The AUX rings of all vCPUs may take a quarter of the memory. "
            f"Set guest.memory={format_size(remedy * PAGE_BYTES)} or a smaller buffer."
        )
    return guest


def _acts(values: Mapping[str, Any], guest: Mapping[str, Any]) -> tuple[tuple[int, int, int, int, int, int], ...]:
    """Return a row an act, by GuestAct number: the order of the draws must not depend on the order in a file."""
    known_keys(values, GUEST_ACTS, "guest.misbehaviour")
    settings = settings_of(ActSettings)
    rows = []
    for name, entry in values.items():
        where = f"guest.misbehaviour.{name}"
        if not isinstance(entry, Mapping):
            raise ConfigurationError(f"{where}={entry}: needs a time. Write {where}={{every: 1ms}} or {{at: 3ms}}.")
        known_keys(entry, settings, where)
        defaults = {item.name: item.default for item in fields(ActSettings)}
        act = {key: checked((defaults | dict(entry))[key], settings[key], f"{where}.{key}") for key in settings}
        if act["every"] and act["at"]:
            raise ConfigurationError(
                f"{where}: both every={entry['every']} and at={entry['at']} are given. An act comes at random times or "
                f"once. Leave one of them out."
            )
        if act["moment"] == "before_eret" and (guest["profile_kernel"] or not guest["profile_user"]):
            raise ConfigurationError(
                f"{where}.moment=before_eret: needs {{E0SPE,E1SPE}} = {{1,0}}; else the write to PMSCR_EL1 itself "
                "enables profiling, not the ERET (kvm.md 4.1 G1). Set guest.profile_user=true and "
                f"guest.profile_kernel=false, or {where}.moment=profiling."
            )
        if act["pages"] > guest["buffer_pages"]:
            raise ConfigurationError(
                f"{where}.pages={act['pages']}: more than the buffer has, {guest['buffer_pages']}. "
                f"Set {where}.pages={guest['buffer_pages']} or less, or a larger guest.buffer."
            )
        if act["every"] or act["at"]:
            moment = int(Moment[act["moment"].upper()])
            rows.append((int(GUEST_ACTS[name]), act["every"], act["at"], moment, int(act["tlbi"]), act["pages"]))
    return tuple(sorted(rows))


def _filter(values: Mapping[str, Any], cpu: Cpu) -> dict[str, int]:
    chosen = checked_fields(values, FilterSettings, "guest.filter")
    types = {"branch": OpType.BRANCH, "load": OpType.LOAD, "store": OpType.STORE}
    largest = (1 << cpu.counter_bits) - 1
    if chosen["min_latency_cycles"] > largest:
        raise ConfigurationError(
            f"guest.filter.min_latency={values['min_latency']}: more than the latency counter can hold, {largest} with "
            f"cpu.counter_bits={cpu.counter_bits}. Set guest.filter.min_latency={largest} or less."
        )
    features = features_of(cpu.spe_version, cpu.features)
    for key in ("events", "not_events"):
        for event in values[key]:
            _check_event(key, event, cpu, features)
    for key, feature, name in (("not_events", Feature.FNE, "FnE"), ("exactly", Feature.EFT, "EFT"),
                               ("data_sources", Feature.FDS, "FDS")):  # fmt: skip
        if values[key] and feature not in features:
            raise ConfigurationError(
                f"guest.filter.{key}={values[key]}: needs {name}, which the processor does not have (spe.md 1.4). "
                f"Set guest.filter.{key}=[], or a cpu.spe_version and cpu.features with {name}."
            )
    return {
        "inverted_event_filter": sum(1 << EVENT_BITS[event] for event in set(values["not_events"])),
        "type_mask": sum(int(types[name]) for name in set(values["exactly"])),
        "data_source_filter": sum(1 << DATA_SOURCES[name] for name in set(values["data_sources"])),
        "type_filter": sum(int(bit) for name, bit in types.items() if values[name]),
        "event_filter": sum(1 << EVENT_BITS[event] for event in set(values["events"])),
        "min_latency_cycles": chosen["min_latency_cycles"],
    }


def _check_event(key: str, event: str, cpu: Cpu, features: Feature) -> None:
    """See that samples can be filtered by *event* (spe.md 1.4)."""
    register = REGISTERS["PMSEVFR_EL1"]
    bit = register.mask(f"E{EVENT_BITS[event]}")
    if register.existing(features) & bit:
        return
    versions = [n for n in VERSIONS if n > cpu.spe_version and register.existing(features_of(n)) & bit]
    remedy = f"Set cpu.spe_version={versions[0]} or more, or leave" if versions else "Leave"
    raise ConfigurationError(
        f"guest.filter.{key}=[{event}]: cpu.spe_version={cpu.spe_version} cannot filter by it with cpu.features="
        f"[{','.join(cpu.features)}] (spe.md 1.4). {remedy} the event out."
    )


def _kvm(values: Mapping[str, Any]) -> Kvm:
    unlimited = value_at(values, "memlock", "kvm.") == UNLIMITED
    special = ("bug_rate", "memlock") if unlimited else ("bug_rate",)
    chosen = checked_fields(values, KvmSettings, "kvm", special=special)
    chosen["irq_delivery"] = IrqDelivery[chosen["irq_delivery"].upper()]
    chosen["bug"] = Bug[chosen["bug"].upper()]
    rate = checked(value_at(values, "bug_rate", "kvm."), settings_of(KvmSettings)["bug_rate"], "kvm.bug_rate")
    chosen["bug_rate_q16"] = round(rate * (1 << 16))
    return Kvm(**chosen, memlock_unlimited=unlimited)


def _migration(values: Mapping[str, Any]) -> Migration:
    kind = value_at(values, "kind", "migration.")
    if kind not in MIGRATION_KINDS:
        raise ConfigurationError(
            f"migration.kind={kind}: must be one of {', '.join(MIGRATION_KINDS)}.{nearest(str(kind), MIGRATION_KINDS)} "
            "Choose a file of conf/migration/ with migration=NAME instead of setting it."
        )
    chosen = checked_fields(values, MIGRATION_KINDS[kind], "migration")
    if "handling" in chosen:
        chosen["handling"] = Handling[chosen["handling"].upper()]
    return Migration(kind=MigrationKind[kind.upper()], abort=values.get("vmm") == "give_up", **chosen)
