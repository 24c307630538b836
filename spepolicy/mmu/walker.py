"""The two-stage walk of the EL1&0 regime for one address: what the SPU does on a TLB miss, and what an AT instruction
does.

Rules: spe.md section 6 and mmu.md (VMSAv8-64). Stage 1 descriptors are fetched through stage 2. A status is 0, or
STAGE1 or STAGE2 with the fault status code (FSC) in bits 5:0, and WALK if a stage 2 fault hit a stage 1 table; or
NOT_MODELLED. PMBSR_EL1 gets the FSC without WALK: the architecture does not report it there.

What a register asks for is in the rows of `spepolicy.mmu.regime.STAGE`, so that one walk serves every configuration.
Where the architecture leaves a choice: the Contiguous bit has no effect on the result, and hardware sets the access
flag only where the stage's other checks pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import (
    FSC_ACCESS_FLAG,
    FSC_ADDRESS_SIZE,
    FSC_EXTERNAL_ABORT_WALK,
    FSC_PERMISSION,
    FSC_TRANSLATION,
)
from spepolicy.jit import cell, inline, lean, prefetch, row
from spepolicy.mmu.memory import find, reads_as_zero
from spepolicy.mmu.regime import FLAT, PA_BITS, SECOND

Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

STAGE1 = 1 << 8
STAGE2 = 2 << 8
WALK = 1 << 10
NOT_MODELLED = 1 << 11
FSC_MASK = 0x3F

# What an access is: bits of `access`.
WRITE = 1
USER = 2  # by EL0
PAN = 4  # PSTATE.PAN counts
MARK_DIRTY = 8  # hardware dirty state is written; an AT instruction only assumes it
INTERMEDIATE = 16  # stop at the output of stage 1
PHYSICAL = 32  # stage 1 is bypassed, as by PMBLIMITR_EL1.nVM (spe.md rule 50); needs the row FLAT

# Descriptors
VALID = 1
TABLE = 2  # bit 1: table, or page at level 3
USER_ACCESS = 1 << 6  # AP[1]
S1_READ_ONLY = 1 << 7  # AP[2]
S2_READ = 1 << 6  # S2AP[0]
S2_WRITE = 1 << 7  # S2AP[1]
S2_NORMAL = 0xC << 2  # MemAttr[3:2]: 0 is Device
AF = 1 << 10
DBM = 1 << 51
EL0_EXECUTE_NEVER = 1 << 54
TABLE_EL0_EXECUTE_NEVER = 1 << 60
TABLE_NO_USER = 1 << 61  # APTable[0]
TABLE_READ_ONLY = 1 << 62  # APTable[1]
OA_MASK = 0x0000_FFFF_FFFF_F000  # output address of a page or table, 48-bit PA, 4 KiB granule
PAGE_MASK = 0xFFF
# What a descriptor is, if it is no fault: above every FSC.
NEXT_TABLE = 0x100
LEAF = 0x200


@inline
def _kind(s: Any, descriptor: int, level: int) -> int:
    """Return what a descriptor of stage *s* is: LEAF, NEXT_TABLE, or the FSC of a fault."""
    if descriptor & s.oversize == 0 and descriptor & (VALID | TABLE) == VALID | TABLE:
        return LEAF if level == 3 else NEXT_TABLE
    if descriptor & (VALID | TABLE) != VALID | TABLE and (descriptor & VALID == 0 or (s.blocks >> level) & 1 == 0):
        return FSC_TRANSLATION | level
    return FSC_ADDRESS_SIZE | level if descriptor & s.oversize != 0 else LEAF


@lean
def _is_device(s: Any, leaf: int) -> bool:
    """Tell whether a stage 2 leaf makes the Normal memory that stage 1 tables are in Device memory."""
    return leaf & ((1 << 4) if s.forced_type != 0 else S2_NORMAL) == 0


@lean
def _stage2_writable(s: Any, leaf: int) -> bool:
    return leaf & S2_WRITE != 0 or (s.hardware_dirty != 0 and leaf & DBM != 0)


@inline
def _stage2_fault(s: Any, leaf: int, write: int, walk: int) -> int:
    """Return the FSC, without level, of what stage 2 leaf *leaf* does not allow, or 0."""
    if leaf & AF == 0 and s.hardware_af == 0:
        return FSC_ACCESS_FLAG
    if write != 0:
        if not _stage2_writable(s, leaf):
            return FSC_PERMISSION
    elif leaf & S2_READ == 0:
        return FSC_PERMISSION
    if walk != 0 and s.no_device_walk != 0 and _is_device(s, leaf):
        return FSC_PERMISSION
    return 0


@lean
def _stage1_writable(s: Any, leaf: int, inherited: int) -> bool:
    if inherited & TABLE_READ_ONLY != 0:
        return False
    return leaf & S1_READ_ONLY == 0 or (s.hardware_dirty != 0 and leaf & DBM != 0)


@inline
def _stage1_fault(s: Any, leaf: int, inherited: int, access: int) -> int:
    """Return the FSC, without level, of what a stage 1 leaf below table descriptors *inherited* (ORed) does not allow,
    or 0.
    """
    if leaf & AF == 0 and s.hardware_af == 0:
        return FSC_ACCESS_FLAG
    user = leaf & USER_ACCESS != 0 and inherited & TABLE_NO_USER == 0
    if access & USER != 0 and not user:
        return FSC_PERMISSION
    if access & PAN != 0:
        executable = leaf & EL0_EXECUTE_NEVER == 0 and inherited & TABLE_EL0_EXECUTE_NEVER == 0
        if user or (s.enhanced_pan != 0 and executable):
            return FSC_PERMISSION
    if access & WRITE != 0 and not _stage1_writable(s, leaf, inherited):
        return FSC_PERMISSION
    return 0


@lean
def _updated(s: Any, leaf: int, access: int) -> int:
    """Return what hardware makes of a stage 1 leaf by an access that it allows."""
    new = leaf | AF
    if access & (WRITE | MARK_DIRTY) == WRITE | MARK_DIRTY and s.hardware_dirty != 0 and leaf & DBM != 0:
        new &= ~S1_READ_ONLY
    return new


@lean
def swap_bytes(word: int) -> int:
    """Return the 64-bit *word* with its bytes in the other order."""
    low = ((word & 0x00FF_00FF_00FF_00FF) << 8) | ((word >> 8) & 0x00FF_00FF_00FF_00FF)
    low = ((low & 0x0000_FFFF_0000_FFFF) << 16) | ((low >> 16) & 0x0000_FFFF_0000_FFFF)
    return (low << 32) | ((low >> 32) & 0xFFFF_FFFF)


# What comes next in a walk: nothing, or a descriptor of stage 1 or of stage 2.
DONE, IN_STAGE1, IN_STAGE2 = range(3)
# `level` when stage 1 is over
DATA = 4

_STATE = """
va          input address
access      what it is for: WRITE, USER, ...
turn        DONE, IN_STAGE1 or IN_STAGE2
level       of stage 1: 0 to 3, or DATA
status      0, or why the walk ended
address     on its way through stage 2: of a descriptor, or of the data. At the end the IPA, of the fault if it is one
            of stage 2
