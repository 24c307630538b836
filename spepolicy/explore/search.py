"""Breadth-first search over the states of a model: levels, threads, bounds, and what was found.

A level is the set of states that are first reached by the same number of events. Its states are unfolded in units; any
number of threads may unfold, but units are inserted in their order, so numbers of states, traces and totals do not
depend on the threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from spepolicy.explore import expand as x
from spepolicy.explore.acts import Act, Event
from spepolicy.explore.added import AddedProperty, States, added_properties
from spepolicy.explore.bench import Bench, Model, Unfolded
from spepolicy.explore.checkpoint import fingerprint, load, save
from spepolicy.explore.frontier import Block, Frontier
from spepolicy.explore.properties import KINDS, Kind, Property, detail_of, property_of
from spepolicy.explore.visited import EVENT_BITS, Visited

Ints = NDArray[np.int64]

__all__ = ["INTERRUPTED", "Bounds", "Found", "Outcome", "Progress", "search"]

_UNIT = 2048  # states unfolded by one thread at a time: enough to spread the cost of calling hooks
VM_END = Event(Act.VM_END)
INTERRUPTED = "Ctrl-C"


@dataclass(frozen=True)
class Bounds:
    """Where the search ends if the states do not."""

    max_states: int = 20_000_000
    max_seconds: float = float("inf")
    max_depth: int = 1_000_000
    frontier_bytes: int = 2 << 30  # of the frontier in memory; the rest goes to disk


@dataclass(frozen=True)
class Found:
    """A violation, and the shortest way to it."""

    kind: Kind
    detail: int  # the host operation, or the claim: see properties.detail_of
    events: tuple[Event, ...]
    cycle: int = 0  # the last so many events repeat for ever
    added: AddedProperty | None = None  # by a plugin; else `kind` says which property it is

    @property
    def rule(self) -> Property:
        """The property that is broken."""
        if self.added is not None:
            return Property(self.added.name, self.added.rule, self.added.source, (Kind.ADDED,))
        return property_of(self.kind)

    @property
    def text(self) -> str:
        """How it is broken."""
        return f"{self.added.name} does not hold" if self.added is not None else KINDS[self.kind].text


@dataclass(frozen=True)
class Progress:
    """Where a search is."""

    states: int
    depth: int
    waiting: int  # states that have not been unfolded
    seconds: float
    found: int


@dataclass
class Outcome:
    """What a search found, and what it covered."""

    model: Model
    states: int = 0
    transitions: int = 0
    depth: int = 0  # all states that fewer events reach have been unfolded
    complete: bool = False  # no state is left
    stopped_by: str = ""  # the bound that ended the search
    left: int = 0  # states that were found and not unfolded
    found: list[Found] = field(default_factory=list)
    added: tuple[AddedProperty, ...] = ()  # what plugins have added to the properties
    levels: list[int] = field(default_factory=list)  # new states by depth
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_per_state: float = 0.0
    spilled_bytes: int = 0


class _Livelocks:
    """Steps on which a fault may come round, and the cycles among them."""

    def __init__(self) -> None:
        self.edges: list[Ints] = []

    def add(self, sources: Ints, events: Ints, targets: Ints) -> None:
        known = targets >= 0
        if known.any():
            self.edges.append(np.stack([sources[known], events[known], targets[known]], axis=1))

    def cycle(self) -> tuple[int, list[int]] | None:
        """Return (state, events) of the cycle that is reached first, None if there is none."""
        edges = np.concatenate(self.edges) if self.edges else np.zeros((0, 3), dtype=np.int64)
        while len(edges):  # drop what no cycle can hold: states that nothing enters, or nothing leaves
            keep = np.isin(edges[:, 0], edges[:, 2]) & np.isin(edges[:, 2], edges[:, 0])
            if keep.all():
                break
            edges = edges[keep]
        if not len(edges):
            return None
        edges = edges[np.lexsort((edges[:, 1], edges[:, 0]))]
        sources = edges[:, 0]
        state = int(sources[0])
        way: list[int] = []
        seen: dict[int, int] = {}
        while state not in seen:
            seen[state] = len(way)
            row = edges[np.searchsorted(sources, state)]
            way.append(int(row[1]))
            state = int(row[2])
        return state, way[seen[state] :]


class _Search:
    def __init__(self, model: Model, bounds: Bounds, threads: int, spill_dir: str | None) -> None:
        self.model, self.bounds, self.threads = model, bounds, threads
        self.visited = Visited(bounds.max_states)
        self.benches: SimpleQueue[Bench] = SimpleQueue()
        first = Bench(model)
        self.benches.put(first)
        for _ in range(threads):  # one more than threads: a result is inserted while the others work
            self.benches.put(Bench(model))
        self.outcome = Outcome(model)
        self.keys: set[tuple[Kind, int]] = set()
        self.livelocks = _Livelocks()
        self.spill_dir = spill_dir
        self.frontier, self.following = self._empty(), self._empty()
        self.done = 0  # states of the level that have been unfolded
        self.image, self.base = first.image, first.base
        self.added = added_properties(first.manager)
        self.outcome.added = self.added
        self.mark = fingerprint(model, first.base)
        start = np.zeros(first.image.map_words, dtype=np.int64)  # the initial state differs from itself in nothing
        self.visited.add_first(*first.hash_of(first.base))
        self.frontier.append(Block(start, np.zeros(1, dtype=np.int64), 0))

    def run(self, progress: Callable[[Progress], None] | None) -> Outcome:
        outcome, begin, cpu = self.outcome, time.monotonic(), time.process_time()
        if not outcome.levels:
            outcome.levels += [1, 0]
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            while len(self.frontier):
                if outcome.depth >= self.bounds.max_depth:
                    outcome.stopped_by = f"explore.max_depth={self.bounds.max_depth}"
                    break
                self._level(pool, begin, progress)
                if outcome.stopped_by:
                    break
                self.frontier.close()
                self.frontier, self.following = self.following, self._empty()
                self.done = 0
                outcome.depth += 1
                outcome.levels.append(0)
        while outcome.levels and outcome.levels[-1] == 0:
            outcome.levels.pop()
        if not outcome.stopped_by:
            outcome.complete = True
            outcome.depth = len(outcome.levels) - 1
        outcome.left = len(self.frontier) - self.done + len(self.following)
        self._find_livelock()
        outcome.states = self.visited.count
        outcome.seconds += time.monotonic() - begin
        outcome.cpu_seconds += time.process_time() - cpu
        outcome.bytes_per_state = self.visited.bytes_per_state()
        if progress is not None:
            progress(self._progress(outcome.seconds))
        return outcome

    def _empty(self) -> Frontier:
        return Frontier(self.bounds.frontier_bytes, self.spill_dir)

    def _level(self, pool: ThreadPoolExecutor, begin: float, progress: Callable[[Progress], None] | None) -> None:
        """Unfold what is left of the level, or stop at a bound."""
        outcome, told = self.outcome, 0.0
        try:
            for unit, result in self._unfolded(pool):
                whole = self._insert(unit, result)
                seconds = outcome.seconds + time.monotonic() - begin
                if not whole:
                    outcome.stopped_by = f"explore.max_states={self.bounds.max_states}"
                    break
                self.done += len(unit.starts)
                if progress is not None and seconds - told > 0.5:
                    told = seconds
                    progress(self._progress(seconds))
                if seconds > self.bounds.max_seconds and self.done < len(self.frontier):
                    outcome.stopped_by = f"explore.max_time={self.bounds.max_seconds:g}s"
                    break
        except KeyboardInterrupt:
            outcome.stopped_by = INTERRUPTED
        outcome.spilled_bytes = max(outcome.spilled_bytes, self.following.spilled_bytes)

    def _progress(self, seconds: float) -> Progress:
        outcome = self.outcome
        waiting = len(self.frontier) - self.done + len(self.following)
        return Progress(self.visited.count, outcome.depth, waiting, seconds, len(outcome.found))

    def _unfolded(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Block, Unfolded]]:
        """Yield the units of the level and their transitions, in order; the bench is free again when the next is asked
        for.
        """

        def work(unit: Block) -> tuple[Bench, Unfolded]:
            bench = self.benches.get()
            return bench, bench.unfold(self.visited, unit.words, unit.starts)

        units = self.frontier.units(_UNIT, self.done)
        under_way: list[tuple[Block, Future[tuple[Bench, Unfolded]]]] = []
        try:
            while True:
                while len(under_way) < self.threads and (unit := next(units, None)) is not None:
                    under_way.append((unit, pool.submit(work, unit)))
                if not under_way:
                    return
                unit, future = under_way.pop(0)
                bench, result = future.result()
                if (more := next(units, None)) is not None:
                    under_way.append((more, pool.submit(work, more)))
                yield unit, result
                self.benches.put(bench)
        finally:
            for _, future in under_way:
                self.benches.put(future.result()[0])

    def _insert(self, unit: Block, result: Unfolded) -> bool:
        """Insert the transitions of a unit. Return False if there was no room for all of their states."""
        count = result.transitions
        words = np.empty(result.words, dtype=np.int64)
        starts = np.empty(count, dtype=np.int64)
        position = np.zeros(2, dtype=np.int64)
        first = self.visited.count
        numbers = self.visited.insert(unit.first, result.out, count, result.blob, words, starts, position)
        used, states = int(position[0]), int(position[1])
        if states:
            block = Block(words[:used].copy(), starts[:states].copy(), first)
            self.following.append(block)
            self._check_added(block)
            self.outcome.levels[-1] += states
        rows = result.out[:count]
        self._note(unit, rows)
        if len(numbers) and numbers.min() < 0:
            return False  # the unit is to be unfolded again when the search goes on
        self.outcome.transitions += count
        stuck = np.flatnonzero(rows[:, x.STUCK])
        if len(stuck):
            self.livelocks.add(unit.first + rows[stuck, x.PARENT], rows[stuck, x.EVENT], numbers[stuck])
        return True

    def _note(self, unit: Block, rows: Ints) -> None:
        """Keep the first way to each kind of violation."""
        bad = np.flatnonzero(rows[:, x.KINDS])
        if not len(bad):
            return
        _, index = np.unique(rows[bad, x.KINDS] | (rows[bad, x.OP_CLAIM] << 32), return_index=True)
        for row in rows[bad[np.sort(index)]]:
            kinds, op_claim = int(row[x.KINDS]), int(row[x.OP_CLAIM])
            for kind in KINDS:
                if kinds >> kind & 1:
                    self._keep(kind, detail_of(kind, op_claim & 0xFF, op_claim >> 8), unit, row)

    def _keep(self, kind: Kind, detail: int, unit: Block, row: Ints) -> None:
        if (kind, detail) in self.keys:
            return
        self.keys.add((kind, detail))
        events = self._path(unit.first + int(row[x.PARENT]), int(row[x.EVENT]))
        if kind is Kind.LEAK:
            events = (*events, VM_END)
        self.outcome.found.append(Found(kind, detail, events))

    def _check_added(self, block: Block) -> None:
        """Check what plugins have added on the new states of *block*."""
        left = [(n, rule) for n, rule in enumerate(self.added) if (Kind.ADDED, n) not in self.keys]
        if not left:
            return
        images = np.empty((len(block.starts), self.image.words), dtype=np.int64)
        x.decode_all(block.words, block.starts, self.base, self.image.stored, self.image.map_words, images)
        states = States(images, self.image)
        for n, rule in left:
            broken = rule.check(states)
            if broken.any():
                self.keys.add((Kind.ADDED, n))
                events = self._path(block.first + int(np.argmax(broken)))
                self.outcome.found.append(Found(Kind.ADDED, n, events, added=rule))

    def _path(self, number: int, *more: int) -> tuple[Event, ...]:
        return tuple(self.model.events[e] for e in (*self.visited.path(number), *more))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Save the search, which has stopped."""
        outcome, visited = self.outcome, self.visited
        number = {event: e for e, event in enumerate(self.model.events)} | {VM_END: -1}
        about = {
            "depth": outcome.depth,
            "levels": outcome.levels,
            "transitions": outcome.transitions,
            "seconds": outcome.seconds,
            "cpu_seconds": outcome.cpu_seconds,
            "found": [
                [int(f.kind), f.detail, [number[event] for event in f.events]]
                for f in outcome.found
                if f.kind is not Kind.LIVELOCK
            ],
        }
        edges = self.livelocks.edges or [np.zeros((0, 3), dtype=np.int64)]
        arrays = {
            "hashes": visited.hashes[: visited.count],
            "links": visited.links[: visited.count],
            "edges": np.concatenate(edges),
        }
        save(path, self.mark, arrays, self.frontier, self.done, self.following, about)

    def load(self, path: Path) -> None:
        """Go on from where the search that was saved to *path* stopped."""
        arrays, waiting, following, about = load(path, self.mark)
        self.visited.fill(arrays["hashes"], arrays["links"])
        self.livelocks.edges = [arrays["edges"]]
        self.frontier, self.following = self._empty(), self._empty()
        for frontier, block in ((self.frontier, waiting), (self.following, following)):
            if block is not None:
                frontier.append(block)
        outcome = self.outcome
        outcome.depth, outcome.levels = about["depth"], about["levels"]
        outcome.levels += [0] * (outcome.depth + 2 - len(outcome.levels))
        outcome.transitions = about["transitions"]
        outcome.seconds, outcome.cpu_seconds = about["seconds"], about["cpu_seconds"]
        events = (*self.model.events, VM_END)
        for kind, detail, way in about["found"]:
            self.keys.add((Kind(kind), detail))
            added = self.added[detail] if kind == Kind.ADDED else None
            outcome.found.append(Found(Kind(kind), detail, tuple(events[e] for e in way), added=added))

    def _find_livelock(self) -> None:
        cycle = self.livelocks.cycle()
        if cycle is not None:
            state, way = cycle
            self.outcome.found.append(Found(Kind.LIVELOCK, 0, self._path(state, *way), len(way)))


def search(
    model: Model,
    bounds: Bounds,
    *,
    threads: int = 1,
    spill_dir: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    save_to: Path | None = None,
    resume_from: Path | None = None,
) -> Outcome:
    """Search all states of *model* within *bounds* and return the shortest way to each kind of violation.

    threads: how many unfold states; the result does not depend on it. spill_dir: folder for what of the frontier does
    not fit into memory. progress: called now and then. save_to: file to which a search that a bound or Ctrl-C ended is
    saved; resume_from: such a file, to go on from.
    """
    assert len(model.events) < 1 << EVENT_BITS
    searcher = _Search(model, bounds, threads, spill_dir)
    if resume_from is not None:
        searcher.load(resume_from)
    outcome = searcher.run(progress)
    if save_to is not None and not outcome.complete:
        searcher.save(save_to)
    return outcome
