"""The simulate driver: run lanes by clocks and random rates, and call the policy's hooks once per batch.

Lanes are cut into chunks; a worker thread runs one chunk after the other on one machine. It runs the compiled machine
on its chunk, without the interpreter lock, until every lane waits for the policy or is done; then it calls each hook
once for all lanes that wait for it, and goes on. Hooks of different chunks may interleave where a tool runs compiled
code. Policies keep all that they remember in `vcpus.state`, so neither that nor the chunk that a lane is in can change
its result.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.drivers.hooks import behaviour_of, call_hook
from spepolicy.drivers.result import KEPT, WINDOW_ROW, LaneLog, Result, joined
from spepolicy.errors import ConfigurationError, UnsupportedPolicyError
from spepolicy.machine import pinning
from spepolicy.machine.build import (
    Behaviour,
    allocate,
    bytes_per_lane,
    reset,
    shape_of,
    share,
    shared_key,
)
from spepolicy.machine.fields import WINDOW
from spepolicy.machine.lane import run_lanes, start_lanes
from spepolicy.machine.rows import context
from spepolicy.machine.scenario import Scenario
from spepolicy.machine.state import Hook, Machine
from spepolicy.machine.trace import LOG
from spepolicy.platforms import why_unsupported

Ints = NDArray[np.int64]

# Enough lanes to spread the cost of a hook call over; few enough that a worker's page tables stay in memory that it has
# touched before. Of 64, 128, 256 and 512 lanes, 256 was the fastest for eager_pin (samples a second of CPU time: 18.7,
# 20.6, 22.8 and 16.1 M), and no other policy lost by it.
CHUNK_LANES = 256
_NONE, _LOG_FULL, _VM_DESTROYED = int(Hook.NONE), int(Hook.LOG_FULL), int(Hook.VM_DESTROYED)


@dataclass(frozen=True)
class Piece:
    """Lanes of one scenario."""

    scenario: Scenario
    replicates: Ints  # [n]


class _Chunk:
    """Some lanes of one policy on one machine, from start to end."""

    def __init__(self, run: Runner, m: Machine, pieces: Sequence[Piece]) -> None:
        self.run, self.m, self.handle = run, m, context(m)
        self.pieces = pieces
        first = 0
        for piece in pieces:
            reset(m, piece.scenario, piece.replicates, run.behaviour, first)
            first += len(piece.replicates)
        self.lanes = np.arange(first, dtype=np.int64)
        state = getattr(run.policy, "State", np.dtype([]))
        self.rows = np.zeros((first, pieces[0].scenario.guest.vcpus), dtype=state)
        self.windows: list[NDArray[np.void]] = []
        self.busy_s = self.hook_s = 0.0  # CPU time: see Result

    def execute(self) -> None:
        """Run all lanes to their end, or until the run is being stopped."""
        begin = time.thread_time()
        waiting = self.lanes
        start_lanes(self.handle, waiting)
        while len(waiting) and not self.run.stopping:
            run_lanes(self.handle, waiting)
            waiting = self.answer(waiting)
        self.collect_windows(self.lanes)
        pinning.release_all(self.handle, self.lanes)
        self.busy_s = time.thread_time() - begin

    def collect_windows(self, lanes: Ints) -> None:
        """Move the window logs of *lanes* out of the machine."""
        for i in lanes[self.m.vm["window_count"][lanes] > 0]:
            rows = self.m.window[i, : self.m.vm["window_count"][i]]
            out = np.zeros(len(rows), dtype=WINDOW_ROW)
            out["lane"] = i
            for field in WINDOW.names or ():
                out[field] = rows[field]
            self.windows.append(out)
            self.m.vm["window_count"][i] = 0

    def answer(self, lanes: Ints) -> Ints:
        """Call the hooks that *lanes* wait for, once each; return the lanes that have to run on."""
        waiting = self.m.vm["hook"][lanes]
        for value in sorted(set(waiting.tolist())):
            at_hook = lanes[waiting == value]
            if value == _LOG_FULL:
                self.collect_windows(at_hook)
            elif value != _NONE:
                self.call(Hook(value), at_hook)
        self.m.vm["hook"][lanes] = _NONE
        unfinished: Ints = lanes[(self.m.vm["finished"][lanes] == 0) | (waiting == _VM_DESTROYED)]
        return unfinished

    def call(self, hook: Hook, lanes: Ints) -> None:
        """Call one hook for one batch, and see that the contract was kept."""
        begin = time.thread_time()
        call_hook(self.run.manager, self.run.name, self.m, self.handle, self.rows, hook, lanes)
        self.hook_s += time.thread_time() - begin


class Runner:
    """One policy, ready to run chunks of lanes; any number of threads may call `run` at once, each with its own
    `Machines`.
    """

    def __init__(self, policy: object, name: str) -> None:
        from spepolicy.plugins import make_plugin_manager

        self.policy, self.name = policy, name
        self.manager = make_plugin_manager(policy, ())
        self.behaviour = behaviour_of(policy, self.manager)
        self.stopping = False
        self.running: dict[int, _Chunk] = {}  # by thread
        self.memory: dict[str, int] = {}

    def run(self, pieces: Sequence[Piece], machines: Machines) -> list[Result]:
        """Run the lanes of all *pieces* side by side and return a result a piece.

        The pieces agree in `spepolicy.machine.build.shared_key`; otherwise their scenarios may differ, and no lane can
        tell who is beside it. If `stopping` becomes true meanwhile, lanes are left unfinished (`Result.finished`).
        """
        for piece in pieces:
            reason = self.why_unsupported(piece.scenario)
            if reason is not None:
                raise UnsupportedPolicyError(self.name, reason)
        begin = time.perf_counter()
        with np.errstate(over="ignore"):
            m = machines.fitting(pieces, self.behaviour)
            self.memory = bytes_per_lane(m)
            chunk = _Chunk(self, m, pieces)
            me = threading.get_ident()
            self.running[me] = chunk
            try:
                chunk.execute()
            finally:
                del self.running[me]
        return _results(chunk, time.perf_counter() - begin)

    def why_unsupported(self, scenario: Scenario) -> str | None:
        """Return the policy's reason not to run on the machine of *scenario*, or None: hook `supports`."""
        return why_unsupported(self.manager, scenario, self.name)

    def guest_ps_under_way(self) -> float:
        """Return how much guest time has passed in the chunks that are running, summed over lanes."""
        return sum(float(c.m.vcpu["now_ps"][c.lanes].mean(axis=1).sum()) for c in list(self.running.values()))


