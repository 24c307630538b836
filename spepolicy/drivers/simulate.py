"""The simulate driver: run lanes by clocks and random rates, and call the policy's hooks once per batch.

Lanes are cut into chunks. Worker threads run the compiled machine on chunks without the interpreter lock; the calling thread takes each
chunk whose lanes all wait or are done, calls the hooks that they wait for, and hands the chunk back. So policy code never runs twice at a
time, and which chunk a lane is in cannot change its result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.batch import Vcpus, Vms, tools
from spepolicy.errors import HookError, SpePolicyError
from spepolicy.hookspecs import PolicySpec, Trap
from spepolicy.machine import toolbox
from spepolicy.machine.build import Behaviour, build_machine, bytes_per_lane
from spepolicy.machine.rows import context
from spepolicy.machine.lane import run_lanes, start_lanes
from spepolicy.machine.scenario import Scenario
from spepolicy.machine.state import WINDOW, Hook, Machine

Ints = NDArray[np.int64]

_HOOK_NAMES = {
    Hook.VM_CREATED: "vm_created",
    Hook.BUFFER_ENABLED: "buffer_enabled",
    Hook.PROFILING_ENABLED: "profiling_enabled",
    Hook.BUFFER_DISABLED: "buffer_disabled",
    Hook.STAGE2_FAULT: "stage2_fault",
    Hook.VM_DESTROYED: "vm_destroyed",
}
_CHUNKS_PER_THREAD = 2
_CHUNK_LANES = 512


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
    host_ops: Ints  # [N, 16]
    exposure_ps: Ints  # [N, V, D]
    seen: Ints  # [N, V, F]
    windows: NDArray[np.void]  # lane and WINDOW, in order of lane and time
    host_elapsed_ps: Ints  # [N]
    finished: NDArray[np.bool_]  # [N] False: interrupted before the end
    samples: int
    seconds: float
    memory: dict[str, int]


class _Kit:
    """The tools of `spepolicy.batch`, bound to the machine for the time of one hook."""

    def __init__(self, m: Machine, handle: Any) -> None:
        self._machine = m
        self._m = handle

    def register(self, name: str, lanes: Ints, vcpus: Ints) -> NDArray[np.uint64]:
        return self._machine.vcpu[name][lanes, vcpus].view(np.uint64)

    def walk_stage1(self, lanes: Ints, vcpus: Ints, lo: Ints, hi: Ints, pin_tables: bool) -> Ints:
        return toolbox.walk_stage1(self._m, lanes, vcpus, lo, hi, int(pin_tables))

    def pin_fresh(self, lanes: Ints, vcpus: Ints) -> Ints:
        return toolbox.pin_fresh(self._m, lanes, vcpus)

    def map_fresh(self, lanes: Ints, vcpus: Ints) -> Ints:
        return toolbox.map_fresh(self._m, lanes, vcpus)

    def unpin_previous(self, lanes: Ints, vcpus: Ints) -> None:
        toolbox.unpin_previous(self._m, lanes, vcpus)

    def unpin_current(self, lanes: Ints, vcpus: Ints) -> None:
        toolbox.unpin_current(self._m, lanes, vcpus)

    def pin_all(self, lanes: Ints, ignore_limit: bool) -> Ints:
        return toolbox.pin_all(self._m, lanes, int(ignore_limit))

    def inject(self, lanes: Ints, vcpus: Ints, event: int, data_loss: bool) -> None:
        toolbox.tell_guest(self._m, lanes, vcpus, event, int(data_loss))

    def resume(self, lanes: Ints, vcpus: Ints) -> None:
        toolbox.resume(self._m, lanes, vcpus)

    def claim(self, lanes: Ints, vcpus: Ints, causes: Ints) -> None:
        self._machine.vcpu["claim"][lanes, vcpus] = causes


def _implemented(policy: object) -> int:
    """Return the mask of `Hook` bits that *policy* implements (marked with hookimpl)."""
    mask = 0
    for hook, name in _HOOK_NAMES.items():
        if hasattr(getattr(policy, name, None), "spepolicy_impl"):
            mask |= 1 << hook
    return mask


def behaviour_of(policy: object, manager: Any) -> Behaviour:
    """Ask the policy's set-up hooks how KVM has to be set up for it."""
    traps = manager.hook.traps()
    keep = manager.hook.notifier_filter()
    virtualized = manager.hook.virtualization()
    traps = Trap.NONE if traps is None else traps
    if not isinstance(traps, Trap):
        raise HookError(f"policy '{_name(policy)}': traps() returned {traps!r}. Rule: a spepolicy.hookspecs.Trap or None.")
    if keep is not None and not isinstance(keep, int):
        raise HookError(f"policy '{_name(policy)}': notifier_filter() returned {keep!r}. Rule: a Notifier mask or None.")
    if virtualized not in (None, True, False):
        raise HookError(f"policy '{_name(policy)}': virtualization() returned {virtualized!r}. Rule: True, False or None.")
    return Behaviour(
        virtualized=virtualized is not False,
        trap_pmb=bool(traps & Trap.PMB),
        trap_pms=bool(traps & Trap.PMS),
        notifier_filter=int(keep or 0),
        hooks=_implemented(policy),
    )


