"""What a run leaves behind: the counts, clocks and windows of its lanes, and a lane's event log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.machine.fields import WINDOW
from spepolicy.machine.scenario import Scenario

Ints = NDArray[np.int64]

WINDOW_ROW = np.dtype([("lane", np.int64), *WINDOW.descr])
KEPT = ("vm", "vcpu", "truth", "lost", "blackout_ps", "claims", "host_ops", "exposure_ps", "seen")  # of the machine
PER_LANE = (*KEPT, "replicates", "host_elapsed_ps", "finished")  # arrays of a Result with a row a lane


@dataclass(frozen=True)
class Result:
    """What one policy did on N lanes of V vCPUs. Arrays as in `spepolicy.machine.state.Machine`; times in ps."""

    policy: str
    scenario: Scenario
    replicates: Ints  # [N]
    vm: NDArray[np.void]  # VM[N]
    vcpu: NDArray[np.void]  # VCPU[N, V]
    truth: NDArray[np.void]  # TRUTH[N, V]
    lost: Ints  # [N, V, LOST_CAUSES]
    blackout_ps: Ints  # [N, V, LOST_CAUSES]
    claims: Ints  # [N, 6, 6] claimed, true
    host_ops: Ints  # [N, len(HostOp)]
    exposure_ps: Ints  # [N, V, D]
    seen: Ints  # [N, V, F]
    windows: NDArray[np.void]  # lane and WINDOW, in order of lane and time
    host_elapsed_ps: Ints  # [N]
    finished: NDArray[np.bool_]  # [N] False: interrupted before the end
    samples: int
    seconds: float
    memory: dict[str, int]
    # CPU time of the worker threads, all lanes: everything, and of it in hooks
    busy_s: float = 0.0
    hook_s: float = 0.0


@dataclass(frozen=True)
class LaneLog:
    """One lane, and all that happened in it."""

    rows: NDArray[np.void]  # spepolicy.machine.trace.LOG[n], by host time
    result: Result  # of this lane; only the fields of the log itself differ from a run without it


def joined(parts: Sequence[Result], seconds: float) -> Result:
    """Put the chunks of one scenario together. Lanes that an interruption left out are not in the result."""
    offset = 0
    windows = []
    for part in parts:
        rows = part.windows.copy()
        rows["lane"] += offset
        offset += len(part.replicates)
        windows.append(rows)
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in PER_LANE}
    return replace(
        parts[0],
        windows=np.concatenate(windows),
        samples=sum(part.samples for part in parts),
        seconds=seconds,
        busy_s=sum(part.busy_s for part in parts),
        hook_s=sum(part.hook_s for part in parts),
        **arrays,
    )