class Machines:
    """The machine of one worker, kept from chunk to chunk: fresh memory costs more than its layout."""

    def __init__(self, log_rows: int = 0) -> None:
        """*log_rows*: room in the event log of each lane."""
        self._log_rows = log_rows
        self._kept: Machine | None = None
        self._shape: tuple[int, ...] = ()

    def fitting(self, pieces: Sequence[Piece], behaviour: Behaviour) -> Machine:
        """Return a machine with room for all lanes of *pieces*; it is valid until the next call."""
        scenario = pieces[0].scenario
        lanes = sum(len(piece.replicates) for piece in pieces)
        assert len({shared_key(piece.scenario) for piece in pieces}) == 1, "pieces of a chunk do not fit together"
        shape = shape_of(scenario)
        if self._kept is not None and shape == self._shape and len(self._kept.par) >= lanes:
            self._kept = share(self._kept, scenario)
        else:
            self._kept = None  # before the next is made: there is memory for one
            self._kept, self._shape = allocate(scenario, behaviour, lanes, self._log_rows), shape
        return self._kept

    def log(self) -> NDArray[np.int64]:
        """Return the event logs that the last chunk left: int64[lanes, log_rows, 5], valid until the next chunk."""
        assert self._kept is not None, "no chunk has run"
        return self._kept.log


