"""A trace on the timeline: the machine's event log of each step, in Perfetto's format (https://ui.perfetto.dev).

An exploration has no clock, so steps are put a millisecond apart, and what happens within a step is where KVM's costs
put it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spepolicy.explore.acts import Act, Aux, Event
from spepolicy.explore.bench import Bench, Model
from spepolicy.explore.image import VM_FIELDS
from spepolicy.explore.properties import KINDS, property_of
from spepolicy.explore.trace import Step, told
from spepolicy.machine.migration import Phase
from spepolicy.machine.state import NEVER
from spepolicy.machine.trace import HOST, LOG, LogKind

__all__ = ["STEP_PS", "log_of", "write_trace"]

STEP_PS = 1_000_000_000
_ROWS = 1024  # of one step: far more than a hook's tools and a driver's segment write
_LAST_PS = STEP_PS - 1_000_000  # where a step's outcome is shown

Rows = NDArray[np.void]


def log_of(model: Model, events: Iterable[Event]) -> tuple[Rows, list[Step]]:
    """Run *events*, all of which can happen, once more and return (rows of the event log, the steps as told)."""
    bench = Bench(model, 1, _ROWS)
    bench.put(bench.base)
    state = _Shown(bench)
    rows: list[Rows] = [state.changes(0)]
    steps: list[Step] = []
    first = int(bench.base[bench.image.offset("vm") + VM_FIELDS.index("log_count")])
    for number, event in enumerate(events, 1):
        actor, text = told(bench, event)
        acted = _acted(bench, event)
        bits, _hooks = bench.step(event)
        count = int(bench.m.vm["log_count"][0])
        assert first <= count <= _ROWS
        logged = bench.m.log[0, first:count].view(LOG)[:, 0].copy()
        # What the host does has the time of its next event, which an exploration does not have.
        logged["host_ps"] = np.where(logged["host_ps"] >= NEVER, 0, logged["host_ps"]) + number * STEP_PS
        rows += [acted, logged] if len(acted) else [logged]
        if len(acted):
            acted["host_ps"] = number * STEP_PS
        rows.append(state.changes(number * STEP_PS + _LAST_PS))
        steps.append(Step(event, True, actor, text, kinds=tuple(kind for kind in KINDS if bits >> kind & 1)))
    return np.concatenate(rows), steps


def _row(kind: LogKind, vcpu: int, host_ps: int, detail: int, a: int = 0, b: int = 0) -> Rows:
    row = np.zeros(1, dtype=LOG)
    row["kind"], row["vcpu"], row["host_ps"], row["detail"], row["a"], row["b"] = kind, vcpu, host_ps, detail, a, b
    return row


def _acted(bench: Bench, event: Event) -> Rows:
    """Return the row of what a simulation's host would have logged of *event*, which has not happened yet."""
    if event.act is not Act.HOST:
        return np.zeros(0, dtype=LOG)
    page = bench.target(event)
    return _row(LogKind.HOST_OP, HOST, 0, event.a, page, page + 1)


class _Shown:
    """What of lane 0 is shown as slices: what each vCPU executes, whether it is sampled, and blackouts."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.before: dict[tuple[LogKind, int], tuple[int, ...] | None] = {}

    def changes(self, at_ps: int) -> Rows:
        """Return the rows of what has changed."""
        m, found = self.bench.m, [np.zeros(0, dtype=LOG)]
        for k in range(self.bench.image.vcpus):
            v = m.vcpu[0, k]
            black = int(self.bench.aux[0, Aux.BLACK]) >> k & 1
            executes = (int(v["segment"]), int(v["level"]), int(v["distribution"]) | int(v["task"]) << 16)
            now: dict[tuple[LogKind, int], tuple[int, ...] | None] = {
                (LogKind.SEGMENT, k): executes,
                (LogKind.PROFILING, k): (int(self.bench.may_write(k)),),
                (LogKind.BLACK, k): (int(v["stop_cause"]),) if black else None,
            }
            for (kind, _), value in now.items():
                old = self.before.get((kind, k))
                if value == old:
                    continue
                if value is not None:
                    found.append(_row(kind, k, at_ps, *value))
                elif old is not None:
                    found.append(_row(LogKind.LIGHT, k, at_ps, *old))
            self.before |= now
        phase = (int(m.vm["migration_phase"][0]),)
        if phase != self.before.get((LogKind.MIGRATED, HOST), (Phase.WAITING,)):
            found.append(_row(LogKind.MIGRATED, HOST, at_ps, *phase))
            self.before[LogKind.MIGRATED, HOST] = phase
        return np.concatenate(found)


def write_trace(path: Path, model: Model, events: Iterable[Event], title: str) -> Path:
    """Write the trace *events* of *model* to *path* as a timeline, with a track of its numbered steps; return *path*.

    Raises OutputError if the file cannot be written.
    """
    from spepolicy.lab import timeline

    rows, steps = log_of(model, events)
    found = timeline.events(rows, model.scenario.workload)
    for number, step in enumerate(steps, 1):
        begin = number * STEP_PS
        facts: dict[str, str | int] = {"who": step.actor, "what": step.text}
        facts |= {f"breaks {property_of(kind).name}": KINDS[kind].text for kind in step.kinds}
        name = f"{number}. {step.actor}: {step.text}"
        found.append(timeline.Event(begin, HOST, "steps", "begin", name, facts))
        found.append(timeline.Event(begin + STEP_PS - 1000, HOST, "steps", "end", "", {}))
    found.sort(key=lambda event: event.ps)
    return timeline.write_events(path, found, title)
