"""What a sweep is about to do, told before it starts: how many lanes, about how long, about how much memory.

The time comes from a trial: a lane of every policy, at most a few milliseconds of guest time, on this machine and now.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spepolicy.lab.sweep.identity import PolicyChoice
from spepolicy.lab.sweep.jobs import Configuration
from spepolicy.units import format_size

__all__ = ["Estimate", "estimate", "listing"]

_TRIAL_PS = 5_000_000_000  # guest time of a trial lane
_TRIALS = 12  # policies tried; the others are taken to be as fast as the slowest of them
_TASK_S = 2.0  # a task should last about so long: often enough stored and told, seldom enough that it costs nothing


@dataclass(frozen=True)
class Estimate:
    """What the trial said."""

    lane_s: float  # seconds a lane, the slowest policy
    total_s: float  # with all workers
    lane_bytes: int  # memory a lane, the largest

    def task_lanes(self, lanes: int, workers: int) -> int:
        """Return how many of *lanes* lanes a task should have."""
        from spepolicy.drivers.simulate import CHUNK_LANES

        by_time = int(_TASK_S / max(self.lane_s, 1e-6))
        return max(1, min(CHUNK_LANES, by_time, -(-lanes // workers)))


def estimate(configurations: Sequence[Configuration], missing: Mapping[str, int], workers: int) -> Estimate:
    """Try a lane of every policy. *missing*: configuration key -> lanes to be computed."""
    import numpy as np

    from spepolicy.drivers.simulate import Machines, Piece, Runner
    from spepolicy.machine.build import shape_of

    machines = Machines()
    lane_s: dict[PolicyChoice, float] = {}
    sizes: dict[tuple[int, ...], int] = {}
    for configuration in configurations:
        choice, scenario = configuration.policy, configuration.scenario
        shape = shape_of(scenario)
        if (choice in lane_s or len(lane_s) >= _TRIALS) and shape in sizes:
            continue
        short = replace(scenario, duration_ps=min(scenario.duration_ps, _TRIAL_PS))
        try:
            runner = Runner(choice.build(), choice.name)
            runner.run([Piece(short, np.arange(1))], machines)  # the first touches fresh memory, which is not typical
            started = time.perf_counter()
            runner.run([Piece(short, np.arange(1, 3))], machines)
        except Exception:  # its job will fail and say why; the estimate is of the others
            continue
        took = (time.perf_counter() - started) / 2
        lane_s[choice] = max(took * scenario.duration_ps / short.duration_ps, lane_s.get(choice, 0.0))
        sizes[shape] = sum(runner.memory.values())
    slowest = max(lane_s.values(), default=0.0)
    total = sum(missing[c.key] * lane_s.get(c.policy, slowest) for c in configurations)
    return Estimate(slowest, total / workers, max(sizes.values(), default=0))


def listing(
    configurations: Sequence[Configuration], jobs: int, stored: int, expected: Estimate, workers: int, task_lanes: int
) -> str:
    """Return the text that the sweep begins with."""
    lanes = sum(configuration.size() for configuration in configurations)
    chosen = sum(configuration.role == "chosen" for configuration in configurations)
    memory = expected.lane_bytes * min(task_lanes, max(1, lanes)) * workers
    policies = ", ".join(dict.fromkeys(configuration.policy.name for configuration in configurations))
    have = f" ({stored:,} of them are in the store)" if stored else ""
    beside = len(configurations) - chosen
    return (
        f"{jobs:,} jobs: {chosen:,} configurations and {beside:,} baselines, {lanes:,} lanes{have}\n"
        f"policies: {policies}\n"
        f"about {_duration(expected.total_s)} and {format_size(_rounded(memory))} of memory for lanes"
    )


def _rounded(size: int) -> int:
    """Return *size* to about two digits, in whole MiB."""
    mib = max(1, round(size / (1 << 20)))
    return mib << 20 if mib < 1024 else round(mib / 1024, 1).__ceil__() << 30


def _duration(seconds: float) -> str:
    if seconds < 1.5:
        return "1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