def _name(policy: object) -> str:
    return type(policy).__name__


class _Run:
    """One call of `simulate`: the machine, the policy's state, and the chunks in flight."""

    def __init__(self, scenario: Scenario, policy: object, name: str, replicates: Sequence[int], threads: int) -> None:
        from spepolicy.plugins import make_plugin_manager

        self.name = name
        self.manager = make_plugin_manager(policy, ())
        self.m = build_machine(scenario, behaviour_of(policy, self.manager), replicates)
        self.handle = context(self.m)
        state = getattr(policy, "State", np.dtype([]))
        self.rows = np.zeros((len(replicates), scenario.guest.vcpus), dtype=state)
        self.windows: list[NDArray[np.void]] = []
        lanes = len(replicates)
        count = max(1, min(lanes, max(threads * _CHUNKS_PER_THREAD, -(-lanes // _CHUNK_LANES)))) if threads > 1 else 1
        self.chunks = [np.asarray(part, dtype=np.int64) for part in np.array_split(np.arange(lanes), count)]

    def run_chunk(self, lanes: Ints) -> None:
        """Run on a worker thread: no Python object of the policy is touched."""
        with np.errstate(over="ignore"):
            run_lanes(self.handle, lanes)

    def start_chunk(self, lanes: Ints) -> None:
        with np.errstate(over="ignore"):
            start_lanes(self.handle, lanes)
            run_lanes(self.handle, lanes)

    def collect_windows(self, lanes: Ints) -> None:
        """Move the window logs of *lanes* out of the machine."""
        for i in lanes[self.m.vm["window_count"][lanes] > 0]:
            rows = self.m.window[i, : self.m.vm["window_count"][i]]
            out = np.zeros(len(rows), dtype=[("lane", np.int64), *WINDOW.descr])
            out["lane"] = i
            for field in WINDOW.names or ():
                out[field] = rows[field]
            self.windows.append(out)
            self.m.vm["window_count"][i] = 0

    def answer(self, lanes: Ints) -> Ints:
        """Call the hooks that *lanes* wait for, once each; return the lanes that have to run on."""
        waiting = self.m.vm["hook"][lanes]
        self.collect_windows(lanes[waiting == Hook.LOG_FULL])
        for hook in _HOOK_NAMES:
            at_hook = lanes[waiting == hook]
            if len(at_hook):
                self.call(hook, at_hook)
        self.m.vm["hook"][lanes] = Hook.NONE
        return lanes[(self.m.vm["finished"][lanes] == 0) | (waiting == Hook.VM_DESTROYED)]

    def call(self, hook: Hook, lanes: Ints) -> None:
        """Call one hook for one batch, and see that the contract was kept."""
        name = _HOOK_NAMES[hook]
        vcpus = self.m.vm["hook_vcpu"][lanes]
        with tools(_Kit(self.m, self.handle)) as ticket:
            try:
                caller = getattr(self.manager.hook, name)
                if hook in (Hook.VM_CREATED, Hook.VM_DESTROYED):
                    caller(vms=Vms(ticket, lanes))
                else:
                    batch = Vcpus(ticket, lanes, vcpus, self.rows)
                    caller(**{"faults" if hook == Hook.STAGE2_FAULT else "vcpus": batch})
            except SpePolicyError as error:
                raise HookError(f"policy '{self.name}', hook {name}(): {error}") from error
            except Exception as error:
                raise HookError(
                    f"policy '{self.name}', hook {name}() raised {type(error).__name__}: {error}. "
                    "Remedy: fix the plugin; HYDRA_FULL_ERROR=1 shows where."
                ) from error
        if hook == Hook.STAGE2_FAULT:
            silent = self.m.vcpu["answered"][lanes, vcpus] == 0
            if silent.any():
                raise HookError(
                    f"policy '{self.name}', hook stage2_fault() left {int(silent.sum())} of {len(lanes)} faults without an answer. "
                    "Rule: every vCPU of the batch is resumed or told. Remedy: call faults.resume() or faults.inject(...)."
                )
            toolbox.score_claims(self.handle, lanes, vcpus)


def simulate(
    scenario: Scenario,
    policy: object,
    *,
    name: str,
    replicates: Sequence[int],
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """Run *policy* on one lane per replicate and return what happened.

    threads: worker threads, all cores by default. progress: called now and then with the share done, 0..1.
    On Ctrl-C the lanes that are done keep their results; `Result.finished` tells which.
    Raises HookError if the policy breaks the contract.
    """
    threads = threads or len(os.sched_getaffinity(0))
    begin = time.perf_counter()
    run = _Run(scenario, policy, name, replicates, threads)
    interrupted = False
    with ThreadPoolExecutor(max_workers=threads) as pool:
        pending: dict[Future[None], Ints] = {pool.submit(run.start_chunk, lanes): lanes for lanes in run.chunks}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    lanes = pending.pop(future)
                    future.result()
                    lanes = run.answer(lanes)
                    if len(lanes):
                        pending[pool.submit(run.run_chunk, lanes)] = lanes
                if progress is not None:
                    progress(float(run.m.vcpu["now_ps"].mean()) / scenario.duration_ps)
        except KeyboardInterrupt:
            interrupted = True
            wait(pending)
    return _result(run, scenario, name, replicates, time.perf_counter() - begin, interrupted)


def _result(run: _Run, scenario: Scenario, name: str, replicates: Sequence[int], seconds: float, interrupted: bool) -> Result:
    m = run.m
    every = np.arange(len(replicates), dtype=np.int64)
    run.collect_windows(every)
    toolbox.release_all(run.handle, every)
    windows = np.concatenate(run.windows) if run.windows else np.zeros(0, dtype=[("lane", np.int64), *WINDOW.descr])
    windows = windows[np.lexsort((windows["start_host_ps"], windows["vcpu"], windows["lane"]))]
    finished = m.vm["finished"] != 0
    if not interrupted and not finished.all():
        raise AssertionError("a lane ended without reaching its duration: this is a bug in spepolicy.machine")
    return Result(
        policy=name, scenario=scenario, replicates=np.asarray(replicates, dtype=np.int64), vm=m.vm, vcpu=m.vcpu, truth=m.truth,
        lost=m.lost, blackout_ps=m.blackout_ps, claims=m.claims, host_ops=m.host_ops, exposure_ps=m.exposure_ps, seen=m.seen,
        windows=windows, host_elapsed_ps=(m.vcpu["now_ps"] + m.vcpu["host_ps"]).max(axis=1), finished=finished,
        samples=int(m.truth["selected"].sum()), seconds=seconds, memory=bytes_per_lane(m),
    )


assert set(_HOOK_NAMES.values()) <= set(dir(PolicySpec))
