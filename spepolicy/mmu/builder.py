"""Building translation tables from Python, beside the walker and in the same memory: map, unmap, protect, clear the
access flag, blocks and their splitting, at both stages and with every granule.

    memory = Memory()
    machine = Region(0x8000_0000, 1 << 40)                    # where host memory for tables is taken from
    stage2 = Tables.stage2(memory, kvm_vtcr(40), machine.take)
    stage2.map(0x4000_0000, 0x9000_0000, 1 << 21, S2_LEAF | S2_WRITE)
    registers["VTTBR_EL2"] = stage2.root

As in KVM, a table goes when its last entry does, so that the level of a fault tells how much is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import ConfigurationError
from spepolicy.jit import entry, row
from spepolicy.mmu.memory import Memory
from spepolicy.mmu.regime import HCR_VM, LOWER, SCTLR_M, SECOND, STAGE, UPPER, set_stage1, set_stage2
from spepolicy.mmu.tables import TABLE_DESCRIPTOR, entry_address, kvm_vtcr, level_shift
from spepolicy.mmu.walker import AF, VALID

Ints = NDArray[np.int64]

PAGE = 4096


@entry
def _decode(stages: Any, upper: int, vtcr: int, tcr: int, sctlr: int) -> None:
    """Decode stage 2 and one half of stage 1 into the zeroed *stages* (STAGE[3]), with roots at address 0."""
    set_stage1(row(stages, upper), upper, 0, tcr, 0, sctlr, 0, 1)
    set_stage2(row(stages, SECOND), 0, vtcr, HCR_VM, 1)


@entry
def _entry_address(stages: Any, which: int, table: int, address: int, level: int) -> int:
    return entry_address(row(stages, which), table, address, level)


@entry
def _level_shift(stages: Any, which: int, level: int) -> int:
    return level_shift(row(stages, which), level)


def _signed(word: int) -> int:
    """Return the 64-bit *word*, which may be an address of either sign, as compiled code takes it."""
    return int(np.array([word & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64).view(np.int64)[0])


class Region:
    """Addresses that are handed out once, upwards."""

    def __init__(self, lo: int, hi: int) -> None:
        self.next = lo
        self.hi = hi

    def take(self, size: int) -> int:
        """Return the address of *size* bytes, aligned to their size, a power of two."""
        address = -(-self.next // size) * size
        if address + size > self.hi:
            raise ConfigurationError(
                f"no {size} bytes are left below {self.hi:#x} for a translation table. Remedy: a larger region."
            )
        self.next = address + size
        return address


class Tables:
    """The translation tables of one stage: `Tables.stage2` or `Tables.stage1` makes them, empty.

    *root* goes into VTTBR_EL2 or TTBRn_EL1. Addresses, sizes and descriptors are int; ranges are multiples of the
    granule. A *leaf* is a descriptor without address: permissions and attributes, AF.
    """

    def __init__(
        self,
        memory: Memory,
        stages: NDArray[np.void],
        which: int,
        take: Callable[[int], int],
        through: Tables | None,
    ) -> None:
        self._memory = memory
        self._stages = stages
        self._which = which
        self._take = take
        self._through = through
        self._free: list[int] = []
        geometry = stages[which]
        if geometry["closed"] or geometry["reserved"]:
            raise ConfigurationError(
                "these registers translate nothing: TxSZ, SL0 or TG does not fit, or EPD is set. Rule: spe.md 6.1."
            )
        self._stride, self._mask = int(geometry["stride"]), int(geometry["output_mask"])
        self._blocks, self._swapped = int(geometry["blocks"]), bool(geometry["big_endian"])
        self.start = int(geometry["start"])
        self.input_bits = int(geometry["input_bits"])
        self.granule = 8 << self._stride
        self.root = self._new(max(8 << (self.input_bits - int(geometry["start_shift"])), 64))

    @classmethod
    def stage2(cls, memory: Memory, vtcr: int, take: Callable[[int], int]) -> Tables:
        """Make stage 2 tables for VTCR_EL2 *vtcr*. *take* returns physical addresses of free memory, aligned to its
        argument, the size in bytes.
        """
        stages = np.zeros(3, dtype=STAGE)
        _decode(stages, UPPER, _signed(vtcr), _signed(1 << 23), _signed(0))
        return cls(memory, stages, SECOND, take, None)

    @classmethod
    def stage1(
        cls,
        memory: Memory,
        tcr: int,
        take: Callable[[int], int],
        *,
        upper: bool = False,
        sctlr: int = SCTLR_M,
        through: Tables | None = None,
    ) -> Tables:
        """Make stage 1 tables for TTBR0_EL1, or TTBR1_EL1 with *upper*.

        *take* returns addresses of free memory: physical, or with the stage 2 tables *through*, IPA that these map.
        """
        stages = np.zeros(3, dtype=STAGE)
        half = UPPER if upper else LOWER
        _decode(stages, half, _signed(kvm_vtcr(48)), _signed(tcr), _signed(sctlr))
        return cls(memory, stages, half, take, through)

    def block_bytes(self, level: int) -> int:
        """Return how much a leaf of *level* maps."""
        return 1 << int(_level_shift(self._stages, self._which, level))

    def leaf_levels(self) -> list[int]:
        """Return the levels that may hold leaves, the largest leaf first."""
        return [level for level in range(self.start, 4) if level == 3 or self._blocks >> level & 1]

    def lookup(self, address: int) -> tuple[int, int]:
        """Return (descriptor, level) where the tables for *address* end."""
        where, level = self._find(address, 3)
        return self._read(where), level

    def output(self, address: int) -> int:
        """Return what *address* is mapped to. Raise ConfigurationError if it is not mapped."""
        descriptor, level = self.lookup(address)
        if descriptor & VALID == 0:
            raise ConfigurationError(f"address {address:#x} is not mapped: its tables end at level {level}.")
        offset = self.block_bytes(level) - 1
        return (descriptor & self._mask & ~offset) | (address & offset)

    def map(self, address: int, output: int, size: int, leaf: int, *, blocks: bool = True) -> int:
        """Map [address, address + size) to *output* with blocks as large as fit, or pages only. What was there is
        replaced. Return the number of leaves written.
        """
        self._check(address, size)
        self._check(output, size)
        count = 0
        done = 0
        while done < size:
            level = self._fitting(address + done, output + done, size - done) if blocks else 3
            where = self._make(address + done, level)
            self._drop(self._read(where), level)
            self._write(where, self._leaf(output + done, leaf, level))
            done += self.block_bytes(level)
            count += 1
        return count

    def unmap(self, address: int, size: int) -> int:
        """Remove the leaves of [address, address + size), after splitting blocks that are only partly in it. Return
        their number. Tables that are empty then are freed, but for the root.
        """
        count = 0
        for at, where, level, _descriptor in self._leaves(address, size):
            self._write(where, 0)
            self._prune(at, level)
            count += 1
        return count

    def protect(self, address: int, size: int, *, clear: int = 0, set: int = 0) -> int:
        """Change bits of the leaves of [address, address + size), after splitting blocks that are only partly in it.
        Return their number.
        """
        count = 0
        for _at, where, _level, descriptor in self._leaves(address, size):
            self._write(where, (descriptor & ~clear) | set)
            count += 1
        return count

    def clear_access_flag(self, address: int, size: int) -> int:
        """Clear AF of the leaves of [address, address + size), as ageing does. Return their number."""
        return self.protect(address, size, clear=AF)

    def split(self, address: int) -> int:
        """Replace the block that maps *address* by a table of leaves of the next level that has them, which map the
        same. Return that level, or 3 if it is a page already.
        """
        where, level = self._find(address, 3)
        descriptor = self._read(where)
        if descriptor & VALID == 0 or level == 3:
            return level
        table = self._new(self.granule)
        attributes = descriptor & ~self._mask & ~TABLE_DESCRIPTOR
        first = descriptor & self._mask & ~(self.block_bytes(level) - 1)
        step = self.block_bytes(level + 1)
        leaves = [self._leaf(first + n * step, attributes, level + 1) for n in range(1 << self._stride)]
        self._store(table, np.array(leaves, dtype=np.uint64))
        self._write(where, table | TABLE_DESCRIPTOR)
        return level + 1

    def _check(self, address: int, size: int) -> None:
        if (address | size) % self.granule or size <= 0:
            raise ConfigurationError(
                f"the range {address:#x} + {size:#x} is not of whole pages. Rule: multiples of {self.granule}."
            )

    def _fitting(self, address: int, output: int, size: int) -> int:
        """Return the level of the largest leaf that maps *address* to *output* and no more than *size*."""
        for level in self.leaf_levels():
            block = self.block_bytes(level)
            if (address | output) % block == 0 and block <= size:
                return level
        return 3

    def _leaf(self, output: int, leaf: int, level: int) -> int:
        kind = TABLE_DESCRIPTOR if level == 3 else VALID
        return (output & self._mask) | (leaf & ~self._mask & ~TABLE_DESCRIPTOR) | kind

    def _leaves(self, address: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (input address, where, level, descriptor) of the leaves of a range; those at its ends are split."""
        self._check(address, size)
        at = address
        while at < address + size:
            where, level = self._find(at, 3)
            descriptor = self._read(where)
            block = self.block_bytes(level)
            if descriptor & VALID and level < 3 and (at % block or at + block > address + size):
                self.split(at)
                continue
            if descriptor & VALID:
                yield at, where, level, descriptor
            at += block - at % block

    def _find(self, address: int, last: int) -> tuple[int, int]:
        """Return (where, level) of the entry for *address*, of *last* or where the tables end."""
        table = self.root
        signed = _signed(address)
        for level in range(self.start, last + 1):
            where = int(_entry_address(self._stages, self._which, table, signed, level))
            if level == last:
                break
            descriptor = self._read(where)
            if descriptor & TABLE_DESCRIPTOR != TABLE_DESCRIPTOR:
                break
            table = descriptor & self._mask
        return where, level

    def _make(self, address: int, last: int) -> int:
        """Return where the entry of level *last* for *address* is, after making the tables on the way."""
        while True:
            where, level = self._find(address, last)
            if level == last:
                return where
            if self._read(where) & VALID:
                self.split(address)
            else:
                self._write(where, self._new(self.granule) | TABLE_DESCRIPTOR)

    def _drop(self, descriptor: int, level: int) -> None:
        """Free the table below an entry that is about to be overwritten, and all tables below that."""
        if level == 3 or descriptor & TABLE_DESCRIPTOR != TABLE_DESCRIPTOR:
            return
        table = descriptor & self._mask
        for entry_below in self._load(table).tolist():
            self._drop(entry_below, level + 1)
        self._free.append(table)

    def _prune(self, address: int, level: int) -> None:
        """Free the table of *level* for *address* if it is empty, then the one above it."""
        while level > self.start:
            above, _ = self._find(address, level - 1)
            table = self._read(above) & self._mask
            if np.any(self._load(table) & np.uint64(VALID)):
                return
            self._free.append(table)
            self._write(above, 0)
            level -= 1

    def _new(self, size: int) -> int:
        """Return the address of a zeroed table of *size* bytes."""
        if size == self.granule and self._free:
            table = self._free.pop()
        else:
            table = self._take(size)
        for offset in range(0, size, PAGE):
            page = self._physical(table + offset) & -PAGE
            if not self._memory.has(page):
                self._memory.add_pages(np.array([page], dtype=np.uint64))
        self._store(table, np.zeros(size // 8, dtype=np.uint64))
        return table

    def _pieces(self, table: int, size: int) -> Iterator[NDArray[np.uint64]]:
        """Yield the physical addresses of the words of a table, page by page: a table may be scattered."""
        for offset in range(0, size, PAGE):
            words = np.arange(min(size, PAGE) // 8, dtype=np.uint64) * np.uint64(8)
            yield np.uint64(self._physical(table + offset)) + words

    def _load(self, table: int) -> NDArray[np.uint64]:
        """Return the descriptors of a whole table."""
        words = np.concatenate([self._memory.read(piece) for piece in self._pieces(table, self.granule)])
        return words.byteswap() if self._swapped else words

    def _store(self, table: int, descriptors: NDArray[np.uint64]) -> None:
        words = descriptors.byteswap() if self._swapped else descriptors
        first = 0
        for piece in self._pieces(table, 8 * len(words)):
            self._memory.write(piece, words[first : first + len(piece)])
            first += len(piece)

    def _physical(self, address: int) -> int:
        return address if self._through is None else self._through.output(address)

    def _read(self, where: int) -> int:
        word = self._memory.read(np.array([self._physical(where)], dtype=np.uint64))
        return int((word.byteswap() if self._swapped else word)[0])

    def _write(self, where: int, descriptor: int) -> None:
        self._store(where, np.array([descriptor], dtype=np.uint64))
