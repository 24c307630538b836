"""Sparse physical memory: the page frames that hold translation tables.

Only frames with content take space. An open-addressing hash maps a frame number (PA >> 12) to a slot in a pool of pages
of 512 descriptors; a frame that is not in it is ordinary memory whose content the machine does not need. All arrays are
those of one lane: `frame_key int64[H]` (frame, or -1 if free), `frame_slot int32[H]`, `pool int64[P, 512]`; H is
a power of two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import jit, widen

Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

FREE = -1


@jit
def _bucket(frame: int, size: int) -> int:
    # Table frames come in runs and scattered; the upper bits of a 31-bit product spread both.
    return (((frame & 0x7FFF_FFFF) * 0x2C1B_3C6D) >> 20) & (size - 1)


@jit
def find(frame_key: Ints, frame_slot: Slots, frame: int) -> int:
    """Return the pool slot of *frame*, or -1 if the frame has no content."""
    size = frame_key.shape[0]
    bucket = _bucket(frame, size)
    while True:
        key = frame_key[bucket]
        if key == frame:
            return widen(frame_slot[bucket])
        if key == FREE:
            return -1
        bucket = (bucket + 1) & (size - 1)


@jit
def attach(frame_key: Ints, frame_slot: Slots, frame: int, slot: int) -> None:
    """Make *frame* hold the page in *slot*. The frame must not hold one already; H exceeds the number of slots."""
    size = frame_key.shape[0]
    bucket = _bucket(frame, size)
    while frame_key[bucket] != FREE:
        bucket = (bucket + 1) & (size - 1)
    frame_key[bucket] = frame
    frame_slot[bucket] = slot


@jit
def detach(frame_key: Ints, frame_slot: Slots, frame: int) -> int:
    """Take the content away from *frame* and return its slot, or -1 if it had none."""
    size = frame_key.shape[0]
    hole = _bucket(frame, size)
    while frame_key[hole] != frame:
        if frame_key[hole] == FREE:
            return -1
        hole = (hole + 1) & (size - 1)
    slot = widen(frame_slot[hole])
    # Entries behind the hole that were pushed past it move up, so that no marker is needed: markers would pile up as
    # the host moves tables about, until no search ended any more.
    bucket = (hole + 1) & (size - 1)
    while frame_key[bucket] != FREE:
        home = _bucket(frame_key[bucket], size)
        if (bucket - home) & (size - 1) >= (bucket - hole) & (size - 1):
            frame_key[hole] = frame_key[bucket]
            frame_slot[hole] = frame_slot[bucket]
            hole = bucket
        bucket = (bucket + 1) & (size - 1)
    frame_key[hole] = FREE
    return slot
