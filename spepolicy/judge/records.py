"""The laws that every lane obeys. A violation is a bug of the machine or the driver, never the user's fault.

Records: every selected sample ends in exactly one place,

    selected = collided + filtered + kept + sum(lost, by cause) + discarded + in_flight,

and further: what was kept is what the profile shows, and wanted time is active time plus blackout, of which the windows
are the parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spepolicy.judge.lanes import finished_lanes
from spepolicy.machine.state import LOST_CAUSES, LostCause

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result

__all__ = ["ConservationError", "check_conservation", "check_profile", "check_time"]


class ConservationError(AssertionError):
    """A sum that must hold exactly does not. Attributes: `policy`, `lane`, `replicate`, `vcpu`, `terms`."""

    def __init__(
        self, law: str, policy: str, lane: int, replicate: int, vcpu: int, terms: dict[str, int], wrong: int
    ) -> None:
        self.policy, self.lane, self.replicate, self.vcpu, self.terms = policy, lane, replicate, vcpu, terms
        listed = ", ".join(f"{name}={value}" for name, value in terms.items())
        super().__init__(
            f"{law} does not hold under policy '{policy}' in lane {lane} (replicate {replicate}), vCPU {vcpu}: "
            f"{listed}. "
            f"{wrong} vCPUs are affected. This is a bug in spepolicy: please report it with the configuration and the "
            f"seed."
        )


def check_conservation(result: Result) -> None:
    """Raise `ConservationError` unless the records law holds for every vCPU of every finished lane."""
    result = finished_lanes(result)
    truth = result.truth
    terms = {name: truth[name] for name in ("selected", "collided", "filtered", "kept")}
    terms |= {f"lost_{cause.name.lower()}": result.lost[:, :, cause] for cause in LostCause}
    terms |= {name: truth[name] for name in ("discarded", "in_flight")}
    _require_sum("records: selected = collided + filtered + kept + lost + discarded + in_flight", result, terms)


def check_profile(result: Result) -> None:
    """Raise `ConservationError` unless kept = records by function summed, for every vCPU of every finished lane."""
    result = finished_lanes(result)
    _require_sum("profile: kept = sum of seen", result, {"kept": result.truth["kept"], "seen": result.seen.sum(axis=2)})


def check_time(result: Result) -> None:
    """Raise `ConservationError` unless wanted = active + blackout, and each cause's blackout is that of its windows."""
    result = finished_lanes(result)
    terms = {name: result.truth[name] for name in ("wanted_ps", "active_ps")}
    terms |= {f"blackout_{cause.name.lower()}_ps": result.blackout_ps[:, :, cause] for cause in LostCause}
    _require_sum("time: wanted = active + blackout", result, terms)
    logged = np.zeros_like(result.blackout_ps)
    windows = result.windows
    np.add.at(logged, (windows["lane"], windows["vcpu"], windows["cause"]), windows["length_ps"])
    for cause in range(LOST_CAUSES):
        name = LostCause(cause).name.lower()
        pair = {f"blackout_{name}_ps": result.blackout_ps[:, :, cause], "windows_ps": logged[:, :, cause]}
        _require_sum(f"time: blackout of cause {name} = sum of its windows", result, pair)


def _require_sum(law: str, result: Result, terms: dict[str, NDArray[np.int64]]) -> None:
    """The first term [N, V] is the sum of the others, and none is negative."""
    total, *parts = terms.values()
    wrong = total != np.sum(parts, axis=0)
    for term in terms.values():
        wrong |= term < 0
    if not wrong.any():
        return
    lane, vcpu = (int(i) for i in np.argwhere(wrong)[0])
    raise ConservationError(
        law,
        result.policy,
        lane,
        int(result.replicates[lane]),
        vcpu,
        {name: int(term[lane, vcpu]) for name, term in terms.items()},
        int(wrong.sum()),
    )
