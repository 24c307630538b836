"""A worker's machine: lanes on which states are unfolded, the policy's hooks, and room for what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.drivers.hooks import behaviour_of, call_hook
from spepolicy.errors import ConfigurationError, UnsupportedPolicyError
from spepolicy.explore import expand as x
from spepolicy.explore.acts import Act, Aux, Budget, Event, Taint
from spepolicy.explore.image import HUGE, Image, page_of, policy_rows, views_of
from spepolicy.explore.possible import BARE, EDITS, RULES
from spepolicy.explore.properties import Kind
from spepolicy.explore.visited import Visited
from spepolicy.machine.build import Behaviour, allocate, reset
from spepolicy.machine.hostpage import FOLIO, ROLE_HOT, ROLE_MASK, ROLE_SHIFT, ROLE_TABLE
from spepolicy.machine.lane import start_lanes
from spepolicy.machine.scenario import Scenario
from spepolicy.machine.state import NEVER, Hook, Segment

Ints = NDArray[np.int64]

__all__ = ["Bench", "Model", "Unfolded"]

_VM_CREATED, _VM_DESTROYED = int(Hook.VM_CREATED), int(Hook.VM_DESTROYED)
_LANES = 1024
_BLOB_WORDS = 1 << 20
_LAYOUTS = 10_000


@dataclass(frozen=True)
class Model:
    """What is explored: a small machine, a policy, and what can happen."""

    scenario: Scenario
    policy: object
    name: str
    events: tuple[Event, ...]
    limits: tuple[int, ...]  # by Budget
    bare: bool  # the guest writes registers by itself, instead of Linux's driver
    edits: int  # possible.EDITS_*

    def event_rows(self) -> Ints:
        """Return int64[events, 6]: act, a, b, c, vCPU, budget."""
        rows = [(e.act, e.a, e.b, e.c, e.vcpu, e.budget) for e in self.events]
        return np.array(rows, dtype=np.int64).reshape(-1, 6)

    def rules(self) -> Ints:
        """Return the words of `possible.RULES`."""
        rules = np.zeros(RULES, dtype=np.int64)
        rules[BARE], rules[EDITS] = self.bare, self.edits
        return rules


@dataclass
class Unfolded:
    """What `Bench.unfold` found: transitions, in the order of parents and events."""

    out: Ints  # int64[rows, expand.OUT_COLUMNS], the first `transitions` hold
    blob: Ints
    transitions: int
    words: int


class Bench:
    """Lanes of one model, for one thread at a time."""

    def __init__(self, model: Model, lanes: int = _LANES, log_rows: int = 0) -> None:
        """*log_rows*: rows of the machine's event log of each lane, which then holds what a `step` did."""
        from spepolicy.platforms import why_unsupported
        from spepolicy.plugins import installed_reporters, make_plugin_manager

        self.model = model
        self.manager = make_plugin_manager(model.policy, list(installed_reporters().values()))
        self.behaviour: Behaviour = behaviour_of(model.policy, self.manager)
        scenario = model.scenario
        reason = why_unsupported(self.manager, scenario, model.name)
        if reason is not None:
            raise UnsupportedPolicyError(model.name, reason)
        self.events, self.rules = model.event_rows(), model.rules()
        self.limits: Ints = np.array(model.limits, dtype=np.int64)
        assert len(self.limits) == len(Budget)
        # A lane more than can wait: the one that works.
        lanes = max(lanes, 2 * len(self.events) + 2)
        self.lanes = lanes
        self.m = allocate(scenario, self.behaviour, lanes, log_rows)
        state = getattr(model.policy, "State", np.dtype([]))
        self.rows, words = policy_rows(np.dtype(state), lanes, scenario.guest.vcpus)
        self.aux: Ints = np.zeros((lanes, int(Aux.END)), dtype=np.int64)
        views = views_of(self.m, words, self.aux)
        self.handle, self.views = views.handle, views.arrays()
        self.version = scenario.cpu.spe_version
        self._start()
        self.image = Image(self.m, words.shape[1])
        self.base: Ints = np.zeros(self.image.words, dtype=np.int64)
        self.scratch = (self.base.copy(), np.zeros(self.m.host_page.shape[1], dtype=np.int64))
        self._take_base()
        self.out: Ints = np.zeros((0, x.OUT_COLUMNS), dtype=np.int64)
        self.blob: Ints = np.zeros(_BLOB_WORDS, dtype=np.int64)
        self.waiting: Ints = np.zeros((lanes, 2), dtype=np.int64)

    def _start(self) -> None:
        """Boot all lanes alike, with the clocks that an exploration has: nothing is due."""
        m, every = self.m, np.arange(self.lanes, dtype=np.int64)
        with np.errstate(over="ignore"):
            reset(m, self.model.scenario, np.full(self.lanes, self._layout(), dtype=np.int64))
            # Memory that no lane has laid out stays as it is: images compare tables word by word.
            m.pool[:] = 0
            start_lanes(self.handle, every)
        v = m.vcpu
        for name in ("phase_left_ps", "switch_left_ps", "syscall_left_ps", "renew_next_ps"):
            v[name] = NEVER // 2
        for name in ("exit_next_ps", "preempt_next_ps"):
            v[name] = NEVER
        for name in ("segment_ps", "segment_end_ps", "program_draws", "sample_draws", "kvm_draws", "phase"):
            v[name] = 0
        m.vm["host_next_ps"] = NEVER
        m.vm["migration_next_ps"] = 0
        if self.model.bare:
            v["segment"], v["level"] = Segment.KERNEL, 1
        m.par["bug_rate_q16"] = 0  # it strikes when the search says so
        if self.behaviour.hooks >> _VM_CREATED & 1:
            self._call(Hook.VM_CREATED, every)
        for k in range(self.model.scenario.guest.vcpus):  # what booting has reached
            m.vm["hook_vcpu"] = k
            while x.chained_hooks(self.handle, every):
                self.call_hooks(every)
        limit = int(m.par["memlock_pages"][0])
        self.aux[:] = 0
        self.aux[:, Aux.TAINT] = np.where(m.vm["pinned_pages"] > limit, int(Taint.NO_LIMIT), 0)
        for name in (
            "pin_calls", "pin_refused", "pinned_peak_pages", "charged_peak_pages", "startup_ps", "stage2_maps",
            "stage2_unmapped",
        ):  # fmt: skip
            m.vm[name] = 0
        m.truth[:] = np.zeros((), dtype=m.truth.dtype)

    def _layout(self) -> int:
        """Return the first replicate, which decides the layout of memory, that shows what huge pages do: one in which
        no CPU's own walks bring back at once what the host took of the first page of a buffer or of its table.
        """
        if self.model.scenario.host.backing not in HUGE:
            return 0
        m = self.m
        for replicate in range(_LAYOUTS):
            reset(m, self.model.scenario, [replicate])
            m.pool[:1] = 0
            start_lanes(self.handle, np.zeros(1, dtype=np.int64))
            role = (m.host_page[0] & ROLE_MASK) >> ROLE_SHIFT
            hot = np.unique(np.flatnonzero(role == ROLE_HOT) // FOLIO)
            first = [page_of(m, k) for k in range(self.model.scenario.guest.vcpus)]
            if not np.isin(np.array([*first, *np.flatnonzero(role == ROLE_TABLE)]) // FOLIO, hot).any():
                return replicate
        raise AssertionError(
            f"none of {_LAYOUTS} layouts has the buffer and the guest's tables in different huge pages"
        )

    def _take_base(self) -> None:
        whole = x.take(self.handle, self.views, self.layout, 0, self.base)
        if not whole:
            raise ConfigurationError(
                f"explore: policy '{self.model.name}' holds more pages in a list of pins than a small VM has."
            )

    @property
    def layout(self) -> tuple[Any, ...]:
        """What compiled code has to know about images."""
        image = self.image
        sizes = np.array([image.map_words, image.pins], dtype=np.int64)
        return (
            image.offsets, image.par_at, image.pool_at, self.base, image.plain, image.stored, image.leaf1, image.leaf2,
            image.pairs, sizes,
        )  # fmt: skip

    def _call(self, hook: Hook, lanes: Ints) -> None:
        call_hook(self.manager, self.model.name, self.m, self.handle, self.rows, hook, lanes)

    # ---- a block of states ------------------------------------------------------------------------------------------

    def unfold(self, visited: Visited, frontier: Ints, starts: Ints) -> Unfolded:
        """Return every transition from the states of a block: state s is in *frontier* from starts[s] on."""
        count = len(starts)
        if len(self.out) < count * len(self.events):
            self.out = np.zeros((count * len(self.events), x.OUT_COLUMNS), dtype=np.int64)
        position = np.zeros(x.POSITION, dtype=np.int64)
        with np.errstate(over="ignore"):
            while position[x.NEXT_PARENT] < count:
                before = int(position[x.NEXT_PARENT])
                position[x.WAITING] = 0
                x.expand(
                    self.handle, self.views, self.layout, visited.arrays, self.scratch, self.events, self.limits,
                    self.rules, frontier, starts, count, self.lanes, self.version, self.out, self.blob, self.waiting,
                    position,
                )  # fmt: skip
                if position[x.WAITING]:
                    self._answer(visited, self.waiting[: position[x.WAITING]], position)
                elif position[x.NEXT_PARENT] == before:
                    self._more_room()
        return Unfolded(self.out, self.blob, int(position[x.TRANSITIONS]), int(position[x.BLOB_WORDS]))

    def _more_room(self) -> None:
        grown = np.zeros(2 * len(self.blob), dtype=np.int64)
        grown[: len(self.blob)] = self.blob
        self.blob = grown

    def _room_for(self, states: int, words: int) -> None:
        while words + states * (self.image.map_words + len(self.image.stored)) > len(self.blob):
            self._more_room()

    def _answer(self, visited: Visited, waiting: Ints, position: Ints) -> None:
        """Call the hooks that transitions wait for, once each, and record what becomes of them."""
        first_hooks = self.call_hooks(waiting[:, 1])
        self._room_for(len(waiting), int(position[x.BLOB_WORDS]))
        x.finish(
            self.handle, self.views, self.layout, visited.arrays, self.scratch, waiting, first_hooks, self.version,
            self.out, self.blob, position,
        )  # fmt: skip
        new = waiting[self.out[waiting[:, 0], x.BLOB] != x.KNOWN]
        self._find_leaks(new[self.m.vm["pinned_pages"][new[:, 1]] != 0])

    def call_hooks(self, lanes: Ints) -> Ints:
        """Call the hooks that *lanes* wait for until none waits; return the first hook of each."""
        hooks: Ints = self.m.vm["hook"][lanes].copy()
        left = lanes
        while len(left):
            due = self.m.vm["hook"][left]
            for value in np.unique(due).tolist():
                self._call(Hook(value), left[due == value])
            if x.chained_hooks(self.handle, left) == 0:
                break
            left = left[self.m.vm["hook"][left] != 0]
        return hooks

    def _find_leaks(self, chosen: Ints) -> None:
        """End the VMs of some transitions (t, lane) that hold pins, and see whether all are released."""
        if not len(chosen):
            return
        lanes = np.ascontiguousarray(chosen[:, 1])
        if self.behaviour.hooks >> _VM_DESTROYED & 1:
            self._call(Hook.VM_DESTROYED, lanes)
        leaked = self.m.vm["pinned_pages"][lanes] != 0
        self.out[chosen[leaked, 0], x.KINDS] |= 1 << Kind.LEAK

    # ---- one lane ---------------------------------------------------------------------------------------------------

    def put(self, image: Ints) -> None:
        """Put lane 0 into the state *image*."""
        x.put(self.views, self.layout, 0, image)

    def possible(self) -> NDArray[np.bool_]:
        """Return bool[events]: what can happen in lane 0."""
        result = np.zeros(len(self.events), dtype=np.bool_)
        x.possible_events(self.handle, self.views, 0, self.events, self.limits, self.rules, result)
        return result

    def may_write(self, k: int) -> bool:
        """Tell whether the SPU of vCPU *k* can write in lane 0: profiling is enabled, and the vCPU runs."""
        writes = [event.act is Act.WRITE and event.vcpu == k for event in self.model.events]
        return bool(self.possible()[writes].any())

    def target(self, event: Event) -> int:
        """Return the guest page that a host operation would hit in lane 0, -1 if there is none."""
        row = np.array([event.act, event.a, event.b, event.c, event.vcpu, event.budget], dtype=np.int64)
        return int(x.page_hit(self.handle, 0, row))

    def step(self, event: Event) -> tuple[int, tuple[Hook, ...]]:
        """Let *event* happen in lane 0, hooks and all; return the kinds of violation as bits, and the hooks called.

        `m.truth[0]` then counts what this step did.
        """
        row = np.array([event.act, event.a, event.b, event.c, event.vcpu, event.budget], dtype=np.int64)
        image = self.scratch[0]
        lane = np.zeros(1, dtype=np.int64)
        hooks: list[Hook] = []
        with np.errstate(over="ignore"):
            x.take(self.handle, self.views, self.layout, 0, image)
            # Every step begins with the clocks and counters of the first state, as a state from the frontier has them.
            image[self.image.passing] = self.base[self.image.passing]
            self.put(image)
            due = first = x.step(self.handle, self.views, 0, row)
            while due:
                hooks.append(Hook(due))
                self._call(Hook(due), lane)
                x.chained_hooks(self.handle, lane)
                due = int(self.m.vm["hook"][0])
            kinds = int(x.check(self.handle, self.views, 0, first, self.version))
        return kinds, tuple(hooks)

    def state(self) -> Ints:
        """Return the image of lane 0."""
        image = self.base.copy()
        x.take(self.handle, self.views, self.layout, 0, image)
        return image

    def hash_of(self, image: Ints) -> tuple[int, int]:
        """Return the hash of the canonical form of *image*."""
        with np.errstate(over="ignore"):
            h1, h2 = x.hash_of(self.handle, self.layout, self.scratch, 0, image)
        return int(h1), int(h2)
