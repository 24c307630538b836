"""A fingerprint of the results: what fixed small configurations give, as digests that are kept in tests/data.

    python -m tests.properties.fingerprint [NAME ...]           # compare with what is kept, or a part of it
    python -m tests.properties.fingerprint refresh "what changed, and why"

`refresh` keeps the digests of today, and writes the words with the first digits of the fingerprint below "Results
changed" of CHANGELOG.md, where `test_fingerprint.py` looks for them.

A configuration is what a user types. Of each, four things are digested: the *trajectory* (every row of one lane's event
log, and the AUX area that perf in the guest gets), the *counters* of all lanes (what the judge reads), the *metrics*,
and the *errata*. All but the metrics are integers and text; of a metric nine digits count, for the last bits of a sum
of floats may depend on the processor. A counter that is 0 in every lane is left out, so that a field for something new
changes nothing here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spepolicy.drivers.result import LaneLog, Result
from spepolicy.drivers.simulate import record_lane, simulate
from spepolicy.judge.findings import find
from spepolicy.judge.metrics import measure
from spepolicy.machine.scenario import GuestDriver
from spepolicy.machine.trace import samples

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "tests" / "data" / "fingerprint.json"
CHANGELOG = ROOT / "CHANGELOG.md"
DIGITS = 12  # of the fingerprint, in the changelog

_SMALL = (
    "replicates=3 duration=3ms baselines=[] guest.buffer=64KiB guest.period=1024 "
    "guest.task_on=600us guest.task_off=80us guest.reader_latency=100us kvm.exit_interval=40us "
    "kvm.preempt_interval=500us kvm.preempt=50us"
)
_SILENT = f"host=silent {_SMALL}"
_BUSY = (
    "host=random host.ops.numa_scan.every=400us host.ops.numa_scan.pages=4096 host.ops.ksm.every=150us "
    "host.ops.reclaim.every=200us host.ops.fork.every=900us host.ops.move.every=150us"
)
CONFIGURATIONS: Mapping[str, str] = {
    "default": "+policy=eager_pin replicates=2 duration=5ms",
    "pin_vm on a silent host": f"+policy=pin_vm {_SILENT}",
    "eager_pin on a busy host": f"+policy=eager_pin {_BUSY} {_SMALL}",
    "pin_on_fault, two vCPUs": f"+policy=pin_on_fault guest.vcpus=2 {_BUSY} {_SMALL}",
    "map_on_fault, cut records": f"+policy=map_on_fault cpu=generic_variable {_BUSY} {_SMALL}",
    "synthetic_fault on 6.12": f"+policy=synthetic_fault host.kernel=6.12 host.backing=thp {_BUSY} {_SMALL}",
    "copy_buffer, filters": f"+policy=copy_buffer guest.filter.load=true guest.filter.min_latency=4 {_SMALL}",
    "pin_cache, new buffers": f"+policy=pin_cache guest.renew=1ms kvm.memlock=48KiB {_BUSY} {_SMALL}",
    "best_effort_pin, memlock": f"+policy=best_effort_pin kvm.memlock=12KiB {_BUSY} {_SMALL}",
    "hostile guest": f"+policy=pin_while_enabled guest=hostile {_SILENT}",
    "EL0 only, remapped": f"+policy=eager_pin guest=eret_remap guest.misbehaviour.remap.pages=4 {_SILENT}",
    "FreeBSD": f"+policy=pin_on_fault guest=freebsd {_BUSY} {_SMALL}",
    "Windows": "+policy=eager_pin guest=windows replicates=2 duration=5ms host=silent",
    "SPEv1p5, aborts": f"+policy=eager_pin cpu=maximal cpu.external_abort_every=200 workload=sqlite {_SILENT}",
    "the least SPE, per CPU": f"+policy=switch_only cpu=minimal guest=per_cpu workload=syscall_heavy {_BUSY} {_SMALL}",
    "measured SPE": f"+policy=mlock_finalize cpu=measured workload=lua_list host=overcommitted {_SMALL}",
    "pre-copy": f"+policy=eager_pin migration=precopy migration.start=500us migration.bandwidth=20000 "
                f"migration.max_downtime=50us migration.switch=50us migration.handling=report_dirty {_SILENT}",
    "post-copy": f"+policy=pin_on_fault migration=postcopy migration.start=500us migration.bandwidth=20000 "
                 f"migration.switch=50us migration.request=10us {_SMALL}",
    "a bug of KVM": f"+policy=eager_pin kvm.bug=skip_page kvm.bug_rate=0.05 guest.buffer_mapped=false {_SILENT}",
}  # fmt: skip

# Of a lane's memory, KVM and host: what the judge reads. The rest of its row is how the machine works.
_VM = (
    "pinned_pages", "pinned_peak_pages", "pinned_page_ps", "pin_refused", "stale_pins", "leaked_pins", "startup_ps",
    "notifier_ignored", "migration_begin_ps", "migration_end_ps", "migration_downtime_ps", "migration_round",
    "migration_resent", "migration_resent_buffer", "migration_outcome", "migration_refused", "migration_demanded",
    "migration_unlogged", "died",
)  # fmt: skip
_ARRAYS = ("lost", "blackout_ps", "claims", "host_ops", "exposure_ps", "seen", "host_elapsed_ps")


@cache
def composed(overrides: str) -> tuple[Any, str, Any, int]:
    """Return scenario, name of the policy, policy and replicates, as the command line has them."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from spepolicy.config import register
    from spepolicy.launch import build_plan, register_policies

    register()
    register_policies()
    with initialize_config_module("spepolicy_conf", version_base="1.3"):
        cfg = compose("config", overrides=overrides.split())
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    plan = build_plan({str(key): value for key, value in config.items()}, Path())
    return plan.scenario, plan.chosen, plan.policies[plan.chosen], plan.replicates


