"""The sparse memory of table frames against a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ..machine.interpreted import module

SIZE = 32  # buckets; as many frames at most as `build` allows: half of it

# Frames of all three kinds: guest RAM, pages that moved, KVM's own tables. Few values, so that they come again.
frames = st.one_of(
    st.integers(0x40000, 0x40010), st.integers(0x100_0001, 0x100_0010), st.integers(1 << 30, (1 << 30) + 16)
)


class FrameHash(RuleBasedStateMachine):
    """find, attach and detach behave like a dictionary, however often frames come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = module("mmu.memory")
        self.frames = np.full(SIZE, self.memory.FREE, dtype=np.int64)
        self.model: dict[int, int] = {}

    @precondition(lambda self: len(self.model) < SIZE // 2)
    @rule(frame=frames, slot=st.integers(0, 500))
    def attach(self, frame: int, slot: int) -> None:
        if frame not in self.model:
            self.memory.attach(self.frames, frame, slot)
            self.model[frame] = slot

    @rule(frame=frames)
    def detach(self, frame: int) -> None:
        assert self.memory.detach(self.frames, frame) == self.model.pop(frame, -1)

    @rule(old=frames, new=frames)
    def move(self, old: int, new: int) -> None:
        """What a page migration does to a table page."""
        if old in self.model and new not in self.model:
            slot = self.memory.detach(self.frames, old)
            self.memory.attach(self.frames, new, slot)
            self.model[new] = self.model.pop(old)

    @rule(frame=frames)
    def find(self, frame: int) -> None:
        assert self.memory.find(self.frames, frame) == self.model.get(frame, -1)

    @invariant()
    def holds_exactly_the_model(self) -> None:
        held = self.frames[self.frames != self.memory.FREE]
        assert sorted(((held & self.memory.KEY) - 1).tolist()) == sorted(self.model)


TestFrameHash = FrameHash.TestCase
TestFrameHash.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@given(seed=st.integers(0, 2**32), live=st.integers(1, SIZE // 2))
@settings(max_examples=20, deadline=None)
def test_a_search_ends_after_any_number_of_moves(seed: int, live: int) -> None:
    """Migrations for hours: there must always be a free bucket, or the search for an absent frame would never end."""
    memory = module("mmu.memory")
    words = np.full(SIZE, memory.FREE, dtype=np.int64)
    rng = np.random.default_rng(seed)
    here = list(range(0x40000, 0x40000 + live))
    for n, frame in enumerate(here):
        memory.attach(words, frame, n)
    fresh = 0x100_0000
    for _ in range(1000):
        n = int(rng.integers(live))
        fresh += 1
        assert memory.detach(words, here[n]) == n
        memory.attach(words, fresh, n)
        here[n] = fresh
        assert (words == memory.FREE).sum() == SIZE - live
    for n, frame in enumerate(here):
        assert memory.find(words, frame) == n
    assert memory.find(words, 0x3FFFF) == -1
