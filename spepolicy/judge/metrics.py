"""Every number that a run reports: definition, unit and formula, in one table.

`METRICS` maps a name, which carries its unit, to a `Metric`. A metric is first a number a lane (a replicate); `measure`
gives the mean over replicates and its 95 % confidence interval. Where a mean of lanes makes no sense, `pooled` computes
one number from all lanes. A number that is not defined (no fault to attribute, no window to measure) is left out, never
replaced by 0.

Percentages of *wanted* time and rates a *wanted second* refer to guest time in which profiling was wanted, summed over
the vCPUs of a lane: a policy is judged by what it does to profiling, however little of the time the guest profiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spepolicy.hookspecs import Cause
from spepolicy.judge import attribution, blackout
from spepolicy.judge.fidelity import TOP
from spepolicy.judge.interval import means_ci95
from spepolicy.judge.lanes import Floats, ratio
from spepolicy.judge.view import View
from spepolicy.machine.scenario import PAGE_BYTES

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result

__all__ = ["METRICS", "Measured", "Metric", "measure"]

_MIB = PAGE_BYTES / (1 << 20)
_PS_PER_S = 1e12


@dataclass(frozen=True)
class Metric:
    """One reported number."""

    name: str  # ends in its unit
    unit: str
    doc: str  # definition and formula
    lane: Callable[[View], Floats]  # float64[N], NaN where not defined
    pooled: Callable[[View], float] | None = None  # None: mean over lanes with a confidence interval


METRICS: dict[str, Metric] = {}

_Lane = Callable[[View], Floats]


def _add(name: str, unit: str, doc: str, lane: _Lane, pooled: Callable[[View], float] | None = None) -> None:
    if name in METRICS:
        raise ValueError(f"two metrics are called '{name}'")
    METRICS[name] = Metric(name, unit, doc, lane, pooled)


def _per_wanted_s(field: str) -> _Lane:
    return lambda v: ratio(v.sum(field), v.wanted_s)


def _per_host_s(field: str) -> _Lane:
    return lambda v: v.vm[field] / v.host_s


def _share_of_host_time(*fields: str) -> _Lane:
    return lambda v: 100 * ratio(np.sum([v.sum(field) for field in fields], axis=0), v.vcpu_host_ps)


def _count(field: str) -> _Lane:
    return lambda v: v.vm[field].astype(np.float64)


def _blackout_by_cause(index: int) -> _Lane:
    return lambda v: ratio(blackout.blackout_by_cause_ps(v.result)[:, index] / 1e9, v.wanted_s)


def _recall(cause: Cause) -> _Lane:
    return lambda v: 100 * attribution.recall(v.result, cause)


def _memlock_peak(v: View) -> Floats:
    kvm = v.result.scenario.kvm
    if kvm.memlock_unlimited or kvm.memlock_pages == 0:
        return np.full(len(v.vm), np.nan)
    return 100 * v.vm["charged_peak_pages"] / kvm.memlock_pages


# ---- blackout -------------------------------------------------------------------------------------------------------

_add(
    "blackout_pct",
    "%",
    "Share of wanted guest time in which the SPU did not sample: 100 * blackout / wanted.",
    lambda v: 100 * blackout.blackout_fraction(v.result),
)
_add(
    "excess_blackout_pct",
    "%",
    "blackout_pct minus bare metal's at the same replicate (paired): what virtualization and the policy add, in "
    "percentage points.",
    lambda v: 100 * blackout.excess_blackout(v.result, v.bare_metal),
)
for _index, _cause in enumerate(blackout.CAUSES):
    _add(
        f"blackout_{_cause}_ms_per_s",
        "ms/s",
        f"Blackout of cause {_cause} in ms a wanted second; over all causes 10 times blackout_pct.",
        _blackout_by_cause(_index),
    )
_add(
    "windows_per_s",
    "1/s",
    "Blackout windows a wanted second.",
    lambda v: ratio(v.windows.count.astype(np.float64), v.wanted_s),
)
_add(
    "median_blackout_us",
    "us",
    "Median length of a blackout window, in wanted guest time; over the windows of all replicates.",
    lambda v: v.windows.median_us,
    lambda v: v.windows.pooled_median_us,
)
_add(
    "p99_blackout_us",
    "us",
    "99th percentile of the lengths of blackout windows, in wanted guest time; over the windows of all replicates.",
    lambda v: v.windows.p99_us,
    lambda v: v.windows.pooled_p99_us,
)
_add(
    "longest_blackout_us",
    "us",
    "Longest blackout window of any replicate, in wanted guest time.",
    lambda v: v.windows.longest_us,
    lambda v: v.windows.pooled_longest_us,
)
_add(
    "missed_ops_pct",
    "%",
    "Operations executed in blackout: 100 * missed_ops / wanted_ops.",
    lambda v: 100 * ratio(v.sum("missed_ops"), v.sum("wanted_ops")),
)

# ---- records --------------------------------------------------------------------------------------------------------

_add(
    "kept_records",
    "records",
    "Records that reached the guest's perf, or were in its buffer at the end; a replicate.",
    lambda v: v.sum("kept"),
)
_add("kept_records_per_s", "1/s", "kept_records a wanted second.", _per_wanted_s("kept"))
_add(
    "missed_samples",
    "samples",
    "Samples never selected because of blackout: missed_ops / mean interval, which is INTERVAL*256 + 1, plus 127.5 "
    "with jitter; a replicate.",
    lambda v: v.missed_samples,
)
_add(
    "missed_samples_pct",
    "%",
    "100 * missed records / due records. Missed records = missed_samples times the share of samples that pass "
    "collision and filters; "
    "due records = kept + lost + discarded + missed records.",
    lambda v: 100 * ratio(v.missed_records, v.due_records),
)
_add(
    "lost_samples_pct",
    "%",
    "Samples whose record could not be written: 100 * lost, all causes / due records (see missed_samples_pct).",
    lambda v: 100 * ratio(v.lost, v.due_records),
)
_add(
    "discarded_samples_pct",
    "%",
    "Records written and thrown away because of DL: 100 * discarded / due records (see missed_samples_pct).",
    lambda v: 100 * ratio(v.sum("discarded"), v.due_records),
)
_add(
    "unseen_samples_pct",
    "%",
    "missed_samples_pct + lost_samples_pct + discarded_samples_pct: what a profile lacks; 100 minus the share of due "
    "records that were kept.",
    lambda v: 100 * ratio(v.due_records - v.sum("kept"), v.due_records),
)
_add(
    "collided_pct",
    "%",
    "Samples dropped because another was in flight: 100 * collided / selected.",
    lambda v: 100 * ratio(v.sum("collided"), v.sum("selected")),
)
_add(
    "filtered_pct",
    "%",
    "Samples that the guest's filters rejected: 100 * filtered / selected.",
    lambda v: 100 * ratio(v.sum("filtered"), v.sum("selected")),
)

# ---- events ---------------------------------------------------------------------------------------------------------

for _name, _field, _what in (
    ("stage2_faults_per_s", "stage2_faults", "Stage 2 faults of the SPU"),
    ("stage1_faults_per_s", "stage1_faults", "Stage 1 faults of the SPU"),
    ("buffer_full_per_s", "buffer_full", "Buffer full events (PMU event SAMPLE_BUFFER_FULL)"),
    ("sample_pop_per_s", "population", "PMU event SAMPLE_POP: operations executed while profiling was enabled"),
    ("sample_filtrate_per_s", "survived", "PMU event SAMPLE_FILTRATE: samples that no filter rejected"),
    ("sample_collision_per_s", "collided", "PMU event SAMPLE_COLLISION: selections dropped for one in flight"),
    ("external_aborts_per_s", "external_aborts", "External aborts on buffer writes"),
    ("data_loss_per_s", "data_loss", "Buffer management events with PMBSR_EL1.DL=1"),
    ("fatal_per_s", "fatal", "Events that the guest's driver answered by switching SPE off"),
    ("traps_per_s", "traps", "Trapped accesses to SPE registers"),
):
    _add(_name, "1/s", f"{_what}, a wanted second.", _per_wanted_s(_field))
_add(
    "sample_feed_per_s",
    "1/s",
    "PMU event SAMPLE_FEED: samples taken, collisions not counted, a wanted second.",
    lambda v: ratio(v.sum("selected") - v.sum("collided"), v.sum("wanted_ps") / _PS_PER_S),
)
_add(
    "refused_sessions",
    "sessions",
    "Sessions that the policy refused before the SPU wrote; a replicate.",
    lambda v: v.sum("refused"),
)
_add(
    "diverged_records",
    "records",
    "Records written to pages that the VMM's address no longer shows, or that it may not write (silent divergence); a "
    "replicate.",
    lambda v: v.sum("diverged_records"),
)
_add(
    "diverged_samples_pct",
    "%",
    "Samples that are written where nobody looks who reads through the VMM, a migration for one: 100 * "
    "diverged_records / due records (see missed_samples_pct). The guest's CPUs read through the same stage 2 as the "
    "SPU writes and still find them, so they are no part of unseen_samples_pct.",
    lambda v: 100 * ratio(v.sum("diverged_records"), v.due_records),
)

# ---- stolen time ----------------------------------------------------------------------------------------------------

_STOLEN = {
    "traps": ("trap_total_ps", "traps of SPE registers"),
    "policy": ("hook_total_ps", "the policy's walks, pins, maps and unpins"),
    "events": ("event_total_ps", "exits for PMBIRQ, reading PMBSR and injection"),
    "switch": ("switch_total_ps", "saving and draining SPE state in ordinary exits"),
}
_add(
    "stolen_pct",
    "%",
    "vCPU time spent on account of SPE: 100 * (traps + policy + events + switch) / host time of the vCPUs.",
    _share_of_host_time(*(field for field, _ in _STOLEN.values())),
)
for _name, (_field, _what) in _STOLEN.items():
    _add(f"stolen_{_name}_pct", "%", f"The part of stolen_pct that goes to {_what}.", _share_of_host_time(_field))
_add(
    "startup_ms",
    "ms",
    "Host time by which the policy delays the start of the VM (hook vm_created).",
    lambda v: v.vm["startup_ps"] / 1e9,
)

# ---- memory ---------------------------------------------------------------------------------------------------------

_add(
    "pinned_peak_MiB",
    "MiB",
    "Most memory held pinned at any time; every pin counts, a page pinned twice counts twice.",
    lambda v: v.vm["pinned_peak_pages"] * _MIB,
)
_add(
    "pinned_mean_MiB",
    "MiB",
    "Pinned memory, mean over host time: integral of pinned pages / host time.",
    lambda v: v.vm["pinned_page_ps"] * 1e3 / _PS_PER_S * _MIB / v.host_s,
)
_add(
    "pinned_page_s",
    "page s",
    "Integral of pinned pages over host time; a replicate.",
    lambda v: v.vm["pinned_page_ps"] * 1e3 / _PS_PER_S,
)
_add(
    "memlock_peak_MiB",
    "MiB",
    "Most memory charged to RLIMIT_MEMLOCK at any time: what is pinned, and what the VMM has mlock()ed.",
    lambda v: v.vm["charged_peak_pages"] * _MIB,
)
_add(
    "own_buffers_MiB",
    "MiB",
    "Most memory that KVM held as SPE buffers of its own: kernel memory, which the memlock limit does not count.",
    lambda v: v.vm["own_pages"] * _MIB,
)
_add(
    "memlock_peak_pct",
    "%",
    "Peak of what is charged to RLIMIT_MEMLOCK against it: 100 * peak / limit; undefined without one.",
    _memlock_peak,
)
_add(
    "memlock_refused_pages",
    "pages",
    "Pages that could not be pinned because of the memlock limit; a replicate.",
    _count("pin_refused"),
)
_add(
    "stale_pin_pages",
    "pages",
    "Pinned pages that the host replaced behind the pin; a replicate.",
    _count("stale_pins"),
)
_add("pins_left_pages", "pages", "Pins that KVM still held when the VM was gone; a replicate.", _count("pinned_pages"))

# ---- host -----------------------------------------------------------------------------------------------------------

for _name, _field, _what in (
    ("host_events_per_s", "host_events", "Operations of the host's memory management applied"),
    ("notifier_calls_per_s", "notifier_calls", "MMU notifier events that reached KVM"),
    ("notifier_ignored_per_s", "notifier_ignored", "Of these, events on pages that the policy's filter kept mapped"),
    ("stage2_unmapped_per_s", "stage2_unmapped", "Stage 2 leaf entries removed by notifiers"),
):
    _add(_name, "1/s", f"{_what}, a second of host time.", _per_host_s(_field))

# ---- live migration -------------------------------------------------------------------------------------------------

_MS = 1e9  # ps


def _if_migrated(value: _Lane) -> _Lane:
    """Undefined in lanes whose migration has not begun, or where there is none."""
    return lambda v: np.where(v.vm["migration_begin_ps"] > 0, value(v), np.nan)


for _name, _unit, _doc, _value in (
    ("migration_downtime_ms", "ms", "Host time for which a migration stops all vCPUs; over all of a replicate.",
     lambda v: v.vm["migration_downtime_ps"] / _MS),
    ("migration_total_ms", "ms", "Host time from the migration's begin to its end.",
     lambda v: np.where(v.vm["migration_outcome"] > 0, v.vm["migration_end_ps"] - v.vm["migration_begin_ps"], np.nan)
     / _MS),
    ("migration_rounds", "", "Rounds of pre-copy before the vCPUs stopped.",
     lambda v: v.vm["migration_round"].astype(np.float64)),
    ("migration_resent_MiB", "MiB", "Memory sent again because it was written to.",
     lambda v: v.vm["migration_resent"] * _MIB),
    ("migration_resent_buffer_MiB", "MiB", "The part of migration_resent_MiB that is SPE buffers.",
     lambda v: v.vm["migration_resent_buffer"] * _MIB),
    ("migration_completed_pct", "%", "100 if the migration was completed, 0 if not yet, cancelled or given up.",
     lambda v: 100.0 * (v.vm["migration_outcome"] == 1)),
    ("migration_given_up_pct", "%", "100 if the VMM gave the migration up because of SPE, else 0.",
     lambda v: 100.0 * (v.vm["migration_outcome"] == 3)),
    ("migration_demanded_pages", "pages", "Post-copy: pages fetched on demand for a CPU, KVM or a pin.",
     lambda v: v.vm["migration_demanded"].astype(np.float64)),
    ("migration_unlogged_pages", "pages",
     "Pages that the SPU wrote to and the dirty log did not tell: the target has old data there.",
     lambda v: v.vm["migration_unlogged"].astype(np.float64)),
    ("migration_held_ms", "ms", "Host time for which the VMM held vCPUs because of SPE, summed over vCPUs.",
     lambda v: v.sum("stalled_ps") / _MS),
):  # fmt: skip
    _add(_name, _unit, _doc, _if_migrated(_value))
_add(
    "migration_refused",
    "",
    "Times that KVM refused to begin a migration because a vCPU had SPE on.",
    lambda v: v.vm["migration_refused"].astype(np.float64),
)
_add(
    "vm_died_pct",
    "%",
    "100 if the VM ended before its time because of how a failure was answered, else 0.",
    lambda v: 100.0 * (v.vm["died"] != 0),
)
_add(
    "reported_blackout_ms_per_s",
    "ms/s",
    "Blackout of which the guest was told by a side channel, a wanted second.",
    lambda v: ratio(v.sum("reported_ps") / 1e9, v.wanted_s),
)
_add("vmm_exits_per_s", "1/s", "Exits to the VMM because of SPE, a wanted second.", _per_wanted_s("vmm_exits"))
_add(
    "stray_records",
    "records",
    "Records written through a translation that the guest had changed without a TLBI; a replicate.",
    lambda v: v.sum("stray_records"),
)

# ---- fidelity and attribution ---------------------------------------------------------------------------------------

_add(
    "fidelity_tv",
    "",
    "Total variation distance between the profile that the guest got and the true one, over functions: 0 to 1.",
    lambda v: v.fidelity.tv,
)
_add(
    "fidelity_tv_noise",
    "",
    "Expected fidelity_tv of a random (multinomial) sample of as many records, exact.",
    lambda v: v.fidelity.tv_noise,
)
_add(
    "fidelity_tv_excess",
    "",
    "fidelity_tv - fidelity_tv_noise: distance that sampling noise does not explain. May be below 0: interval "
    "sampling is evener than random.",
    lambda v: v.fidelity.tv - v.fidelity.tv_noise,
)
_add(
    "fidelity_pooled_tv",
    "",
    "fidelity_tv of the profile summed over all replicates: noise averages out, bias stays.",
    lambda v: v.fidelity.tv,
    lambda v: v.fidelity.pooled_tv,
)
_add(
    "fidelity_pooled_tv_noise",
    "",
    "fidelity_tv_noise of the profile summed over all replicates.",
    lambda v: v.fidelity.tv_noise,
    lambda v: v.fidelity.pooled_tv_noise,
)
_add(
    f"fidelity_top{TOP}_error_pp",
    "percentage points",
    f"Largest error of the share of any of the {TOP} functions that are really hottest.",
    lambda v: v.fidelity.top_error_pp,
)
_add(
    f"fidelity_top{TOP}_found_pct",
    "%",
    f"How many of the {TOP} really hottest functions are among the {TOP} hottest of the guest's profile.",
    lambda v: 100 * v.fidelity.top_found,
)
_add(
    "attribution_accuracy_pct",
    "%",
    "Stage 2 faults whose cause the policy claimed rightly: 100 * right / all; no claim is not right.",
    lambda v: 100 * attribution.accuracy(v.result),
)
_add(
    "attribution_claimed_pct",
    "%",
    "Stage 2 faults for which the policy claimed any cause but UNKNOWN.",
    lambda v: 100 * attribution.claimed_share(v.result),
)
for _true in Cause:
    if _true != Cause.UNKNOWN:
        _add(
            f"attribution_recall_{_true.name.lower()}_pct",
            "%",
            f"Stage 2 faults truly caused by {_true.name} that were claimed as such.",
            _recall(_true),
        )


@dataclass(frozen=True)
class Measured:
    """All metrics of one policy."""

    values: dict[str, float]  # by name, without those that are not defined
    ci95: dict[str, float]  # half-width of the 95 % confidence interval, same unit; needs two replicates that define it
    lanes: dict[str, Floats]  # by name, float64[N], NaN where not defined


def measure(result: Result, bare_metal: Result | None) -> Measured:
    """Compute every metric of *result*, whose lanes have all finished.

    *bare_metal* is what excess is measured against: pairs of equal replicates count, and without any it is undefined.
    """
    view = View(result, bare_metal)
    lanes = {name: np.asarray(metric.lane(view), dtype=np.float64) for name, metric in METRICS.items()}
    means, halves = means_ci95(np.stack(list(lanes.values())))
    measured = Measured({}, {}, lanes)
    for (name, metric), mean, half in zip(METRICS.items(), means.tolist(), halves.tolist(), strict=True):
        if metric.pooled is not None:
            mean, half = metric.pooled(view), math.nan
        if not math.isnan(mean):
            measured.values[name] = mean
        if not math.isnan(half):
            measured.ci95[name] = half
    return measured