class Digest:
    """A hash of named numbers and texts, the same whatever type or byte order the numbers are kept in."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def text(self, *words: str) -> None:
        self._hash.update(json.dumps(words).encode())

    def integers(self, name: str, values: Any) -> None:
        """Take an integer array with its name and shape, unless it is 0 throughout; a structured one field by field."""
        values = np.asarray(values)
        if values.dtype.names:
            for field in sorted(values.dtype.names):
                self.integers(f"{name}.{field}", values[field])
        elif values.any():
            self.text(name, str(values.shape))
            self._hash.update(values.astype("<i8", casting="unsafe").tobytes())

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def counters(result: Result) -> str:
    """Return the digest of all that was counted in the lanes of *result*."""
    digest = Digest()
    digest.integers("truth", result.truth)
    digest.integers("windows", result.windows)
    for name in _ARRAYS:
        digest.integers(name, getattr(result, name))
    for name in _VM:
        digest.integers(name, result.vm[name])
    return str(digest)


def trajectory(log: LaneLog) -> str:
    """Return the digest of everything that happened in a lane, in order, and of what perf in its guest gets."""
    digest = Digest()
    for name in log.rows.dtype.names or ():
        digest.integers(name, log.rows[name])
    scenario = log.result.scenario
    if scenario.guest.driver == GuestDriver.LINUX:
        from spepolicy.perfdata.aux_area import aux_area

        for k in range(scenario.guest.vcpus):
            area = aux_area(log, samples(log.rows, scenario.workload), k, tid=None)
            digest.text(hashlib.sha256(area.content).hexdigest())
            digest.integers("handles", area.handles)
            digest.integers("reads", area.reads)
    return str(digest)


def _metrics(result: Result, bare_metal: Result) -> str:
    digest = Digest()
    for name, value in sorted(measure(result, bare_metal).values.items()):
        digest.text(name, f"{value:.9g}")
    return str(digest)


def _errata(result: Result, policy: object) -> str:
    from spepolicy.plugins import installed_reporters, make_plugin_manager

    manager = make_plugin_manager(policy, list(installed_reporters().values()))
    findings = find(result, virtualized=manager.hook.virtualization() is not False, hooks=())
    digest = Digest()
    for answer in manager.hook.report_errata(findings=findings):
        for erratum in sorted(answer or (), key=lambda erratum: erratum.id):
            if erratum.count:
                first = json.dumps(dict(erratum.first_trace or {}), sort_keys=True, default=int)
                digest.text(erratum.id, str(erratum.count), first)
    return str(digest)


def digests(overrides: str) -> dict[str, str]:
    """Return what one configuration gives."""
    from spepolicy_plugins.bare_metal import BareMetal

    scenario, name, policy, replicates = composed(overrides)
    result = simulate(scenario, policy, name=name, replicates=range(replicates))
    metal = simulate(scenario, BareMetal(), name="bare_metal", replicates=range(replicates))
    return {
        "trajectory": trajectory(record_lane(scenario, policy, name=name, replicate=0)),
        "counters": counters(result),
        "metrics": _metrics(result, metal),
        "errata": _errata(result, policy),
    }


def measured() -> dict[str, dict[str, str]]:
    """Return the digests of all configurations, by name."""
    return {name: digests(overrides) for name, overrides in CONFIGURATIONS.items()}


def fingerprint(table: Mapping[str, Mapping[str, str]]) -> str:
    """Return one digest of a table of digests."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def kept() -> dict[str, dict[str, str]]:
    """Return the digests that are kept."""
    table: dict[str, dict[str, str]] = json.loads(KEPT.read_text(encoding="utf-8"))
    return table


