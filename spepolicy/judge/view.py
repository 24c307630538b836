"""A result as the metrics see it: sums over vCPUs, and what several metrics need, computed once."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from spepolicy.judge import blackout
from spepolicy.judge.fidelity import Fidelity, fidelity
from spepolicy.judge.lanes import Floats, lane_sum, ratio, vcpu_host_ps

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result

__all__ = ["View"]

_PS_PER_S = 1e12


class View:
    """A result of finished lanes beside the bare-metal one, with what several metrics need computed once."""

    def __init__(self, result: Result, bare_metal: Result | None) -> None:
        self.result = result
        self.bare_metal = bare_metal
        self.vm = result.vm

    def sum(self, name: str) -> Floats:
        """Field *name* of TRUTH, summed over vCPUs, as float64[N]."""
        return lane_sum(self.result, name).astype(np.float64)

    @cached_property
    def wanted_s(self) -> Floats:
        return self.sum("wanted_ps") / _PS_PER_S

    @cached_property
    def guest_s(self) -> Floats:
        total: Floats = self.result.vcpu["now_ps"].sum(axis=1) / _PS_PER_S
        return total

    @cached_property
    def host_s(self) -> Floats:
        return self.result.host_elapsed_ps / _PS_PER_S

    @cached_property
    def vcpu_host_ps(self) -> Floats:
        return vcpu_host_ps(self.result).astype(np.float64)

    @cached_property
    def windows(self) -> blackout.WindowLengths:
        return blackout.window_lengths(self.result)

    @cached_property
    def fidelity(self) -> Fidelity:
        return fidelity(self.result)

    @cached_property
    def missed_samples(self) -> Floats:
        return blackout.missed_samples(self.result)

    @cached_property
    def lost(self) -> Floats:
        total: Floats = self.result.lost.sum(axis=(1, 2)).astype(np.float64)
        return total

    @cached_property
    def missed_records(self) -> Floats:
        """Missed samples times the share of completed samples that became records: passed collision and filters."""
        completed = self.sum("selected") - self.sum("in_flight")
        passed = completed - self.sum("collided") - self.sum("filtered")
        share: Floats = np.where(completed > 0, ratio(passed, completed), 1.0)
        return self.missed_samples * share

    @cached_property
    def due_records(self) -> Floats:
        """Records that a machine without any gap would have given: kept + lost + discarded + missed records."""
        due: Floats = self.sum("kept") + self.lost + self.sum("discarded") + self.missed_records
        return due