shift       lowest bit of va that indexes a table of `level`
level2      of stage 2
shift2      lowest bit of `address` that indexes a stage 2 table of `level2`
next        physical address of the next descriptor
slot        its page in the pool, -1 if it has no content
inherited   table descriptors so far, ORed
leaf        stage 1 leaf, 0 where stage 1 is off
leaf2       last stage 2 leaf: at the end that of the data, 0 where stage 2 is off
place2      where leaf2 is in the pool
leaf2_level its level
pa          output address
reads       descriptors read
"""
STATE = np.dtype([(line.split()[0], np.int64) for line in _STATE.strip().splitlines() if not line.startswith(" ")])


@inline
def begin(frames: Ints, pool: Ints, s: Any, second: Any, w: Any, va: int, access: int) -> None:
    """Start the walk *w* (a row of STATE) for *va*, which is in the half of stage 1 that *s* describes. *second* is the
    row of stage 2.
    """
    _begin(s, second, w, va, access)
    _aim(frames, pool, w)


@inline
def _begin(s: Any, second: Any, w: Any, va: int, access: int) -> None:
    upper = (va >> 55) & 1
    w.va = va
    w.access = access
    w.status = 0
    w.turn = DONE
    w.level = DATA
    w.address = 0
    w.inherited = 0
    w.leaf = 0
    w.leaf2 = 0
    w.pa = 0
    w.reads = 0
    if s.ignore_top != 0:
        va = (va << 8) >> 8
    if s.on == 0:
        # Flat: the address must fit the implemented PA size (spe.md 6.3).
        if va >> PA_BITS != 0:
            w.status = STAGE1 | FSC_ADDRESS_SIZE
            return
        _go_to(second, w, va)
        return
    if s.closed != 0 or va >> s.input_bits != -upper or (access & USER != 0 and s.no_user != 0):
        w.status = STAGE1 | FSC_TRANSLATION
    elif s.reserved != 0:
        w.status = NOT_MODELLED | STAGE1
    elif s.base >> s.output_bits != 0:
        w.status = STAGE1 | FSC_ADDRESS_SIZE
    else:
        index = (va & ((1 << s.input_bits) - 1)) >> s.start_shift
        w.level = s.start
        w.shift = s.start_shift
        _go_to(second, w, s.base + index * 8)


@inline
def _go_to(second: Any, w: Any, address: int) -> None:
    """Take *address*, which stage 1 led to, to stage 2."""
    w.address = address
    if second.on == 0 or (w.level == DATA and w.access & INTERMEDIATE != 0):
        w.pa = address
        w.next = address
        w.turn = DONE if w.level == DATA else IN_STAGE1
        return
    if second.closed != 0 or address >> second.input_bits != 0:
        # Beyond the stage 2 input size: a level 0 translation fault, not an address size fault (spe.md 6.3).
        _end_in_stage2(w, FSC_TRANSLATION)
    elif second.reserved != 0:
        _end_in_stage2(w, NOT_MODELLED)
    elif second.base >> second.output_bits != 0:
        _end_in_stage2(w, FSC_ADDRESS_SIZE)
    else:
        w.turn = IN_STAGE2
        w.level2 = second.start
        w.shift2 = second.start_shift
        # Concatenated root tables are one larger table.
        w.next = second.base + (address >> second.start_shift) * 8


@inline
def _aim(frames: Ints, pool: Ints, w: Any) -> None:
    """Find the next descriptor. Its line of the cache comes while other walks go on."""
    if w.turn == DONE:
        return
    slot = find(frames, w.next >> 12)
    w.slot = slot
    if slot >= 0:
        prefetch(pool, slot, (w.next & PAGE_MASK) >> 3)


@inline
def _end_in_stage1(w: Any, code: int) -> None:
    w.status = STAGE1 | code
    w.address = 0
    w.turn = DONE


@inline
def _end_in_stage2(w: Any, code: int) -> None:
    w.status = STAGE2 | code | (WALK if w.level != DATA else 0)
    w.turn = DONE


@inline
def advance1(frames: Ints, pool: Ints, zero: Ints, s: Any, second: Any, w: Any) -> None:
    """Take the walk *w*, which is IN_STAGE1, one descriptor further. *s* and *second* are the rows of STAGE for its
    half of stage 1 and for stage 2.
    """
    w.reads += 1
    if w.slot < 0:
        _end_in_stage1(w, (FSC_TRANSLATION if reads_as_zero(zero, w.next) else FSC_EXTERNAL_ABORT_WALK) | w.level)
        return
    _read_stage1(pool, s, second, w, w.slot, (w.next & PAGE_MASK) >> 3)
    _aim(frames, pool, w)


@inline
def advance2(frames: Ints, pool: Ints, zero: Ints, second: Any, w: Any) -> None:
    """Take the walk *w*, which is IN_STAGE2, one descriptor further. *second* is the row of STAGE for stage 2."""
    w.reads += 1
    if w.slot < 0:
        _end_in_stage2(w, (FSC_TRANSLATION if reads_as_zero(zero, w.next) else FSC_EXTERNAL_ABORT_WALK) | w.level2)
        return
    _read_stage2(pool, second, w, w.slot, (w.next & PAGE_MASK) >> 3)
    _aim(frames, pool, w)


@inline
def _read_stage2(pool: Ints, second: Any, w: Any, slot: int, entry: int) -> None:
    descriptor = cell(pool, slot, entry)
    level = w.level2
    address = w.address
    kind = _kind(second, descriptor, level)
    if kind == NEXT_TABLE:
        w.level2 = level + 1
        shift = w.shift2 - second.stride
        w.shift2 = shift
        w.next = (descriptor & second.output_mask) + ((address >> shift) & second.index_mask) * 8
        return
    if kind != LEAF:
        _end_in_stage2(w, kind)
        return
    is_data = w.level == DATA
    access = w.access if is_data else 0
    fault = _stage2_fault(second, descriptor, access & WRITE, 0 if is_data else 1)
    if fault != 0:
        _end_in_stage2(w, fault | level)
        return
    new = descriptor | AF
    if access & (WRITE | MARK_DIRTY) == WRITE | MARK_DIRTY:
        new |= S2_WRITE
    if new != descriptor:
        pool[slot, entry] = new
    offset = (1 << w.shift2) - 1
    w.pa = (descriptor & second.output_mask & ~offset) | (address & offset)
    w.leaf2 = new
    if is_data:
        w.turn = DONE
        return
    w.place2 = slot * 512 + entry
    w.leaf2_level = level
    w.turn = IN_STAGE1
    w.next = w.pa


@inline
def _read_stage1(pool: Ints, s: Any, second: Any, w: Any, slot: int, entry: int) -> None:
    descriptor = cell(pool, slot, entry)
    if s.big_endian != 0:
        descriptor = swap_bytes(descriptor)
    level = w.level
    kind = _kind(s, descriptor, level)
    if kind == NEXT_TABLE:
        if s.inherit != 0:
            w.inherited |= descriptor
        w.level = level + 1
        shift = w.shift - s.stride
        w.shift = shift
        _go_to(second, w, (descriptor & s.output_mask) + ((w.va >> shift) & s.index_mask) * 8)
        return
    if kind != LEAF:
        _end_in_stage1(w, kind)
        return
    fault = _stage1_fault(s, descriptor, w.inherited, w.access)
    if fault != 0:
        _end_in_stage1(w, fault | level)
        return
    new = _updated(s, descriptor, w.access)
    if new != descriptor:
        if second.on != 0:
            # The update is a write to the table, which stage 2 must allow, and which makes that page dirty.
            if not _stage2_writable(second, w.leaf2):
                _end_in_stage2(w, FSC_PERMISSION | w.leaf2_level)
                return
            pool[w.place2 >> 9, w.place2 & 511] = w.leaf2 | S2_WRITE
        pool[slot, entry] = swap_bytes(new) if s.big_endian != 0 else new
    offset = (1 << w.shift) - 1
    w.leaf = new
    w.leaf2 = 0
    w.level = DATA
    _go_to(second, w, (descriptor & s.output_mask & ~offset) | (w.va & offset))


@lean
def translate(frames: Ints, pool: Ints, zero: Ints, stages: Any, w: Any, va: int, access: int) -> None:
    """Translate *va* through both stages of the regime *stages* (STAGE[3], or STAGE[4] for PHYSICAL) in the memory of
    the first four arguments (`spepolicy.mmu.memory`). *w*, a row of STATE, holds the result. Descriptors change where
    hardware manages flags.
    """
    s = row(stages, FLAT if access & PHYSICAL != 0 else (va >> 55) & 1)
    second = row(stages, SECOND)
    begin(frames, pool, s, second, w, va, access)
    while w.turn != DONE:
        while w.turn == IN_STAGE2:
            advance2(frames, pool, zero, second, w)
        if w.turn == IN_STAGE1:
            advance1(frames, pool, zero, s, second, w)