def differences(was: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a line for each configuration that gives something else."""
    lines = []
    for name in dict.fromkeys((*was, *now)):
        before, after = was.get(name, {}), now.get(name, {})
        parts = [part for part in (after or before) if before.get(part) != after.get(part)]
        if parts:
            lines.append(f"{name}: {', '.join(parts)}")
    return lines


REMEDY = (
    "The same configuration and seed give other results than before. If that is meant: run "
    '`python -m tests.properties.fingerprint refresh "what changed, and why"`, which '
    'writes a line below "Results changed" of CHANGELOG.md. If it is not, find the change that did it.'
)


def results_changed(text: str) -> Iterator[str]:
    """Yield the entries below the "Results changed" headings of a changelog, newest first."""
    for section in text.split("\n### Results changed\n")[1:]:
        body = section.partition("\n#")[0]
        for entry in body.split("\n- ")[1:]:
            yield " ".join(entry.split())


def refresh(words: str) -> None:
    """Keep the digests of today, and say in the changelog why they are others."""
    table = measured()
    changed = differences(kept() if KEPT.exists() else {}, table)
    if not changed:
        print("nothing has changed")
        return
    print("\n".join(changed))
    KEPT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    text = CHANGELOG.read_text(encoding="utf-8")
    heading = "\n### Results changed\n\n"
    if heading not in text:
        raise SystemExit(
            f"{CHANGELOG.name} has no heading 'Results changed' below [Unreleased]: add one, and run this again"
        )
    entry = f"- {words.strip()} (fingerprint `{fingerprint(table)[:DIGITS]}`)\n"
    CHANGELOG.write_text(text.replace(heading, heading + entry, 1), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Compare, or refresh; return the exit status."""
    if arguments[:1] == ["refresh"] and len(arguments) == 2 and arguments[1].strip():
        refresh(arguments[1])
        return 0
    if not CONFIGURATIONS.keys() >= set(arguments):
        print(__doc__, file=sys.stderr)
        return 2
    was = {name: parts for name, parts in kept().items() if not arguments or name in arguments}
    changed = differences(was, {name: digests(CONFIGURATIONS[name]) for name in arguments or CONFIGURATIONS})
    print("\n".join([*changed, REMEDY] if changed else [f"as kept: {fingerprint(kept())[:DIGITS]}"]))
    return bool(changed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
