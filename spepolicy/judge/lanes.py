"""Choosing lanes of a `Result`: those that finished, those that two policies share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.drivers.result import PER_LANE, Result

__all__ = ["Floats", "finished_lanes", "lane_sum", "ratio", "take_lanes", "vcpu_host_ps"]

Floats = NDArray[np.float64]


def take_lanes(result: Result, index: NDArray[np.int64]) -> Result:
    """Return *result* with the lanes of *index* only, in that order. Windows follow their lanes and are renumbered.

    `samples`, `seconds` and `memory` describe the whole simulation and stay as they are.
    """
    index = np.asarray(index, dtype=np.int64)
    number = np.full(len(result.replicates), -1, dtype=np.int64)
    number[index] = np.arange(len(index))
    windows = result.windows[number[result.windows["lane"]] >= 0].copy()
    windows["lane"] = number[windows["lane"]]
    windows = windows[np.argsort(windows["lane"], kind="stable")]
    return replace(result, windows=windows, **{name: getattr(result, name)[index] for name in PER_LANE})


def finished_lanes(result: Result) -> Result:
    """Return *result* without the lanes that an interrupt stopped: their sums are of unequal guest time."""
    if bool(np.all(result.finished)):
        return result
    return take_lanes(result, np.flatnonzero(result.finished))


def lane_sum(result: Result, name: str) -> NDArray[np.int64]:
    """Return field *name* of TRUTH summed over the vCPUs: int64[N], unit of the field."""
    total: NDArray[np.int64] = result.truth[name].sum(axis=1)
    return total


def vcpu_host_ps(result: Result) -> NDArray[np.int64]:
    """Return the host time that the vCPUs took, summed over the vCPUs of a lane: int64[N], ps.

    A vCPU's host time is its guest time (`VCPU.now_ps`) plus what exits, traps and preemptions took (`VCPU.host_ps`).
    """
    total: NDArray[np.int64] = (result.vcpu["now_ps"] + result.vcpu["host_ps"]).sum(axis=1)
    return total


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """Return part / whole as float64, NaN where whole is 0: not defined, which is not the same as 0."""
    quotient: Floats = np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
    return quotient