def _results(chunk: _Chunk, seconds: float) -> list[Result]:
    """Cut what a chunk left behind into one result a piece. The time is shared out by lanes."""
    m, run = chunk.m, chunk.run
    windows = np.concatenate(chunk.windows) if chunk.windows else np.zeros(0, dtype=WINDOW_ROW)
    windows = windows[np.lexsort((windows["start_host_ps"], windows["vcpu"], windows["lane"]))]
    results = []
    first = 0
    for piece in chunk.pieces:
        end = first + len(piece.replicates)
        part = len(piece.replicates) / len(chunk.lanes)
        kept = {name: getattr(m, name)[first:end].copy() for name in KEPT}
        begin_row, end_row = np.searchsorted(windows["lane"], (first, end))
        mine = windows[begin_row:end_row].copy()
        mine["lane"] -= first
        results.append(
            Result(
                policy=run.name,
                scenario=piece.scenario,
                replicates=piece.replicates,
                windows=mine,
                finished=kept["vm"]["finished"] != 0,
                host_elapsed_ps=(kept["vcpu"]["now_ps"] + kept["vcpu"]["host_ps"]).max(axis=1),
                samples=int(kept["truth"]["selected"].sum()),
                seconds=seconds * part,
                memory=run.memory,
                busy_s=chunk.busy_s * part,
                hook_s=chunk.hook_s * part,
                **kept,
            )
        )
        first = end
    return results


def chunks_of(pieces: Sequence[Piece], lanes: int) -> list[list[Piece]]:
    """Cut *pieces* into chunks of at most *lanes* lanes that can run side by side, in the order of the pieces."""
    together: dict[tuple[Any, ...], list[list[Piece]]] = {}
    room: dict[tuple[Any, ...], int] = {}
    for piece in pieces:
        key = shared_key(piece.scenario)
        begin = 0
        while begin < len(piece.replicates):
            if not room.get(key):
                together.setdefault(key, []).append([])
                room[key] = lanes
            part = piece.replicates[begin : begin + room[key]]
            together[key][-1].append(Piece(piece.scenario, part))
            begin += len(part)
            room[key] -= len(part)
    return [chunk for chunks in together.values() for chunk in chunks]


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
    Raises HookError if the policy breaks the contract, ConfigurationError for no replicates.
    """
    if len(replicates) == 0:
        raise ConfigurationError("replicates is empty. Rule: at least one lane.")
    threads = threads or len(os.sched_getaffinity(0))
    begin = time.perf_counter()
    runner = Runner(policy, name)
    order = np.asarray(replicates, dtype=np.int64)
    size = min(CHUNK_LANES, -(-len(order) // threads))
    todo = iter(enumerate(chunks_of([Piece(scenario, order)], size)))
    parts: list[tuple[int, Result]] = []
    interrupted = False
    told = 0.0

    def work() -> None:
        machines = Machines()
        while not runner.stopping and (item := next(todo, None)) is not None:
            parts.append((item[0], runner.run(item[1], machines)[0]))

    def share_done() -> float:
        done = float(sum(len(part.replicates) for _, part in list(parts)))
        return (done + runner.guest_ps_under_way() / scenario.duration_ps) / len(order)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        pending = {pool.submit(work) for _ in range(threads)}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if progress is not None:
                    told = max(told, share_done())  # a chunk that just ended is for a moment in neither sum
                    progress(told)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            runner.stopping = True
    if not parts:
        raise KeyboardInterrupt
    result = joined([part for _, part in sorted(parts, key=lambda item: item[0])], time.perf_counter() - begin)
    if not interrupted and (len(result.replicates) != len(order) or not result.finished.all()):
        raise AssertionError("a lane ended without reaching its duration: this is a bug in spepolicy.machine")
    return result


def record_lane(scenario: Scenario, policy: object, *, name: str, replicate: int, capacity: int = 1 << 16) -> LaneLog:
    """Run *policy* on one lane again, with its event log on, and return every row of it.

    A lane is a function of configuration and seed, so this is the very lane of `simulate` with the same *replicate*.
    capacity: rows to make room for (40 bytes each). Where more happen, the lane is run once more with room for all.
    Raises HookError if the policy breaks the contract, ConfigurationError for a capacity below 1.
    """
    if capacity < 1:
        raise ConfigurationError(f"capacity is {capacity}. Rule: at least one row. Remedy: leave it out.")
    while True:
        machines = Machines(log_rows=capacity)
        result = Runner(policy, name).run([Piece(scenario, np.array([replicate]))], machines)[0]
        count = int(result.vm["log_count"][0])
        if count <= capacity:
            rows = machines.log()[0, :count].view(LOG)[:, 0]
            return LaneLog(rows[np.argsort(rows["host_ps"], kind="stable")], result)
        capacity = count
