"""The set of visited states: 16 bytes of hash and 8 bytes of link a state, found through an index of 8-byte slots.

States are numbered in the order in which they are found. A link is (parent's number << 8 | event), so that the way to a
state can be traced back. A slot of the index holds half of a state's hash and its number; so a search reads one slot,
and rarely a hash that is not the one it looks for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import ConfigurationError
from spepolicy.jit import entry, inline, jit

Ints = NDArray[np.int64]

_NUMBER_BITS = 36  # 64 thousand million states
_NUMBER = (1 << _NUMBER_BITS) - 1
EVENT_BITS = 8
_FULL_SHARE = 0.7

# Columns of the rows that expand() fills (spepolicy.explore.expand), repeated here against a circle of imports.
_PARENT, _EVENT, _HASH1, _HASH2, _BLOB, _BLOB_END = 0, 1, 2, 3, 6, 7


@inline
def look_up(visited: Any, h1: int, h2: int) -> int:
    """Return the number of the state of that hash, -1 if it is new."""
    slots, hashes, _links = visited
    mask = slots.shape[0] - 1
    at = h1 & mask
    while True:
        slot = slots[at]
        if slot == 0:
            return -1
        if (slot ^ h2) >> _NUMBER_BITS == 0:
            number = (slot & _NUMBER) - 1
            if hashes[number, 0] == h1 and hashes[number, 1] == h2:
                return number
        at = (at + 1) & mask


@jit
def _put(slots: Ints, h1: int, h2: int, number: int) -> None:
    mask = slots.shape[0] - 1
    at = h1 & mask
    while slots[at] != 0:
        at = (at + 1) & mask
    slots[at] = (h2 & ~_NUMBER) | (number + 1)


@entry
def _fill(slots: Ints, hashes: Ints, count: int) -> None:
    for number in range(count):
        _put(slots, hashes[number, 0], hashes[number, 1], number)


@entry
def _insert(
    visited: Any, count: int, first_parent: int, out: Ints, transitions: int, blob: Ints, stop: int, numbers: Ints,
    next_blob: Ints, next_starts: Ints, position: Ints,
) -> int:  # fmt: skip
    """Insert transitions 0.. of *out* until *stop* states are known; append new states to the next frontier."""
    slots, hashes, links = visited
    words, states = position[0], position[1]
    for t in range(transitions):
        h1, h2 = out[t, _HASH1], out[t, _HASH2]
        number = look_up(visited, h1, h2)
        if number < 0 and count < stop:
            number = count
            count += 1
            hashes[number, 0] = h1
            hashes[number, 1] = h2
            links[number] = ((first_parent + out[t, _PARENT]) << EVENT_BITS) | out[t, _EVENT]
            _put(slots, h1, h2, number)
            next_starts[states] = words
            states += 1
            for n in range(out[t, _BLOB], out[t, _BLOB_END]):
                next_blob[words] = blob[n]
                words += 1
        numbers[t] = number
    position[0], position[1] = words, states
    return count


class Visited:
    """The visited states. `arrays` is what compiled code takes; it stays valid, if not complete, when the set grows."""

    def __init__(self, most: int) -> None:
        """Make room for *most* states. Memory is reserved; it is used as states come."""
        self.most = most
        self.count = 0
        try:
            self.hashes: Ints = np.empty((most, 2), dtype=np.int64)
            self.links: Ints = np.empty(most, dtype=np.int64)
        except MemoryError as error:
            raise ConfigurationError(
                f"explore.max_states={most}: this machine cannot reserve {most * 24:,} bytes for it. "
                "Remedy: set a smaller explore.max_states."
            ) from error
        self.slots: Ints = np.zeros(1 << 16, dtype=np.int64)

    @property
    def arrays(self) -> tuple[Ints, Ints, Ints]:
        """Return (slots, hashes, links)."""
        return self.slots, self.hashes, self.links

    def reserve(self, more: int) -> None:
        """See that *more* states fit into the index."""
        size = len(self.slots)
        while self.count + more > _FULL_SHARE * size:
            size *= 2
        if size > len(self.slots):
            slots = np.zeros(size, dtype=np.int64)
            _fill(slots, self.hashes, self.count)
            self.slots = slots

    def insert(
        self, first_parent: int, out: Ints, transitions: int, blob: Ints, next_blob: Ints, next_starts: Ints,
        position: Ints,
    ) -> Ints:  # fmt: skip
        """Insert what `expand` found; return the number of each transition's state, int64[transitions], -1 where there
        was no room.
        """
        self.reserve(transitions)
        numbers = np.empty(transitions, dtype=np.int64)
        self.count = int(
            _insert(
                self.arrays, self.count, first_parent, out, transitions, blob, self.most, numbers, next_blob,
                next_starts, position,
            )
        )  # fmt: skip
        return numbers

    def add_first(self, h1: int, h2: int) -> None:
        """Insert the initial state, which has no parent."""
        self.hashes[0] = h1, h2
        self.links[0] = -1
        _fill(self.slots, self.hashes, 1)
        self.count = 1

    def fill(self, hashes: Ints, links: Ints) -> None:
        """Put in states 0, 1, ... of those hashes and links, instead of what is there."""
        if len(links) > self.most:
            raise ConfigurationError(
                f"explore.max_states={self.most}: the search to resume has {len(links)} states already. Rule: at least "
                "as many."
            )
        self.count = 0
        self.slots = np.zeros(1 << 16, dtype=np.int64)
        self.hashes[: len(hashes)] = hashes
        self.links[: len(links)] = links
        self.reserve(len(links))
        self.count = len(links)
        _fill(self.slots, self.hashes, self.count)

    def path(self, number: int) -> list[int]:
        """Return the events that lead from the initial state to state *number*."""
        events = []
        while number > 0:
            link = int(self.links[number])
            events.append(link & ((1 << EVENT_BITS) - 1))
            number = link >> EVENT_BITS
        return events[::-1]

    def depth(self, number: int) -> int:
        """Return how many events it takes to reach state *number*."""
        return len(self.path(number))

    def bytes_per_state(self) -> float:
        """Return the memory that a visited state takes now, index and all."""
        return (24 * self.count + self.slots.nbytes) / max(self.count, 1)
