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
from spepolicy.jit import inline, lean, row
from spepolicy.mmu.memory import find, reads_as_zero
from spepolicy.mmu.regime import PA_BITS, SECOND

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
    if descriptor & (VALID | TABLE) == VALID | TABLE:
        kind = LEAF if level == 3 else NEXT_TABLE
    elif descriptor & VALID != 0 and (s.blocks >> level) & 1 != 0:
        kind = LEAF
    else:
        return FSC_TRANSLATION | level
    return FSC_ADDRESS_SIZE | level if descriptor & s.oversize != 0 else kind


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


@inline
def stage2(
    frames: Ints, pool: Ints, zero: Ints, s: Any, ipa: int, access: int, walk: int
) -> tuple[int, int, int, int, int, int]:
    """Translate *ipa* by the stage 2 row *s*, for data or with *walk* for a stage 1 descriptor.

    Return (status, PA, leaf descriptor, its level, its place in the pool, descriptors read).
    """
    if s.closed != 0 or ipa >> s.input_bits != 0:
        # Beyond the stage 2 input size: a level 0 translation fault, not an address size fault (spe.md 6.3).
        return STAGE2 | FSC_TRANSLATION, 0, 0, 0, 0, 0
    if s.reserved != 0:
        return NOT_MODELLED | STAGE2, 0, 0, 0, 0, 0
    if s.base >> s.output_bits != 0:
        return STAGE2 | FSC_ADDRESS_SIZE, 0, 0, 0, 0, 0
    level = s.start
    shift = s.start_shift
    address = s.base + (ipa >> shift) * 8  # concatenated root tables are one larger table
    while True:
        slot = find(frames, address >> 12)
        if slot < 0:
            reads = level - s.start + 1
            if reads_as_zero(zero, address):
                return STAGE2 | FSC_TRANSLATION | level, 0, 0, 0, 0, reads
            return STAGE2 | FSC_EXTERNAL_ABORT_WALK | level, 0, 0, 0, 0, reads
        entry = (address & PAGE_MASK) >> 3
        descriptor = pool[slot, entry]
        kind = _kind(s, descriptor, level)
        if kind != NEXT_TABLE:
            break
        level += 1
        shift -= s.stride
        address = (descriptor & s.output_mask) + ((ipa >> shift) & s.index_mask) * 8
    reads = level - s.start + 1
    if kind != LEAF:
        return STAGE2 | kind, 0, 0, 0, 0, reads
    fault = _stage2_fault(s, descriptor, access & WRITE, walk)
    if fault != 0:
        return STAGE2 | fault | level, 0, 0, 0, 0, reads
    new = descriptor | AF
    if access & (WRITE | MARK_DIRTY) == WRITE | MARK_DIRTY:
        new |= S2_WRITE
    if new != descriptor:
        pool[slot, entry] = new
    offset = (1 << shift) - 1
    return 0, (descriptor & s.output_mask & ~offset) | (ipa & offset), new, level, slot * 512 + entry, reads


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


# A walk under way. `level` is 0 to 3: a stage 1 descriptor of that level is next; DATA; or DONE.
DATA = 4
DONE = 5

_STATE = """
va          input address
access      what it is for: WRITE, USER, ...
level       see DATA, DONE
status      0, or why the walk ended
address     next to go through stage 2: of a descriptor, or of the data. At the end the IPA, of the fault if it is one
            of stage 2
shift       lowest bit of va that indexes a table of `level`
inherited   table descriptors so far, ORed
leaf        stage 1 leaf, 0 where stage 1 is off
leaf2       stage 2 leaf of the data, 0 where stage 2 is off
pa          output address
reads       descriptors read
"""
STATE = np.dtype([(line.split()[0], np.int64) for line in _STATE.strip().splitlines() if not line.startswith(" ")])


@inline
def begin(s: Any, w: Any, va: int, access: int) -> None:
    """Start the walk *w* (a row of STATE) for *va*, which is in the half of stage 1 that *s* describes."""
    upper = (va >> 55) & 1
    w.va = va
    w.access = access
    w.status = 0
    w.level = DONE
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
        w.address = va
        w.pa = va
        w.level = DATA
        return
    if s.closed != 0 or va >> s.input_bits != -upper or (access & USER != 0 and s.no_user != 0):
        w.status = STAGE1 | FSC_TRANSLATION
    elif s.reserved != 0:
        w.status = NOT_MODELLED | STAGE1
    elif s.base >> s.output_bits != 0:
        w.status = STAGE1 | FSC_ADDRESS_SIZE
    else:
        index = (va & ((1 << s.input_bits) - 1)) >> s.start_shift
        w.address = s.base + index * 8
        w.level = s.start
        w.shift = s.start_shift


@inline
def advance(frames: Ints, pool: Ints, zero: Ints, s: Any, second: Any, w: Any) -> None:
    """Take the walk *w*, which is not DONE, one stage 1 descriptor further, or through stage 2 for the data. *s* and
    *second* are the rows of STAGE for its half of stage 1 and for stage 2.
    """
    level = w.level
    address = w.address
    if level == DATA and w.access & INTERMEDIATE != 0:
        w.level = DONE
        return
    pa, leaf2, level2, place = address, 0, 0, 0
    if second.on != 0:
        access = w.access if level == DATA else 0
        walk = WALK if level != DATA else 0
        status, pa, leaf2, level2, place, more = stage2(frames, pool, zero, second, address, access, walk)
        w.reads += more
        if status != 0:
            w.status = status | walk
            w.level = DONE
            return
    if level == DATA:
        w.pa = pa
        w.leaf2 = leaf2
        w.level = DONE
        return
    slot = find(frames, pa >> 12)
    w.reads += 1
    if slot < 0:
        code = FSC_TRANSLATION if reads_as_zero(zero, pa) else FSC_EXTERNAL_ABORT_WALK
        _end_in_stage1(w, code | level)
        return
    entry = (pa & PAGE_MASK) >> 3
    descriptor = pool[slot, entry]
    if s.big_endian != 0:
        descriptor = swap_bytes(descriptor)
    kind = _kind(s, descriptor, level)
    if kind == NEXT_TABLE:
        if s.inherit != 0:
            w.inherited |= descriptor
        w.level = level + 1
        shift = w.shift - s.stride
        w.shift = shift
        w.address = (descriptor & s.output_mask) + ((w.va >> shift) & s.index_mask) * 8
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
            if not _stage2_writable(second, leaf2):
                w.status = STAGE2 | WALK | FSC_PERMISSION | level2
                w.level = DONE
                return
            pool[place >> 9, place & 511] = leaf2 | S2_WRITE
        pool[slot, entry] = swap_bytes(new) if s.big_endian != 0 else new
    offset = (1 << w.shift) - 1
    w.leaf = new
    w.address = (descriptor & s.output_mask & ~offset) | (w.va & offset)
    w.pa = w.address
    w.level = DATA


@inline
def _end_in_stage1(w: Any, code: int) -> None:
    w.status = STAGE1 | code
    w.address = 0
    w.level = DONE


@lean
def translate(frames: Ints, pool: Ints, zero: Ints, stages: Any, w: Any, va: int, access: int) -> None:
    """Translate *va* through both stages of the regime *stages* (STAGE[3]) in the memory of the first four arguments
    (`spepolicy.mmu.memory`). *w*, a row of STATE, holds the result. Descriptors change where hardware manages flags.
    """
    s = row(stages, (va >> 55) & 1)
    second = row(stages, SECOND)
    begin(s, w, va, access)
    while w.level != DONE:
        advance(frames, pool, zero, s, second, w)
