"""The judge's numbers as tables: one row a lane, one row a window. Column names carry units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.judge.blackout import CAUSES, mean_interval_ops
from spepolicy.judge.lanes import lane_sum, vcpu_host_ps
from spepolicy.judge.metrics import Measured
from spepolicy.machine.fields import TRUTH
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.state import LOST_CAUSES

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result

__all__ = ["Categories", "Column", "lane_table", "window_table"]


@dataclass(frozen=True)
class Categories:
    """A column of few distinct texts: names[codes[row]]."""

    codes: NDArray[np.int32]  # [rows]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codes)


Column = NDArray[Any] | Categories

# Fields of TRUTH that are no sums: the last fault's cause, the page under the SPU, and the first fault.
_NOT_SUMMED = ("diverged_now", "fault_cause", "fault_loss_cause", "pending", "digest")
_VM_COLUMNS = (
    "host_events", "notifier_calls", "notifier_ignored", "stage2_unmapped", "pinned_peak_pages", "charged_peak_pages",
    "pin_calls", "pin_refused", "stale_pins", "startup_ps",
)  # fmt: skip


def _is_summed(name: str) -> bool:
    return name not in _NOT_SUMMED and not name.startswith("first_")


def lane_table(result: Result, measured: Measured | None = None) -> dict[str, Column]:
    """Return a table with a row a lane, in the lanes' order: exact integers first, then the metrics of *measured*.

    Integers are sums over the lane's vCPUs: times in ps (`_ps`), memory in 4 KiB pages (`_pages`), everything else
    counts. Metrics are float64, NaN where not defined; `spepolicy.judge.metrics.METRICS` defines them.
    """
    lanes = len(result.replicates)
    table: dict[str, Column] = {
        "policy": Categories(np.zeros(lanes, np.int32), (result.policy,)),
        "replicate": result.replicates,
        "guest_ps": result.vcpu["now_ps"].sum(axis=1),
        "vcpu_host_ps": vcpu_host_ps(result),
        "host_elapsed_ps": result.host_elapsed_ps,
    }
    names = [name for name in TRUTH.names or () if _is_summed(name)]
    table |= {name: lane_sum(result, name) for name in names}
    table["digest"] = np.bitwise_xor.reduce(result.truth["digest"], axis=1)
    for cause, name in enumerate(CAUSES):
        table[f"lost_{name}"] = result.lost[:, :, cause].sum(axis=1)
        table[f"blackout_{name}_ps"] = result.blackout_ps[:, :, cause].sum(axis=1)
    table |= {name: result.vm[name] for name in _VM_COLUMNS}
    for op in HostOp:
        if op != HostOp.NONE:
            table[f"host_{op.name.lower()}"] = result.host_ops[:, op]
    if measured is not None:
        # A metric that only repeats an exact count of the same name is there already.
        table |= {name: values for name, values in measured.lanes.items() if name not in table}
    return table


def window_table(results: Mapping[str, Result]) -> dict[str, Column]:
    """Return a table with a row a blackout window of every policy in *results*; times in us.

    `start_us` is guest time, `start_host_us` and `host_length_us` host time; `length_us` is the part of the window's
    guest time in which profiling was wanted. `missed_samples` = missed_ops / mean interval.
    """
    policies = tuple(results)
    runs = list(results.values())
    sizes = [len(result.windows) for result in runs]

    def joined(name: str) -> NDArray[np.int64]:
        parts = [result.windows[name] for result in runs]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    replicate = [result.replicates[result.windows["lane"]] for result in runs]
    interval = [np.full(len(result.windows), mean_interval_ops(result.scenario.guest)) for result in runs]
    missed_ops = joined("missed_ops")
    return {
        "policy": Categories(np.repeat(np.arange(len(runs), dtype=np.int32), sizes), policies),
        "replicate": np.concatenate(replicate) if replicate else np.empty(0, np.int64),
        "vcpu": joined("vcpu"),
        "cause": Categories(joined("cause").astype(np.int32), CAUSES[:LOST_CAUSES]),
        "start_us": joined("start_ps") / 1e6,
        "length_us": joined("length_ps") / 1e6,
        "start_host_us": joined("start_host_ps") / 1e6,
        "host_length_us": joined("host_length_ps") / 1e6,
        "missed_ops": missed_ops,
        "missed_samples": missed_ops / np.concatenate(interval) if interval else np.empty(0),
    }
