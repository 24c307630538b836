"""Sparse physical memory: the page frames that hold translation tables, in compiled code and, as `Memory`, for Python.

Only frames with content take space. An open-addressing hash maps a frame number (PA >> 12) to a slot in a pool of pages
of 512 descriptors; a frame that is not in it is ordinary memory whose content the machine does not need. The arrays are
those of one lane, or of one `Memory`: `frames int64[H]`, H a power of two, and `pool int64[P, 512 or more]`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import ConfigurationError
from spepolicy.jit import entry, lean, word

Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

NO_ZERO_RANGES: Ints = np.zeros(0, dtype=np.int64)

# Words from one page to the next in the pool of `Memory`. The same entry of many tables would fall into the same few
# sets of a cache if it were 512.
ROW_WORDS = 520

# A word of the hash: the frame number plus 1 in the low bits, its slot above them.
SLOT_SHIFT = 37
KEY = (1 << SLOT_SHIFT) - 1
FREE = 0


@lean
def _bucket(frame: int, size: int) -> int:
    # Table frames come in runs and scattered: upper bits of a product, of 33 and 27 bits, spread both; the frames of a
    # run of eight stay in one line of the cache.
    return ((((frame >> 3) * 0x2C1_B3C7) >> 17) & ~7 | frame & 7) & (size - 1)


@lean
def find(frames: Ints, frame: int) -> int:
    """Return the pool slot of *frame*, or -1 if the frame has no content."""
    size = frames.shape[0]
    bucket = _bucket(frame, size)
    key = frame + 1
    while True:
        held = word(frames, bucket)
        if (held ^ key) & KEY == 0:
            return held >> SLOT_SHIFT
        if held == FREE:
            return -1
        bucket = (bucket + 1) & (size - 1)


@lean
def attach(frames: Ints, frame: int, slot: int) -> None:
    """Make *frame* hold the page in *slot*. The frame must not hold one already; H exceeds the number of slots."""
    size = frames.shape[0]
    bucket = _bucket(frame, size)
    while frames[bucket] != FREE:
        bucket = (bucket + 1) & (size - 1)
    frames[bucket] = (slot << SLOT_SHIFT) | (frame + 1)


@lean
def detach(frames: Ints, frame: int) -> int:
    """Take the content away from *frame* and return its slot, or -1 if it had none."""
    size = frames.shape[0]
    hole = _bucket(frame, size)
    key = frame + 1
    while (frames[hole] ^ key) & KEY != 0:
        if frames[hole] == FREE:
            return -1
        hole = (hole + 1) & (size - 1)
    slot = frames[hole] >> SLOT_SHIFT
    # Entries behind the hole that were pushed past it move up, so that no marker is needed: markers would pile up as
    # the host moves tables about, until no search ended any more.
    bucket = (hole + 1) & (size - 1)
    while frames[bucket] != FREE:
        home = _bucket((frames[bucket] & KEY) - 1, size)
        if (bucket - home) & (size - 1) >= (bucket - hole) & (size - 1):
            frames[hole] = frames[bucket]
            hole = bucket
        bucket = (bucket + 1) & (size - 1)
    frames[hole] = FREE
    return slot


@lean
def reads_as_zero(zero: Ints, address: int) -> bool:
    """Tell whether *address*, in a frame without content, is in a range of *zero* (int64[2 z]: lo, hi, lo, hi ...)."""
    for n in range(0, zero.shape[0], 2):  # noqa: SIM110 - compiled code has no generators
        if zero[n] <= address < zero[n + 1]:
            return True
    return False


@entry
def _attach_all(frames: Ints, added: Ints, slot: int) -> int:
    """Give the frames *added* the slots from *slot* on. Return the index of one that has a slot already, or -1."""
    for n in range(added.shape[0]):
        if find(frames, added[n]) >= 0:
            return n
        attach(frames, added[n], slot + n)
    return -1


@entry
def _copy_words(frames: Ints, pool: Ints, addresses: Ints, words: Ints, store: int) -> int:
    """Load *words* from *addresses*, or store them. Return the index of the first address without a page, or -1."""
    missing = -1
    for n in range(addresses.shape[0]):
        slot = find(frames, addresses[n] >> 12)
        if slot < 0:
            missing = n if missing < 0 else missing
        elif store != 0:
            pool[slot, (addresses[n] & 0xFFF) >> 3] = words[n]
        else:
            words[n] = pool[slot, (addresses[n] & 0xFFF) >> 3]
    return missing


class Memory:
    """Sparse physical memory of 4 KiB pages, as the walker and the builder see it.

    Pages hold what was put there; addresses in *zero_ranges* exist and read as zero; at any other address a walk takes
    an external abort. `frames`, `pool` and `zero` are the arrays of the functions above.
    """

    def __init__(self, pages: int = 64, zero_ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Make an empty memory with room for *pages* pages; it grows."""
        self.used = 0
        self._allocate(max(pages, 1))
        bounds = [bound for lo_hi in zero_ranges for bound in lo_hi]
        for lo, hi in zip(bounds[::2], bounds[1::2], strict=True):
            if not 0 <= lo < hi <= 1 << 48:
                raise ConfigurationError(
                    f"zero_ranges has ({lo:#x}, {hi:#x}). Rule: 0 <= lo < hi <= 2**48, bytes. Remedy: correct it."
                )
        self.zero: Ints = np.array(bounds, dtype=np.int64)

    @classmethod
    def from_pages(
        cls,
        page_addrs: NDArray[np.uint64],
        page_data: NDArray[np.uint64],
        zero_ranges: Iterable[tuple[int, int]] = (),
    ) -> Memory:
        """Make a memory of m pages: their addresses, uint64[m], multiples of 4096, and their content, uint64[m, 512],
        little-endian words. The content is copied.

        Raise ConfigurationError for a page that is not aligned, given twice or beyond 48 bits, and for wrong shapes.
        """
        addresses = np.atleast_1d(np.asarray(page_addrs, dtype=np.uint64))
        memory = cls(len(addresses), zero_ranges)
        memory.add_pages(addresses, np.asarray(page_data, dtype=np.uint64).reshape(-1, 512))
        return memory

    def add_pages(self, addresses: NDArray[np.uint64], data: NDArray[np.uint64] | None = None) -> None:
        """Add pages as `from_pages` has them; zeroed without *data*."""
        addresses = np.atleast_1d(np.asarray(addresses, dtype=np.uint64))
        count = len(addresses)
        bad = addresses[(addresses & np.uint64(0xFFF) != 0) | (addresses >> np.uint64(48) != 0)]
        if len(bad):
            raise ConfigurationError(
                f"page_addrs has {int(bad[0]):#x}. Rule: multiples of 4096 below 2**48. Remedy: give page addresses."
            )
        if data is not None and data.shape != (count, 512):
            raise ConfigurationError(
                f"page_data has the shape {data.shape} for {count} page_addrs. Rule: (pages, 512) words of 8 bytes."
            )
        if self.used + count > len(self.pool):
            self._grow(self.used + count)
        twice = _attach_all(self.frames, (addresses >> np.uint64(12)).view(np.int64), self.used)
        if twice >= 0:
            raise ConfigurationError(f"page_addrs has {int(addresses[twice]):#x} twice. Remedy: give each page once.")
        self.pool[self.used : self.used + count, :512] = 0 if data is None else data.view(np.int64)
        self.used += count

    def has(self, address: int) -> bool:
        """Tell whether the page of physical *address* is in memory."""
        one = np.array([address & ~7], dtype=np.int64)
        return int(_copy_words(self.frames, self.pool, one, np.zeros(1, dtype=np.int64), 0)) < 0

    def read(self, addresses: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the words, uint64[n], at physical *addresses*, uint64[n] multiples of 8, in pages that exist."""
        words = np.zeros(len(addresses), dtype=np.int64)
        self._copy(addresses, words, 0)
        return words.view(np.uint64)

    def write(self, addresses: NDArray[np.uint64], words: NDArray[np.uint64]) -> None:
        """Store *words*, uint64[n], at physical *addresses*, uint64[n] multiples of 8, in pages that exist."""
        self._copy(addresses, np.ascontiguousarray(words, dtype=np.uint64).view(np.int64), 1)

    def pages(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return the addresses, uint64[m], of all pages in the order in which they came, and a copy of their content,
        uint64[m, 512].
        """
        held = self.frames[self.frames & KEY != 0]
        addresses = np.zeros(self.used, dtype=np.uint64)
        addresses[held >> SLOT_SHIFT] = ((held & KEY) - 1) << 12
        return addresses, self.pool[: self.used, :512].copy().view(np.uint64)

    def _copy(self, addresses: NDArray[np.uint64], words: Ints, store: int) -> None:
        where = np.ascontiguousarray(addresses, dtype=np.uint64).view(np.int64)
        missing = _copy_words(self.frames, self.pool, where, words, store)
        if missing >= 0:
            raise ConfigurationError(
                f"address {int(where[missing]):#x} is in no page of the memory. Remedy: add_pages."
            )

    def _allocate(self, pages: int) -> None:
        self.frames: Ints = np.zeros(1 << (2 * pages).bit_length(), dtype=np.int64)
        self.pool: Ints = np.zeros((pages, ROW_WORDS), dtype=np.int64)

    def _grow(self, pages: int) -> None:
        addresses, data = self.pages()
        self.used = 0
        self._allocate(2 * pages)
        self.add_pages(addresses, data)
