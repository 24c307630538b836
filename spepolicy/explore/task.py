"""`task=explore`: from a composed configuration to a search, traces, scenario files, a table, and MLflow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from spepolicy.check import checked, checked_fields, group_at, value_at
from spepolicy.errors import ConfigurationError, UnsupportedPolicyError
from spepolicy.explore import scenario as files
from spepolicy.explore.acts import event_name
from spepolicy.explore.bench import Bench
from spepolicy.explore.model import Settings, make_model
from spepolicy.explore.properties import KINDS, Kind
from spepolicy.explore.report import Explored, matrix, summary, verdict_rows
from spepolicy.explore.search import INTERRUPTED, Bounds, Found, Outcome, Progress, search
from spepolicy.explore.timeline import write_trace
from spepolicy.explore.trace import replay, trace_text
from spepolicy.hookspecs import Cause
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Scenario
from spepolicy.schema import ExploreSettings, settings_of

__all__ = ["bounds_of", "explore", "settings_from"]

_GROUPS = ("explore", "cpu", "kvm", "host", "migration", "guest")
_LISTS = ("sessions", "tlbi", "host_ops", "host_targets", "compare")
_TEXTS = ("spill_dir", "resume")
_BOUNDS = ("max_states", "max_depth", "max_time", "frontier_memory")


def settings_from(config: Mapping[str, Any], scenario: Scenario) -> Settings:
    """Return the settings in the group `explore` of a plain configuration, checked, and what matters of *scenario*, the
    other groups' part.
    """
    values = group_at(config, "explore")
    rules = settings_of(ExploreSettings)
    chosen = checked_fields(values, ExploreSettings, "explore", special=(*_LISTS, *_TEXTS))
    lists = {
        name: tuple(dict.fromkeys(checked(value_at(values, name, "explore."), rules[name], f"explore.{name}")))
        for name in _LISTS
    }
    if chosen["guest"] == "linux" and not lists["sessions"]:
        raise ConfigurationError("explore.sessions=[]: perf opens no session. Rule: at least one, for example [el0].")
    if chosen["edits"] != "never" and not lists["tlbi"]:
        raise ConfigurationError("explore.tlbi=[]: edits need a TLBI or none. Rule: [with], [without] or both.")
    return Settings(
        **chosen,
        sessions=lists["sessions"],
        tlbi=tuple(name == "with" for name in lists["tlbi"]),
        host_ops=lists["host_ops"],
        host_targets=lists["host_targets"],
        paravirtual=scenario.guest.paravirtual,
        physical_buffer=scenario.guest.physical_buffer,
        cpu=scenario.cpu,
        irq_delivery=scenario.kvm.irq_delivery,
        bug=scenario.kvm.bug,
        backing=scenario.host.backing,
        kernel=scenario.host.kernel,
        migration=scenario.migration.kind,
        handling=scenario.migration.handling,
        migration_abort=scenario.migration.abort,
    )


def bounds_of(config: Mapping[str, Any]) -> Bounds:
    """Return the bounds in the group `explore`, checked."""
    values = group_at(config, "explore")
    rules = settings_of(ExploreSettings)
    found = {name: checked(value_at(values, name, "explore."), rules[name], f"explore.{name}") for name in _BOUNDS}
    return Bounds(
        max_states=found["max_states"],
        max_depth=found["max_depth"],
        max_seconds=found["max_time"] / 1e12,
        frontier_bytes=found["frontier_memory"],
    )


def explore(
    config: Mapping[str, Any],
    policies: Mapping[str, object],
    run_dir: Path,
    scenario: Scenario,
    threads: int,
    tracking: Any,
    say: Callable[[str], None],
) -> bool:
    """Explore each of *policies*, the chosen one first; write the run folder and track. Return True if interrupted.

    Raises `SpePolicyError` for whatever the user can correct.
    """
    from spepolicy.lab import output
    from spepolicy.lab.tracking import Tracker

    settings, bounds = settings_from(config, scenario), bounds_of(config)
    values = group_at(config, "explore")
    folder = output.open_folder(run_dir)
    start_ms = int(time.time() * 1000)
    tracker = None if tracking.kind == "none" else Tracker(tracking)
    explored: list[Explored] = []
    try:
        for name, policy in policies.items():
            say(f"exploring {name}")
            resume = values.get("resume")
            try:
                outcome = search(
                    make_model(settings, policy, name),
                    bounds,
                    threads=threads,
                    spill_dir=values.get("spill_dir"),
                    progress=_progress(say),
                    save_to=folder / _checkpoint(name),
                    resume_from=Path(resume) / _checkpoint(name) if resume else None,
                )
            except UnsupportedPolicyError as error:
                if not explored:
                    raise
                say(f"  left out: {error}")
                continue
            explored.append(_written(name, policy, outcome, settings, folder))
            if outcome.stopped_by == INTERRUPTED:
                break
        results = [output.write_json(folder / "exploration.json", _as_json(explored))]
        results.append(output.write_json(folder / output.CONFIG, dict(config)))
        text = summary(explored, settings, folder)
        results.append(output.write_text(folder / "exploration.txt", text + "\n"))
        results.append(output.write_text(folder / "properties.txt", matrix(explored)))
        say(text)
        if tracker is not None:
            tracked = tracker.write([_record(e, config, text, results, start_ms) for e in explored])
            say(f"mlflow: {tracked.ui_command() or ''}\n        {tracked.link()}")
    finally:
        if tracker is not None:
            tracker.__exit__(*sys.exc_info())
    return any(e.outcome.stopped_by == INTERRUPTED for e in explored)


def _checkpoint(name: str) -> str:
    return f"checkpoint-{name}.npz"


def _progress(say: Callable[[str], None]) -> Callable[[Progress], None] | None:
    """Return a line of progress every few seconds where somebody watches."""
    if not sys.stderr.isatty():
        return None
    last = [0.0]

    def show(p: Progress) -> None:
        if p.seconds - last[0] >= 2.0:
            last[0] = p.seconds
            say(
                f"  {p.seconds:6.0f} s  {p.states:,} states  {p.states / p.seconds:,.0f} states/s  depth {p.depth}  "
                f"frontier {p.waiting:,}  {p.found} kinds of violation"
            )

    return show


def detail_text(found: Found) -> str:
    """Return what tells traces of one kind apart, as text; empty where there is nothing to tell."""
    if found.added is not None:
        return found.added.name
    if KINDS[found.kind].by_host:
        return HostOp(found.detail).name.lower() if found.detail else ""
    return f"claims {Cause(found.detail).name}" if found.kind is Kind.IMPOSSIBLE_CLAIM else ""


def _written(name: str, policy: object, outcome: Outcome, settings: Settings, folder: Path) -> Explored:
    """Replay every trace and write it, as text and as a scenario file."""
    from spepolicy.lab import output

    bench = Bench(outcome.model, 1)
    traces: list[tuple[Found, str, Path]] = []
    for found in outcome.found:
        detail = detail_text(found)
        stem = "-".join(part.replace(" ", "_") for part in (name, found.kind.name.lower(), detail.lower()) if part)
        run = replay(bench, found.events, found.cycle)
        if found.rule.name not in run.broken():
            raise AssertionError(f"trace {stem} does not show its violation when it is run again: a bug in explore")
        title = f"{found.rule.name}: {found.text}{f' ({detail})' if detail else ''}, under {name}"
        text = trace_text(run, title, found.cycle)
        path = output.write_text(folder / f"{stem}.txt", text)
        fields = asdict(policy) if is_dataclass(policy) and not isinstance(policy, type) else {}
        content = files.Scenario(
            name=stem,
            title=title,
            source=f"found by task=explore; {found.rule.source}",
            settings=settings,
            events=tuple(event_name(event) for event in found.events),
            verdicts=(files.Verdict(name, tuple(run.broken()), fields),),
            repeats=found.cycle,
        )
        output.write_text(folder / f"{stem}.yaml", files.write(content))
        write_trace(folder / f"{stem}.pftrace", outcome.model, found.events, title)
        traces.append((found, text, path))
    return Explored(name, policy, outcome, traces)


def _as_json(explored: list[Explored]) -> dict[str, Any]:
    return {
        e.policy: {
            "states": e.outcome.states,
            "transitions": e.outcome.transitions,
            "depth": e.outcome.depth,
            "complete": e.outcome.complete,
            "stopped_by": e.outcome.stopped_by,
            "states_left": e.outcome.left,
            "states_by_depth": e.outcome.levels,
            "seconds": e.outcome.seconds,
            "cpu_seconds": e.outcome.cpu_seconds,
            "bytes_per_visited_state": e.outcome.bytes_per_state,
            "properties": dict(verdict_rows(e)),
            "violations": [
                {
                    "property": found.rule.name,
                    "kind": found.kind.name.lower(),
                    "detail": detail_text(found),
                    "steps": len(found.events),
                    "repeats": found.cycle,
                    "events": [event_name(event) for event in found.events],
                    "trace": path.name,
                }
                for found, _text, path in e.traces
            ],
        }
        for e in explored
    }


def _record(explored: Explored, config: Mapping[str, Any], text: str, results: list[Path], start_ms: int) -> Any:
    """Return the MLflow run of one policy."""
    from spepolicy.lab.tracking import RunRecord, flat_params

    outcome = explored.outcome
    steps: dict[str, float] = {}
    for found, _text, _path in explored.traces:
        key = f"steps_to_break/{found.rule.name}"
        steps[key] = min(steps.get(key, float("inf")), len(found.events))
    shown = {key: value for key, value in config.items() if key in _GROUPS}
    depths = outcome.levels[:: -(-len(outcome.levels) // 100) or 1]
    stride = -(-len(outcome.levels) // 100) or 1
    policy = explored.instance
    fields = asdict(policy) if is_dataclass(policy) and not isinstance(policy, type) else {}
    return RunRecord(
        name=f"explore {explored.policy}",
        tags={
            "policy": explored.policy,
            "task": "explore",
            "mlflow.source.name": "spepolicy",
            "mlflow.source.type": "LOCAL",
            "mlflow.note.content": f"```\n{text}\n```",
        },
        params={"policy": explored.policy} | flat_params(shown) | flat_params(fields, "policy."),
        metrics={
            "states": outcome.states,
            "transitions": outcome.transitions,
            "depth": outcome.depth,
            "complete": float(outcome.complete),
            "properties_broken": len(steps),
            "states_per_s": outcome.states / max(outcome.seconds, 1e-9),
            "bytes_per_visited_state": outcome.bytes_per_state,
            **steps,
        },
        series=[("states_by_depth", n * stride, float(count)) for n, count in enumerate(depths)],
        files=[str(path) for path in (*results, *(path for _f, _t, path in explored.traces))],
        status="KILLED" if outcome.stopped_by == INTERRUPTED else "FINISHED",
        start_ms=start_ms,
        end_ms=int(time.time() * 1000),
    )
