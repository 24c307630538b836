"""Alias tables made with integers only, so that they are equal to the bit on every machine.

A table of `SLOTS` slots with a threshold of 0..`SLOT_DRAWS` each has `TABLE_DRAWS` = 2**32 equally likely (slot, draw)
pairs. Every outcome is given a whole number of them by largest remainder, so its probability is less than 2**-32 away
from the one asked for (an outcome below 2**-33 may vanish), and Vose's alias method (M. D. Vose, IEEE Trans. Software
Eng. 17(9), 1991) on integers realises exactly that number: where the usual form in floating point has leftovers, this
one has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

__all__ = ["SLOTS", "SLOT_DRAWS", "TABLE_DRAWS", "alias_table", "apportion", "table_counts"]

SLOTS = 256
SLOT_DRAWS = 1 << 24
TABLE_DRAWS = SLOTS * SLOT_DRAWS


def apportion(probability: Sequence[Fraction]) -> list[int]:
    """Return whole numbers of `TABLE_DRAWS` for probabilities that sum to 1 exactly; ties go to the earlier outcome."""
    exact = [p * TABLE_DRAWS for p in probability]
    counts = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: TABLE_DRAWS - sum(counts)]:
        counts[k] += 1
    return counts


def alias_table(counts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return thresholds int64[256] and outcomes int64[256, 2] that realise *counts*, which sum to `TABLE_DRAWS`.

    A draw in slot s below threshold s gives outcome [s, 0], any other [s, 1]. At most 256 counts may be above 0.
    """
    used = [k for k, count in enumerate(counts) if count > 0]
    left = [counts[k] for k in used] + [0] * (SLOTS - len(used))
    under = [slot for slot in range(SLOTS) if left[slot] < SLOT_DRAWS]
    over = [slot for slot in range(SLOTS) if left[slot] >= SLOT_DRAWS]
    partner = list(range(SLOTS))
    while under:  # the counts fill the slots exactly, so a slot that lacks something has one with a surplus
        slot, giver = under.pop(), over[-1]
        partner[slot] = giver
        left[giver] -= SLOT_DRAWS - left[slot]
        if left[giver] < SLOT_DRAWS:
            under.append(over.pop())
    pairs = [(used[slot if slot < len(used) else partner[slot]], used[partner[slot]]) for slot in range(SLOTS)]
    return np.array(left, np.int64), np.array(pairs, np.int64)


def table_counts(threshold: NDArray[np.int64], outcome: NDArray[np.int64], outcomes: int) -> NDArray[np.int64]:
    """Return int64[D, outcomes]: of the `TABLE_DRAWS` draws of each table, how many give each outcome.

    :param threshold: int64[D, 256].
    :param outcome: int64[D, 256, 2].
    """
    counts = np.zeros((len(threshold), outcomes), np.int64)
    for d in range(len(threshold)):
        np.add.at(counts[d], outcome[d, :, 0], threshold[d])
        np.add.at(counts[d], outcome[d, :, 1], SLOT_DRAWS - threshold[d])
    return counts
