"""The two-stage walk of the EL1&0 regime for one address: what the SPU does on a TLB miss.

Rules: spe.md section 6 and mmu.md (VMSAv8-64, 4 KiB granule). Stage 1 uses TTBR1_EL1 (the SPE driver's buffer is a
kernel address); every stage 1 descriptor is fetched through stage 2. A status is 0, or STAGE1 or STAGE2 with the fault
status code (FSC) in bits 5:0, and WALK if a stage 2 fault hit a stage 1 table. PMBSR_EL1 gets the FSC without WALK: the
architecture does not report it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import (
    FSC_ACCESS_FLAG,
    FSC_ADDRESS_SIZE,
    FSC_EXTERNAL_ABORT_WALK,
    FSC_PERMISSION,
    FSC_TRANSLATION,
)
from spepolicy.jit import jit
from spepolicy.mmu.memory import find

Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

STAGE1 = 1 << 8
STAGE2 = 2 << 8
WALK = 1 << 10
FSC_MASK = 0x3F

VALID = 1
TABLE = 2  # bit 1: table, or page at level 3
AF = 1 << 10
S1_READ_ONLY = 1 << 7  # AP[2]
S1_DBM = 1 << 51
S2_READ = 1 << 6
S2_WRITE = 1 << 7
OA_MASK = 0x0000_FFFF_FFFF_F000  # output address of a page or table, 48-bit PA
PAGE_MASK = 0xFFF

T1SZ = 16  # 48-bit kernel addresses, as Linux with 4 KiB pages


@jit
def level_shift(level: int) -> int:
    """Return the lowest input address bit that indexes a table of *level* (4 KiB granule: 9 bits a level)."""
    return 12 + 9 * (3 - level)


@jit
def stage2(
    frame_key: Ints, frame_slot: Slots, pool: Ints, ipa: int, vttbr: int, vtcr: int, write: int, hardware_af: int
) -> tuple[int, int, int]:
    """Translate *ipa* at stage 2. Return (status, PA, descriptors read)."""
    if ipa >> (64 - (vtcr & 0x3F)) != 0:
        # Beyond the stage 2 input size: a level 0 translation fault, not an address size fault (spe.md 6.3).
        return STAGE2 | FSC_TRANSLATION, 0, 0
    level = 2 - ((vtcr >> 6) & 3)
    pa_bits = _pa_bits((vtcr >> 16) & 7)
    table = vttbr & OA_MASK
    index = ipa >> level_shift(level)  # concatenated root tables are one larger table
    reads = 0
    while True:
        address = table + index * 8
        slot = find(frame_key, frame_slot, address >> 12)
        reads += 1
        if slot < 0:
            return STAGE2 | FSC_EXTERNAL_ABORT_WALK | level, 0, reads
        entry = (address & PAGE_MASK) >> 3
        descriptor = pool[slot, entry]
        if descriptor & VALID == 0 or (descriptor & TABLE == 0 and (level == 0 or level == 3)):
            return STAGE2 | FSC_TRANSLATION | level, 0, reads
        output = descriptor & OA_MASK
        if output >> pa_bits != 0:
            return STAGE2 | FSC_ADDRESS_SIZE | level, 0, reads
        if level == 3 or descriptor & TABLE == 0:
            break
        level += 1
        table = output
        index = (ipa >> level_shift(level)) & 511
    if descriptor & AF == 0:
        # VTCR_EL2.HA (bit 21) lets hardware set AF; the SPU honours it only if PMBIDR_EL1.F=1 (spe.md rule 33).
        if (vtcr >> 21) & 1 == 0 or hardware_af == 0:
            return STAGE2 | FSC_ACCESS_FLAG | level, 0, reads
        pool[slot, entry] = descriptor | AF
    if (write != 0 and descriptor & S2_WRITE == 0) or (write == 0 and descriptor & S2_READ == 0):
        return STAGE2 | FSC_PERMISSION | level, 0, reads
    offset = (1 << level_shift(level)) - 1
    return 0, (output & ~offset) | (ipa & offset), reads


@jit
def _pa_bits(ps: int) -> int:
    """Return the address width that an IPS or PS field of a translation control register means (48-bit PA at most)."""
    if ps >= 5:
        return 48
    if ps == 4:
        return 44
    if ps == 3:
        return 42
    if ps == 2:
        return 40
    return 36 if ps == 1 else 32


@jit
def translate(
    frame_key: Ints,
    frame_slot: Slots,
    pool: Ints,
    va: int,
    ttbr1: int,
    vttbr: int,
    vtcr: int,
    two_stages: int,
    write: int,
    hardware_af: int,
) -> tuple[int, int, int, int]:
    """Translate *va* through both stages as a privileged access. Return (status, PA, IPA, descriptors read).

    With *two_stages* 0 (bare metal) the stage 1 output is the PA. PAN is treated as 0 and the access as EL1 even while
    the PE executes at EL0 (spe.md rule 30).
    """
    if va >> (64 - T1SZ) != -1:
        # VA bits above the input size must all be 1 for TTBR1 (spe.md 6.1).
        return STAGE1 | FSC_TRANSLATION, 0, 0, 0
    level = 0
    table = ttbr1 & OA_MASK
    reads = 0
    while True:
        index = (va >> level_shift(level)) & 511
        address = table + index * 8
        if two_stages != 0:
            status, pa, more = stage2(frame_key, frame_slot, pool, address, vttbr, vtcr, 0, hardware_af)
            reads += more
            if status != 0:
                return status | WALK, 0, address, reads
        else:
            pa = address
        slot = find(frame_key, frame_slot, pa >> 12)
        reads += 1
        if slot < 0:
            return STAGE1 | FSC_EXTERNAL_ABORT_WALK | level, 0, 0, reads
        descriptor = pool[slot, (pa & PAGE_MASK) >> 3]
        if descriptor & VALID == 0 or (descriptor & TABLE == 0 and (level == 0 or level == 3)):
            return STAGE1 | FSC_TRANSLATION | level, 0, 0, reads
        if level == 3 or descriptor & TABLE == 0:
            break
        table = descriptor & OA_MASK
        level += 1
    if descriptor & AF == 0:
        # Linux maps kernel memory with AF set; a clear AF is a guest edit and TCR_EL1.HA is not assumed.
        return STAGE1 | FSC_ACCESS_FLAG | level, 0, 0, reads
    if write != 0 and descriptor & S1_READ_ONLY != 0:
        return STAGE1 | FSC_PERMISSION | level, 0, 0, reads
    offset = (1 << level_shift(level)) - 1
    ipa = (descriptor & OA_MASK & ~offset) | (va & offset)
    if two_stages == 0:
        return 0, ipa, ipa, reads
    status, pa, more = stage2(frame_key, frame_slot, pool, ipa, vttbr, vtcr, write, hardware_af)
    return status, pa, ipa, reads + more
